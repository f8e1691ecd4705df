"""Calls of a provider with an access token in custody: waits before, reports after."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdoff._log import log
from holdoff._platform import boottime_ns
from holdoff._timing import SECOND
from holdoff.auth._rules import Rules, patience_seconds
from holdoff.errors import HoldoffError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdoff import AccessToken, BudgetGuard, Client
    from holdoff.auth._rules import Target
    from holdoff.custody.access import Usable


@dataclass(slots=True)
class Attempt:
    """A call that may be made now."""

    url: str
    target: Target
    usable: Usable
    rules: Rules
    guard: BudgetGuard
    room: contextlib.ExitStack
    """Closed when the answer is known; until then the call counts as one that may fail."""
    sent_ns: int
    is_over: bool = False

    @property
    def header(self) -> str:
        """The value of the header `Authorization`."""
        return self.rules.header(self.usable)


class Calls:
    """Makes calls of the provider of one token.

    Args:
        client: Where the coordinator is.
        access: The access token.
        wait_seconds: How long a call waits for room and an access token.
        call_seconds: Longer than a call takes: then it counts as failed.
        job: Name of the job, for listings.
    """

    def __init__(
        self,
        client: Client,
        access: AccessToken,
        *,
        wait_seconds: float,
        call_seconds: float,
        job: str,
    ) -> None:
        self._client = client
        self._access = access
        self._wait_seconds = wait_seconds
        self._call_seconds = call_seconds
        self._job = job
        self._known: Rules | None = None
        self._others: set[str] = set()

    def begin(self, url: str, target: Target | None) -> Attempt | None:
        """Wait until a call may be made; None if it goes where no access token may go.

        Raises:
            BudgetSpent: A scope of it backs off, or a budget is spent, for longer than the wait.
            NoAccessToken: There is no access token within the wait.
            HoldoffError: It cannot be asked for room, or the access token was closed.
        """
        give_up_ns = boottime_ns() + round(self._wait_seconds * SECOND)
        usable = self._access.usable(self._wait_seconds)
        if target is None or not target.may_have_token(usable.api_hosts):
            self._pass_by(target)
            return None
        rules = self._rules()
        with contextlib.ExitStack() as room:
            guard = room.enter_context(
                self._client.budget_guard(
                    self._access.token,
                    division=rules.division(url),
                    endpoint=url,
                    ttl_seconds=self._call_seconds,
                    wait_seconds=_left(give_up_ns),
                )
            )
            try:
                # The first may be too old by now.
                usable = self._access.usable(_left(give_up_ns))
            except BaseException:
                guard.cancel()
                raise
            return Attempt(url, target, usable, rules, guard, room.pop_all(), boottime_ns())
        raise AssertionError("nothing suppresses an exception")

    def end(self, attempt: Attempt, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Report an answer. A coordinator that is away must not cost the caller the answer."""
        attempt.is_over = True
        attempt.guard.status = status
        age_seconds = (boottime_ns() - attempt.sent_ns) / SECOND
        block = attempt.rules.block(attempt.url, status, headers, body, age_seconds)
        try:
            with attempt.room:
                if block:
                    self._client.record_events([block])
        except HoldoffError as error:
            self._not_reported(error)

    def report(
        self, attempt: Attempt, url: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Report an answer to what a call was redirected to."""
        event = attempt.rules.event(url, status, headers, body)
        try:
            if event:
                self._client.record_events([event])
        except HoldoffError as error:
            self._not_reported(error)

    def _not_reported(self, error: HoldoffError) -> None:
        log.warning("an answer to a call of %s was not reported: %s", self._access.token, error)

    def again(self, attempt: Attempt, headers: Mapping[str, str]) -> Attempt | None:
        """Begin a call that was answered with 401 once more, if there is another access token."""
        wait_seconds = patience_seconds(headers, self._wait_seconds)
        try:
            self._access.usable(wait_seconds, newer_than=attempt.usable.generation)
            return self.begin(attempt.url, attempt.target)
        except HoldoffError as error:
            log.info("a call under %s is not repeated: %s", self._access.token, error)
            return None

    def _rules(self) -> Rules:
        if self._known is None:
            token = self._client.get_token(self._access.token)
            policy = self._client.get_policy(token.policy)
            self._known = Rules(self._access.token, policy, self._job)
        return self._known

    def _pass_by(self, target: Target | None) -> None:
        where = str(target) if target else "a URL that is not plain"
        if where not in self._others and len(self._others) < _MOST_OTHERS:
            self._others.add(where)
            log.warning(
                "%s gets no access token of %s: it is no API host of the grant",
                where,
                self._access.token,
            )


_MOST_OTHERS = 100


def _left(give_up_ns: int) -> float:
    return max(0.0, (give_up_ns - boottime_ns()) / SECOND)
