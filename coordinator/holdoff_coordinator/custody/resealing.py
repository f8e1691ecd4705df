"""Seals secrets again with another master key. Pure."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

import msgspec

from holdoff_coordinator.custody.records import Facts
from holdoff_coordinator.custody.sealing import AccessSecrets, GrantSecrets, UnsealableError
from holdoff_coordinator.custody.seals import binding_of

if TYPE_CHECKING:
    from holdoff.names import TokenName
    from holdoff_coordinator.custody.records import EndRefresh, Record
    from holdoff_coordinator.custody.sealing import Binding, Keyring, Secrets


def resealed(ring: Keyring, name: TokenName, sealed: Record | EndRefresh) -> dict[str, str]:
    """Return what changes of sealed secrets if the primary key is to seal them; nothing if it does.

    Raises:
        SealError: They cannot be opened, or the primary key is missing.
    """
    facts = msgspec.json.decode(sealed.facts, type=Facts)
    if facts.key_id == ring.primary:
        return {}
    binding = binding_of(name, sealed.chain, sealed.generation, facts)
    public = msgspec.structs.replace(facts, key_id=ring.primary or "")
    return {
        "sealed_grant": _again(ring, sealed.sealed_grant, binding, GrantSecrets),
        "sealed_access": _again(ring, sealed.sealed_access, binding, AccessSecrets),
        "facts": msgspec.json.encode(public).decode(),
    }


def _again(ring: Keyring, text: str, binding: Binding, kind: type[Secrets]) -> str:
    if not text:
        return ""
    try:
        blob = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise UnsealableError from None
    return base64.b64encode(ring.seal(ring.open(blob, binding, kind), binding)).decode()
