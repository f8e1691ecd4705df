"""Which key seals, and the key of the fingerprints: what the coordinators of a store share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from holdoff_coordinator.custody.key_notices import KEPT_SECONDS
from holdoff_coordinator.custody.sealing import (
    FINGERPRINTS,
    Binding,
    FingerprintKey,
    KeyMissingError,
    Keyring,
    UnsealableError,
    choose_primary,
    key_id_of,
)
from holdoff_coordinator.failures import Failure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from holdoff.names import TokenName
    from holdoff_coordinator.custody.key_notices import KeyNotices
    from holdoff_coordinator.custody.records import Facts
    from holdoff_coordinator.custody.sealing import MasterKey
    from holdoff_coordinator.scripts import Scripts

    Note = Callable[[str, str], Awaitable[None]]

SHARED_NAME = "custody-fingerprints"
"""Where the store has the key of the fingerprints. It belongs to no app."""
_MOST_NAMED = 10
"""Replicas that an error names."""


class Seals:
    """The master keys of this replica, and the one of them that seals.

    The primary key is the one that sealed the fingerprint key of the store, so that all
    coordinators of a store have the same one.

    Args:
        scripts: The store.
        keys: Returns this replica's keys by id.
        notices: What other replicas tell of their keys; None where there are no others.
    """

    def __init__(
        self,
        scripts: Scripts,
        keys: Callable[[], Mapping[str, MasterKey]],
        notices: KeyNotices | None = None,
    ) -> None:
        self._scripts = scripts
        self._keys = keys
        self._notices = notices

    def ids(self) -> Collection[str]:
        """Return the ids of this replica's keys."""
        return self._keys().keys()

    def require(self) -> Mapping[str, MasterKey]:
        """Return the keys of this replica.

        Raises:
            Failure: CUSTODY_OFF, if it has none.
        """
        keys = self._keys()
        if not keys:
            raise off(
                "it has no master keys. Generate one with `holdoff-coordinator key generate "
                "--key-dir DIR`, copy it to every replica, and start each with --custody-key-dir "
                "DIR"
            )
        return keys

    async def unlocked(self) -> tuple[Keyring, FingerprintKey]:
        """Return what seals, and what recognises a grant that is put twice.

        Raises:
            Failure: CUSTODY_KEY_MISSING, CUSTODY_OFF or STORE_….
        """
        keys = self.require()
        sealed = await self._scripts.known_key(SHARED_NAME)
        if sealed is None:
            ring = Keyring(keys, await self._agreed())
            new = ring.seal(FingerprintKey.generate(), FINGERPRINTS)
            sealed = await self._scripts.shared_key(SHARED_NAME, new)
        return _opened(keys, sealed)

    async def usable(self) -> tuple[Keyring, FingerprintKey | None]:
        """Return what opens; and what seals and recognises, unless the primary key is missing.

        Raises:
            Failure: CUSTODY_OFF or STORE_….
        """
        keys = self.require()
        sealed = await self._scripts.known_key(SHARED_NAME)
        if sealed is None:
            return await self.unlocked()
        try:
            return _opened(keys, sealed)
        except Failure:
            # A key with that id, if there is one, is another one.
            with contextlib.suppress(UnsealableError):
                keys = {key_id: keys[key_id] for key_id in keys.keys() - {key_id_of(sealed)}}
            return Keyring(keys, None), None

    async def rotate(self, wanted: str, note: Note | None = None) -> None:
        """Seal with another key from now on; an empty id means the highest one that there is.

        Args:
            wanted: Its id.
            note: Called before it is done, with the ids of the key until now and of that one.

        Raises:
            Failure: CUSTODY_KEY_MISSING, if a live replica does not have it; CUSTODY_OFF; STORE_….
        """
        wanted = await self._agreed(wanted)
        ring, prints = await self.unlocked()
        if note:
            await note(ring.primary or "", wanted)
        if ring.primary != wanted:
            sealed = Keyring(ring.keys, wanted).seal(prints, FINGERPRINTS)
            await self._scripts.replace_key(SHARED_NAME, sealed)

    async def _agreed(self, wanted: str = "") -> str:
        """Return the id of a key that every live replica has.

        Args:
            wanted: Only this one will do. If it is empty and no key was ever in use, it is the
                highest id that all have; later the highest one that any has.
        """
        own = {key.id: key.check for key in self.require().values()}
        others = await self._notices.exchange() if self._notices else ()
        is_first = not wanted and await self._scripts.known_key(SHARED_NAME) is None
        announced = [notice.checks for notice in others]
        wanted = wanted or max(key_id for one in (own, *announced) for key_id in one)
        chosen = choose_primary(own, announced, wanted)
        if chosen is not None and (is_first or chosen == wanted):
            return chosen
        if wanted not in own:
            raise _missing(f"this coordinator does not have the custody key {wanted!r}")
        lacking = [one.replica for one in others if one.checks.get(wanted) != own[wanted]]
        raise _missing(
            f"not every replica has the custody key {wanted!r}, so that it cannot encrypt yet: "
            f"copy {wanted}.key to {', '.join(sorted(lacking)[:_MOST_NAMED])}; a replica that "
            f"ended counts for {KEPT_SECONDS} seconds"
        )


def _opened(keys: Mapping[str, MasterKey], sealed: bytes) -> tuple[Keyring, FingerprintKey]:
    primary = ""
    try:
        primary = key_id_of(sealed)
        ring = Keyring(keys, primary)
        return ring, ring.open(sealed, FINGERPRINTS, FingerprintKey)
    except KeyMissingError as error:
        raise _missing(
            f"{error}, with which the coordinators of this store encrypt: copy {primary}.key to "
            "the directory of --custody-key-dir"
        ) from None
    except UnsealableError:
        raise _missing(
            f"the custody key {primary!r} of this coordinator is not the one with which the other "
            "coordinators of this store encrypt: compare the CHECK of `holdoff-coordinator key "
            "list` on all of them"
        ) from None


def binding_of(name: TokenName, chain: str, generation: int, facts: Facts) -> Binding:
    """Say what the secrets of a grant belong to."""
    return Binding(str(name), chain, generation, facts.token_url, facts.client_id, facts.api_hosts)


def off(why: str) -> Failure:
    """Say why there is no custody, and what to do."""
    return Failure("CUSTODY_OFF", f"this coordinator takes nothing into custody: {why}")


def _missing(why: str) -> Failure:
    return Failure("CUSTODY_KEY_MISSING", why)
