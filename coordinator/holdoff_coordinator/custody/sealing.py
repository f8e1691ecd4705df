"""Encrypts the secrets of custody, so that the store and its backups reveal none of them. Pure.

Each write has a fresh salt; its key is HKDF-SHA256(master key, salt), and the cipher AES-256-GCM.
The associated data are the kind of secrets and what they belong to (`Binding`): a sealed blob opens
only in its own record, at its own generation. A blob names its key, so several can be in use:

    format (1 byte) | length of the key's id (1) | id | salt (32) | nonce (12) | ciphertext and tag
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar
from urllib.parse import urlsplit

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

KEY_BYTES: Final = 32
_FORMAT: Final = 1
_SALT_BYTES, _NONCE_BYTES, _TAG_BYTES = 32, 12, 16
_KEY_ID: Final = re.compile(r"[a-z0-9-]{1,63}")
_FOR_SEALS: Final = b"holdoff custody seal 1"
_FOR_CHECKS: Final = b"holdoff custody key check 1"
_CHECK_BYTES: Final = 8


class SealError(Exception):
    """Secrets cannot be sealed or opened; the message tells nothing of them."""


class KeyMissingError(SealError):
    """This coordinator does not have the key."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"this coordinator does not have the custody key {key_id!r}")
        self.key_id = key_id


class UnsealableError(SealError):
    """The blob is damaged, or belongs to another record or generation."""

    def __init__(self) -> None:
        super().__init__("sealed secrets are damaged, or belong to another record")


def is_key_id(text: str) -> bool:
    """Tell whether a text can be the id of a key."""
    return _KEY_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class MasterKey:
    """A master key: what it encrypted cannot be read without it.

    Raises:
        ValueError: The id or the length is wrong.
    """

    id: str
    secret: bytes = field(repr=False)
    created: str = ""
    """When, in UTC (RFC 3339); empty if that is not known."""

    def __post_init__(self) -> None:
        if not is_key_id(self.id) or len(self.secret) != KEY_BYTES:
            raise ValueError(f"a master key has an id of a-z, 0-9 and -, and {KEY_BYTES} bytes")

    @property
    def check(self) -> str:
        """A short public value by which two hosts compare their keys of one id."""
        return self.derive(None, _FOR_CHECKS, _CHECK_BYTES).hex()

    def derive(self, salt: bytes | None, purpose: bytes, length: int = KEY_BYTES) -> bytes:
        """Derive a key for one purpose."""
        return HKDF(SHA256(), length, salt, purpose).derive(self.secret)


class Binding(msgspec.Struct, frozen=True, array_like=True):
    """What sealed secrets belong to; they open only with an equal one."""

    resource: str
    chain_id: str
    generation: int
    token_url: str
    client_id: str
    api_hosts: tuple[str, ...]


class Secrets(msgspec.Struct, frozen=True):
    """What is sealed together. Its representations do not show it."""

    KIND: ClassVar[str]
    """Secrets that were sealed as one kind do not open as another."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class GrantSecrets(Secrets, frozen=True):
    """What requests an access token; opened only by the process that sends the request."""

    KIND: ClassVar[str] = "grant"

    refresh_token: str
    client_secret: str = ""


class AccessSecrets(Secrets, frozen=True):
    """What is handed out; opened by those that serve it."""

    KIND: ClassVar[str] = "access"

    access_token: str


class AuthorizationSecrets(Secrets, frozen=True):
    """What completes an authorization, beside the code that the provider gives."""

    KIND: ClassVar[str] = "authorization"

    state: str
    verifier: str
    """Of PKCE (RFC 7636)."""
    redirect_uri: str
    client_secret: str = ""


class SpoolKey(Secrets, frozen=True):
    """Encrypts one answer in the spool of a replica."""

    KIND: ClassVar[str] = "spool"

    key: bytes


class FingerprintKey(Secrets, frozen=True):
    """Recognises a grant that is put twice, under two names.

    It is random, shared by the coordinators of a store, and kept there sealed like other secrets.
    A change of the primary key seals it again and leaves it as it is, so fingerprints stay
    comparable. With fingerprints from the master keys themselves, those of a key that is missing
    could not be compared. Without a master key the store reveals neither this key nor whether it
    has a certain token.
    """

    KIND: ClassVar[str] = "fingerprints"

    key: bytes

    @classmethod
    def generate(cls) -> Self:
        """Make a new one."""
        return cls(os.urandom(KEY_BYTES))

    def fingerprint(self, token_url: str, client_id: str, refresh_token: str) -> str:
        """Return the same text for the same grant: same host, client id and refresh token.

        Raises:
            ValueError: The URL has no host.
        """
        url = urlsplit(token_url)
        if not url.hostname:
            raise ValueError("a token URL has a host")
        is_default = url.port in {None, 443 if url.scheme == "https" else 80}
        host = url.hostname if is_default else f"{url.hostname}:{url.port}"
        grant = msgspec.msgpack.encode((host, client_id, refresh_token))
        return hmac.digest(self.key, grant, "sha256").hex()


FINGERPRINTS: Final = Binding("custody/fingerprints", "", 0, "", "", ())
"""What the fingerprint key of a store belongs to."""

SecretsT = TypeVar("SecretsT", bound=Secrets)


@dataclass(frozen=True, slots=True)
class Keyring:
    """Seals with the primary key, and opens with all keys.

    Args:
        keys: By their ids.
        primary: Id of the primary key; None while none has been chosen: nothing can be sealed.
    """

    keys: Mapping[str, MasterKey]
    primary: str | None

    def seal(self, secrets: Secrets, binding: Binding) -> bytes:
        """Encrypt secrets.

        Raises:
            KeyMissingError: There is no primary key, or it is not here.
            ValueError: A secret is not valid Unicode.
        """
        master = self._key(self.primary or "")
        key_id = master.id.encode()
        salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
        return b"".join(
            (
                bytes((_FORMAT, len(key_id))),
                *(key_id, salt, nonce),
                AESGCM(master.derive(salt, _FOR_SEALS)).encrypt(
                    nonce, _encode(secrets), _associated(master.id, secrets.KIND, binding)
                ),
            )
        )

    def open(self, sealed: bytes, binding: Binding, kind: type[SecretsT]) -> SecretsT:
        """Decrypt secrets.

        Raises:
            KeyMissingError: The key that sealed them is not here.
            UnsealableError: They are damaged, of another kind, or belong to something else.
        """
        blob = _Blob.parse(sealed)
        master = self._key(blob.key_id)
        try:
            return msgspec.msgpack.decode(
                AESGCM(master.derive(blob.salt, _FOR_SEALS)).decrypt(
                    blob.nonce, blob.ciphertext, _associated(blob.key_id, kind.KIND, binding)
                ),
                type=kind,
            )
        except (InvalidTag, msgspec.MsgspecError):
            raise UnsealableError from None

    def _key(self, key_id: str) -> MasterKey:
        if key_id not in self.keys:
            raise KeyMissingError(key_id)
        return self.keys[key_id]


@dataclass(frozen=True, slots=True)
class _Blob:
    key_id: str
    salt: bytes
    nonce: bytes
    ciphertext: bytes

    @classmethod
    def parse(cls, sealed: bytes) -> Self:
        """Take it apart.

        Raises:
            UnsealableError: It is not one of ours.
        """
        if len(sealed) < 2 or sealed[0] != _FORMAT:  # noqa: PLR2004 - its first two bytes
            raise UnsealableError
        key_end = 2 + sealed[1]
        salt_end = key_end + _SALT_BYTES
        nonce_end = salt_end + _NONCE_BYTES
        key_id = sealed[2:key_end].decode(errors="replace")
        if len(sealed) < nonce_end + _TAG_BYTES or not is_key_id(key_id):
            raise UnsealableError
        salt, nonce = sealed[key_end:salt_end], sealed[salt_end:nonce_end]
        return cls(key_id, salt, nonce, sealed[nonce_end:])


def key_id_of(sealed: bytes) -> str:
    """Return the id of the key that sealed a blob; whether that is true shows when it is opened.

    Raises:
        UnsealableError: It is not one of ours.
    """
    return _Blob.parse(sealed).key_id


def _encode(secrets: Secrets) -> bytes:
    # The error of an encoder holds the text. Here it is gone before ours is raised.
    with contextlib.suppress(UnicodeEncodeError):
        return msgspec.msgpack.encode(secrets)
    raise ValueError("a secret is not valid Unicode")


def _associated(key_id: str, kind: str, binding: Binding) -> bytes:
    """Encode what a blob belongs to; MessagePack gives the length of each part."""
    return msgspec.msgpack.encode((_FORMAT, key_id, kind, binding))


def choose_primary(
    own: Mapping[str, str],
    announced: Iterable[Mapping[str, str]],
    wanted: str | None = None,
    current: str | None = None,
) -> str | None:
    """Choose the key that seals from now on: only one that every live replica has.

    Others could not open what it seals. A replica that lacks the current primary key changes
    nothing: it may have the wrong directory, and must not stop the others or bring an old key back.

    Args:
        own: Ids of this replica's keys, with the `check` of each.
        announced: The same of each other live replica.
        wanted: The key that an operator asked for.
        current: The primary key so far; None if there is none yet.

    Returns:
        Its id; None if no key is everywhere. Keys of one id with different checks are different.
    """
    common = set(own.items()).intersection(*(keys.items() for keys in announced))
    everywhere = {key_id for key_id, _ in common}
    if wanted in everywhere:
        return wanted
    return current or max(everywhere, default=None)
