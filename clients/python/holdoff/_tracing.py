"""Traces by OpenTelemetry: sent where its packages (the extra `[tracing]`) and its variables are.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`) names a collector that takes OTLP over gRPC,
see https://opentelemetry.io/docs/specs/otel/protocol/exporter/. Without it nothing is imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace.sampling import Sampler

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORT_SECONDS = 2
"""A collector that is away delays the end of a command by no more."""


def start(service: str, sampler: Sampler | None = None) -> bool:
    """Begin to send spans of this process; tell whether they are.

    Args:
        service: What it is called, unless `OTEL_SERVICE_NAME` says otherwise.
        sampler: Decides what is sent, unless `OTEL_TRACES_SAMPLER` does; None sends all.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return False
    import logging  # noqa: PLC0415 - not for those who want no traces

    try:
        from opentelemetry import trace  # noqa: PLC0415 - a second, for those who want traces
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:  # the variable may be there for the job
        return False
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(sampler, Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=EXPORT_SECONDS)))
    trace.set_tracer_provider(provider)
    # What it cannot send is its own trouble, not a line among a job's.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    return True


def headers() -> tuple[tuple[str, str], ...]:
    """Return what makes a call part of the trace that is under way, if one is.

    OpenTelemetry's own instrumentation of gRPC's clients would also make a span of each call; but a
    stream that it has touched cannot be cancelled.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate  # noqa: PLC0415

    found: dict[str, str] = {}
    propagate.inject(found)
    return tuple(found.items())


@contextlib.contextmanager
def command(name: str) -> Iterator[None]:
    """Trace a command of the command line with all of its calls, also those of its threads."""
    if not start("holdoff"):
        yield
        return
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.instrumentation.threading import ThreadingInstrumentor  # noqa: PLC0415

    ThreadingInstrumentor().instrument()
    with trace.get_tracer("holdoff").start_as_current_span(name):
        yield
