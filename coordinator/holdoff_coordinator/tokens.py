"""Handlers of tokens: create, update, get and list. They know nothing of gRPC."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from holdoff._text import quoted
from holdoff.names import TokenName
from holdoff.v1 import token_pb2, token_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import invalid, token_damaged, token_not_found
from holdoff_coordinator.leases import failure_of
from holdoff_coordinator.policies import RefreshAt, rules
from holdoff_coordinator.records import token_message
from holdoff_coordinator.scripts import READ_BATCH

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

CREATION_SECONDS = 1.0
"""Within so long the first records of an app follow its entry in the index."""
MOST_INTERVAL_US = 31 * 24 * 3600 * 1_000_000
_SETTINGS = ("policy", "refresh_interval", "refresh_at")
_OWN_REFRESH_AT = {
    token_pb2.REFRESH_AT_UNSPECIFIED: None,
    token_pb2.REFRESH_AT_END: RefreshAt.END,
    token_pb2.REFRESH_AT_START: RefreshAt.START,
}


class Tokens:
    """Create, update, get and list tokens."""

    def __init__(
        self,
        scripts: Scripts,
        policies: Policies,
        compare_epoch: Callable[[], Awaitable[None]],
    ) -> None:
        self._scripts = scripts
        self._policies = policies
        self._compare_epoch = compare_epoch

    async def create(
        self, request: token_service_pb2.CreateTokenRequest, caller: Caller
    ) -> token_service_pb2.CreateTokenResponse:
        """Create a token; unless told otherwise it was never refreshed."""
        name = validation.token_name("token.name", request.token.name)
        settings = self._settings(request.token)
        match request.WhichOneof("last_refreshed"):
            case "last_refresh_age":
                age_us = validation.microseconds("last_refresh_age", request.last_refresh_age)
                last_refresh_age = str(age_us)
            case "last_refresh_unknown" if request.last_refresh_unknown:
                last_refresh_age = "0"
            case _:
                last_refresh_age = ""
        await self._prepare(name.app)
        reply = await self._scripts.run(
            "create_token", name.app, name.token, *settings, last_refresh_age, caller=caller
        )
        if reply.status != "OK":
            raise failure_of(reply, name)
        return token_service_pb2.CreateTokenResponse(token=await self._read(name))

    async def _prepare(self, app: str) -> None:
        """Find out whether the store has lost what it knew of an app."""
        is_new = await self._scripts.register(app)
        await self._compare_epoch()
        if is_new or await self._scripts.has_records(app):
            return
        await asyncio.sleep(CREATION_SECONDS)
        if not await self._scripts.has_records(app):
            self._scripts.records_are_lost(app)

    async def update(
        self, request: token_service_pb2.UpdateTokenRequest, caller: Caller
    ) -> token_service_pb2.UpdateTokenResponse:
        """Change a token's policy or own settings; what is named but absent is unset."""
        name = validation.token_name("token.name", request.token.name)
        for field in request.update_mask.paths:
            if field not in _SETTINGS:
                raise invalid("update_mask", f"write {', '.join(_SETTINGS)}, not {quoted(field)}")
        fields = set(request.update_mask.paths) or set(_SETTINGS)
        await self._update(name, request.token, fields, caller)
        return token_service_pb2.UpdateTokenResponse(token=await self._read(name))

    async def _update(
        self, name: TokenName, token: token_pb2.Token, fields: set[str], caller: Caller
    ) -> None:
        """Change some fields; begin again if somebody else changed the token in between."""
        changed = await self._read(name)
        read_us = str(changed.update_time.ToMicroseconds())
        if "policy" in fields:
            changed.policy = token.policy
        if "refresh_at" in fields:
            changed.refresh_at = token.refresh_at
        if "refresh_interval" in fields:
            changed.ClearField("refresh_interval")
            if token.HasField("refresh_interval"):
                changed.refresh_interval.CopyFrom(token.refresh_interval)
        settings = self._settings(changed)
        reply = await self._scripts.run(
            "update_token", name.app, name.token, *settings, read_us, caller=caller
        )
        if reply.status == "TOKEN_CHANGED":
            await self._update(name, token, fields, caller)
        elif reply.status != "OK":
            raise failure_of(reply, name)

    async def get(
        self, request: token_service_pb2.GetTokenRequest, _: Caller
    ) -> token_service_pb2.GetTokenResponse:
        """Return one token."""
        name = validation.token_name("name", request.name)
        return token_service_pb2.GetTokenResponse(token=await self._read(name))

    async def list(
        self, request: token_service_pb2.ListTokensRequest, caller: Caller
    ) -> token_service_pb2.ListTokensResponse:
        """List tokens by name."""
        parent = validation.app_parent(request.parent)
        size = validation.page_size(request.page_size)
        after = validation.page_token(request.page_token) or ("", "")
        found: list[token_pb2.Token] = []
        for app in [parent.app] if parent else await self._scripts.apps():
            if app < after[0]:
                continue
            last = after[1] if app == after[0] else ""
            while tokens := await self._scripts.tokens(app, last, READ_BATCH):
                last = tokens[-1]
                seen = [token for token in tokens if caller.sees(app, token)]
                reply = await self._scripts.run("read", app, *seen)

                def read(entry: Any, app: str = app, now_us: int = reply.now_us) -> token_pb2.Token:
                    return token_message(TokenName(app, entry[0].decode()), entry, now_us)

                for token in self._scripts.readable(app, "tokens", reply.values[0], read):
                    if len(found) == size:
                        return token_service_pb2.ListTokensResponse(
                            tokens=found, next_page_token=found[-1].name
                        )
                    found.append(token)
        return token_service_pb2.ListTokensResponse(tokens=found)

    async def _read(self, name: TokenName) -> token_pb2.Token:
        reply = await self._scripts.run("read", name.app, name.token)
        for entry in reply.values[0]:
            with self._scripts.sparing(name.app, f"tokens/{name.token}"):
                return token_message(name, entry, reply.now_us)
            raise token_damaged(name)
        raise token_damaged(name) if reply.damaged else token_not_found(name)

    def _settings(self, token: token_pb2.Token) -> tuple[str, str, str, int, str, int]:
        """Check a token's settings and work out its rules, as the scripts take them."""
        policy = self._policies.find("token.policy", token.policy)
        own_interval_us = None
        if token.HasField("refresh_interval"):
            own_interval_us = validation.microseconds(
                "token.refresh_interval", token.refresh_interval, MOST_INTERVAL_US
            )
        if token.refresh_at not in _OWN_REFRESH_AT:
            raise invalid("token.refresh_at", "must be REFRESH_AT_END or REFRESH_AT_START")
        own_refresh_at = _OWN_REFRESH_AT[token.refresh_at]
        effective = rules(policy, own_interval_us, own_refresh_at)
        return (
            policy.name,
            "" if own_interval_us is None else str(own_interval_us),
            own_refresh_at or "",
            effective.interval_us,
            effective.refresh_at,
            effective.access_token_life_us,
        )
