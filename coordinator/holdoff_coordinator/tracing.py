"""Traces of calls, down to the scripts in the store; see `holdoff._tracing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdoff import _tracing
from holdoff_coordinator.scripts import SCRIPTS, digest

if TYPE_CHECKING:
    from opentelemetry.trace import Span


def start() -> None:
    """Trace calls from now on, where traces are wanted; before the first server is made.

    What the coordinator does by itself, several times a second, is no part of a call: of what has
    no parent only calls are kept.
    """
    try:
        from opentelemetry.instrumentation.grpc import (  # noqa: PLC0415 - it may be missing
            GrpcAioInstrumentorServer,
        )
        from opentelemetry.instrumentation.redis import RedisInstrumentor  # noqa: PLC0415
        from opentelemetry.sdk.trace import sampling  # noqa: PLC0415
        from opentelemetry.trace import SpanKind  # noqa: PLC0415
    except ImportError:
        return

    class Calls(sampling.Sampler):
        """Keeps calls, and not what begins in the coordinator."""

        def should_sample(self, *args: Any, **options: Any) -> sampling.SamplingResult:
            kind = options.get("kind", args[3] if len(args) > 3 else None)  # noqa: PLR2004
            always = sampling.ALWAYS_ON if kind == SpanKind.SERVER else sampling.ALWAYS_OFF
            return always.should_sample(*args, **options)

        def get_description(self) -> str:
            return "calls"

    if not _tracing.start("holdoff-coordinator", sampling.ParentBased(Calls())):
        return
    names = {digest(name): name for name in SCRIPTS}

    def name_script(span: Span, _: Any, args: list[Any], _options: Any) -> None:
        if args[0] == "EVALSHA":
            span.update_name(f"script {names.get(args[1], '')}".rstrip())

    GrpcAioInstrumentorServer().instrument()  # type: ignore[no-untyped-call] # has no types
    RedisInstrumentor().instrument(request_hook=name_script)
