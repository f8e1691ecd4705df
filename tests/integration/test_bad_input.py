"""Bad input: refused with a code, a reason, the field and the remedy; nothing is changed."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import redis
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

import holdoff
from holdoff.policies import presets
from holdoff.v1 import (
    admin_service_pb2,
    custody_service_pb2,
    grant_pb2,
    lease_pb2,
    lease_service_pb2,
    token_pb2,
    token_service_pb2,
)
from holdoff_coordinator.requests import MOST_CHARACTERS, MOST_ENTRIES, TEXTS
from holdoff_coordinator.service import SERVICES
from tests.harness import Replica, Waiter, ask, run_out, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

    from tests.conftest import StartValkey

LIMIT = 256 * 1024
"""Bytes that the coordinator takes in one message."""

PASSING = {
    *(b"tick_us", b"high_water_us", b"service_us", b"recovery_until_us"),
    *(b"heard_us", b"heard_service_us"),
}
"""Fields that move with time alone: the clocks of a shard, and when a waiter was heard."""

LOOK = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, value = redis.call('TYPE', key).ok, nil
  if kind == 'hash' then value = redis.call('HGETALL', key)
  elseif key:sub(-4) == ':due' then value = redis.call('ZRANGE', key, 0, -1) -- the times move on
  else value = redis.call('DUMP', key) end
  found[#found + 1] = {key, kind, value}
end
return found
"""
"""Reads the whole store in one step."""


@dataclass(frozen=True, slots=True)
class World:
    """A store with something in it to damage, behind a replica of its own."""

    replica: Replica
    store: redis.Redis
    waiter: Waiter
    idle: str
    """A token that nothing stands in the way of."""
    sibling: str
    """One like it, of the app of `held`."""
    held: lease_service_pb2.LeaseOffer
    """A live lease; a waiter waits for its token."""
    released: lease_service_pb2.LeaseOffer
    """A lease that its holder gave back; its token cools down."""
    expired: lease_service_pb2.LeaseOffer
    broken: lease_service_pb2.LeaseOffer
    """A lease that was broken and confirmed; `held` is on the same token."""

    @property
    def token(self) -> str:
        """The token of `held`."""
        return self.held.lease.name.partition("/leases/")[0]

    def everything(self) -> dict[bytes, Any]:
        """Return all that the store holds, but for what moves with time alone."""
        found: dict[bytes, Any] = {}
        for key, kind, value in self.store.eval(LOOK, 0):
            if key in (b"lock:{holdoff:sweeper}", b"{holdoff}:refusals"):
                continue  # renewed by whoever sweeps; where refusals belong
            if kind == b"hash":
                pairs = zip(value[::2], value[1::2], strict=True)
                found[key] = {name: text for name, text in pairs if name not in PASSING}
            else:
                found[key] = value
        return found

    def stream(self, *messages: lease_service_pb2.StreamAcquireLeaseRequest) -> status_pb2.Status:
        """Send messages and nothing more; return the error that comes as an event."""
        for response in self.replica.leases.StreamAcquireLease(iter(messages), timeout=10):
            if response.event.HasField("error"):
                return response.event.error
        raise AssertionError("the stream was not refused")


@pytest.fixture(scope="module")
def world(start_shared_valkey: StartValkey) -> Iterator[World]:
    """Give the world, on a store of its own; no test changes it."""
    url = start_shared_valkey().url
    with Replica(url) as replica, redis.Redis.from_url(url) as store:
        contested = replica.create_token(0)
        broken = replica.hold(contested, ttl=60.0)
        replica.admin.BreakLease(
            admin_service_pb2.BreakLeaseRequest(name=broken.lease.name, reason="test")
        )
        replica.release(broken)
        held = replica.hold(contested, ttl=24 * 3600.0)
        released = replica.hold(replica.create_token(3600))
        replica.release(released)
        expired = replica.hold(replica.create_token(3600))
        run_out(store, expired)
        state = lease_pb2.LEASE_STATE_EXPIRED
        assert replica.show(expired.lease.name).state == state
        waiter = Waiter(replica, ask(contested))
        waiter.waiting()
        idle, sibling = replica.create_token(3600), f"{contested.removesuffix('t')}sibling"
        replica.create_token(3600, name=sibling)
        wait_until(lambda: not store.keys("lock-signal:*"))  # they are kept for a second
        yield World(replica, store, waiter, idle, sibling, held, released, expired, broken)
        waiter.vanish()


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call was refused."""

    code: int
    reason: str
    field: str
    message: str


@contextlib.contextmanager
def unchanged(world: World) -> Iterator[None]:
    """Check that the store holds what it held."""
    before = world.everything()
    yield
    assert world.everything() == before


@contextlib.contextmanager
def case(name: str) -> Iterator[None]:
    """Name the case of a list in which a check fails."""
    try:
        yield
    except Exception as error:
        error.add_note(f"case: {name}")
        raise


def refusal(world: World, call: Callable[[], object]) -> Refusal:
    """Return how a call is refused, after a look at what must hold of every refusal."""
    with unchanged(world):
        return refused(call)


def refused(call: Callable[[], object]) -> Refusal:
    """Return how a call is refused, without a look into the store, which takes a while."""
    try:
        status = call()
    except grpc.RpcError as error:
        status = _status(error)
    assert isinstance(status, status_pb2.Status), f"not refused: {status}"
    info, wrong = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        assert detail.Unpack(info) or detail.Unpack(wrong) or detail.type_url
    (field,) = [one.field for one in wrong.field_violations] or [""]
    assert status.message.isprintable()
    assert status.message.isascii()
    assert status.ByteSize() < 4096
    if status.details:
        assert info.domain == "holdoff"
    return Refusal(status.code, info.reason, field, status.message)


def _status(error: Any) -> status_pb2.Status:
    """Return the status of a failed call, also of one that gRPC itself refused."""
    code, message = error.code().value[0], error.details()
    return rpc_status.from_call(error) or status_pb2.Status(code=code, message=message)


def assert_invalid(found: Refusal, field: str, words: str) -> None:
    """Check that a field is refused, and what the message says to do."""
    assert found.code == code_pb2.INVALID_ARGUMENT
    assert found.reason == "INVALID_FIELD"
    assert found.field == field
    assert found.message.startswith(f"{field}: ")
    assert words in found.message


# Names -----------------------------------------------------------------------------------------

METHODS = {
    f"{service}/{method.name}": method
    for service in SERVICES
    for method in Default().FindServiceByName(service).methods
}
NAMES = ("name", "parent", "page_token", "token")

BAD_NAMES = {
    "empty": "",
    "blank": " ",
    "slashes": "apps/a/tokens/b/c/d",
    "only slashes": "/////",
    "empty id": "apps//tokens/x",
    "leading slash": "/{good}",
    "trailing slash": "{good}/",
    "trailing line end": "{good}\n",
    "NUL": "{good}\0",
    "braces": "apps/{{a}}/tokens/b",
    "closing brace": "apps/a}}:x{{/tokens/b",
    "upper case": "apps/Exact/tokens/finance",
    "10 kB": "apps/a/tokens/" + "x" * 10_240,
    "64 characters": "apps/a/tokens/" + "x" * 64,
    "emoji": "apps/a/tokens/\U0001f600",
    "10 kB of emoji": "\U0001f600" * 2560,
    "full width": "apps/a/tokens/\uff41",
    "bidi override": "apps/a/tokens/\u202egnp",
    "percent-encoded": "apps%2Fa%2Ftokens%2Fb",
    "percent in id": "apps/a/tokens/%62",
    "dots": "apps/../tokens/b",
    "asterisk": "apps/*/tokens/*",
    "other collection": "users/a/tokens/b",
    "terminal escape": "apps/a/tokens/\x1b[2J",
}


def string_fields(message: Descriptor, path: str = "") -> Iterator[str]:
    """Yield the paths of a request's fields that hold a resource name."""
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_STRING and field.name in NAMES:
            yield path + field.name
        elif field.message_type in (
            token_pb2.Token.DESCRIPTOR,
            grant_pb2.Grant.DESCRIPTOR,
            lease_service_pb2.AcquireLeaseRequest.DESCRIPTOR,
        ):
            yield from string_fields(field.message_type, f"{path}{field.name}.")


def raw_call(replica: Replica, method: MethodDescriptor, data: bytes) -> bytes:
    """Call a method with bytes as they are; return the bytes of the first answer."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    channel: Any = replica.channel  # whose types know no bytes
    if not method.server_streaming:
        return bytes(channel.unary_unary(path)(data, timeout=10))
    if method.client_streaming:
        call = channel.stream_stream(path)(iter([data]), timeout=10)
    else:
        call = channel.unary_stream(path)(data, timeout=10)
    try:
        return bytes(next(call))
    finally:
        call.cancel()


def send(replica: Replica, method: MethodDescriptor, request: Message) -> object:
    """Call any method; return its first answer, or the error in it."""
    data = raw_call(replica, method, request.SerializeToString())
    answer = GetMessageClass(method.output_type).FromString(data)
    if isinstance(answer, lease_service_pb2.StreamAcquireLeaseResponse):
        return answer.event.error if answer.event.HasField("error") else answer
    return answer


@pytest.mark.parametrize(
    ("method", "path"),
    [(name, path) for name in METHODS for path in string_fields(METHODS[name].input_type)],
)
def test_bad_names(world: World, method: str, path: str) -> None:
    """Every field of every RPC that takes a name refuses what is none. New RPCs are found.

    Fails when `_check_id` takes upper case, a listing takes any page token, or a name is
    stripped or unquoted before it is checked.
    """
    field = path.removeprefix("acquire.")
    request = GetMessageClass(METHODS[method].input_type)()
    *parents, last = path.split(".")
    owner: Any = request
    for parent in parents:
        owner = getattr(owner, parent)
    with unchanged(world):
        for bad, template in BAD_NAMES.items():
            text = template.format(good=world.token)
            if field in ("parent", "page_token") and not text:
                continue  # which means all, or the beginning: see the next test
            setattr(owner, last, text)
            with case(bad):
                found = refused(lambda: send(world.replica, METHODS[method], request))
                words = "write " if len(text) <= 1000 else "must be at most 1000 "
                assert_invalid(found, field, words)
                assert len(found.message) < 1000


@pytest.mark.parametrize("method", ["ListLeaseHistory", "ListWaiters"])
def test_a_parent_that_must_not_be_empty(world: World, method: str) -> None:
    """Where only the parent tells what is meant, it has to be there."""
    service = METHODS[f"holdoff.v1.LeaseService/{method}"]
    request = GetMessageClass(service.input_type)()
    found = refusal(world, lambda: send(world.replica, service, request))
    assert_invalid(found, "parent", "write apps/{app}/tokens/{token}")


def test_all_fields_of_a_name_are_found() -> None:
    """The test above would be empty if the search for fields were broken."""
    fields = {path for method in METHODS.values() for path in string_fields(method.input_type)}
    nested = {"acquire.token", "grant.name", "token.name"}
    assert fields == {"name", "page_token", "parent", "token", *nested}


@pytest.mark.parametrize("parent", ["apps/a/tokens/b", "tokens/b", "apps/a/leases/b"])
def test_tokens_are_listed_of_apps_alone(world: World, parent: str) -> None:
    """The remedy is one that works: it does not send to a token's name, which is refused too."""
    request = token_service_pb2.ListTokensRequest(parent=parent)
    found = refusal(world, lambda: world.replica.tokens.ListTokens(request))
    assert_invalid(found, "parent", "write apps/{app}, such as")
    assert "or leave it out" in found.message


# Durations, times and numbers ------------------------------------------------------------------

INVALID = {
    "nanos out of range": Duration(seconds=5, nanos=1_000_000_000),
    "mixed signs": Duration(seconds=5, nanos=-1),
    "mixed signs, negative": Duration(seconds=-5, nanos=1),
    "beyond protobuf": Duration(seconds=2**62),
    "least number": Duration(seconds=-(2**63), nanos=-(2**31)),
}
OUT_OF_RANGE = {
    "negative": Duration(seconds=-1),
    "a negative nanosecond": Duration(nanos=-1),
    "two years": Duration(seconds=2 * 366 * 24 * 3600),
}


def acquiring(world: World, field: str, value: Duration) -> object:
    """Ask for a lease with a wrong duration."""
    request = ask(world.idle)
    getattr(request, field).CopyFrom(value)
    return world.replica.leases.AcquireLease(request)


def streaming(world: World, field: str, value: Duration) -> object:
    """Ask for a lease on a stream with a wrong duration."""
    request = ask(world.idle)
    getattr(request, field).CopyFrom(value)
    return world.stream(lease_service_pb2.StreamAcquireLeaseRequest(acquire=request))


def creating(world: World, field: str, value: Duration) -> object:
    """Create a token with a wrong duration."""
    request = token_service_pb2.CreateTokenRequest()
    request.token.name = "apps/new/tokens/t"
    getattr(request.token if field == "refresh_interval" else request, field).CopyFrom(value)
    return world.replica.tokens.CreateToken(request)


def updating(world: World, field: str, value: Duration) -> object:
    """Update a token with a wrong duration."""
    request = token_service_pb2.UpdateTokenRequest()
    request.token.name = world.token
    getattr(request.token, field).CopyFrom(value)
    return world.replica.tokens.UpdateToken(request)


def putting(world: World, field: str, value: Duration) -> object:
    """Put a grant with a wrong duration."""
    request = custody_service_pb2.PutGrantRequest()
    request.grant.name = f"{world.token}/grant"
    getattr(request, field).CopyFrom(value)
    return world.replica.custody.PutGrant(request)


def renewing(world: World, field: str, value: Duration) -> object:
    """Renew with a wrong report."""
    report = lease_service_pb2.RefreshReport()
    getattr(report, field).CopyFrom(value)
    return world.replica.renew(world.held, refresh=report)


def releasing(world: World, field: str, value: Duration) -> object:
    """Release with a wrong report."""
    report = lease_service_pb2.RefreshReport(saw_every_refresh=True)
    getattr(report, field).CopyFrom(value)
    return world.replica.release(world.held, refresh=report)


DURATIONS: list[tuple[Callable[[World, str, Duration], object], str, str]] = [
    (acquiring, "ttl", ""),
    (acquiring, "wait", ""),
    (streaming, "ttl", ""),
    (streaming, "wait", ""),
    (creating, "refresh_interval", "token."),
    (creating, "last_refresh_age", ""),
    (updating, "refresh_interval", "token."),
    (putting, "last_refresh_age", ""),
    (renewing, "last_refresh_age", "refresh."),
    (releasing, "last_refresh_age", "refresh."),
]


@pytest.mark.parametrize(("call", "field", "prefix"), DURATIONS)
def test_bad_durations(
    world: World, call: Callable[[World, str, Duration], object], field: str, prefix: str
) -> None:
    """Durations that protobuf does not allow, negative ones and endless ones are refused.

    Fails when `microseconds` rounds a negative nanosecond to zero, which for a wait means
    something else.
    """
    with unchanged(world):
        for bad, value in (INVALID | OUT_OF_RANGE).items():
            words = "nanos must be" if bad in INVALID else "must be from"
            with case(bad):
                found = refused(partial(call, world, field, value))
                assert_invalid(found, prefix + field, words)


@pytest.mark.parametrize(
    "ttl",
    [Duration(), Duration(nanos=999_999_000), Duration(seconds=24 * 3600, nanos=1000)],
)
def test_a_ttl_out_of_its_range(world: World, ttl: Duration) -> None:
    """A TTL is from a second to a day, and the message says so in one step."""
    assert_invalid(refusal(world, lambda: acquiring(world, "ttl", ttl)), "ttl", "from 1s to 1d")
    assert_invalid(refusal(world, lambda: streaming(world, "ttl", ttl)), "ttl", "from 1s to 1d")


@pytest.mark.parametrize("call", [creating, updating])
def test_an_interval_of_more_than_a_month(world: World, call: Callable[..., object]) -> None:
    """An interval is at most 31 days."""
    value = Duration(seconds=32 * 24 * 3600)
    found = refusal(world, lambda: call(world, "refresh_interval", value))
    assert_invalid(found, "token.refresh_interval", "from 0s to 31d")


@pytest.mark.parametrize(
    "time", [Timestamp(seconds=2**62), Timestamp(nanos=-1), Timestamp(seconds=1, nanos=10**9)]
)
def test_a_bad_time(world: World, time: Timestamp) -> None:
    """A time that protobuf does not allow is refused."""
    request = lease_service_pb2.ListLeaseHistoryRequest(parent=world.token, at_time=time)
    found = refusal(world, lambda: world.replica.leases.ListLeaseHistory(request))
    assert_invalid(found, "at_time", "valid Timestamp")


@pytest.mark.parametrize("size", [-1, -(2**31)])
def test_a_negative_page_size(world: World, size: int) -> None:
    """A negative page size is refused by all listings of resources."""
    leases = lease_service_pb2.ListLeasesRequest(page_size=size)
    found = refusal(world, lambda: world.replica.leases.ListLeases(leases))
    assert_invalid(found, "page_size", "write 0 for the default")
    tokens = token_service_pb2.ListTokensRequest(page_size=size)
    found = refusal(world, lambda: world.replica.tokens.ListTokens(tokens))
    assert_invalid(found, "page_size", "write 0 for the default")
    grants = custody_service_pb2.ListGrantsRequest(page_size=size)
    found = refusal(world, lambda: world.replica.custody.ListGrants(grants))
    assert_invalid(found, "page_size", "write 0 for the default")


@pytest.mark.parametrize("token", ["x", "a:b", "app::", "app:zz:1", "app:00:" + "1" * 5000])
def test_a_bad_resume_token(world: World, token: str) -> None:
    """A watch goes on only where we said it was."""
    request = lease_service_pb2.WatchLeasesRequest(resume_token=token)
    found = refusal(world, lambda: next(world.replica.leases.WatchLeases(request, timeout=10)))
    assert_invalid(found, "resume_token", "omit it")


# Things that are not there ---------------------------------------------------------------------

UNKNOWN = "apps/nobody/tokens/nothing"
UNKNOWN_LEASE = f"{UNKNOWN}/leases/1"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda w: w.replica.show_token(UNKNOWN), "TOKEN_NOT_FOUND"),
        (lambda w: w.replica.acquire(UNKNOWN), "TOKEN_NOT_FOUND"),
        (lambda w: w.replica.acquire(UNKNOWN, wait=None), "TOKEN_NOT_FOUND"),
        (
            lambda w: w.stream(lease_service_pb2.StreamAcquireLeaseRequest(acquire=ask(UNKNOWN))),
            "TOKEN_NOT_FOUND",
        ),
        (
            lambda w: w.replica.tokens.UpdateToken(
                token_service_pb2.UpdateTokenRequest(token=token_pb2.Token(name=UNKNOWN))
            ),
            "TOKEN_NOT_FOUND",
        ),
        (
            lambda w: w.replica.leases.ListLeaseHistory(
                lease_service_pb2.ListLeaseHistoryRequest(parent=UNKNOWN)
            ),
            "TOKEN_NOT_FOUND",
        ),
        (
            lambda w: w.replica.leases.ListWaiters(
                lease_service_pb2.ListWaitersRequest(parent=UNKNOWN)
            ),
            "TOKEN_NOT_FOUND",
        ),
        (
            lambda w: next(
                w.replica.leases.WatchLeases(
                    lease_service_pb2.WatchLeasesRequest(parent=UNKNOWN), timeout=10
                )
            ),
            "TOKEN_NOT_FOUND",
        ),
        (lambda w: w.replica.show(UNKNOWN_LEASE), "TOKEN_NOT_FOUND"),
        (lambda w: w.replica.renew(offer(UNKNOWN_LEASE)), "TOKEN_NOT_FOUND"),
        (lambda w: w.replica.release(offer(UNKNOWN_LEASE)), "TOKEN_NOT_FOUND"),
        (lambda w: breaking(w, UNKNOWN_LEASE), "TOKEN_NOT_FOUND"),
        (lambda w: w.replica.show(f"{w.token}/leases/1"), "LEASE_NOT_FOUND"),
        (lambda w: w.replica.renew(offer(f"{w.token}/leases/1")), "LEASE_NOT_FOUND"),
        (lambda w: w.replica.release(offer(f"{w.token}/leases/1")), "LEASE_NOT_FOUND"),
        (lambda w: breaking(w, f"{w.token}/leases/1"), "LEASE_NOT_FOUND"),
    ],
)
def test_what_is_not_there(world: World, call: Callable[[World], object], reason: str) -> None:
    """Nothing comes into being because somebody asked for it.

    Fails when a script writes before it knows that there is such a token.
    """
    found = refusal(world, lambda: call(world))
    assert (found.code, found.reason) == (code_pb2.NOT_FOUND, reason)
    remedy = "holdoff token create apps/" if reason == "TOKEN_NOT_FOUND" else "too long ago"
    assert remedy in found.message


def offer(name: str, secret: str = "0" * 64) -> lease_service_pb2.LeaseOffer:
    """Make up an offer."""
    return lease_service_pb2.LeaseOffer(lease=lease_pb2.Lease(name=name), secret=secret)


def breaking(world: World, name: str, reason: str = "test") -> object:
    """Break a lease."""
    return world.replica.admin.BreakLease(
        admin_service_pb2.BreakLeaseRequest(name=name, reason=reason)
    )


@pytest.mark.parametrize("policy", ["exact", "EXACT-ONLINE", "exact-online\n", "x" * 1000, "\0"])
def test_an_unknown_policy(world: World, policy: str) -> None:
    """The message tells which policies there are."""
    token = token_pb2.Token(name="apps/new/tokens/t", policy=policy)
    create = token_service_pb2.CreateTokenRequest(token=token)
    update = token_service_pb2.UpdateTokenRequest(
        token=token_pb2.Token(name=world.token, policy=policy)
    )
    calls: list[Callable[[], object]] = [
        lambda: world.replica.tokens.CreateToken(create),
        lambda: world.replica.tokens.UpdateToken(update),
    ]
    for call in calls:
        found = refusal(world, call)
        assert (found.code, found.reason) == (code_pb2.NOT_FOUND, "POLICY_NOT_FOUND")
        assert found.field == "token.policy"
        assert found.message.endswith(f"there is: {', '.join(presets())}")


def test_a_token_that_exists(world: World) -> None:
    """A second creation changes nothing, whatever it says."""
    found = refusal(world, lambda: world.replica.create_token(1, name=world.token))
    assert (found.code, found.reason) == (code_pb2.ALREADY_EXISTS, "TOKEN_EXISTS")
    assert "holdoff token update" in found.message


@pytest.mark.parametrize("path", ["", "*", "name", "token.policy", "lease", "\x1b[2J", "x" * 1000])
def test_a_field_that_cannot_be_updated(world: World, path: str) -> None:
    """The mask names settings only, and the message names them."""
    request = token_service_pb2.UpdateTokenRequest(token=token_pb2.Token(name=world.token))
    request.update_mask.paths.extend(["policy", path])
    found = refusal(world, lambda: world.replica.tokens.UpdateToken(request))
    assert_invalid(found, "update_mask", "write policy, refresh_interval, refresh_at")


# Secrets and ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["renew", "release"])
@pytest.mark.parametrize(
    "secret",
    ["stale", "", "0" * 64, "x" * 1000, "\U0001f600" * 64, "\0", "upper case", "shortened"],
)
def test_a_wrong_secret(world: World, way: str, secret: str) -> None:
    """Only the lease's own secret will do: not an earlier lease's, and not nearly the right one.

    Fails when `owned_lease` does not compare, or an error repeats what was sent.
    """
    right = world.held.secret
    made = {"stale": world.broken.secret, "upper case": right.upper(), "shortened": right[:-1]}
    sent = made.get(secret, secret)
    call = getattr(world.replica, way)
    found = refusal(world, lambda: call(offer(world.held.lease.name, sent)))
    assert (found.code, found.reason) == (code_pb2.PERMISSION_DENIED, "WRONG_SECRET")
    assert "the secret is not that of" in found.message
    assert not sent or sent not in found.message


@pytest.mark.parametrize(
    ("end", "way", "reason"),
    [
        ("released", "renew", "LEASE_ENDED"),
        ("released", "break", "LEASE_ENDED"),
        ("expired", "renew", "LEASE_LOST"),
        ("expired", "release", "LEASE_LOST"),
        ("expired", "break", "LEASE_LOST"),
        ("broken", "renew", "LEASE_BROKEN"),
        ("broken", "break", "LEASE_BROKEN"),
    ],
)
def test_a_lease_that_is_over(world: World, end: str, way: str, reason: str) -> None:
    """What has ended is not ended again, and says how it ended."""
    lease: lease_service_pb2.LeaseOffer = getattr(world, end)
    if way == "break":
        found = refusal(world, lambda: breaking(world, lease.lease.name))
    else:
        found = refusal(world, lambda: getattr(world.replica, way)(lease))
    assert (found.code, found.reason) == (code_pb2.FAILED_PRECONDITION, reason)
    assert lease.lease.name in found.message


@pytest.mark.parametrize("end", ["released", "broken"])
def test_a_second_release(world: World, end: str) -> None:
    """The answer to a release can be had again, and asking for it changes nothing."""
    lease: lease_service_pb2.LeaseOffer = getattr(world, end)
    before = world.everything()
    first, second = world.replica.release(lease), world.replica.release(lease)
    assert first == second
    assert world.everything() == before


# Request ids -----------------------------------------------------------------------------------

GOOD_ID = "9b2d7c7e-40f6-4a62-9c11-0d1f5a3e8a77"


@pytest.mark.parametrize(
    "request_id",
    [
        "",
        "1",
        str(uuid.UUID(int=0)),
        str(uuid.UUID(GOOD_ID, version=1)),
        str(uuid.UUID(GOOD_ID, version=5)),
        GOOD_ID.upper(),
        GOOD_ID.replace("-", ""),
        f"{{{GOOD_ID}}}",
        f"urn:uuid:{GOOD_ID}",
        f" {GOOD_ID}",
        f"{GOOD_ID}\n",
        f"{GOOD_ID}\0",
        GOOD_ID.replace("9", "\uff19"),
        "x" * 1000,
    ],
)
def test_a_bad_request_id(world: World, request_id: str) -> None:
    """A request id is hard to guess and has one spelling; it is not repeated, being a secret."""
    request = ask(world.idle)
    request.request_id = request_id
    calls: list[Callable[[], object]] = [
        lambda: world.replica.leases.AcquireLease(request),
        lambda: world.stream(lease_service_pb2.StreamAcquireLeaseRequest(acquire=request)),
    ]
    for call in calls:
        found = refusal(world, call)
        assert_invalid(found, "request_id", "must be a random UUID (version 4), in lower case")
        assert not request_id.strip() or request_id == "1" or request_id not in found.message


@pytest.mark.parametrize("change", ["token", "ttl", "holder", "labels"])
def test_a_request_id_reused(world: World, change: str) -> None:
    """An id is bound to what it came with: a waiter's id gets nobody else a lease.

    Fails when the fingerprint leaves one of these out.
    """
    request = lease_service_pb2.AcquireLeaseRequest()
    request.CopyFrom(world.waiter.request)
    match change:
        case "token":
            request.token = world.sibling
        case "ttl":
            request.ttl.FromSeconds(3)
        case "holder":
            request.holder.pid += 1
        case "labels":
            request.holder.labels["run"] = "2"
    calls: list[Callable[[], object]] = [
        lambda: world.replica.leases.AcquireLease(request),
        lambda: world.stream(lease_service_pb2.StreamAcquireLeaseRequest(acquire=request)),
    ]
    for call in calls:
        found = refusal(world, call)
        assert (found.code, found.reason) == (code_pb2.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        assert found.field == "request_id"
        assert "another token, TTL or holder" in found.message
        assert request.request_id not in found.message


# Texts -----------------------------------------------------------------------------------------

PRINTABLE = "must be one line of printable characters"
BAD_HOLDERS: list[tuple[str, dict[str, Any], str, str]] = [
    ("host", {"host": "a\nb"}, "holder.host", PRINTABLE),
    ("user", {"user": "\x1b[31mroot"}, "holder.user", PRINTABLE),
    ("job", {"job": "\u202egnp.exe"}, "holder.job", PRINTABLE),
    ("job isolate", {"job": "\u2066x\u2069"}, "holder.job", PRINTABLE),
    ("job NUL", {"job": "a\0b"}, "holder.job", PRINTABLE),
    ("job zero width", {"job": "a\u200bb"}, "holder.job", PRINTABLE),
    ("job line separator", {"job": "a\u2028b"}, "holder.job", PRINTABLE),
    ("version", {"client_version": "\x7f"}, "holder.client_version", PRINTABLE),
    ("long host", {"host": "h" * 256}, "holder.host", "at most 255 characters"),
    ("long user", {"user": "u" * 101}, "holder.user", "at most 100 characters"),
    ("long job", {"job": "\U0001f600" * 101}, "holder.job", "at most 100 characters"),
    ("long version", {"client_version": "v" * 10_240}, "holder.client_version", "at most 100"),
    ("pid", {"pid": -1}, "holder.pid", "must not be negative"),
    ("labels", {"labels": {f"k{i}": "" for i in range(17)}}, "holder.labels", "at most 16"),
    ("key", {"labels": {"Key": "x"}}, "holder.labels", "is not a key: write"),
    ("key empty", {"labels": {"": "x"}}, "holder.labels", "is not a key: write"),
    ("key long", {"labels": {"k" * 64: "x"}}, "holder.labels", "is not a key: write"),
    ("key control", {"labels": {"a\x1bb": "x"}}, "holder.labels", "is not a key: write"),
    ("key ends", {"labels": {"run-": "x"}}, "holder.labels", "is not a key: write"),
    ("value", {"labels": {"run": "a\nb"}}, "holder.labels.run", PRINTABLE),
    ("value long", {"labels": {"run": "x" * 201}}, "holder.labels.run", "at most 200"),
]


@pytest.mark.parametrize(
    ("holder", "field", "words"),
    [case[1:] for case in BAD_HOLDERS],
    ids=[c[0] for c in BAD_HOLDERS],
)
def test_a_bad_holder(world: World, holder: dict[str, Any], field: str, words: str) -> None:
    """What a holder says of itself comes to other people's terminals: it must be harmless there.

    Fails when `printable` looks for control characters alone, and lets format characters through.
    """
    request = ask(world.idle)
    request.holder.MergeFrom(lease_pb2.Holder(**holder))
    calls: list[Callable[[], object]] = [
        lambda: world.replica.leases.AcquireLease(request),
        lambda: world.stream(lease_service_pb2.StreamAcquireLeaseRequest(acquire=request)),
    ]
    for call in calls:
        assert_invalid(refusal(world, call), field, words)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("", "give a reason"),
        ("   ", "give a reason"),
        ("two\nlines", PRINTABLE),
        ("\x1b]0;title\x07", PRINTABLE),
        ("\u202egnp", PRINTABLE),
        ("x" * 201, "at most 200 characters"),
        ("x" * 10_240, "at most 200 characters"),
    ],
)
def test_a_bad_reason(world: World, reason: str, words: str) -> None:
    """Why a lease is broken is told to its holder, in one line, and in every case."""
    found = refusal(world, lambda: breaking(world, world.held.lease.name, reason))
    assert_invalid(found, "reason", words)


# Sizes -----------------------------------------------------------------------------------------


def long_fields(message: Descriptor, path: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    """Yield the fields of a request that can be long, with their paths."""
    for field in message.fields:
        if field.is_repeated or field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            yield path + field.name, field
        if field.message_type and not (
            field.message_type.GetOptions().map_entry or field.message_type == message
        ):
            yield from long_fields(field.message_type, f"{path}{field.name}.")


@pytest.mark.parametrize("method", METHODS)
def test_fields_that_are_too_long(world: World, method: str) -> None:
    """Each text, list and map of each request has a limit, and one more than that is refused.

    Fails for a new field that is a list or a map and has no limit in `MOST_ENTRIES`, and when a
    field is not checked before its content.
    """
    with unchanged(world):
        for path, _ in long_fields(METHODS[method].input_type):
            with case(path):
                request, most = too_long(METHODS[method], path)
                found = refused(partial(send, world.replica, METHODS[method], request))
                assert_invalid(found, path.removeprefix("acquire."), f"must be at most {most}")


def too_long(method: MethodDescriptor, path: str) -> tuple[Message, int]:
    """Return a request with one entry or character too many in a field, and how many may be."""
    message = request = GetMessageClass(method.input_type)()
    *parents, last = path.split(".")
    for parent in parents:
        owner: Any = getattr(message, parent)
        if message.DESCRIPTOR.fields_by_name[parent].is_repeated:
            owner = owner.add()
        message = owner
    field = message.DESCRIPTOR.fields_by_name[last]
    most = TEXTS.get(field.full_name, MOST_CHARACTERS)
    value = getattr(message, last)
    if not field.is_repeated:
        setattr(message, last, type(value)().ljust(most + 1))  # a text, or bytes
    else:
        most = MOST_ENTRIES[field.full_name]
        assert 0 < most <= 1000
        if field.message_type and field.message_type.GetOptions().map_entry:
            value.update({f"k{number}": "" for number in range(most + 1)})
        elif field.message_type:
            for _ in range(most + 1):
                value.add()
        else:
            value.extend([1 if field.enum_type else ""] * (most + 1))
    return request, most


@pytest.mark.parametrize(("key", "text"), [("k" * 1001, ""), ("k", "x" * 1001)])
def test_a_label_that_is_too_long(world: World, key: str, text: str) -> None:
    """Fails when keys or values of a map are not checked."""
    request = ask(world.idle)
    request.holder.labels[key] = text
    found = refusal(world, lambda: world.replica.leases.AcquireLease(request))
    assert_invalid(found, "holder.labels", "must be at most 1000 characters")


# The wire --------------------------------------------------------------------------------------


def test_a_message_over_the_limit(world: World) -> None:
    """It is refused before it is read, and reaches a client's user as a typed error."""
    huge = "x" * (4 * LIMIT)
    request = ask(world.idle)
    request.request_id = huge
    found = refusal(world, lambda: world.replica.leases.AcquireLease(request))
    assert found.code == code_pb2.RESOURCE_EXHAUSTED
    assert str(LIMIT) in found.message
    with (
        holdoff.Client(world.replica.address) as client,
        pytest.raises(holdoff.InvalidRequest, match=str(LIMIT)),
    ):
        client.break_lease(world.held.lease.name, huge)


def test_a_message_just_under_the_limit(world: World) -> None:
    """It is read, and refused for what is in it."""
    found = refusal(world, lambda: breaking(world, world.held.lease.name, "x" * (LIMIT - 1000)))
    assert_invalid(found, "reason", "at most 200 characters")


GARBAGE = {
    "not UTF-8": b"\x0a\x02\xff\xfe",
    "cut short": b"\x0a\x7fapps",
    "no protobuf": b"\xff" * 100,
    "JSON": b'{"name": "apps/a/tokens/b"}',
    "wrong wire type": b"\x0b\x0b\x0b",
    "nested without end": b"\x0a\xff\xff\xff\xff\x0f",
}


@pytest.mark.parametrize("method", METHODS)
def test_garbage_on_the_wire(world: World, method: str) -> None:
    """Bytes that are no message are refused with a reason, and the connection continues."""
    with unchanged(world):
        for garbage, data in GARBAGE.items():
            if garbage == "not UTF-8" and not METHODS[method].input_type.fields:
                continue  # an unknown field may hold any bytes
            with case(garbage):
                found = refused(partial(raw_call, world.replica, METHODS[method], data))
                assert (found.code, found.reason) == (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD")
                assert f"the request of {method} cannot be decoded" in found.message
        assert world.replica.show_token(world.token).lease == world.held.lease.name


@pytest.mark.parametrize("path", ["/holdoff.v1.LeaseService/Steal", "/holdoff.v2.Lease/Get", "/x"])
def test_an_unknown_method(world: World, path: str) -> None:
    """What there is not is said so by gRPC itself."""
    channel: Any = world.replica.channel
    found = refusal(world, lambda: channel.unary_unary(path)(b"", timeout=10))
    assert found.code == code_pb2.UNIMPLEMENTED


@pytest.mark.parametrize("number", [3, 99, -1, 2**31 - 1])
def test_an_unknown_number_of_an_enumeration(world: World, number: int) -> None:
    """A newer client's word is not taken for one of ours."""
    create = token_service_pb2.CreateTokenRequest(token=token_pb2.Token(name="apps/new/tokens/t"))
    create.token.MergeFromString(b"\x20" + _varint(number))  # field 4, refresh_at
    update = token_service_pb2.UpdateTokenRequest(token=token_pb2.Token(name=world.token))
    update.token.MergeFromString(b"\x20" + _varint(number))
    assert create.token.refresh_at == update.token.refresh_at == number
    calls: list[Callable[[], object]] = [
        lambda: world.replica.tokens.CreateToken(create),
        lambda: world.replica.tokens.UpdateToken(update),
    ]
    for call in calls:
        found = refusal(world, call)
        assert_invalid(found, "token.refresh_at", "must be REFRESH_AT_END or REFRESH_AT_START")


def _varint(number: int) -> bytes:
    number %= 2**64
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def test_unknown_fields_are_ignored_and_not_kept(replica: Replica, store: redis.Redis) -> None:
    """A newer client may say more than we know; none of it is stored."""
    request = token_service_pb2.CreateTokenRequest()
    request.token.name = f"apps/{uuid.uuid4().hex}/tokens/t"
    unknown = b"\xa2\x06\x10unknown-to-all-x"  # field 100
    request.MergeFromString(unknown)
    request.token.MergeFromString(unknown)
    replica.tokens.CreateToken(request)
    asked = ask(request.token.name, wait=0.0)
    asked.MergeFromString(unknown)
    replica.renew(replica.leases.AcquireLease(asked).offer)
    app = request.token.name.split("/")[1]
    for key in store.scan_iter(f"*{app}*"):
        assert b"unknown-to-all" not in (store.dump(key) or b"")


# Streams ---------------------------------------------------------------------------------------

HEARTBEAT = lease_service_pb2.StreamAcquireLeaseRequest(heartbeat=lease_service_pb2.Heartbeat())
WITHDRAWAL = lease_service_pb2.StreamAcquireLeaseRequest(withdraw=lease_service_pb2.Withdrawal())


@pytest.mark.parametrize(
    "messages",
    [[HEARTBEAT], [WITHDRAWAL], [lease_service_pb2.StreamAcquireLeaseRequest()], []],
    ids=["heartbeat", "withdrawal", "empty message", "nothing"],
)
def test_a_stream_that_does_not_begin_with_what_it_wants(
    world: World, messages: list[lease_service_pb2.StreamAcquireLeaseRequest]
) -> None:
    """The first message says what is asked for; a stream that ends without one is refused too."""
    found = refusal(world, lambda: world.stream(*messages))
    assert_invalid(found, "acquire", "must be the first message")


def test_a_stream_that_asks_twice(replica: Replica) -> None:
    """A second request on a stream is refused: it could not be answered there."""
    token, other = replica.create_token(), replica.create_token()
    replica.hold(token, ttl=30.0)
    asked = [ask(token), ask(other)]
    messages = (lease_service_pb2.StreamAcquireLeaseRequest(acquire=one) for one in asked)
    *_, last = replica.leases.StreamAcquireLease(messages, timeout=20)
    assert last.event.error.code == code_pb2.INVALID_ARGUMENT
    assert last.event.error.message.startswith("acquire: ")


def test_a_flood_of_heartbeats(replica: Replica) -> None:
    """Ten thousand heartbeats at once keep the place, and hold up nobody else."""
    token = replica.create_token(0)
    held = replica.hold(token, ttl=30.0)
    first = lease_service_pb2.StreamAcquireLeaseRequest(acquire=ask(token))
    flood = itertools.chain([first], itertools.repeat(HEARTBEAT, 10_000))
    events = replica.leases.StreamAcquireLease(flood, timeout=50)
    assert next(events).event.waiting.place == 1
    for _ in range(20):
        replica.leases.RenewLease(
            lease_service_pb2.RenewLeaseRequest(name=held.lease.name, secret=held.secret),
            timeout=20,
        )
    assert replica.show_token(token).queue_length == 1
    replica.release(held)
    assert any(response.event.HasField("offer") for response in events)
    events.cancel()


# Updates of a token ----------------------------------------------------------------------------


def test_two_updates_at_once_lose_nothing(replica: Replica, second_replica: Replica) -> None:
    """Updates of different fields, through two replicas at once, both hold.

    Fails when update_token.lua does not look at `updated_us`.
    """
    token = replica.create_token(1)

    def update(one: Replica, field: str, value: Any) -> None:
        request = token_service_pb2.UpdateTokenRequest(
            token=token_pb2.Token(name=token, **{field: value})
        )
        request.update_mask.paths.append(field)
        one.tokens.UpdateToken(request)

    with ThreadPoolExecutor(2) as pool:
        for number in range(2, 12):
            at = (token_pb2.REFRESH_AT_END, token_pb2.REFRESH_AT_START)[number % 2]
            both = (
                pool.submit(update, replica, "refresh_interval", Duration(seconds=number)),
                pool.submit(update, second_replica, "refresh_at", at),
            )
            for one in both:
                one.result()
            found = replica.show_token(token)
            assert (found.refresh_interval.seconds, found.refresh_at) == (number, at)


@pytest.mark.parametrize("field", ["refresh_interval", "refresh_at"])
def test_a_setting_goes_back_to_the_policys(replica: Replica, field: str) -> None:
    """A field that the mask names and the token lacks is as the policy says again."""
    token = replica.create_token(1, refresh_at=token_pb2.REFRESH_AT_START)
    before = replica.show_token(token)
    request = token_service_pb2.UpdateTokenRequest(token=token_pb2.Token(name=token))
    request.update_mask.paths.append(field)
    after = replica.tokens.UpdateToken(request).token
    assert after.HasField("refresh_interval") is (field != "refresh_interval")
    interval_seconds = 572 if field == "refresh_interval" else 1
    assert after.rules.refresh_interval.seconds == interval_seconds
    at = token_pb2.REFRESH_AT_END if field == "refresh_at" else before.rules.refresh_at
    assert after.rules.refresh_at == at
