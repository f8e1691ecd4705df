"""Alert rules and dashboard: their expressions against what a live coordinator tells."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import click
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import holdoff
from holdoff._timing import DEFAULT_TTL_SECONDS
from holdoff.cli import main
from holdoff.durations import parse_duration
from holdoff.v1 import lease_service_pb2
from holdoff_coordinator.custody.grants import Terms
from holdoff_coordinator.custody.key_files import KeyDirectory
from tests.custodian import key_directory
from tests.harness import Replica, Waiter, ask, refusal, wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.conftest import StartValkey

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "alerts"
RULES: list[dict[str, Any]] = yaml.safe_load((ALERTS / "holdoff.yaml").read_text())["groups"][0][
    "rules"
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "dashboards/holdoff.json").read_text())
TARGETS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
EXPRESSIONS = [*(rule["expr"] for rule in RULES), *TARGETS]


def tool(name: str) -> str:
    """Return a program of Debian's package `prometheus`; skip where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name}: apt-get install -y prometheus")
    return path


class Measured(Replica):
    """A coordinator that serves metrics."""

    def __init__(self, store_url: str, **options: Any) -> None:
        super().__init__(store_url, metrics_listen="127.0.0.1:0", **options)

    def families(self) -> dict[str, set[str]]:
        """Return the labels of each metric that has a sample."""
        url = f"http://{self.coordinator.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=30) as page:
            text = page.read().decode()
        found: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


@pytest.fixture
def told(start_valkey: StartValkey, tmp_path: Path) -> dict[str, set[str]]:
    """Give the metrics of a coordinator at which there is something of every kind to measure."""
    terms = Terms(keys=KeyDirectory(key_directory(tmp_path, "first")).keys)
    with (
        Measured(start_valkey().url, custody=terms) as one,
        holdoff.Client(one.address) as client,
    ):
        client.create_token("apps/custody/tokens/t", policy="quickbooks")
        client.grants.put(
            "apps/custody/tokens/t",
            client_id="id",
            refresh_token="r",
            api_hosts=["quickbooks.api.intuit.com"],
        )
        token = one.create_token(3600)
        client.record_error(token, endpoint="x", status=400)
        client.set_back_off(token, 60, "test", endpoint="y")
        lease = one.hold(token, ttl=60).lease.name
        wrong = lease_service_pb2.RenewLeaseRequest(name=lease, secret="0" * 64)
        assert refusal(one.leases.RenewLease, wrong) == "WRONG_SECRET"
        waiter = Waiter(one, ask(token))
        waiter.waiting(30)
        found = one.families()
        waiter.vanish()
        return found


def test_every_metric_and_label_of_an_expression_is_there(told: dict[str, set[str]]) -> None:
    """Fails when an alert or a panel names a metric, or a label of it, that nobody tells."""
    scraped = {"instance", "job", "namespace"}  # Prometheus adds them
    unknown = []
    for expression in EXPRESSIONS:
        for name, braces in re.findall(r"(holdoff_[a-z_]+)(\{[^}]*\})?", expression):
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces))
            if name not in told and name != "holdoff_tokens_not_shown":
                unknown.append(name)
            elif not asked <= told.get(name, asked) | scraped:
                unknown.append(f"{name}{braces}")
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            labels = {label.strip() for label in group.split(",")} - {"le"} - scraped
            names = re.findall(r"holdoff_[a-z_]+", expression)
            if not any(labels <= told.get(name, labels) for name in names):
                unknown.append(f"by ({group})")
    assert unknown == []


def test_every_metric_is_in_the_dashboard(told: dict[str, set[str]]) -> None:
    """Fails when a metric is told that no panel shows and no alert asks for: who needs it?"""
    families = {
        re.sub(r"_(bucket|count|sum|created)$", "", name)
        for name in told
        if name.startswith("holdoff_")
    }
    used = " ".join(EXPRESSIONS)
    assert [name for name in sorted(families) if name not in used] == []


def test_every_alert_has_its_entry_in_the_runbook() -> None:
    """Fails when an entry is missing, is left over, or has a command that the CLI does not know."""
    entries = re.split(r"^## ", (DEPLOY / "RUNBOOK.md").read_text(), flags=re.MULTILINE)[1:]
    names = [entry.split("\n", 1)[0] for entry in entries]
    assert names == [rule["alert"] for rule in RULES]
    for rule in RULES:
        notes = rule["annotations"]
        assert notes["runbook_url"] == f"deploy/RUNBOOK.md#{rule['alert'].lower()}"
        assert notes["summary"]
        assert notes["description"].endswith(".")
        assert rule["labels"]["severity"] in ("warning", "critical")
    commands = re.findall(r"^\$ holdoff (.*)$|`holdoff ([^`]*)`", "\n".join(entries), re.MULTILINE)
    told = [one or other.replace("\n", " ") for one, other in commands]
    told = [command for command in told if " " in command]  # not `holdoff run` as a word
    assert len(told) > 20
    for command in told:
        words = (
            command.replace("APP", "a").replace("TOKEN", "t").replace("BUDGET", "apps/a/budgets/b")
        )
        words = words.replace("BACK-OFF", "apps/a/backOffs/b")
        words = words.replace("LEASE", "apps/a/tokens/t/leases/1")
        parse(re.findall(r'"[^"]*"|\S+', words))


def parse(words: list[str]) -> None:
    """Read a command line without carrying it out."""
    group: click.Command = main
    context = main.make_context("holdoff", list(words), resilient_parsing=False)
    while isinstance(group, click.Group):
        name, command, words = group.resolve_command(context, words)
        assert command is not None
        context = command.make_context(name, list(words), parent=context)
        group = command


def test_every_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    """A story for each, by promtool.

    Fails when a threshold, a label, a duration or a word of an expression is another.
    """
    promtool = tool("promtool")
    subprocess.run([promtool, "check", "rules", ALERTS / "holdoff.yaml"], check=True)
    stories = ALERTS / "stories.yaml"
    done = subprocess.run(
        [promtool, "test", "rules", stories], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = set(re.findall(r'alertname="(\w+)"', stories.read_text()))
    assert told == {rule["alert"] for rule in RULES}


def test_what_ends_leases_is_told_before_they_end() -> None:
    """Fails when a scrape, an evaluation and `for` take longer than half of a default TTL."""
    group = yaml.safe_load((ALERTS / "holdoff.yaml").read_text())["groups"][0]
    compose = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    chart = yaml.safe_load((DEPLOY / "chart" / "values.yaml").read_text())
    scrapes = [one["scrape_interval"] for one in compose["scrape_configs"]]
    scrapes.append(chart["metrics"]["serviceMonitor"]["interval"])
    looks = [compose["global"]["evaluation_interval"], group["interval"]]
    for rule in group["rules"]:
        if rule["alert"] in {"HoldoffDown", "HoldoffStoreAway"}:
            steps = [max(map(parse_duration, scrapes)), max(map(parse_duration, looks))]
            assert sum(steps) + parse_duration(rule["for"]) <= DEFAULT_TTL_SECONDS / 2


def test_panels_are_whole() -> None:
    """Fails when panels overlap or share an id, or one has no unit, title or source."""
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & places, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        places |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


class Prometheus:
    """A real Prometheus that scrapes coordinators, each in a namespace, and evaluates our rules.

    It looks every second, and the alert that is named needs not last longer to fire.
    """

    def __init__(
        self, folder: Path, targets: Mapping[str, Sequence[Measured]], at_once: str = ""
    ) -> None:
        rules = yaml.safe_load((ALERTS / "holdoff.yaml").read_text())
        for group in rules["groups"]:
            group["interval"] = "1s"
            for rule in group["rules"]:
                if rule["alert"] == at_once:
                    rule["for"] = "1s"
        (folder / "holdoff.yaml").write_text(yaml.safe_dump(rules))
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["holdoff.yaml"],
            "scrape_configs": [
                {
                    "job_name": "holdoff",
                    "static_configs": [
                        {
                            "targets": [one.coordinator.metrics_address for one in replicas],
                            "labels": {"namespace": namespace},
                        }
                        for namespace, replicas in targets.items()
                    ],
                }
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        self._folder = folder
        self._port = free_port()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={self._folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={self._folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)

    def get(self, path: str) -> Any:
        """Ask its API; None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as page:
                return json.load(page)["data"]
        except OSError:
            return None

    def query(self, expression: str) -> Any:
        """Return the samples of an expression."""
        found = self.get(f"/api/v1/query?query={quote(expression)}")
        return found["result"] if found else []

    def firing(self) -> list[Any]:
        """Return the alerts that fire."""
        found = (self.get("/api/v1/alerts") or {}).get("alerts", ())
        return [alert for alert in found if alert["state"] == "firing"]


@pytest.mark.timeout(300)
def test_first_events_and_a_namespace_that_is_down_fire(
    tmp_path: Path, start_valkey: StartValkey
) -> None:
    """One refused call, three lost leases, and production down beside a staging that is alive.

    Fails when a counter begins at 1, and when staging speaks for production.
    """
    with Measured(start_valkey().url) as staging, Measured(start_valkey().url) as production:
        targets = {"staging": [staging], "prod": [production]}
        with Prometheus(tmp_path, targets, at_once="HoldoffDown") as prometheus:

            def told(kind: str) -> Any:
                events = f'holdoff_audit_events_total{{namespace="prod", kind="{kind}"}}'
                return prometheus.query(f"{events} == 0")

            def names() -> set[tuple[str, str]]:
                found = [one["labels"] for one in prometheus.firing()]
                return {(one["alertname"], one["namespace"]) for one in found}

            wait_until(lambda: told("call_refused"), 120)
            tokens = [
                production.create_token(0, name=f"apps/e2e/tokens/t{number}") for number in range(3)
            ]
            wait_until(lambda: told("lease_lost"), 120)
            leases = [production.hold(token, ttl=1).lease.name for token in tokens]
            wrong = lease_service_pb2.RenewLeaseRequest(name=leases[0], secret="0" * 64)
            assert refusal(production.leases.RenewLease, wrong) in {"WRONG_SECRET", "LEASE_LOST"}
            expected = {("HoldoffCallsRefused", "prod"), ("HoldoffLeasesLost", "prod")}
            wait_until(lambda: names() == expected, 120)
            production.stop()
            wait_until(lambda: ("HoldoffDown", "prod") in names(), 120)
            assert ("HoldoffDown", "staging") not in names()


@pytest.mark.timeout(300)
def test_prometheus_scrapes_two_replicas_under_load(
    tmp_path: Path, start_valkey: StartValkey
) -> None:
    """A real Prometheus evaluates every expression, and an alert fires from end to end.

    Fails when a page is none that Prometheus reads, when an expression has an error there, and when
    two replicas that tell the same are added up.
    """
    url = start_valkey().url
    with Measured(url) as first, Measured(url) as second:
        prometheus = Prometheus(tmp_path, {"prod": [first, second]})

        def under_load(condition: Callable[[], Any]) -> Any:
            """Wait until a condition holds, and let both replicas give leases meanwhile."""

            def look() -> Any:
                for client in (one, other):
                    client.acquire(token, wait_seconds=30).release()
                return condition()

            return wait_until(look, 120)

        with prometheus:
            token = first.create_token(0.1, name="apps/e2e/tokens/t")
            with holdoff.Client(first.address) as one, holdoff.Client(second.address) as other:
                for client in (one, other):
                    client.record_error(token, endpoint="x", status=400, count=4)
                under_load(lambda: prometheus.query("sum(up) == 2"))
                spent = 'sum(max by (app, limit) (holdoff_budgets{state="spent"}))'
                [found] = under_load(lambda: prometheus.query(f"{spent} > 0"))
                assert found["value"][1] == "1"
                granted = 'sum(holdoff_audit_events_total{kind="lease_granted"})'
                under_load(lambda: prometheus.query(f"{granted} > 5"))
                [alert] = under_load(prometheus.firing)
            assert alert["labels"]["alertname"] == "HoldoffBudgetSpent"
            assert alert["annotations"]["summary"] == "A budget 'errors' of apps/e2e is spent"
            for expression in EXPRESSIONS:
                whole = re.sub(r"\$(app|job|namespace)", ".*", expression)
                whole = whole.replace("$__rate_interval", "1m")
                assert prometheus.get(f"/api/v1/query?query={quote(whole)}"), expression
