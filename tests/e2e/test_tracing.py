"""Traces, from the wrapper to the store, at a collector that speaks OTLP."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from concurrent import futures
from typing import TYPE_CHECKING

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.e2e.service import BIN, Service
from tests.e2e.test_access import GuardedService
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what is exported."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(  # noqa: N802 - of the interface
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keep it."""
        del context
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def all(self) -> bytes:
        """Return all that was exported."""
        return b"".join(one.SerializeToString() for one in self.requests)

    def spans(self, service: str) -> list[Span]:
        """Return the spans of a service."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            if service in [one.value.string_value for one in resource.resource.attributes]
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, dict[str, str]]]:
    """Give a collector, and the variables that name it."""
    server, one = grpc.server(futures.ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(one, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield (
        one,
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        },
    )
    server.stop(None)


@pytest.fixture
def collector() -> Iterator[tuple[Collector, dict[str, str]]]:
    """Give the same for one test."""
    with collecting() as one:
        yield one


def test_a_run_is_one_trace(tmp_path: Path, collector: tuple[Collector, dict[str, str]]) -> None:
    """From the command by its calls, also those of threads, to the scripts; and no secret in it.

    Fails when the client sends no `traceparent`, when a thread's calls begin a trace of their own,
    when a script has no name, and when what the coordinator does by itself is traced.
    """
    collected, variables = collector
    service = GuardedService(tmp_path)
    service.environment |= variables
    with service:
        credential = service.issue("operator")
        environment = {**service.environment, "HOLDOFF_CREDENTIAL_FILE": str(credential)}
        token = "apps/a/tokens/ours"
        with service.client(credential) as operator:
            operator.create_token(token)
        arguments = ("run", "--token", token, "--ttl", "6s", "--", "sleep", "3")
        done = service.holdoff(*arguments, env=environment)
        assert done.returncode == 0, done.stderr
        [run] = [one for one in collected.spans("holdoff") if one.name == "holdoff run"]

        def answered() -> list[Span]:
            found = collected.spans("holdoff-coordinator")
            return [one for one in found if one.trace_id == run.trace_id]

        def told() -> set[str]:
            return {one.name.rpartition("/")[2] for one in answered()}

        scripts = {"script renew", "script release"}
        calls = {"StreamAcquireLease", "FollowLease", "RenewLease", "ReleaseLease"}
        wait_until(lambda: told() >= calls | scripts)
        by_id = {one.span_id: one for one in (run, *answered())}
        [script] = [one for one in answered() if one.name == "script release"]
        way = []
        span: Span | None = script
        while span:
            way.append(span.name.rpartition("/")[2])
            span = by_id.get(span.parent_span_id)
        assert way == ["script release", "ReleaseLease", "holdoff run"]
        orphans = [
            one.name for one in collected.spans("holdoff-coordinator") if not one.parent_span_id
        ]
        assert [name for name in orphans if "/" not in name] == []
        secret = credential.read_text().strip().split("_", 2)[2]
        raw = collected.all()
        assert secret.encode() not in raw
        assert b"authorization" not in raw.lower()


def test_a_collector_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    """The job runs, ends with its code, and says nothing of it; so does the coordinator.

    Fails when the exporter waits as long as it would by default, or its complaints show.
    """
    service = Service(tmp_path)
    service.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "60",  # without a limit of ours it would take so long
    }
    with service:
        token = service.create_token("t")
        began = time.monotonic()
        done = service.holdoff("run", "--token", token, "--", "sh", "-c", "exit 3")
        assert time.monotonic() - began < 30
        assert (done.returncode, done.stderr) == (3, "")
        service.end(signal.SIGTERM)
        assert not any("opentelemetry" in line for line in service.log)


def test_without_a_collector_nothing_is_imported(service: Service) -> None:
    """Fails when the packages are imported whether or not anybody asks for traces."""
    environment = {**service.environment, "PYTHONVERBOSE": "1"}
    shown = subprocess.run(
        [BIN / "holdoff", "token", "list", service.app],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "import 'holdoff._tracing'" in shown.stderr
    assert "import 'opentelemetry" not in shown.stderr
