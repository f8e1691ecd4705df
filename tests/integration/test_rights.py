"""What a caller may not see or change, as properties of all calls that there are.

Requests are built from the descriptors, so that a new call, or a new field, is among them. The
first property: no answer to a caller with random grants has a name that belongs to a token on which
it has no role. The second: nothing that a caller with a role on one token alone does changes an
answer about another token of the app.

Left out of the second are limits that the policy shares between tokens, and blocks of the app that
the holder of a lease reports with proof: see `test_isolation.py`. An operator addresses everybody,
so that what operators say of themselves is no secret.
"""

from __future__ import annotations

import base64
import difflib
import re
import threading
import time
import uuid
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, message_factory, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from holdoff.policies import presets
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    custody_service_pb2,
    lease_service_pb2,
    policy_service_pb2,
    token_service_pb2,
)
from holdoff_coordinator.access import Role
from holdoff_coordinator.custody.grants import Terms
from holdoff_coordinator.custody.key_files import KeyDirectory
from holdoff_coordinator.gate import AccessFile
from tests.custodian import key_directory
from tests.harness import LONG, NO_PROXY, Replica, wait_until
from tests.integration.test_isolation import credential_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

    from holdoff.policies import Policy
    from tests.conftest import Server

METHODS: dict[str, MethodDescriptor] = {
    method.full_name: method
    for module in (
        lease_service_pb2,
        token_service_pb2,
        custody_service_pb2,
        budget_service_pb2,
        policy_service_pb2,
        admin_service_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
READS = ("Get", "List", "Watch", "Explain")
WORDS = ("job", "host", "user", "division", "endpoint", "client", "secret")
START = "start.exactonline.nl"
_NUMBERS = {"status": (0, 400, 403, 404), "count": (1, 9), "page_size": (0, 1, 2)}
_LISTS = {"api_hosts": [START]}
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "report_multiple_bugs": False,
    "suppress_health_check": list(HealthCheck),
}


def reads(method: MethodDescriptor) -> bool:
    """Whether a call changes nothing."""
    return method.name.startswith(READS)


@dataclass
class Target:
    """A token, with words and resources that belong to it alone."""

    app: str
    name: str
    leases: list[str] = field(default_factory=list)

    @property
    def token(self) -> str:
        """The id of the token."""
        return self.name.rpartition("/")[2]

    def word(self, kind: str) -> str:
        """What is called so in all that belongs to it."""
        return f"{kind}-of-{self.token}"

    @property
    def holder(self) -> dict[str, str]:
        """Who has it."""
        return {kind: self.word(kind) for kind in ("job", "host", "user")}

    @property
    def places(self) -> list[dict[str, str]]:
        """Where its calls go."""
        return [
            {"token": self.name, "division": self.word("division"), "endpoint": endpoint}
            for endpoint in (self.word("endpoint"), "")
        ]

    @property
    def ask(self) -> dict[str, Any]:
        """A request for a lease."""
        ttl = {"seconds": 3600}
        return {"token": self.name, "ttl": ttl, "holder": self.holder, "scopes": self.places}

    @property
    def grant(self) -> dict[str, Any]:
        """A grant to put."""
        return {
            "name": f"{self.name}/grant",
            "client_id": self.word("client"),
            "token_url": f"https://{START}/api/oauth2/token",
            "api_hosts": [START],
        }

    @property
    def secrets(self) -> set[str]:
        """All that tells of it."""
        ids = {lease.rpartition("/")[2] for lease in self.leases}
        return {self.token, *map(self.word, WORDS), *ids}


class Builder:
    """Builds requests from descriptors.

    Args:
        pick: Picks one of several values.
        targets: What the requests are about.
        names: Names of budgets and back-offs, by a word of the request's type.
    """

    def __init__(
        self,
        pick: Callable[[Sequence[Any]], Any],
        targets: Sequence[Target],
        names: dict[str, list[str]],
    ) -> None:
        self._pick = pick
        self._targets = targets
        self._names = names

    def request(self, method: MethodDescriptor) -> Any:
        """Build a request for a call; all of one that changes something is about one token."""
        self._one = None if reads(method) else self._pick(self._targets)
        self._by_operator = method.containing_service.name == "AdminService"
        return self._message(method.input_type)

    @property
    def _target(self) -> Target:
        target: Target = self._one or self._pick(self._targets)
        return target

    def _message(self, descriptor: Descriptor) -> Any:
        message = message_factory.GetMessageClass(descriptor)()
        if isinstance(message, duration_pb2.Duration):
            message.FromSeconds(self._pick([1, 30]))
        elif isinstance(message, timestamp_pb2.Timestamp):
            message.FromSeconds(int(time.time()))
        elif not isinstance(message, field_mask_pb2.FieldMask):
            for one in descriptor.fields:
                oneof = one.containing_oneof
                if oneof and (oneof.fields[0] is not one or one.name == "etag"):
                    continue
                self._fill(message, one)
        return message

    def _fill(self, message: Any, one: Any) -> None:
        if one.message_type and one.message_type.GetOptions().map_entry:
            return
        if one.type == FieldDescriptor.TYPE_MESSAGE:
            if one.message_type.full_name.startswith("google.") and self._pick([True, False]):
                return
            value = self._message(one.message_type)
            if one.is_repeated:
                getattr(message, one.name).add().CopyFrom(value)
            else:
                getattr(message, one.name).CopyFrom(value)
        elif one.is_repeated:
            getattr(message, one.name).extend(_LISTS.get(one.name, ()))
        elif one.type == FieldDescriptor.TYPE_STRING:
            setattr(message, one.name, self._text(message, one))
        elif one.type == FieldDescriptor.TYPE_ENUM:
            setattr(message, one.name, self._pick([value.number for value in one.enum_type.values]))
        elif one.type == FieldDescriptor.TYPE_BOOL:
            setattr(message, one.name, self._pick([False, True]))
        elif one.name in _NUMBERS:
            setattr(message, one.name, self._pick(_NUMBERS[one.name]))

    def _text(self, message: Any, one: Any) -> str:  # noqa: C901, PLR0911, PLR0912 - as well
        kind, target = type(message).__name__, self._target
        match one.name:
            case "id" | "request_id" | "reservation_id":
                return str(uuid.uuid4())
            case "app" if kind == "Scope":
                return str(self._pick(["", target.app]))
            case "app":
                return target.app
            case "token" if kind == "Scope":
                return str(self._pick([target.name, ""])) if self._one is None else target.name
            case "token":
                return target.name
            case "parent":
                return str(self._pick(["", target.app, target.name]))
            case "lease":
                return str(self._pick(["", *target.leases]))
            case "name" if "Grant" in kind or "AccessToken" in kind:
                return str(target.grant["name"])
            case "client_id" | "token_url":
                return str(target.grant[one.name])
            case "refresh_token" | "client_secret":
                return target.word("secret")
            case "name":
                for word, names in self._names.items():
                    if word in kind:
                        return str(self._pick(names or [target.name]))
                return str(self._pick(target.leases or [""])) if "Lease" in kind else target.name
            case "job" | "host" | "user" if self._by_operator:
                return "an operator"
            case "job" | "host" | "user" | "division" | "endpoint":
                return str(self._pick([target.word(one.name), ""]))
            case "policy":
                return "own"  # which shares no limit
            case "reason":
                return "a reason"
            case "resume_token":
                return str(self._pick(["", *self._names["WatchLeases"]]))
            case _:
                return ""


class Caller:
    """Makes any call as one identity, and keeps all that it hears."""

    def __init__(self, replica: Replica, url: str, identity: str) -> None:
        self._channel = grpc.insecure_channel(replica.address, NO_PROXY)
        self._metadata = [("authorization", f"Bearer {credential_of(url, identity)}")]

    def close(self) -> None:
        """Close its connection."""
        self._channel.close()

    def _open(self, method: MethodDescriptor, kind: str) -> Any:
        answer = message_factory.GetMessageClass(method.output_type)
        return getattr(self._channel, kind)(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )

    def call(self, method: MethodDescriptor, request: Message) -> Heard:
        """Make a call of one answer."""
        heard = Heard(method, request)
        try:
            answer, call = self._open(method, "unary_unary").with_call(
                request, metadata=self._metadata, timeout=60
            )
        except grpc.RpcError as error:
            heard.fail(error)
        else:
            heard.hear(answer)
            heard.metadata(call)
        return heard

    def listen(self, method: MethodDescriptor, request: Message) -> Heard:
        """Begin a call of many answers; `Heard.stop` ends it."""
        heard = Heard(method, request)
        if method.client_streaming:
            stream = self._open(method, "stream_stream")(iter([request]), metadata=self._metadata)
        else:
            stream = self._open(method, "unary_stream")(request, metadata=self._metadata)

        def read() -> None:
            try:
                for answer in stream:
                    heard.hear(answer)
            except grpc.RpcError as error:
                heard.fail(error)

        heard.follow(stream, threading.Thread(target=read, daemon=True))
        return heard


class Heard:
    """The answers to a call."""

    def __init__(self, method: MethodDescriptor, request: Message) -> None:
        self.method = method
        self.request = request
        self.answers: list[Message] = []
        self.texts: list[str] = []
        self.begun = threading.Event()
        self._stream: Any = None

    def hear(self, answer: Message) -> None:
        """Take in an answer."""
        self.answers.append(answer)
        self.texts += [str(answer), repr(answer.SerializeToString())]
        if token := getattr(answer, "resume_token", ""):
            self.texts.append(repr(base64.urlsafe_b64decode(token + "===")))
        self.begun.set()

    def fail(self, error: Any) -> None:
        """Take in a refusal, with all that comes with it."""
        self.texts.append(str(error.details()))
        self.metadata(error)
        self.begun.set()

    def metadata(self, call: Any) -> None:
        """Take in what goes before and after an answer."""
        for pairs in (call.initial_metadata(), call.trailing_metadata()):
            self.texts += [f"{pair.key} {pair.value!r}" for pair in pairs or ()]

    def follow(self, stream: Any, thread: threading.Thread) -> None:
        """Read answers in a thread."""
        self._stream, self._thread = stream, thread
        thread.start()

    def stop(self) -> None:
        """End a call of many answers."""
        if self._stream:
            self._stream.cancel()
            self._thread.join(30)

    def check(self, hidden: set[str]) -> None:
        """See that no answer has a word that it must not have, and that was not asked for."""
        asked, told = str(self.request), "\n".join(self.texts)
        found = {word for word in hidden if word in told and word not in asked}
        assert not found, f"{self.method.full_name} tells {found}: {self.request}"


def shared(policy: Policy) -> Policy:
    """A policy whose limits are of the app, so that tokens share scopes with names in them."""
    [errors, *rest] = policy.limit
    errors = msgspec.structs.replace(errors, scope=("app", "division", "endpoint"))
    return msgspec.structs.replace(policy, name="shared", limit=(errors, *rest))


def own(policy: Policy) -> Policy:
    """A policy whose limits are each token's own."""
    limits = [limit for limit in policy.limit if "token" in limit.scope]
    return msgspec.structs.replace(policy, name="own", limit=tuple(limits))


class World:
    """Apps with tokens, about which there is something to tell, and callers with any grants."""

    def __init__(self, replica: Replica, url: str, path: Path) -> None:
        self.path = path
        self.operator = Caller(replica, url, "operator")
        self.stranger = Caller(replica, url, "stranger")
        self.neighbour = Caller(replica, url, "neighbour")
        self.targets: list[Target] = []
        self.names: dict[str, list[str]] = {}

    def grant(self, *grants: tuple[str, str, str]) -> None:
        """Give identities roles on resources; the operator has all."""
        text = "".join(
            f'[[grants]]\nidentities = ["credential:{identity}"]\nrole = "{role}"\n'
            f'resources = ["{one}"]\n'
            for identity, role, one in (("operator", "admin", "*"), *grants)
        )
        draft = self.path.with_suffix(".new")
        draft.write_text(text)
        draft.replace(self.path)

    def do(self, call: str, /, **fields: Any) -> Any:
        """Make a call as the operator."""
        method = next(one for one in METHODS.values() if one.name == call)
        request = message_factory.GetMessageClass(method.input_type)(**fields)
        heard = self.operator.call(method, request)
        assert heard.answers, heard.texts
        return heard.answers[0]

    def add(self, app: str, policy: str) -> Target:
        """Create a token, and let things happen to it."""
        target = Target(app, f"{app}/tokens/t{uuid.uuid4().hex[:10]}")
        self.targets.append(target)
        self.do("CreateToken", token={"name": target.name, "policy": policy})
        hours = {"seconds": 36000}
        secret = target.word("secret")
        self.do("PutGrant", grant=target.grant, refresh_token=secret, last_refresh_age=hours)
        return target

    def happen(self, *targets: Target) -> None:
        """Let tokens have leases, waiters, events and back-offs."""
        for one in targets:
            self._lease(one)
            self.do("AcquireLease", request_id=str(uuid.uuid4()), **one.ask)
        for one in targets:
            self._err(one)
            self._block(one)

    def happen_calmly(self, *targets: Target) -> None:
        """Let tokens have leases and events, and nothing that ends soon or holds others."""
        for one in targets:
            self._lease(one)
            self._err(one)

    def probe(self, target: Target, app: str) -> None:
        """Let a back-off of an app have been over, and the holder of a token be the probe."""
        name, secret = self._lease(target)
        scope, second = {"app": app}, {"seconds": 1}
        self.do("SetBackOff", scope=scope, length=second, reason="a reason")
        request = lease_service_pb2.FollowLeaseRequest(name=name, secret=secret)
        heard = self.operator.listen(METHODS["holdoff.v1.LeaseService.FollowLease"], request)

        def probes() -> bool:
            back_offs = self.do("ListBackOffs", parent=app).back_offs
            return any(one.HasField("probe") for one in back_offs)

        wait_until(probes)
        heard.stop()

    def _lease(self, target: Target) -> tuple[str, str]:
        for _ in range(2):
            offer = self.do(
                "AcquireLease", request_id=str(uuid.uuid4()), wait={}, **target.ask
            ).offer
            target.leases.append(offer.lease.name)
            key = {"name": offer.lease.name, "secret": offer.secret}
            self.do("RenewLease", command_started=True, **key)
            if len(target.leases) == 1:
                self.do("ReleaseLease", unused=True, **key)
        return offer.lease.name, offer.secret

    def _err(self, target: Target) -> None:
        holder, places = target.holder, target.places
        kinds = budget_pb2.EventKind
        for kind, count in ((kinds.EVENT_KIND_ERROR, 9), (kinds.EVENT_KIND_CALL, 100)):
            for scope in places:
                event = {"id": str(uuid.uuid4()), "kind": kind, "scope": scope, "count": count}
                self.do("RecordEvents", events=[{**event, "holder": holder, "status": 400}])

    def _block(self, target: Target) -> None:
        for throttle in ("", "too-many-calls"):
            event: dict[str, Any] = {"id": str(uuid.uuid4()), "scope": target.places[0]}
            event |= {"holder": target.holder, "status": 403, "throttle": throttle}
            event["kind"] = budget_pb2.EventKind.EVENT_KIND_BLOCK
            event["retry_after"] = {"seconds": 3600}
            self.do("RecordEvents", events=[event])

    def look(self, parent: str = "") -> None:
        """Learn the names of budgets and back-offs, and a resume token."""
        budgets = self.do("ListBudgets", parent=parent, page_size=1000).budgets
        self.names["Budget"] = [one.name for one in budgets]
        back_offs = self.do("ListBackOffs", parent=parent).back_offs
        self.names["BackOff"] = [one.name for one in back_offs]
        self.names["Policy"] = ["own", "shared"]
        watch = METHODS["holdoff.v1.LeaseService.WatchLeases"]
        heard = self.operator.listen(watch, lease_service_pb2.WatchLeasesRequest())
        assert heard.begun.wait(30)
        heard.stop()
        answers: list[Any] = heard.answers[-1:]
        self.names["WatchLeases"] = [one.resume_token for one in answers]


@pytest.fixture(scope="module")
def worlds(
    valkey: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], World]]:
    """Make worlds, on a replica of their own."""
    path = tmp_path_factory.mktemp("access") / "access.toml"
    terms = Terms(KeyDirectory(key_directory(tmp_path_factory.mktemp("keys"), "first")).keys)
    path.write_text("grants = []\n")
    exact = presets()["exact-online"]
    policies = {**presets(), "own": own(exact), "shared": shared(exact)}
    made: list[World] = []
    with Replica(valkey.url, access=AccessFile(path), policies=policies, custody=terms) as replica:

        def make() -> World:
            made.append(World(replica, valkey.url, path))
            made[-1].grant()
            return made[-1]

        yield make
        for world in made:
            world.operator.close()
            world.stranger.close()
            world.neighbour.close()


@pytest.fixture(scope="module")
def world(worlds: Callable[[], World]) -> World:
    """Three apps of two tokens: one has tokens that share scopes, one a back-off with a probe."""
    world = worlds()
    for policy in ("own", "shared"):
        app = f"apps/{policy}-{uuid.uuid4().hex[:10]}"
        for _ in range(2):
            world.add(app, policy)
    world.happen(*world.targets)
    app = f"apps/probed-{uuid.uuid4().hex[:10]}"
    for _ in range(2):
        world.add(app, "own")
    world.probe(world.targets[-1], app)
    world.look()
    return world


def hear(caller: Caller, builder: Builder, names: Sequence[str]) -> list[Heard]:
    """Make some calls; those of many answers go on meanwhile."""
    methods = [METHODS[name] for name in names]
    streams = [
        caller.listen(method, builder.request(method))
        for method in methods
        if method.server_streaming
    ]
    heard = [
        caller.call(method, builder.request(method))
        for method in methods
        if not method.server_streaming
    ]
    for one in streams:
        one.begun.wait(0.2)  # there may be nothing that it may hear
        one.stop()
    return [*streams, *heard]


def test_every_call_is_among_them(world: World) -> None:
    """An operator gets an answer to each call that reads, built as below: else nothing is shown."""
    builder = Builder(Random(1).choice, world.targets, world.names)  # noqa: S311 - repeatable
    missing = {name for name, method in METHODS.items() if reads(method)}
    for _ in range(40):
        for heard in hear(world.operator, builder, sorted(missing)):
            if heard.answers:
                missing.discard(heard.method.full_name)
    assert not missing


seeds = st.integers(0, 2**32)
grants_of = st.lists(
    st.tuples(
        st.sampled_from([str(role) for role in Role]),
        st.integers(0, 5),
        st.sampled_from(["token"] * 4 + ["app"]),
    ),
    max_size=3,
)


@settings(max_examples=250 if LONG else 12, **SETTINGS)
@given(chosen=grants_of, seed=seeds)
@example(chosen=[("viewer", 0, "token")], seed=0)
@example(chosen=[("viewer", 2, "token")], seed=0)
@example(chosen=[("viewer", 4, "token")], seed=0)
@example(chosen=[("viewer", 4, "token")], seed=1)
def test_no_answer_names_what_a_caller_has_no_role_on(
    world: World, chosen: list[tuple[str, int, str]], seed: int
) -> None:
    """Whatever a caller was granted and asks: what it hears are names of its own, or its words."""
    grants = [
        (role, world.targets[number].name if kind == "token" else world.targets[number].app)
        for role, number, kind in chosen
    ]
    world.grant(*(("stranger", role, resource) for role, resource in grants))
    resources = {resource for _, resource in grants}
    seen = [one for one in world.targets if {one.name, one.app} & resources]
    hidden = set().union(*(one.secrets for one in world.targets if one not in seen))
    apps = {one.app.removeprefix("apps/") for one in world.targets}
    hidden |= apps - {one.app.removeprefix("apps/") for one in seen}
    builder = Builder(Random(seed).choice, world.targets, world.names)  # noqa: S311 - repeatable
    looks = [name for name, method in METHODS.items() if reads(method)]
    for heard in hear(world.stranger, builder, [*looks, *METHODS, *looks]):
        heard.check(hidden)


_LENGTH = re.compile(r" for at least \w+")
"""In texts."""


def normal(message: Message) -> Message:
    """Leave out of an answer all that time alone changes."""
    for one, value in message.ListFields():
        if one.name == "resume_token" or (
            one.message_type and one.message_type.full_name.startswith("google.protobuf.")
        ):
            message.ClearField(one.name)
        elif one.message_type and not one.message_type.GetOptions().map_entry:
            for inner in value if one.is_repeated else [value]:
                normal(inner)
    return message


def about(world: World, caller: Caller, target: Target) -> dict[str, list[str]]:
    """Ask all that can be asked about a token."""
    found: dict[str, list[str]] = {}
    for choice in range(3):
        builder = Builder(lambda values: values[choice % len(values)], [target], world.names)  # noqa: B023
        for name in sorted(METHODS):
            method = METHODS[name]
            if not reads(method) or name.endswith("Policies"):
                continue
            request = builder.request(method)
            if method.server_streaming:
                heard = caller.listen(method, request)
                assert heard.begun.wait(30)
                heard.stop()
                heard.answers = heard.answers[:1]
            else:
                heard = caller.call(method, request)
            found[f"{name} {choice}"] = [
                _LENGTH.sub("", line)
                for one in heard.answers
                for line in str(normal(one)).splitlines()
            ]
    return found


@settings(max_examples=30 if LONG else 2, **SETTINGS)
@given(role=st.sampled_from([str(role) for role in Role]), seed=seeds)
def test_nothing_done_with_one_token_changes_what_is_said_of_another(
    worlds: Callable[[], World], role: str, seed: int
) -> None:
    """A caller with a role on A alone does what it likes: all answers about B stay as they were."""
    world = worlds()
    app = f"apps/both-{uuid.uuid4().hex[:10]}"
    a, b = world.add(app, "own"), world.add(app, "own")
    world.happen_calmly(a, b)
    world.look(app)
    world.grant(("stranger", role, a.name), ("neighbour", "viewer", b.name))
    before = about(world, world.neighbour, b)
    builder = Builder(Random(seed).choice, [a], world.names)  # noqa: S311 - repeatable
    for _ in range(10):
        hear(world.stranger, builder, [name for name, one in METHODS.items() if not reads(one)])
    after = about(world, world.neighbour, b)
    for name, answer in before.items():
        changes = difflib.unified_diff(answer, after[name], "before", "after", lineterm="", n=9)
        assert not (found := "\n".join(changes)), f"{name}\n{found}"
