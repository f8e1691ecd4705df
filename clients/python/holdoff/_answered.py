"""What an answer of a provider is to its policy: a block, an error, or nothing bad. Pure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from holdoff import _calls
from holdoff._places import find_place
from holdoff._recognise import recognise_answer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdoff._recognise import Headers
    from holdoff.v1 import budget_pb2, policy_pb2


def division_of(policy: policy_pb2.Policy, url: str) -> str:
    """Return the division that a call goes to; '' if its URL names none."""
    return find_place(policy.endpoint_path, url, policy.division_query)[0]


def block_of(  # noqa: PLR0913 - what is known of an answer
    policy: policy_pb2.Policy,
    where: budget_pb2.Scope,
    status: int,
    headers: Headers | Iterable[tuple[str, str]],
    body: bytes | None,
    *,
    job: str,
    sent_age_seconds: float | None = None,
) -> budget_pb2.Event | None:
    """Describe an answer that blocks or throttles; None for any other."""
    block = recognise_answer(policy, status, headers, body, now_epoch_seconds=time.time())
    if block is None:
        return None
    return _calls.block_event(
        where,
        status=status,
        retry_after_seconds=block.retry_after_seconds,
        throttle=block.throttle,
        job=job,
        sent_age_seconds=sent_age_seconds,
    )


def event_of(  # noqa: PLR0913, PLR0917 - what is known of an answer
    policy: policy_pb2.Policy,
    token: str,
    url: str,
    status: int,
    headers: Headers | Iterable[tuple[str, str]],
    body: bytes | None,
    job: str,
) -> budget_pb2.Event | None:
    """Describe an answer that its policy counts, or that blocks; None if it is nothing bad."""
    where = _calls.scope(token, division_of(policy, url), url)
    if block := block_of(policy, where, status, headers, body, job=job):
        return block
    if any(status in limit.statuses for limit in policy.limits):
        return _calls.error_event(where, status=status, job=job)
    return None
