"""What a coordinator reports of its own requests to token URLs, as a job reports its calls. Pure.

An error counts at the token URL's endpoint. An answer that blocks or throttles has no endpoint: the
token, or the app, backs off.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from holdoff._recognise import recognise_answer
from holdoff.v1 import budget_pb2, lease_pb2, policy_pb2
from holdoff_coordinator.custody import outcomes
from holdoff_coordinator.custody.answers import Issued
from holdoff_coordinator.policies import policy_message
from holdoff_coordinator.records import duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdoff.names import TokenName
    from holdoff.policies import Policy
    from holdoff_coordinator.custody.answers import Verdict
    from holdoff_coordinator.custody.outcomes import Outcome, Received

JOB: Final = "custody"
"""What is shown as the job that met an error."""
_FIRST_ERROR: Final = 400
_POLITE: Final = policy_pb2.Policy(
    throttles=[policy_pb2.Throttle(statuses=[429, 503], until=["Retry-After"])]
)
"""Recognises an answer that says when to come again, whatever a policy has."""


@dataclass(frozen=True, slots=True)
class Requested:
    """A request to a token URL."""

    attempt: str
    """Its id."""
    token_url: str


def events_of(  # noqa: PLR0913 - what is known of a request
    name: TokenName,
    policy: Policy,
    request: Requested,
    outcome: Outcome,
    verdict: Verdict,
    *,
    replica: str,
    epoch_seconds: float,
) -> Sequence[budget_pb2.Event]:
    """Return what to report of a request, without ages; each attempt has the same ids.

    Args:
        name: Of the token.
        policy: Of the token.
        request: The request.
        outcome: What came of it.
        verdict: What that proves.
        replica: Who made it.
        epoch_seconds: Now, for a header that names an instant.
    """
    received = outcomes.body_holder(outcome)
    if received is None or isinstance(verdict, Issued):  # whose body is secret
        return ()
    holder = lease_pb2.Holder(job=JOB, host=replica)
    error_id = uuid.UUID(request.attempt)
    endpoint = urlsplit(request.token_url).path
    found = []
    if received.status >= _FIRST_ERROR:
        found.append(
            budget_pb2.Event(
                id=str(error_id),
                kind=budget_pb2.EVENT_KIND_ERROR,
                scope=budget_pb2.Scope(token=str(name), endpoint=endpoint),
                status=received.status,
                holder=holder,
            )
        )
    block = budget_pb2.Event(
        id=str(uuid.UUID(int=error_id.int ^ 1)),
        kind=budget_pb2.EVENT_KIND_BLOCK,
        scope=budget_pb2.Scope(token=str(name)),
        status=received.status,
        holder=holder,
    )
    if _recognised(policy, received, epoch_seconds, block):
        found.append(block)
    return found


def aged(events: Sequence[budget_pb2.Event], outcome: Outcome, now_us: int) -> None:
    """Set how long ago the events happened, at an instant of the boot clock."""
    match outcome:
        case outcomes.Answered(sent_us=sent_us, last_byte_us=last_us):
            pass
        case outcomes.NoProof(sent_us=sent_us, ended_us=last_us):
            pass
        case _:
            return
    for event in events:
        event.age.CopyFrom(duration(max(0, now_us - last_us)))
        if event.kind == budget_pb2.EVENT_KIND_BLOCK and sent_us is not None:
            event.sent_age.CopyFrom(duration(max(0, now_us - sent_us)))


def _recognised(
    policy: Policy, received: Received, epoch_seconds: float, block: budget_pb2.Event
) -> bool:
    """Tell whether an answer blocks or throttles; if so, write into the event how long."""
    for rules in (policy_message(policy), _POLITE):
        seen = recognise_answer(
            rules,
            received.status,
            received.headers,
            bytes(received.body),
            now_epoch_seconds=epoch_seconds,
        )
        if seen is None or (rules is _POLITE and seen.retry_after_seconds is None):
            continue
        block.throttle = seen.throttle
        if seen.retry_after_seconds is not None:
            block.retry_after.CopyFrom(duration(round(seen.retry_after_seconds * 1e6)))
        return True
    return False
