"""Says why there is an access token of a token in custody, or none, and who uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from holdoff.v1 import grant_pb2
from holdoff_coordinator.custody.messages import attempt_message, shown, status_of
from holdoff_coordinator.custody.records import read
from holdoff_coordinator.failures import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from holdoff.names import TokenName
    from holdoff_coordinator.custody.handout import HandOuts
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

MOST_USERS: Final = 20


class GrantExplanations:
    """Explains grants.

    Args:
        scripts: Where they are read.
        policies: Say what becomes of their refresh tokens.
        key_ids: Returns the ids of this replica's master keys.
        hand_outs: Knows who uses them here.
    """

    def __init__(
        self,
        scripts: Scripts,
        policies: Policies,
        key_ids: Callable[[], Collection[str]],
        hand_outs: HandOuts,
    ) -> None:
        self._scripts = scripts
        self._policies = policies
        self._key_ids = key_ids
        self._hand_outs = hand_outs

    async def explain(self, name: TokenName) -> grant_pb2.GrantExplanation | None:
        """Explain the grant of a token, apart from its leases; None if it has none.

        Raises:
            Failure: STORE_….
        """
        held = await read(self._scripts, name)
        if held is None:
            return None
        held = shown(held, self._policies)
        record = held.record
        callers = self._hand_outs.callers(name)
        return grant_pb2.GrantExplanation(
            status=status_of(name, held, has_key=record.public.key_id in self._key_ids()),
            most_runs=self._most_runs(held.policy),
            has_access_token=held.now_us < record.expires_us,
            last_attempt=attempt_message(record),
            users=[
                grant_pb2.GrantUser(identity=identity, host=host, streams=streams)
                for (identity, host), streams in callers.most_common(MOST_USERS)
            ],
        )

    def _most_runs(self, policy: str) -> int:
        try:
            return self._policies.find("the token's policy", policy).most_runs
        except Failure:
            return 0
