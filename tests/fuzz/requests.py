"""Calls of a coordinator: every RPC, built from the descriptors, mostly valid and then mutated.

An input is lines of `WHO SERVICE/METHOD MESSAGE…`, each message in percent-encoded bytes. Each
input has an app of its own, with a token that is held, one that is free, a budget, a back-off and a
reservation; `_APP` and `_LEASE` are replaced by its name and the id of the lease. The bystander has
the same in an app of its own, on which no caller but `viewer` has a role.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import os
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import grpc
import redis
import structlog
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status
from hypothesis import strategies as st

from holdoff import testing
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
    token_service_pb2,
)
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.custody.grants import Terms
from holdoff_coordinator.custody.sealing import KEY_BYTES, MasterKey
from holdoff_coordinator.failures import CODES
from holdoff_coordinator.gate import AccessFile
from holdoff_coordinator.places import scope_id
from holdoff_coordinator.service import SERVICES
from holdoff_coordinator.store import connect
from tests.fuzz.engine import Target, check_cpu, edited, files
from tests.harness import Replica, ask, token_to_create, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message
    from hypothesis.strategies import DrawFn, SearchStrategy

METHODS = {
    f"{service.rpartition('.')[2]}/{method.name}": method
    for service in SERVICES
    for method in Default().FindServiceByName(service).methods
}

# Callers ---------------------------------------------------------------------------------------

ACCESS = """
[[grants]]
identities = ["credential:setup"]
role = "admin"
resources = ["*"]

[[grants]]
identities = ["credential:bystander"]
role = "holder"
resources = ["apps/bystander-app"]

[[grants]]
identities = ["credential:admin"]
role = "admin"
resources = ["apps/fuzz-*"]

[[grants]]
identities = ["credential:holder"]
role = "holder"
resources = ["apps/fuzz-*"]

[[grants]]
identities = ["credential:reporter"]
role = "reporter"
resources = ["apps/fuzz-*/tokens/held"]

[[grants]]
identities = ["credential:viewer"]
role = "viewer"
resources = ["*"]
"""
WITH_ROLES = ("setup", "bystander", "admin", "holder", "reporter", "viewer")
CALLERS = ("admin", "holder", "reporter", "viewer", "stranger", "nobody")

# What there is in an input's app ---------------------------------------------------------------

_APP = "fuzz-00000000"
_LEASE = "1000000000000000"
"""As long as an id: names inside a serialised message can be replaced."""
HELD, FREE, NONE = (f"apps/{_APP}/tokens/{name}" for name in ("held", "free", "none"))
_THEIRS = "bystander-app"
BYSTANDER = HELD.replace(_APP, _THEIRS)
ENDPOINT = "https://start.exactonline.nl/api/v1/535193/crm/Accounts"
IDS = [str(uuid.UUID(int=number, version=4)) for number in range(1, 7)]
HOLD_ID, EVENT_ID, RESERVATION_ID = IDS[:3]
SECRET = hmac.new(HOLD_ID.encode(), b"holdoff lease secret", "sha256").hexdigest()
DIVISION = {"token": "", "division": "9", "endpoint": ""}
BUDGET = scope_id("errors", {"token": "held", "division": "535193", "endpoint": "crm/accounts"})
NAMES = {
    "Lease": [f"{HELD}/leases/{_LEASE}"] * 2 + [f"{HELD}/leases/1", f"{FREE}/leases/{_LEASE}"],
    "Grant": [f"{FREE}/grant", f"{HELD}/grant", f"{NONE}/grant", FREE],
    "AccessToken": [f"{FREE}/grant", f"{HELD}/grant", f"{NONE}/grant", FREE],
    "Budget": [f"apps/{_APP}/budgets/{BUDGET}", f"apps/{_APP}/budgets/errors-x"],
    "BackOff": [f"apps/{_APP}/backOffs/{scope_id('operator', DIVISION)}"],
    "Policy": ["exact-online", "xero", "none"],
    "": [f"apps/{_APP}/tokens/new", HELD, FREE, NONE],
}
"""Values of fields that are called `name`, by what the message's name contains."""
TEXTS = {
    "token": [HELD, FREE, FREE, NONE, BYSTANDER],
    "parent": ["", f"apps/{_APP}", HELD, FREE, f"apps/{_THEIRS}"],
    "app": [f"apps/{_APP}", f"apps/{_APP}", "", f"apps/{_THEIRS}"],
    "division": ["535193", "", "9"],
    "endpoint": [ENDPOINT, "", "crm/Accounts", "crm/Accounts(guid'1')?$filter=x"],
    "secret": [SECRET, SECRET, SECRET[::-1]],
    "request_id": IDS[::-1],
    "reservation_id": [IDS[-1], RESERVATION_ID, *IDS],
    "id": IDS[::-1],
    "lease": NAMES["Lease"],
    "page_token": ["", HELD, f"1700000000000-0/holdoff:{{{_APP}}}:audit"],
    "resume_token": ["", f"{_APP}:{'0' * 32}:1", f"{_APP}::5"],
    "throttle": ["", "too-many-calls"],
    "client_id": ["ours", ""],
    "token_url": ["https://start.exactonline.nl/api/oauth2/token", "", "http://127.0.0.1/"],
    "api_hosts": ["start.exactonline.nl", "start.exactonline.be", "", "127.0.0.1:80"],
    "refresh_token": ["a-refresh-token", "another", ""],
    "client_secret": ["", "a-client-secret"],
    "etag": ["", f"{'0' * 32}.1", "x"],
    "policy": ["", "exact-online", "xero"],
    "paths": ["refresh_interval", "refresh_at", "policy", "name"],
}
HOSTILE_TEXTS = [
    *("", " ", "\0", "\n", "\x1b[2J", "\u202e", "\ufeff", "%s{0}", "a\r\nb", "*", "apps/*"),
    *("x" * 200, "x" * 5000, "\U0001f600" * 100, "e\u0301" * 99, "'" * 40, "(''" + "''" * 24),
    *("((((((((" * 200, "../" * 20, "/" * 300, "apps/a}:x{/tokens/b", '"}]', "-1", "1e999"),
    *(BYSTANDER, f"{BYSTANDER}/leases/{_LEASE}", IDS[0].upper(), "a:b:c," * 300, "1-1/" + "x" * 90),
]
TIMES = ("google.protobuf.Duration", "google.protobuf.Timestamp")
SECONDS = [30, 5, 0, 1, 570, 3600]
HOSTILE_SECONDS = [-1, 86_401, 2_678_401, 31_622_401, 10**9, 2**62, -(2**62), 2**63 - 1, -(2**63)]
HOSTILE_NANOS = [1, -1, 999_999_999, 10**9, 2**31 - 1, -(2**31)]
NUMBERS = {
    "status": [400, 429, 0, 401, 503],
    "count": [1, 2, 0],
    "page_size": [10, 1, 0],
    "pid": [0, 4711],
}
_INTS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
STREAM_SECONDS = 0.1
"""How long a stream is listened to: what it may say later is not seen."""
WORDS = [
    *(b"\x00", b"\xff", b"\x80" * 10, b"\x0a", b"\x08\x01", b"\xfa\x7f\x03abc", b"\x0b", b"\x0c"),
    *(b"\xff\xff\xff\xff\x0f", b"\xc3\x28", _APP.encode(), _LEASE.encode()),
]


# Building requests -----------------------------------------------------------------------------


@st.composite
def calls(draw: DrawFn) -> bytes:
    """Draw some calls, most of them by the administrator of their app."""
    count = draw(st.sampled_from((1, 2, 4, 8, 16)))
    return b"\n".join(draw(_call()) for _ in range(count))


@st.composite
def _call(draw: DrawFn) -> bytes:
    name = draw(st.sampled_from(list(METHODS)))
    who = draw(st.sampled_from(("admin",) * 6 + ("holder",) * 3 + CALLERS))
    method = METHODS[name]
    count = draw(st.sampled_from((1, 1, 2, 4))) if method.client_streaming else 1
    # In half of the calls nothing is wrong.
    builder = _Builder(draw, hostile=draw(st.sampled_from((0, 0, 0, 8, 20, 40))))
    texts = [builder.message(method.input_type).SerializeToString() for _ in range(count)]
    if draw(_below(8)) == 0:
        texts = [text.replace(_APP.encode(), _THEIRS.encode()) for text in texts]
    if draw(st.integers(0, 39)) == 0:
        texts = [draw(edited(st.just(text), WORDS)) for text in texts]
    return b" ".join([who.encode(), name.encode(), *map(_quoted, texts)])


def _quoted(data: bytes) -> bytes:
    return quote_from_bytes(data, safe="/:-_.()'").encode()


@functools.cache
def _below(count: int) -> SearchStrategy[int]:
    """Draw a number; a strategy that is made anew each time is slow."""
    return st.integers(0, count - 1)


FREE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


class _Builder:
    """Draws messages.

    Args:
        draw: Hypothesis's.
        hostile: Per cent of the fields that are left out, and of those with a hostile value. With
            none, only the first two values of each kind are drawn.
    """

    def __init__(self, draw: DrawFn, hostile: int) -> None:
        self._draw = draw
        self._hostile = hostile

    def _one_of(self, values: Sequence[Any]) -> Any:
        count = len(values) if self._hostile else min(2, len(values))
        return values[self._draw(_below(count))] if count > 1 else values[0]

    def _is_hostile(self) -> bool:
        return self._hostile > self._draw(_below(100)) if self._hostile else False

    def message(self, descriptor: Descriptor) -> Message:
        """Draw a message whose fields are mostly there, and mostly valid."""
        message = GetMessageClass(descriptor)()
        chosen = {one.name: self._one_of(list(one.fields)[:1]) for one in descriptor.oneofs}
        if self._hostile:
            chosen = {one.name: self._one_of(list(one.fields)) for one in descriptor.oneofs}
        for field in descriptor.fields:
            of = field.containing_oneof
            if (of and chosen[of.name] is not field) or self._is_hostile():
                continue
            hostile, kind = self._is_hostile(), field.message_type
            if field.is_repeated and kind and kind.GetOptions().map_entry:
                for key in self._one_of(([], ["run"], ["a" * 70], list(map(str, range(20))))):
                    getattr(message, field.name)[key] = "4711"
            elif field.is_repeated:
                values = getattr(message, field.name)
                if hostile:
                    times = self._one_of((1, 2, 101, 1000, 5000))
                    values.extend([self._value(field, hostile=self._is_hostile())] * times)
                values.extend(self._value(field) for _ in range(self._one_of((1, 2))))
            elif kind:
                getattr(message, field.name).CopyFrom(self._value(field, hostile=hostile))
            else:
                setattr(message, field.name, self._value(field, hostile=hostile))
        return message

    def _value(self, field: FieldDescriptor, *, hostile: bool = False) -> Any:
        """Draw a value of a field; of a repeated one, one of its values."""
        if field.message_type:
            if field.message_type.full_name in TIMES:
                return self._time(field.message_type, hostile=hostile)
            return self.message(field.message_type)
        if hostile:
            return self._draw(_hostile(field))
        valid: list[Any] = NUMBERS.get(field.name, [0, 1])
        if field.enum_type:
            valid = [*(one.number for one in field.enum_type.values[1:]), 0]
        elif field.type == FieldDescriptor.TYPE_STRING:
            valid = _texts(field)
        elif field.type == FieldDescriptor.TYPE_BOOL:
            valid = [False, True]
        elif field.type == FieldDescriptor.TYPE_BYTES:
            valid = [b"", b"\x01first"]
        return self._one_of(valid)

    def _time(self, kind: Descriptor, *, hostile: bool) -> Message:
        """Draw a duration or an instant; a hostile one is far away, or none."""
        base = 1_700_000_000 if kind.name == "Timestamp" else 0
        seconds = self._one_of(HOSTILE_SECONDS if hostile else SECONDS)
        nanos = self._one_of([0, *HOSTILE_NANOS]) if hostile else 0
        least, most = _INTS[FieldDescriptor.TYPE_INT64]
        return GetMessageClass(kind)(seconds=max(least, min(most, base + seconds)), nanos=nanos)


def _hostile(field: FieldDescriptor) -> SearchStrategy[Any]:
    """Values that a field should not have, or seldom has."""
    if field.enum_type:
        return st.sampled_from([-1, 99, 2**31 - 1])
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(HOSTILE_TEXTS) | FREE_TEXT
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=200)
    least, most = _INTS[field.type]  # a type that is new to the API fails here
    return st.sampled_from((least, most, most - 1)) | st.integers(least, most)


def _texts(field: FieldDescriptor) -> list[str]:
    if field.name == "name":
        owner = field.containing_type.name if field.containing_type else ""
        return next(names for kind, names in NAMES.items() if kind in owner)
    return TEXTS.get(field.name, ["nightly"])


# Trying them -----------------------------------------------------------------------------------


class Log(logging.Handler):
    """What the coordinator, gRPC and asyncio complain about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take in a line of a library."""
        self.lines.append(f"{record.name}: {self.format(record)}")

    def note(self, _: Any, level: str, event: structlog.typing.EventDict) -> Any:
        """Take in a line of ours."""
        if level in ("error", "critical", "exception") or event.get("exc_info"):
            self.lines.append(f"{level}: {event}")
        raise structlog.DropEvent


class World:
    """A coordinator that asks who calls, and a bystander who holds a lease of another app."""

    def __init__(self, replica: Replica, store: redis.Redis, pid: int, credentials: Any) -> None:
        self._replica = replica
        self._store = store
        self._pid = pid
        self._metadata: dict[str, tuple[tuple[str, str], ...]] = {
            who: (("authorization", f"Bearer {credentials.get(who, 'holdoff_0_0')}"),)
            for who in (*WITH_ROLES, "stranger")
        }
        self._metadata["nobody"] = ()
        self._number = 0
        self.log = Log()
        self._settle()

    def _settle(self) -> None:
        """Give the bystander its app anew."""
        self._forget(_THEIRS)
        self._theirs = self._prepare(_THEIRS, "bystander", "setup", "setup")
        self._before = self._seen()

    def _check_bystander(self) -> None:
        """Fail if something of the bystander's changed; the next input finds it as it was."""
        try:
            seen = self._seen()
            assert seen == self._before, f"the bystander sees {seen} and saw {self._before}"
        except AssertionError:
            self._settle()
            raise

    def _send(self, who: str, method: str, *messages: Message) -> Any:
        """Make a call that has to work."""
        answers, status = self._call(
            who, METHODS[method], [one.SerializeToString() for one in messages]
        )
        assert status is None, f"{method}: {status}"
        return answers[0] if answers else None

    def _hold(self, token: str, who: str) -> str:
        """Create a token and take its lease; return the lease's name."""
        self._send("setup", "TokenService/CreateToken", token_to_create(token, 0))
        asked = ask(token, wait=0.0, ttl=3600.0, request_id=HOLD_ID)
        offer = self._send(who, "LeaseService/AcquireLease", asked).offer
        assert offer.secret == SECRET
        name: str = offer.lease.name
        self._renew(name, who)
        return name

    def _renew(self, name: str, who: str) -> lease_pb2.Lease:
        request = lease_service_pb2.RenewLeaseRequest(name=name, secret=SECRET)
        lease: lease_pb2.Lease = self._send(who, "LeaseService/RenewLease", request).lease
        return lease

    def _seen(self) -> tuple[object, ...]:
        """Return what the bystander sees of its own app."""
        get = token_service_pb2.GetTokenRequest(name=BYSTANDER)
        token = self._send("bystander", "TokenService/GetToken", get).token
        lease = self._renew(f"{BYSTANDER}/leases/{self._theirs}", "bystander")
        app = f"apps/{_THEIRS}"
        budgets, back_offs, tokens = (
            self._send("bystander", method, request(parent=app))
            for method, request in (
                ("BudgetService/ListBudgets", budget_service_pb2.ListBudgetsRequest),
                ("BudgetService/ListBackOffs", budget_service_pb2.ListBackOffsRequest),
                ("TokenService/ListTokens", token_service_pb2.ListTokensRequest),
            )
        )
        return (
            *(lease.name, lease.state, lease.holder.job, lease.break_reason),
            *(token.lease, token.queue_length, token.policy, token.refresh_interval.seconds),
            [(one.name, one.used) for one in budgets.budgets if one.limit == "errors"],
            [(one.name, one.state, one.reason) for one in back_offs.back_offs],
            [one.name for one in tokens.tokens],
        )

    def check(self, data: bytes) -> None:
        """Make the calls of an input, and look at all that must hold afterwards."""
        self._number += 1
        app = f"fuzz-{self._number:08x}"
        try:
            self._check(app, self._prepare(app, "holder", "reporter", "admin"), data)
        finally:
            self.log.lines.clear()
            self._forget(app)

    def _check(self, app: str, lease: str, data: bytes) -> None:
        keys, began = self._keys(app), self._cpu_seconds()
        own, theirs = lease.encode(), self._theirs.encode()
        for line in data.split(b"\n"):
            who, name, *messages = [*line.split(b" "), b""]
            method = METHODS.get(name.decode(errors="replace"))
            if method and who.decode(errors="replace") in CALLERS:
                filled = [
                    unquote_to_bytes(one)
                    .replace(_APP.encode(), app.encode())
                    .replace(_LEASE.encode(), own if _THEIRS.encode() not in one else theirs)
                    for one in messages[:-1] or [b""]
                ]
                self._try(who.decode(), method, filled)
        for what, used, before in zip(
            ("the coordinator", "the store"), self._cpu_seconds(), began, strict=True
        ):
            check_cpu(what, used - before, data)
        assert self._keys(app) - keys <= 100 + len(data), "the store fills up"
        self._check_bystander()
        assert not self.log.lines, "the log has: " + "\n".join(self.log.lines[:3])

    def _prepare(self, app: str, holder: str, reporter: str, admin: str) -> str:
        """Fill an app, as these callers; return the id of its lease."""
        held, free = (one.replace(_APP, app) for one in (HELD, FREE))
        lease = self._hold(held, holder).rpartition("/")[2]
        assert len(lease) == len(_LEASE)
        self._send("setup", "TokenService/CreateToken", token_to_create(free, 0))
        scope = budget_pb2.Scope(token=held, endpoint=ENDPOINT)
        event = budget_pb2.Event(
            id=EVENT_ID, kind=budget_pb2.EVENT_KIND_ERROR, scope=scope, count=1, status=400
        )
        record = budget_service_pb2.RecordEventsRequest(events=[event])
        self._send(reporter, "BudgetService/RecordEvents", record)
        reserve = budget_service_pb2.ReserveRequest(
            reservation_id=RESERVATION_ID, scope=scope, kind=budget_pb2.EVENT_KIND_CALL, count=1
        )
        reserve.ttl.seconds = 3600  # one that runs out counts as an error
        self._send(reporter, "BudgetService/Reserve", reserve)
        quiet = admin_service_pb2.SetBackOffRequest(reason="a test")
        quiet.scope.app, quiet.scope.division = f"apps/{app}", DIVISION["division"]
        quiet.length.seconds = 3600
        self._send(admin, "AdminService/SetBackOff", quiet)
        return lease

    def _try(self, who: str, method: MethodDescriptor, messages: list[bytes]) -> None:
        answers, status = self._call(who, method, messages)
        answers = [getattr(one, "event", one) for one in answers]
        for one in answers:
            if "error" in one.DESCRIPTOR.fields_by_name and one.HasField("error"):
                status = one.error
        if status is None:
            return
        name = f"{who} {method.name}"
        if status.code == code_pb2.DEADLINE_EXCEEDED and method.server_streaming:
            return  # a stream that has nothing more to say now
        assert status.message, f"{name}: no message: {status}"
        if not status.details:  # of gRPC itself: the message is too large
            assert status.code == code_pb2.RESOURCE_EXHAUSTED, f"{name}: {status}"
            return
        assert status.message.isprintable(), f"{name}: {status}"
        assert status.ByteSize() < 4096, f"{name}: {status}"
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info), f"{name}: {status}"
        assert info.domain == "holdoff", f"{name}: {status}"
        assert CODES.get(info.reason) == status.code, f"{name}: {status}"
        assert status.code != code_pb2.INTERNAL, f"{name}: {status}"

    def _call(
        self, who: str, method: MethodDescriptor, messages: list[bytes]
    ) -> tuple[list[Any], Any]:
        """Make a call; return its first answers, and its status unless that is OK."""
        channel: Any = self._replica.channel  # whose types know no bytes
        path = f"/{method.containing_service.full_name}/{method.name}"
        read = GetMessageClass(method.output_type).FromString
        metadata = self._metadata[who]
        answers: list[Any] = []
        try:
            if method.server_streaming:
                if method.client_streaming:
                    call = channel.stream_stream(path)(
                        iter(messages), metadata=metadata, timeout=STREAM_SECONDS
                    )
                else:
                    call = channel.unary_stream(path)(
                        messages[0], metadata=metadata, timeout=STREAM_SECONDS
                    )
                try:
                    answers += map(read, islice(call, 20))
                finally:
                    call.cancel()
            else:
                answer = channel.unary_unary(path)(messages[0], metadata=metadata, timeout=60)
                answers.append(read(answer))
        except grpc.RpcError as failed:
            error: Any = failed
            code = error.code().value[0]
            status = rpc_status.from_call(error) or rpc_status.status_pb2.Status(
                code=code, message=error.details()
            )
            return answers, status
        return answers, None

    def _cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU time of the coordinator's event loop, and of the store."""
        clock = time.pthread_getcpuclockid(self._replica._thread.ident or 0)
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return time.clock_gettime(clock), ticks / os.sysconf("SC_CLK_TCK")

    def _keys(self, app: str) -> int:
        return sum(1 for _ in self._store.scan_iter(f"*{{{app}}}*", count=10_000))

    def _forget(self, app: str) -> None:
        """Take away an app, so that inputs do not see each other's."""
        keys = list(self._store.scan_iter(f"*{{{app}}}*", count=10_000))
        self._store.srem("holdoff:apps", app)
        self._store.delete(*keys, "")


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """Give a world; at its end the coordinator has to forget all calls, and to drain."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdoff-fuzz-")))
        (folder / "access.toml").write_text(ACCESS)
        url, pid = stack.enter_context(testing.valkey())

        async def issue() -> dict[str, str]:
            client = connect(url)
            try:
                known = Credentials(client)
                return {who: (await known.issue(who, 0, "a test"))[1] for who in WITH_ROLES}
            finally:
                await client.aclose()

        with ThreadPoolExecutor(1) as thread:  # the test may have a loop of its own
            credentials = thread.submit(asyncio.run, issue()).result()
        store = stack.enter_context(redis.Redis.from_url(url))
        before = structlog.get_config()
        stack.callback(structlog.configure, **before)
        terms = Terms(lambda: {"key": MasterKey("key", bytes(KEY_BYTES))})
        replica = Replica(url, access=AccessFile(folder / "access.toml"), custody=terms)
        log = Log()
        structlog.configure(processors=[log.note])
        logging.getLogger().addHandler(log)
        stack.callback(logging.getLogger().removeHandler, log)
        stack.enter_context(replica)
        world = World(replica, store, pid, credentials)
        world.log = log
        tasks = _tasks(replica)
        yield world.check
        wait_until(lambda: _tasks(replica) <= tasks + 1)
        replica.stop()
        assert not replica._thread.is_alive(), "it does not drain"
        assert not log.lines, "the log has: " + "\n".join(log.lines[:3])


def _tasks(replica: Replica) -> int:
    return len(asyncio.all_tasks(replica._loop))


TARGETS = {
    "requests": Target(
        calls() | edited(files("requests", b"admin LeaseService/ListLeases "), WORDS), opened
    ),
}
