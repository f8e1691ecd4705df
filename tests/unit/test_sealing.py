"""Sealed secrets: they open only where they belong, with their key, and show in no text."""

from __future__ import annotations

import os
import traceback
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import rich.pretty
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from holdoff_coordinator.custody import sealing
from holdoff_coordinator.custody.sealing import (
    FINGERPRINTS,
    AccessSecrets,
    Binding,
    FingerprintKey,
    GrantSecrets,
    KeyMissingError,
    Keyring,
    MasterKey,
    SealError,
    Secrets,
    UnsealableError,
    choose_primary,
    key_id_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAIN = MasterKey("main", bytes(range(32)))
OLD, NEW = MasterKey("old", bytes(32)), MasterKey("new", b"n" * 32)
RING = Keyring({MAIN.id: MAIN}, MAIN.id)
BINDING = Binding(
    resource="apps/a/tokens/t",
    chain_id="chain-1",
    generation=7,
    token_url="https://login.example/token",
    client_id="client-1",
    api_hosts=("api.example", "files.example"),
)
GRANT = GrantSecrets("refresh-1", "secret-1")

# Made once with MAIN: what was sealed by an older release must open.
SEALED = bytes.fromhex(
    "01046d61696e638c4f5cb537e940156cee8d8eb2549229e9f8a795b9f163a7cbb8813029d932147de250c428507bcf59"
    "68051aca5a7ecafb964a53b1aa801f2f67eefb4d77315826afc0b7ad1cfc46cd231a0cf626c8961b5bebc1eb09c157be"
    "99effc483f43ab9fe49c9a581033fc511a3e"
)
CHECK = "d9683e761060730a"
FINGERPRINT = "ba4f58d0449685874c5ddda5c7fde0042984825a5809e822992e2eb498abafa8"

# MessagePack has no lone surrogates; neither has anything that OAuth could send.
texts = st.text(st.characters(exclude_categories=["Cs"]))
bindings = st.builds(
    Binding, texts, texts, st.integers(0, 2**64 - 1), texts, texts, st.lists(texts).map(tuple)
)
secrets: st.SearchStrategy[Secrets] = (
    st.builds(GrantSecrets, texts, texts)
    | st.builds(AccessSecrets, texts)
    | st.builds(FingerprintKey, st.binary(min_size=1))
)


def opens(sealed: bytes, binding: Binding = BINDING, kind: type[Secrets] = GrantSecrets) -> bool:
    """Tell whether a blob opens."""
    try:
        RING.open(sealed, binding, kind)
    except SealError:
        return False
    return True


@given(secrets, bindings)
def test_what_was_sealed_opens(sealed: Secrets, binding: Binding) -> None:
    """With the same key and binding it is what it was, of whatever kind it is."""
    blob = RING.seal(sealed, binding)
    assert RING.open(blob, binding, type(sealed)) == sealed
    assert key_id_of(blob) == MAIN.id


def test_the_format_stays() -> None:
    """Fails when what an older release stored no longer opens, or has another fingerprint."""
    assert RING.open(SEALED, BINDING, GrantSecrets) == GRANT
    assert MAIN.check == CHECK
    key = FingerprintKey(bytes(range(32)))
    assert key.fingerprint("https://Login.Example/t", "client-1", "refresh-1") == FINGERPRINT


def test_equal_secrets_never_look_the_same() -> None:
    """Fails when a salt or a nonce is used twice: the store would show that nothing changed."""
    blobs = [RING.seal(GRANT, BINDING) for _ in range(100)]
    header = 2 + len(MAIN.id)
    salts = {blob[header : header + 32] for blob in blobs}
    nonces = {blob[header + 32 : header + 44] for blob in blobs}
    assert [len(set(blobs)), len(salts), len(nonces)] == [100, 100, 100]


def test_no_bit_may_be_flipped() -> None:
    """Fails when a part of a blob is not authenticated."""
    for position in range(len(SEALED) * 8):
        flipped = bytearray(SEALED)
        flipped[position // 8] ^= 1 << position % 8
        assert not opens(bytes(flipped)), position


@given(st.integers(0, len(SEALED) - 1), st.binary(min_size=1, max_size=4))
def test_a_blob_is_whole(length: int, more: bytes) -> None:
    """Fails when one opens that was cut off, or that has more at its end."""
    assert not opens(SEALED[:length])
    assert not opens(SEALED + more)


@given(st.binary() | st.binary().map(lambda rest: SEALED[:6] + rest))
def test_foreign_bytes_are_refused(blob: bytes) -> None:
    """Whatever is in the store in its place: the error is one of ours."""
    assert not opens(blob)


@given(bindings, bindings)
def test_another_binding_opens_nothing(one: Binding, other: Binding) -> None:
    """Fails when two bindings are encoded to the same bytes."""
    assert opens(RING.seal(GRANT, one), other) is (one == other)


@pytest.mark.parametrize(
    "other",
    [
        replace(BINDING, resource="apps/a/tokens/u"),
        replace(BINDING, chain_id="chain-2"),
        replace(BINDING, generation=8),
        replace(BINDING, token_url="https://login.example/token/"),
        replace(BINDING, client_id="client-2"),
        replace(BINDING, api_hosts=("api.example",)),
        replace(BINDING, api_hosts=("api.examplefiles.example",)),
        replace(BINDING, api_hosts=("files.example", "api.example")),
        replace(BINDING, resource="apps/a/tokens/tc", chain_id="hain-1"),
        replace(BINDING, client_id="client-1api.example", api_hosts=("files.example",)),
    ],
)
def test_each_part_of_the_binding_counts(other: Binding) -> None:
    """Fails when a blob opens in another record, at another generation, or for other hosts."""
    assert opens(SEALED)
    assert not opens(SEALED, other)


class Twin(Secrets, frozen=True):
    """Another kind, with the same field."""

    KIND: ClassVar[str] = "twin"

    access_token: str


def test_one_kind_does_not_open_as_another() -> None:
    """Also if it has the same fields.

    Fails when a blob that is moved within its record is taken for another one.
    """
    blob = RING.seal(AccessSecrets("a"), BINDING)
    opened = [kind for kind in (AccessSecrets, Twin, GrantSecrets) if opens(blob, kind=kind)]
    assert opened == [AccessSecrets]


def test_an_older_key_opens_and_the_primary_key_seals() -> None:
    """After a rotation both blobs open; without its key one says which key is missing."""
    before = Keyring({"old": OLD}, "old").seal(GRANT, BINDING)
    both = Keyring({"old": OLD, "new": NEW}, "new")
    after = both.seal(both.open(before, BINDING, GrantSecrets), BINDING)
    assert [key_id_of(before), key_id_of(after)] == ["old", "new"]
    for blob in (before, after):
        assert both.open(blob, BINDING, GrantSecrets) == GRANT
    alone = Keyring({"new": NEW}, "new")
    assert alone.open(after, BINDING, GrantSecrets) == GRANT
    with pytest.raises(KeyMissingError, match="'old'") as missing:
        alone.open(before, BINDING, GrantSecrets)
    assert missing.value.key_id == "old"


def test_another_key_of_the_same_id_opens_nothing() -> None:
    """Fails when a key's id is enough."""
    impostor = Keyring({"main": MasterKey("main", b"x" * 32)}, "main")
    with pytest.raises(UnsealableError):
        impostor.open(SEALED, BINDING, GrantSecrets)


@pytest.mark.parametrize("primary", [None, "new"])
def test_nothing_is_sealed_without_the_primary_key(primary: str | None) -> None:
    """Fails when some other key is taken instead."""
    with pytest.raises(KeyMissingError):
        Keyring({"old": OLD}, primary).seal(GRANT, BINDING)


@pytest.mark.parametrize(("key_id", "size"), [("main", 31), ("main", 33), ("Main", 32), ("", 32)])
def test_a_key_has_an_id_and_256_bits(key_id: str, size: int) -> None:
    """Fails when a key is weak, or its id cannot be a name of a file."""
    with pytest.raises(ValueError, match="master key"):
        MasterKey(key_id, b"k" * size)


# Fingerprints


def test_a_fingerprint_recognises_a_grant() -> None:
    """Same host, client id and refresh token; whatever the path. Nothing else is the same."""
    key = FingerprintKey.generate()
    known = key.fingerprint("https://h.example/a", "c", "r")
    assert known == key.fingerprint("https://H.example:443/b", "c", "r")
    others = [
        key.fingerprint("https://i.example/a", "c", "r"),
        key.fingerprint("https://h.example/a", "d", "r"),
        key.fingerprint("https://h.example/a", "c", "s"),
        key.fingerprint("https://h.example/a", "cr", ""),
        FingerprintKey.generate().fingerprint("https://h.example/a", "c", "r"),
    ]
    assert len({known, *others}) == 1 + len(others)
    with pytest.raises(ValueError, match="host"):
        key.fingerprint("/token", "c", "r")


def test_fingerprints_survive_a_rotation() -> None:
    """Fails when a grant is not recognised after the primary key changed."""
    key = FingerprintKey.generate()
    both = Keyring({"old": OLD, "new": NEW}, "new")
    before = Keyring({"old": OLD}, "old").seal(key, FINGERPRINTS)
    after = both.seal(both.open(before, FINGERPRINTS, FingerprintKey), FINGERPRINTS)
    opened = Keyring({"new": NEW}, "new").open(after, FINGERPRINTS, FingerprintKey)
    grant = ("https://h.example/a", "c", "r")
    assert opened.fingerprint(*grant) == key.fingerprint(*grant)


# The primary key

ONE, TWO, BOTH = {"k1": "c1"}, {"k2": "c2"}, {"k1": "c1", "k2": "c2"}


@pytest.mark.parametrize(
    ("own", "others", "wanted", "current", "chosen"),
    [
        (ONE, [], None, None, "k1"),
        (BOTH, [ONE, BOTH], None, None, "k1"),
        (BOTH, [BOTH, BOTH], None, None, "k2"),
        (ONE, [TWO], None, None, None),
        ({}, [ONE], None, None, None),
        # A key becomes primary when everybody has it, and not before.
        (BOTH, [BOTH, BOTH], "k2", "k1", "k2"),
        (BOTH, [BOTH, ONE], "k2", "k1", "k1"),
        (ONE, [BOTH, BOTH], "k2", "k1", "k1"),
        # Without a wish nothing changes, whatever a replica lacks.
        (BOTH, [BOTH], None, "k1", "k1"),
        (TWO, [ONE, {}], None, "k1", "k1"),
        # Two hosts that each generated a key of one name have two keys.
        (ONE, [{"k1": "other"}], None, None, None),
        (BOTH, [ONE | {"k2": "other"}], "k2", "k1", "k1"),
    ],
)
def test_the_primary_key(
    own: Mapping[str, str],
    others: Sequence[Mapping[str, str]],
    wanted: str | None,
    current: str | None,
    chosen: str | None,
) -> None:
    """Fails when a replica would seal what another cannot open, or one replica stops all."""
    assert choose_primary(own, others, wanted, current) == chosen


announcements = st.dictionaries(st.sampled_from("abc"), st.sampled_from("12"))


@given(announcements, st.lists(announcements, max_size=4), st.sampled_from([None, *"abc"]))
def test_a_new_primary_key_is_everywhere(
    own: Mapping[str, str], others: Sequence[Mapping[str, str]], wanted: str | None
) -> None:
    """Fails when one becomes primary that some replica does not have, or has differently."""
    chosen = choose_primary(own, others, wanted, current="z")
    if chosen != "z":
        assert chosen == wanted
        assert chosen is not None
        assert {keys.get(chosen) for keys in (own, *others)} == {own[chosen]}


# What is shown

SECRET = "s3cr3t-\ufeffvalue"
HIDDEN = [SECRET, ascii(SECRET)[1:-1], "s3cr3t", "k" * 8, (b"k" * 32).hex()]


def assert_hidden(text: str) -> None:
    """Fail if a text shows a secret."""
    assert not [secret for secret in HIDDEN if secret in text], text


@pytest.mark.parametrize(
    "value",
    [
        GrantSecrets(SECRET, SECRET),
        AccessSecrets(SECRET),
        FingerprintKey(b"k" * 32),
        MasterKey("main", b"k" * 32),
        Keyring({"main": MasterKey("main", b"k" * 32)}, "main"),
    ],
)
def test_representations_show_no_secret(value: object) -> None:
    """Fails when a log line, an assertion or a debugger that prints one tells it."""
    for text in (repr(value), str(value), f"{value}", f"{[value]!r}", "%r" % (value,)):  # noqa: UP031
        assert_hidden(text)
    assert_hidden(rich.pretty.pretty_repr(value))


def failing(call: Callable[[], Any]) -> BaseException:
    """Return the error of a call."""
    try:
        call()
    except (SealError, ValueError) as error:
        return error
    raise AssertionError("it works")


def test_errors_show_no_secret() -> None:
    """Neither their texts nor the local variables of our functions, nor what caused them.

    Fails when an error of the encoder, which holds the text, remains attached to ours.
    """
    ring = Keyring({"main": MasterKey("main", b"k" * 32)}, "main")
    sealed = ring.seal(GrantSecrets(SECRET), BINDING)
    calls: list[Callable[[], Any]] = [
        lambda: ring.seal(GrantSecrets(f"{SECRET}\ud800"), BINDING),
        lambda: ring.open(sealed, replace(BINDING, generation=8), GrantSecrets),
        lambda: ring.open(sealed, BINDING, AccessSecrets),
        lambda: ring.open(sealed[:-1], BINDING, GrantSecrets),
        lambda: ring.open(SEALED[:2] + b"gone" + SEALED[6:], BINDING, GrantSecrets),
        lambda: Keyring(ring.keys, None).seal(GrantSecrets(SECRET), BINDING),
    ]
    for call in calls:
        error: BaseException | None = failing(call)
        seen = 0
        while error:
            assert_hidden(f"{error!r} {error} {vars(error)}")
            found = traceback.TracebackException.from_exception(error, capture_locals=True)
            for frame in found.stack:
                if frame.filename == sealing.__file__:
                    seen += 1
                    assert_hidden(str(frame.locals))
            error = error.__context__
        assert seen


def test_a_blob_shows_no_secret() -> None:
    """Fails when a secret is stored as it is; what a blob shows is its format and its key's id."""
    secret = os.urandom(16).hex()
    blob = RING.seal(GrantSecrets(secret, secret), BINDING)
    assert secret.encode() not in blob
    assert MAIN.secret not in blob
    assert blob.startswith(b"\x01\x04main")
