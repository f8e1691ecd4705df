"""Alert rules and dashboard: their expressions against what a live coordinator tells."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import holdoff
from holdoff.cli import main
from tests.e2e.service import Service
from tests.harness import wait_until
from tests.stores import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartValkey

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "alerts"
RULES: list[dict[str, Any]] = yaml.safe_load((ALERTS / "holdoff.yaml").read_text())["groups"][0][
    "rules"
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "dashboards/holdoff.json").read_text())
TARGETS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
EXPRESSIONS = [*(rule["expr"] for rule in RULES), *TARGETS]

EXAMPLES = {
    "APP": "a",
    "TOKEN": "t",
    "BUDGET": "apps/a/budgets/b",
    "BACK-OFF": "apps/a/backOffs/b",
    "LEASE": "apps/a/tokens/t/leases/1",
}


def tool(name: str) -> str:
    """Return a program of Debian's package `prometheus`; skip where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name}: apt-get install -y prometheus")
    return path


class Measured(Service):
    """A coordinator that serves metrics."""

    def __init__(self, folder: Path, redis_url: str = "") -> None:
        super().__init__(folder, redis_url)
        self.metrics = f"127.0.0.1:{free_port()}"
        self.environment["HOLDOFF_METRICS_LISTEN"] = self.metrics

    def families(self) -> dict[str, set[str]]:
        """Return the labels of each metric that has a sample."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as page:
            text = page.read().decode()
        found: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Measured]:
    """Give a coordinator at which there is something of every kind to measure."""
    with Measured(tmp_path) as one:
        token = one.create_token("t", interval="1h")
        with holdoff.Client(one.address) as client:
            client.record_error(token, endpoint="x", status=400)
            client.set_back_off(token, 60, "test", endpoint="y")
            client.acquire(token, wait_seconds=0)
            with pytest.raises(holdoff.errors.WrongSecret):
                client._call(wrong_renewal(client.get_token(token).lease))
            waiting = one.start_holdoff("run", "--token", token, "--", "true")
            wait_until(lambda: list(client.list_waiters(token)))
            yield one
            waiting.kill()
            waiting.communicate()


def wrong_renewal(lease: str) -> Any:
    """Build a renewal without its secret."""
    from holdoff import _calls  # noqa: PLC0415 - no user would do that
    from holdoff.v1 import lease_service_pb2  # noqa: PLC0415

    request = lease_service_pb2.RenewLeaseRequest(name=lease, secret="0" * 64)
    return _calls.Call(
        "/holdoff.v1.LeaseService/RenewLease",
        request,
        lease_service_pb2.RenewLeaseResponse,
        lambda response: response,
    )


def test_every_metric_and_label_of_an_expression_is_there(service: Measured) -> None:
    """Fails when an alert or a panel names a metric, or a label of it, that nobody tells."""
    told = service.families()
    scraped = {"instance"}  # Prometheus adds it
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


def test_every_metric_is_in_the_dashboard(service: Measured) -> None:
    """Fails when a metric is told that no panel shows and no alert asks for: who needs it?"""
    families = {
        re.sub(r"_(bucket|count|sum|created)$", "", name)
        for name in service.families()
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


@pytest.mark.timeout(120)
def test_prometheus_scrapes_two_replicas_under_load(
    tmp_path: Path, start_valkey: StartValkey
) -> None:
    """A real Prometheus evaluates every expression, and an alert fires from end to end.

    Fails when a page is none that Prometheus reads, when an expression has an error there, and when
    two replicas that tell the same are added up.
    """
    prometheus, url = tool("prometheus"), start_valkey().url
    with Measured(tmp_path / "1", url) as first, Measured(tmp_path / "2", url) as second:
        port = free_port()
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS / "holdoff.yaml")],
            "scrape_configs": [
                {
                    "job_name": "holdoff",
                    "static_configs": [{"targets": [first.metrics, second.metrics]}],
                }
            ],
        }
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={tmp_path / 'prometheus.yaml'}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def ask(path: str) -> Any:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as page:
                    return json.load(page)["data"]
            except OSError:
                return None

        def query(expression: str) -> Any:
            found = ask(f"/api/v1/query?query={quote(expression)}")
            return found["result"] if found else []

        try:
            token = first.create_token("t", interval="0.1s")
            stop = time.monotonic() + 8
            with holdoff.Client(first.address) as one, holdoff.Client(second.address) as other:
                for client in (one, other):
                    client.record_error(token, endpoint="x", status=400, count=4)
                while time.monotonic() < stop:
                    for client in (one, other):
                        client.acquire(token, wait_seconds=10).release()
            wait_until(lambda: query("sum(up) == 2"), 20)
            spent = 'sum(max by (app, limit) (holdoff_budgets{state="spent"}))'
            [found] = wait_until(lambda: query(f"{spent} == 1"), 20)
            assert found["value"][1] == "1"
            granted = 'sum(holdoff_audit_events_total{kind="lease_granted"})'
            assert float(query(granted)[0]["value"][1]) > 5

            def firing() -> list[Any]:
                found = (ask("/api/v1/alerts") or {}).get("alerts", ())
                return [alert for alert in found if alert["state"] == "firing"]

            [alert] = wait_until(firing, 20)
            assert alert["labels"]["alertname"] == "HoldoffBudgetSpent"
            assert alert["annotations"]["summary"] == "A budget 'errors' of apps/e2e is spent"
            for expression in EXPRESSIONS:
                whole = expression.replace("$__rate_interval", "1m").replace("$app", ".*")
                assert ask(f"/api/v1/query?query={quote(whole)}"), expression
        finally:
            process.terminate()
            process.wait(timeout=20)
