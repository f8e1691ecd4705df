"""The entities of each company: generated at first use, and changed by clients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid4, uuid5

from holdoff.simulator import literals
from holdoff.simulator.limits import DAY_MS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdoff.simulator.literals import Value
    from holdoff.simulator.resources import Resource

_GENERATED = {"financialtransaction/TransactionLines": 2_100}
"""Entities of an endpoint at the start: more than two pages of the bulk endpoints."""
_GENERATED_ELSE = 150
"""More than two pages."""
_CODE_LENGTH = 18
_FIRST_MS = 20_000 * DAY_MS
MOST_WRITTEN = 10_000
"""Entities that clients can create or change in all."""
MOST_WRITTEN_BYTES = 32 << 20
"""Of what they write to them, as JSON."""


class StoreFullError(Exception):
    """Clients wrote more than the simulator keeps."""


@dataclass(slots=True)
class _Entity:
    fields: dict[str, Value]
    timestamp: int
    """Number of the latest change in its company and endpoint."""
    written: int = 0
    """Bytes of what clients wrote, as JSON; 0 if nothing was."""


class Store:
    """The entities of all companies.

    Args:
        most_written: entities that clients can create or change.
        most_bytes: of what they write.
    """

    def __init__(
        self, most_written: int = MOST_WRITTEN, most_bytes: int = MOST_WRITTEN_BYTES
    ) -> None:
        self._most_written = most_written
        self._most_bytes = most_bytes
        self._tables: dict[tuple[str, str], dict[Value, _Entity]] = {}
        self._latest: dict[tuple[str, str], int] = {}
        self._written = 0
        self._bytes = 0

    def rows(self, resource: Resource, division: str) -> list[Mapping[str, Value]]:
        """All entities of an endpoint, sorted by its key; those of sync with their timestamp."""
        entities = self._table(resource, division).values()
        if resource.sync:
            changed = sorted(entities, key=lambda one: one.timestamp)
            return [{**one.fields, "Timestamp": one.timestamp} for one in changed]
        return sorted(
            (one.fields for one in entities), key=lambda fields: str(fields[resource.key])
        )

    def create(
        self, resource: Resource, division: str, fields: dict[str, Value], now_ms: int
    ) -> Mapping[str, Value]:
        """Make an entity of what a client wrote.

        Raises:
            StoreFullError: there is no room.
        """
        table = self._table(resource, division)
        key, now = uuid4(), literals.at(now_ms)
        entity = _Entity({}, 0)
        own = {resource.key: key, "Created": now, "Modified": now, "Division": int(division)}
        self._write(entity, resource, {"Code": str(len(table) + 1), **fields, **own})
        self._touch(entity, resource, division)
        table[key] = entity
        return entity.fields

    def update(
        self, resource: Resource, division: str, key: Value, fields: dict[str, Value], now_ms: int
    ) -> bool:
        """Change an entity; return whether it exists.

        Raises:
            StoreFullError: there is no room.
        """
        entity = self._table(resource, division).get(key)
        if entity is None:
            return False
        own = {name: entity.fields[name] for name in (resource.key, "Created", "Division")}
        self._write(entity, resource, {**fields, **own, "Modified": literals.at(now_ms)})
        self._touch(entity, resource, division)
        return True

    def delete(self, resource: Resource, division: str, key: Value) -> bool:
        """Delete an entity; return whether it existed."""
        entity = self._table(resource, division).pop(key, None)
        if entity is None:
            return False
        self._written -= entity.written > 0
        self._bytes -= entity.written
        return True

    def _write(self, entity: _Entity, resource: Resource, fields: dict[str, Value]) -> None:
        merged = _with_code(resource, {**entity.fields, **fields})
        size = len(json.dumps(merged, default=str))
        written = self._written + (entity.written == 0)
        if written > self._most_written or self._bytes - entity.written + size > self._most_bytes:
            raise StoreFullError
        self._written, self._bytes = written, self._bytes - entity.written + size
        entity.fields, entity.written = merged, size

    def _touch(self, entity: _Entity, resource: Resource, division: str) -> None:
        place = division, resource.entities
        self._latest[place] = entity.timestamp = self._latest[place] + 1

    def _table(self, resource: Resource, division: str) -> dict[Value, _Entity]:
        place = division, resource.entities
        if place not in self._tables:
            self._tables[place] = _generated(resource, division)
            self._latest[place] = len(self._tables[place])
        return self._tables[place]


def _generated(resource: Resource, division: str) -> dict[Value, _Entity]:
    """Generate entities, always the same ones."""
    path = resource.entities
    space = uuid5(NAMESPACE_URL, f"simulator:{division}/{path}")
    entities: dict[Value, _Entity] = {}
    for n in range(1, _GENERATED.get(path, _GENERATED_ELSE) + 1):
        own = uuid5(space, str(n))
        time = literals.at(_FIRST_MS + n * DAY_MS // 24)
        fields: dict[str, Value] = {
            resource.key: own,
            "Code": str(n),
            "Description": f"{resource.kind} {n}",
            "Name": f"{resource.kind} {n}",
            "Division": int(division),
            "Created": time,
            "Modified": time,
        }
        entities[own] = _Entity(_with_code(resource, fields), n)
    return entities


def _with_code(resource: Resource, fields: dict[str, Value]) -> dict[str, Value]:
    """Pad the code of an account, a number in 18 characters (official)."""
    code = fields.get("Code")
    if resource.entities == "crm/Accounts" and isinstance(code, str) and code.strip().isdecimal():
        return {**fields, "Code": code.strip().rjust(_CODE_LENGTH)}
    return fields
