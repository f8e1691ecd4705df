"""The rules of the simulated provider, without sockets and without a clock.

`Provider` decides what Exact Online would answer. Time is handed in as simulated
milliseconds since the epoch. Where the provider's behaviour is published it is
marked *official*, where its users report it *field*; where sources disagree or
are silent it is *open* and a switch (`holdoff.simulator.switches`).
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from holdoff.simulator.accounting import Injection, iso
from holdoff.simulator.api import Api
from holdoff.simulator.authorization import AuthorizationEndpoint
from holdoff.simulator.codes import Codes
from holdoff.simulator.enforcement import Enforcement
from holdoff.simulator.faults import Fault, Faults
from holdoff.simulator.limits import GRACE_MS
from holdoff.simulator.oauth import Rotation, TokenEndpoint, TokenForm
from holdoff.simulator.seeds import Seed
from holdoff.simulator.switches import DEFAULTS, Switches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from holdoff.simulator.answers import Answer
    from holdoff.simulator.api import Request


class Provider:
    """Exact Online as its clients see it.

    Args:
        seeds: the grants that exist.
        start_ms: simulated time at which the seeds' refresh tokens were issued.
        time_scale: simulated seconds in a real one. It only turns simulated
            time into the real seconds of `expires_in` and `Retry-After`.
        rotation: what happens to a refresh token when it is used.
        grace_ms: how long a used refresh token remains valid under `Rotation.GRACE`.
        switches: the behaviours where the real one is not known.
        new_token: makes the value of a token.
    """

    def __init__(  # noqa: PLR0913 -- each can be left out
        self,
        seeds: Iterable[Seed] = (Seed(),),
        *,
        start_ms: int = 0,
        time_scale: float = 1.0,
        rotation: Rotation = Rotation.UNTIL_USED,
        grace_ms: int = GRACE_MS,
        switches: Switches = DEFAULTS,
        new_token: Callable[[], str] = secrets.token_urlsafe,
    ) -> None:
        self.seeds = tuple(seeds)
        self.time_scale = time_scale
        self.rotation = rotation
        self.switches = switches
        self.faults = Faults()
        self._enforcement = Enforcement(
            (seed.client_id for seed in self.seeds), switches, time_scale
        )
        codes = Codes(new_token)
        self._tokens = TokenEndpoint(
            self.seeds,
            start_ms=start_ms,
            rotation=rotation,
            grace_ms=grace_ms,
            new_token=new_token,
            codes=codes,
            enforcement=self._enforcement,
        )
        self._authorization = AuthorizationEndpoint(self._tokens, codes, self._enforcement)
        self._api = Api(self._tokens, self._enforcement)

    def fault(self, path: str, agent: str, now_ms: int) -> Fault | None:
        """Tell which fault, if any, was asked for a request that just came.

        Unless the fault is one that is `acted_on`, the request goes no further.
        """
        fault = self.faults.take(path)
        if fault is not None:
            self._enforcement.ledger.injection(Injection(now_ms, agent, path, fault.kind))
        return fault

    def token(self, form: TokenForm, agent: str, now_ms: int, fault: Fault | None = None) -> Answer:
        """Answer a call of the token endpoint; see `TokenEndpoint.token`."""
        return self._tokens.token(form, agent, now_ms, fault)

    def authorize(self, query: Mapping[str, str], agent: str, now_ms: int) -> Answer:
        """Answer the authorization endpoint; see `AuthorizationEndpoint.authorize`."""
        return self._authorization.authorize(query, agent, now_ms)

    def sent(self, answer: Answer, now_ms: int) -> None:
        """Note that the last byte of an answer with an access token left: 570 s start here."""
        self._tokens.sent(answer, now_ms)

    def call(self, request: Request, now_ms: int) -> Answer:
        """Answer a call of the REST or XML API; see `Api.call`."""
        return self._api.call(request, now_ms)

    def report(self, now_ms: int) -> dict[str, object]:
        """Tell who broke which rule when, and what was asked, as a JSON document."""
        return {
            "time": iso(now_ms),
            "time_scale": self.time_scale,
            "rotation": str(self.rotation),
            "switches": self.switches.document(),
            **self._enforcement.ledger.document(),
        }
