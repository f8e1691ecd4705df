"""`holdoff policy`: the rules of providers as people read them, and files checked."""

# ruff: noqa: D102, N802 - the methods of a servicer are named and described by the service

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import TYPE_CHECKING

import grpc
import msgspec
import pytest
from click.testing import CliRunner, Result

from holdoff.cli import main
from holdoff.policies import presets, read_policy
from holdoff.v1 import policy_service_pb2, policy_service_pb2_grpc
from holdoff_coordinator.policies import policy_message

if TYPE_CHECKING:
    from pathlib import Path

EXACT = (files("holdoff.policies") / "exact-online.toml").read_text()
MINE = EXACT.replace('name = "exact-online"', 'name = "mine"', 1)

Holdoff = Callable[..., Result]


class Policies(policy_service_pb2_grpc.PolicyServiceServicer):
    """Knows a preset and a policy of the operator, which has no limits and sees no errors."""

    def __init__(self) -> None:
        exact = presets()["exact-online"]
        mine = msgspec.structs.replace(
            exact, name="mine", title="", limit=(), throttle=(), output=None, endpoint=None
        )
        self.policies = {one.name: policy_message(one) for one in (exact, mine)}
        self.others = {name: policy_message(one) for name, one in presets().items()}
        self.newer = policy_message(msgspec.structs.replace(exact, name="newer"))
        self.newer.when_quiet = 99  # type: ignore[assignment] # of a newer release

    def GetPolicy(
        self, request: policy_service_pb2.GetPolicyRequest, context: grpc.ServicerContext
    ) -> policy_service_pb2.GetPolicyResponse:
        del context
        policy = (self.others | self.policies).get(request.name, self.newer)
        return policy_service_pb2.GetPolicyResponse(policy=policy)

    def ListPolicies(
        self, request: policy_service_pb2.ListPoliciesRequest, context: grpc.ServicerContext
    ) -> policy_service_pb2.ListPoliciesResponse:
        del request, context
        return policy_service_pb2.ListPoliciesResponse(policies=self.policies.values())


@pytest.fixture
def holdoff() -> Iterator[Holdoff]:
    """Run the command line against a coordinator with these policies."""
    server = grpc.server(ThreadPoolExecutor(2))
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(Policies(), server)
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    def run(*args: str, **environment: str) -> Result:
        runner = CliRunner(env={"HOLDOFF_OUTPUT": None, "HOLDOFF_ENDPOINT": endpoint})
        return runner.invoke(main, args, prog_name="holdoff", env=environment)

    yield run
    server.stop(None).wait()


def test_the_list_reads_well(holdoff: Holdoff) -> None:
    """A line a policy: who, how often a token may be refreshed, what is limited, whose it is."""
    result = holdoff("policy", "list")
    assert result.exit_code == 0, result.output
    rows = [[one.strip() for one in row.split("  ") if one] for row in result.stdout.splitlines()]
    limits = "errors, token-requests, calls-a-minute, calls-a-day"
    assert rows == [
        ["POLICY", "PROVIDER", "INTERVAL", "LIMITS", "FROM"],
        ["exact-online", presets()["exact-online"].title, "9m30s", limits, "preset"],
        ["mine", "-", "9m30s", "-", "a file of the operator"],
    ]
    document = json.loads(holdoff("policy", "list", "-o", "json").stdout)
    assert [one["name"] for one in document["policies"]] == ["exact-online", "mine"]


def test_show_tells_the_rules(holdoff: Holdoff) -> None:
    """Each limit in a line, with what counts and what is kept in hand; and how blocks grow."""
    shown = holdoff("policy", "show", "exact-online").stdout
    for words in (
        "10 errors (400, 401, 403, 404) in 1h for each app + token + division + endpoint, margin",
        "200 token requests in 1d for each app + token",
        "1h of the app, then times 2 up to",
        "(?P<endpoint>",
        "refresh tokens           until used",
        "early margin             28s",
        "token URL                https://start.exactonline.co.uk/api/oauth2/token",
        "API host                 start.exactonline.fr",
        "client authentication    body, basic",
        "authorization scheme     Bearer",
        "429: the app + division, as Retry-After or X-RateLimit-Minutely-Reset or",
        "X-RateLimit-Reset says, else for 1m",
        "403, body with",
        "itgeneor228 = 403, itgeneor229 = 429",
        "back-off, a run          is paused",
        "error in output",
        "preset",
    ):
        assert words in shown
    document = json.loads(holdoff("policy", "show", "exact-online", "-o", "json").stdout)
    assert document["limits"][0]["most"] == "10"
    assert document["throttles"][0]["scope"] == ["app", "division"]
    assert document["output"]["codes"]["itgenexl150"] == 429
    assert document["when_quiet"] == "WHEN_QUIET_PAUSE"
    assert document["refresh"]["early_margin"] == "28s"
    assert document["refresh"]["rotation"] == "ROTATION_UNTIL_USED"
    assert document["oauth"]["client_authentication"] == ["body", "basic"]
    mine = holdoff("policy", "show", "mine").stdout
    assert "a file of the operator" in mine
    for words in ("limit", "throttle", "in output", "endpoint path", "provider"):
        assert words not in mine


def test_show_tells_what_few_policies_have(holdoff: Holdoff) -> None:
    """Calls at a time, the lives of a grant, and all statuses of a class as one word."""
    quickbooks = holdoff("policy", "show", "quickbooks").stdout
    for words in (
        "absolute life",
        "concurrency calls-at-a-time",
        "10 calls at a time for each app + division; not enforced yet",
    ):
        assert words in quickbooks
    assert "1825d" in quickbooks
    assert "100 errors (4xx, 5xx) in 1m for each app" in holdoff("policy", "show", "eve-esi").stdout
    assert "30d" in holdoff("policy", "show", "shopify").stdout
    document = json.loads(holdoff("policy", "show", "quickbooks", "-o", "json").stdout)
    assert document["concurrency_limits"] == [
        {"name": "calls-at-a-time", "most": "10", "scope": ["app", "division"]}
    ]


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_policy_is_printed_as_a_file(holdoff: Holdoff, tmp_path: Path, name: str) -> None:
    """`show -o toml` prints a file that means the same, and passes the check with another name."""
    shown = holdoff("policy", "show", name, "--output", "toml")
    assert shown.exit_code == 0, shown.output
    file = tmp_path / "mine.toml"
    file.write_text(shown.stdout)
    assert read_policy(file) == presets()[name]
    file.write_text(shown.stdout.replace(f'name = "{name}"', 'name = "mine"', 1))
    assert holdoff("policy", "check", str(file)).exit_code == 0
    commented = tmp_path / "commented.toml"
    commented.write_text(re.sub(r"^# (?=\w+ = |\[)", "", shown.stdout, flags=re.MULTILINE))
    tomllib.loads(commented.read_text())


def test_an_unknown_value_is_printed_as_such(holdoff: Holdoff, tmp_path: Path) -> None:
    """Fails when a value of a newer coordinator ends the command, or passes the check."""
    shown = holdoff("policy", "show", "newer", "-o", "toml")
    assert shown.exit_code == 0
    file = tmp_path / "newer.toml"
    file.write_text(shown.stdout)
    refused = holdoff("policy", "check", str(file))
    assert refused.exit_code == 64
    assert "when_quiet: Invalid enum value 'unknown-99'" in refused.stderr


def completed(holdoff: Holdoff, line: str, **environment: str) -> list[str]:
    """Return what zsh is told when Tab is pressed after the line: names and descriptions."""
    result = holdoff(
        _HOLDOFF_COMPLETE="zsh_complete",
        COMP_WORDS=f"holdoff {line}",
        COMP_CWORD=str(len(line.split(" "))),
        **environment,
    )
    return [one for one in result.stdout.splitlines() if one != "plain"]


@pytest.mark.parametrize(
    "command",
    [
        "policy show",
        "token create apps/a/tokens/t --policy",
        "token update apps/a/tokens/t --policy",
    ],
)
def test_names_of_policies_are_completed(holdoff: Holdoff, command: str) -> None:
    """Those that the coordinator knows; the presets where there is none.

    Fails when a coordinator that is away leaves nothing to choose from.
    """
    assert completed(holdoff, f"{command} m") == ["mine", "_"]
    title = presets()["exact-online"].title
    nowhere = {"HOLDOFF_ENDPOINT": "127.0.0.1:1"}
    assert completed(holdoff, f"{command} exact", **nowhere)[:2] == ["exact-online", title]
    assert "xero" in completed(holdoff, f"{command} ", **nowhere)


def test_what_a_newer_coordinator_says_is_shown(holdoff: Holdoff) -> None:
    """Fails when a value that this release does not know ends the command."""
    shown = holdoff("policy", "show", "newer")
    assert shown.exit_code == 0
    assert "unknown (99)" in shown.stdout


def test_a_right_file_passes(holdoff: Holdoff, tmp_path: Path) -> None:
    """It is said which policy a file holds."""
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    result = holdoff("policy", "check", str(path))
    assert (result.exit_code, result.stdout) == (0, f"{path}: policy mine, 4 limits\n")


def test_every_file_is_checked(holdoff: Holdoff, tmp_path: Path) -> None:
    """Each wrong one is told with its line, on stderr, and the right ones are too.

    Fails when the first mistake ends the check, or a wrong file among right ones ends with 0.
    """
    good, bad, worse = (tmp_path / name for name in ("good.toml", "bad.toml", "worse.toml"))
    good.write_text(MINE)
    bad.write_text(EXACT.replace("most = 10 ", "most = 0 ", 1))
    worse.write_bytes(b"name = \n\xff")
    missing = tmp_path / "missing.toml"
    result = holdoff("policy", "check", *map(str, (bad, good, worse, missing)))
    assert result.exit_code == 64
    assert result.stdout == f"{good}: policy mine, 4 limits\n"
    first, second, third = result.stderr.splitlines()
    line = next(n for n, text in enumerate(EXACT.splitlines(), 1) if "most = 10 " in text)
    assert f"bad.toml:{line}: limit[0].most: Expected `int` >= 1" in first
    assert "worse.toml:2: is not UTF-8" in second
    assert f"{missing}: No such file" in third


def test_a_name_is_given_once(holdoff: Holdoff, tmp_path: Path) -> None:
    """A file with the name of a preset, or of another file, is wrong for the coordinator too."""
    one, other, preset = (tmp_path / name for name in ("one.toml", "other.toml", "preset.toml"))
    for path, text in ((one, MINE), (other, MINE), (preset, EXACT)):
        path.write_text(text)
    result = holdoff("policy", "check", *map(str, (one, other, preset)))
    assert (result.exit_code, result.stdout) == (64, f"{one}: policy mine, 4 limits\n")
    assert "other.toml:1: there is a policy mine already" in result.stderr
    assert "preset.toml:1: there is a preset exact-online already" in result.stderr


def test_check_needs_a_file(holdoff: Holdoff) -> None:
    """Without one it is wrong usage."""
    assert holdoff("policy", "check").exit_code == 64
