"""The chart, rendered by Helm's own library, and what differs between two renderings."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "chart"

MONITORING = (
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
)


@dataclass(frozen=True)
class Rendering:
    """What an installation would create, by `Kind/name`, and what it says to the user."""

    manifests: dict[str, dict[str, Any]]
    notes: str

    def pod(self) -> dict[str, Any]:
        """Return the specification of the coordinator's pod."""
        (workload,) = (
            manifest
            for manifest in self.manifests.values()
            if manifest["kind"] in {"Deployment", "StatefulSet"}
        )
        pod: dict[str, Any] = workload["spec"]["template"]["spec"]
        return pod

    def flat(self) -> dict[str, Any]:
        """Return every leaf by its path, such as `Service/holdoff spec.ports[grpc].port`."""
        return {
            path: leaf
            for key, manifest in self.manifests.items()
            for path, leaf in _leaves(manifest, f"{key} ")
        }


@functools.cache
def helm() -> Any:
    """Import Helm's library; skip the test where it has no wheel."""
    reason = "helm-python-sdk has no wheel here: the chart is not rendered"
    return pytest.importorskip("helm_python", reason=reason)


@functools.cache
def _chart() -> Any:
    return helm().Chart.load(CHART)


def render(
    values: Mapping[str, Any] | None = None, *, kinds: tuple[str, ...] = MONITORING
) -> Rendering:
    """Render the chart as `helm install holdoff` would, in `prod` of a cluster with these kinds."""
    options = {"name": "holdoff", "namespace": "prod", "api_versions": kinds}
    # `Chart.render` has no argument for the kinds that a cluster knows; the library has.
    rendered = json.loads(
        helm()._native.call_string(
            "helm_render", _chart()._raw(), json.dumps(values or {}), json.dumps(options)
        )
    )
    notes = rendered.pop("holdoff/templates/NOTES.txt")
    manifests = [
        one
        for text in rendered.values()
        for one in yaml.load_all(text, yaml.CSafeLoader)  # ten times as fast as the one in Python
        if one
    ]
    return Rendering({f"{one['kind']}/{one['metadata']['name']}": one for one in manifests}, notes)


def differences(one: Rendering, other: Rendering) -> set[str]:
    """Return the paths of the leaves that only one of two has, or that differ."""
    missing = object()
    old, new = one.flat(), other.flat()
    return {path for path in old | new if old.get(path, missing) != new.get(path, missing)}


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from _leaves(child, f"{path}{'' if path.endswith(' ') else '.'}{key}")
    elif isinstance(node, list) and node:
        for position, child in enumerate(node):
            # Whatever has a name is found by it; an argument is its own name.
            name = child.get("name", position) if isinstance(child, dict) else child
            yield from _leaves(child, f"{path}[{name}]")
    else:
        yield path, node
