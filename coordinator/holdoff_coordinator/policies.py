"""The policies that this coordinator knows, and what they mean for one token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from holdoff._text import quoted
from holdoff.policies import DEFAULT_POLICY, PolicyError, Seconds, presets, read_policy
from holdoff.v1 import budget_pb2, policy_pb2, policy_service_pb2, token_pb2
from holdoff_coordinator.failures import Failure, invalid
from holdoff_coordinator.records import duration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from google.protobuf import duration_pb2

    from holdoff.policies import Block, Policy
    from holdoff_coordinator.caller import Caller


class RefreshAt(StrEnum):
    """When a run is taken to refresh its access token."""

    END = "END"
    START = "START"


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one token, after its policy and its own settings were put together."""

    interval_us: int
    refresh_at: RefreshAt
    access_token_life_us: int


def rules(policy: Policy, own_interval_us: int | None, own_refresh_at: RefreshAt | None) -> Rules:
    """Put a token's own settings over its policy; an explicit interval is taken exactly."""
    refresh = policy.refresh
    from_policy = round((refresh.interval + refresh.margin) * 1e6)
    return Rules(
        interval_us=from_policy if own_interval_us is None else own_interval_us,
        refresh_at=own_refresh_at or RefreshAt(refresh.at.upper()),
        access_token_life_us=round(refresh.access_token_life * 1e6),
    )


def read_policies(directory: Path | None) -> Mapping[str, Policy]:
    """Return the presets and the policies in a directory's `*.toml` files, by name.

    Raises:
        PolicyError: A file is wrong, or has the name of another policy.
        OSError: The directory or a file cannot be read.
    """
    found = dict(presets())
    for path in sorted(directory.iterdir()) if directory else ():
        if path.suffix != ".toml":
            continue
        if not path.is_file():  # to open a pipe would wait for its writer
            raise PolicyError(f"{path.name}:1: this is not a file: move it elsewhere")
        policy = read_policy(path)
        if policy.name in found:
            kind = "preset" if policy.name in presets() else "policy"
            raise PolicyError(f"{path.name}:1: there is a {kind} {policy.name} already: rename it")
        found[policy.name] = policy
    return found


class Policies:
    """Get and list policies."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._policies = policies

    def use(self, policies: Mapping[str, Policy]) -> None:
        """Go on with other policies; a token keeps the rules that it was given."""
        self._policies = policies

    def find(self, field: str, name: str) -> Policy:
        """Return a policy; an empty name means the default.

        Raises:
            Failure: POLICY_NOT_FOUND.
        """
        policy = self._policies.get(name or DEFAULT_POLICY)
        if policy is None:
            known = ", ".join(sorted(self._policies))
            message = f"{field}: there is no policy {quoted(name)}; there is: {known}"
            raise Failure("POLICY_NOT_FOUND", message, field=field)
        return policy

    def allow_ttl(self, seconds: float) -> bool:
        """Tell whether every policy allows leases with such a TTL."""
        return all(seconds <= policy.longest_ttl for policy in self._policies.values())

    async def get(
        self, request: policy_service_pb2.GetPolicyRequest, _: Caller
    ) -> policy_service_pb2.GetPolicyResponse:
        """Return one policy."""
        if not re.fullmatch(r"[a-z0-9-]{1,63}", request.name):
            raise invalid(
                "name",
                f"{quoted(request.name)} is not the name of a policy: write one such as "
                f"{DEFAULT_POLICY}; ListPolicies has them all",
            )
        policy = self.find("name", request.name)
        return policy_service_pb2.GetPolicyResponse(policy=policy_message(policy))

    async def list(
        self, _request: policy_service_pb2.ListPoliciesRequest, _: Caller
    ) -> policy_service_pb2.ListPoliciesResponse:
        """List all policies by name."""
        found = [policy_message(policy) for _, policy in sorted(self._policies.items())]
        return policy_service_pb2.ListPoliciesResponse(policies=found)


def policy_message(policy: Policy) -> policy_pb2.Policy:
    """A policy as the API shows it."""
    refresh = policy.refresh
    return policy_pb2.Policy(
        name=policy.name,
        title=policy.title,
        preset=policy.name in presets(),
        refresh=policy_pb2.RefreshPolicy(
            interval=_duration(refresh.interval),
            margin=_duration(refresh.margin),
            refresh_at=token_pb2.RefreshAt.Value(f"REFRESH_AT_{refresh.at.upper()}"),
            access_token_life=_duration(refresh.access_token_life),
            rotation=policy_pb2.Rotation.Value(
                f"ROTATION_{refresh.rotation.upper().replace('-', '_')}"
            ),
            grace=_duration(refresh.grace),
            idle_life=_duration(refresh.idle_life),
            early_margin=_duration(refresh.early_margin),
            absolute_life=_duration(refresh.absolute_life),
        ),
        limits=[
            policy_pb2.Limit(
                name=limit.name,
                kind=budget_pb2.EventKind.Value(
                    f"EVENT_KIND_{limit.event.upper().removesuffix('S')}"
                ),
                most=limit.most,
                window=_duration(limit.window),
                scope=limit.scope,
                statuses=limit.statuses,
                margin=limit.margin,
            )
            for limit in policy.limit
        ],
        block=_block_message(policy.block),
        endpoint_path=policy.endpoint.path if policy.endpoint else "",
        division_query=policy.endpoint.division_query if policy.endpoint else (),
        throttles=[
            policy_pb2.Throttle(
                name=throttle.name,
                statuses=throttle.statuses,
                body=throttle.body,
                header=throttle.header,
                scope=throttle.scope,
                until=throttle.until,
                length=_duration(throttle.length),
            )
            for throttle in policy.throttle
        ],
        output=(
            policy_pb2.OutputPolicy(
                errors=policy.output.errors,
                places=policy.output.places,
                codes=policy.output.codes,
            )
            if policy.output
            else None
        ),
        longest_ttl=_duration(policy.longest_ttl),
        most_runs=policy.most_runs,
        when_quiet=policy_pb2.WhenQuiet.Value(f"WHEN_QUIET_{policy.when_quiet.upper()}"),
        oauth=policy_pb2.OAuthPolicy(
            token_urls=policy.oauth.token_urls,
            hosts=policy.oauth.hosts,
            client_authentication=policy.oauth.client_authentication,
            authorization_urls=policy.oauth.authorization_urls,
            scopes=policy.oauth.scopes,
            authorization_scheme=policy.oauth.authorization_scheme,
        ),
        refusals=[
            policy_pb2.Refusal(
                name=one.name, means=one.means, error=one.error, description=one.description
            )
            for one in policy.refusal
        ],
        concurrency_limits=[
            policy_pb2.ConcurrencyLimit(name=one.name, most=one.most, scope=one.scope)
            for one in policy.concurrency
        ],
    )


def _block_message(block: Block) -> policy_pb2.BlockPolicy:
    return policy_pb2.BlockPolicy(
        scope=block.scope,
        first=_duration(block.first),
        factor=block.factor,
        most=_duration(block.most),
        forget_after=_duration(block.forget_after),
    )


def _duration(seconds: Seconds | None) -> duration_pb2.Duration | None:
    return None if seconds is None else duration(round(seconds * 1e6))
