"""Handlers of quarantines: which apps give out no new lease, and the end of that by an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdoff.v1 import admin_service_pb2, lease_pb2, lease_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.records import quarantine_message, record, user_and_host

if TYPE_CHECKING:
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.scripts import Scripts


class Quarantines:
    """List and end."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts

    async def list(
        self, request: lease_service_pb2.ListQuarantinesRequest, _: Caller
    ) -> lease_service_pb2.ListQuarantinesResponse:
        """List the apps in quarantine, those that end last first."""
        parent = validation.app_parent(request.parent)
        found: list[lease_pb2.Quarantine] = []
        for app in [parent.app] if parent else await self._scripts.held_back():
            with self._scripts.sparing(app, "quarantine"):
                reply = await self._scripts.run("read_quarantine", app)
                quarantine = quarantine_message(app, record(reply.values[0]), reply.now_us)
                if quarantine.HasField("remaining"):
                    found.append(quarantine)
        found.sort(key=lambda one: (-one.end_time.ToMicroseconds(), one.app))
        return lease_service_pb2.ListQuarantinesResponse(quarantines=found)

    async def end(
        self, request: admin_service_pb2.EndQuarantineRequest, caller: Caller
    ) -> admin_service_pb2.EndQuarantineResponse:
        """End a quarantine before its time."""
        name = validation.app_name("app", request.app)
        reason, holder = validation.reason(request.reason), validation.holder(request.holder)
        who = user_and_host(holder) or caller.identity
        reply = await self._scripts.run("quarantine_end", name.app, reason, who, caller=caller)
        if reply.status != "OK":
            raise Failure(reply.status, f"{name} is not in quarantine", resource=str(name))
        return admin_service_pb2.EndQuarantineResponse(
            quarantine=quarantine_message(name.app, record(reply.values[0]), reply.now_us)
        )
