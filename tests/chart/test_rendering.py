"""What the chart renders: valid, safe, and changed by a value only where it should be."""

from __future__ import annotations

import functools
import importlib
import json
import re
from fnmatch import fnmatchcase
from typing import Any

import pytest
import yaml

import chart_values
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US
from tests.chart.helm import CHART, DEPLOY, Rendering, differences, helm, render
from tests.harness import LONG

OTHERS = {"ServiceMonitor", "PrometheusRule", "Certificate", "GRPCRoute"}
"""Kinds that Kubernetes itself does not have, so that no schema of its own describes them."""

EXTERNAL = {"store": {"mode": "external"}}
SECRET = {"name": "s"}
POD = "*/holdoff spec.template.spec"
ARGS = f"{POD}.containers?coordinator?.args"
CHECKSUM = "*/holdoff spec.template.metadata.annotations.checksum/"


def mounted(folder: str) -> tuple[str, str]:
    """Return the patterns of a volume and its place in the container."""
    return f"{POD}.volumes?{folder}?*", f"{POD}.containers?coordinator?.volumeMounts?{folder}?*"


def argument(name: str) -> str:
    """Return the pattern of an argument."""
    return f"{ARGS}?{name}*"


# Values, and what they change, compared with the rendering for the mode of store alone.
GRANT = {"identities": ["credential:x"], "role": "holder", "resources": ["apps/a"]}
TOGGLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "replicas": (
        EXTERNAL | {"replicaCount": 3},
        ("Deployment/holdoff spec.replicas", "PodDisruptionBudget/holdoff *"),
    ),
    "no disruption budget": (
        EXTERNAL | {"replicaCount": 3, "podDisruptionBudget": {"enabled": False}},
        ("Deployment/holdoff spec.replicas",),
    ),
    "autoscaling": (
        EXTERNAL | {"autoscaling": {"enabled": True}},
        (
            "Deployment/holdoff spec.replicas",
            "HorizontalPodAutoscaler/holdoff *",
            "PodDisruptionBudget/holdoff *",
        ),
    ),
    "no spread": (
        EXTERNAL | {"topologySpread": {"enabled": False}},
        (f"{POD}.topologySpreadConstraints*",),
    ),
    "strict spread": (
        EXTERNAL | {"topologySpread": {"whenUnsatisfiable": "DoNotSchedule"}},
        (f"{POD}.topologySpreadConstraints*whenUnsatisfiable",),
    ),
    "volume": (
        {"store": {"embedded": {"size": "5Gi", "storageClassName": "fast"}}},
        ("StatefulSet/holdoff spec.volumeClaimTemplates*",),
    ),
    "store url": (
        {"store": {"mode": "external", "external": {"url": "rediss://store:6380/1"}}},
        (argument("--redis-url="),),
    ),
    "store url in a secret": (
        {"store": {"mode": "external", "urlSecret": SECRET}},
        (argument("--redis-url"), argument("--redis-url-file="), *mounted("store-url")),
    ),
    "store password": (
        {"store": {"mode": "external", "passwordSecret": SECRET}},
        (argument("--redis-password-file="), *mounted("store-password")),
    ),
    "store with TLS": (
        {"store": {"mode": "cluster", "tls": {"caSecret": SECRET, "certificateSecret": "c"}}},
        (
            argument("--redis-ca-file="),
            argument("--redis-cert-file="),
            argument("--redis-key-file="),
            *mounted("store-ca"),
            *mounted("store-certificate"),
        ),
    ),
    "Sentinels' password": (
        {"store": {"mode": "sentinel", "sentinel": {"passwordSecret": SECRET}}},
        (argument("--redis-sentinel-password-file="), *mounted("sentinel-password")),
    ),
    "assume": (
        {"store": {"mode": "external", "assume": "noeviction,fsync=always"}},
        (argument("--assume="),),
    ),
    "copies": (
        {"store": {"mode": "sentinel", "waitReplicas": 1, "waitFsync": True, "waitSeconds": 2.5}},
        (argument("--wait-replicas="), argument("--wait-fsync"), argument("--wait-seconds=")),
    ),
    "secrets of another mode": (
        {"store": {"passwordSecret": SECRET, "urlSecret": SECRET, "tls": {"caSecret": SECRET}}},
        (),
    ),
    "quarantine": ({"quarantineSeconds": 1800}, (argument("--quarantine-seconds="),)),
    "drain": (
        {"drainSeconds": 60},
        (argument("--drain-seconds="), f"{POD}.terminationGracePeriodSeconds"),
    ),
    "limits": ({"limits": {"watches": 20}}, (argument("--limit="),)),
    "log": ({"logFormat": "console"}, (argument("--log-format="),)),
    "TLS by secret": (
        {"tls": {"secretName": "t"}},
        (
            argument("--tls-cert-file="),
            argument("--tls-key-file="),
            *mounted("tls"),
            "Service/* spec.ports?grpc?.appProtocol",
            "Pod/holdoff-test spec.*volume*?ca?*",
            "Pod/holdoff-test spec.*env?HOLDOFF_CA_FILE?*",
        ),
    ),
    "TLS by cert-manager": (
        {"tls": {"certManager": {"enabled": True, "issuerRef": {"name": "i"}}}},
        (
            "Certificate/holdoff *",
            argument("--tls-cert-file="),
            argument("--tls-key-file="),
            *mounted("tls"),
            "Service/* spec.ports?grpc?.appProtocol",
            "Pod/holdoff-test spec.*volume*?ca?*",
            "Pod/holdoff-test spec.*env?HOLDOFF_CA_FILE?*",
        ),
    ),
    "mutual TLS": (
        {
            "tls": {"secretName": "t", "clientCA": {"secretName": "c"}},
            "test": {"certificateSecret": "c"},
        },
        (
            argument("--insecure"),
            argument("--tls-*-file="),
            *mounted("tls"),
            *mounted("client-ca"),
            argument("--client-identity="),
            "Service/* spec.ports?grpc?.appProtocol",
            "Pod/holdoff-test spec.*volume*",
            "Pod/holdoff-test spec.*env?HOLDOFF_*_FILE?*",
        ),
    ),
    "mutual TLS, no certificate to test with": (
        {"tls": {"secretName": "t", "clientCA": {"secretName": "c"}}},
        (
            argument("--insecure"),
            argument("--tls-*-file="),
            *mounted("tls"),
            *mounted("client-ca"),
            argument("--client-identity="),
            "Service/* spec.ports?grpc?.appProtocol",
            "Pod/holdoff-test *",
        ),
    ),
    "access": (
        {
            "tls": {"secretName": "t"},
            "access": {"grants": [GRANT]},
            "test": {"credentialSecret": SECRET},
        },
        (
            argument("--access-file="),
            argument("--insecure"),
            argument("--tls-*-file="),
            *mounted("tls"),
            *mounted("access"),
            "ConfigMap/holdoff-access *",
            "Service/* spec.ports?grpc?.appProtocol",
            "Pod/holdoff-test spec.*volume*",
            "Pod/holdoff-test spec.*env?HOLDOFF_*_FILE?*",
        ),
    ),
    "custody": (
        {"custody": {"keysSecret": "k"}},
        (
            argument("--custody-key-dir="),
            argument("--custody-spool-dir="),
            f"{POD}.terminationGracePeriodSeconds",
            *mounted("custody-keys"),
        ),
    ),
    "custody with an external store": (
        EXTERNAL
        | {"custody": {"keysSecret": "k", "networks": ["10.1.0.0/16"], "caSecret": SECRET}},
        (
            argument("--custody-*="),
            f"{POD}.terminationGracePeriodSeconds",
            *mounted("custody-keys"),
            *mounted("custody-ca"),
            *mounted("spool"),
        ),
    ),
    "custody without keys": ({"custody": {"networks": ["fd00::/8"], "caSecret": SECRET}}, ()),
    "policies": (
        {"policies": {"ours": 'name = "ours"\n'}},
        (
            argument("--policy-dir="),
            *mounted("policies"),
            f"{CHECKSUM}policies",
            "ConfigMap/holdoff-policies *",
        ),
    ),
    "service": (
        {"service": {"type": "LoadBalancer", "port": 443, "annotations": {"a": "b"}}},
        (
            "Service/holdoff spec.type",
            "Service/holdoff spec.ports?grpc?.port",
            "Service/holdoff metadata.annotations.a",
            "Pod/holdoff-test spec.*env?HOLDOFF_ENDPOINT?.value",
        ),
    ),
    "ingress": (
        {"ingress": {"enabled": True, "className": "nginx", "tlsSecretName": "t"}},
        ("Ingress/holdoff *",),
    ),
    "route": (
        {"grpcRoute": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["h.example"]}},
        ("GRPCRoute/holdoff *",),
    ),
    "network policy": (
        {"networkPolicy": {"enabled": True, "from": [{"podSelector": {}}]}},
        ("NetworkPolicy/holdoff *",),
    ),
    "metrics": (
        {"metrics": {"enabled": True}},
        (
            argument("--metrics-listen="),
            f"{POD}.containers?coordinator?.ports?metrics?*",
            "Service/holdoff-headless spec.ports?metrics?*",
            "ServiceMonitor/holdoff *",
            "PrometheusRule/holdoff *",
        ),
    ),
    "no monitor, no rules": (
        {
            "metrics": {
                "enabled": True,
                "serviceMonitor": {"enabled": False},
                "prometheusRule": {"enabled": False},
            }
        },
        (
            argument("--metrics-listen="),
            f"{POD}.containers?coordinator?.ports?metrics?*",
            "Service/holdoff-headless spec.ports?metrics?*",
        ),
    ),
    "dashboards": ({"dashboards": {"enabled": True}}, ("ConfigMap/holdoff-dashboards *",)),
    "image": (
        {
            "image": {
                "repository": "r.example/h",
                "digest": f"sha256:{'0' * 64}",
                "pullPolicy": "Always",
            }
        },
        ("*.image", "*.imagePullPolicy"),
    ),
    "private registry": ({"imagePullSecrets": [{"name": "r"}]}, ("*.imagePullSecrets*",)),
    "resources": (
        {"resources": {"requests": {"cpu": "1"}}},
        (f"{POD}.containers?coordinator?.resources.requests.cpu",),
    ),
    "no account": (
        {"serviceAccount": {"create": False}},
        ("ServiceAccount/holdoff *", f"{POD}.serviceAccountName"),
    ),
    "where pods go": (
        {
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "high",
        },
        (
            f"{POD}.nodeSelector.disk",
            f"{POD}.tolerations*",
            f"{POD}.affinity*",
            f"{POD}.priorityClassName",
        ),
    ),
    "labels": (
        {"podLabels": {"team": "x"}, "podAnnotations": {"note": "y"}},
        (
            "*/holdoff spec.template.metadata.labels.team",
            "*/holdoff spec.template.metadata.annotations.note",
        ),
    ),
    "no test": ({"test": {"enabled": False}}, ("Pod/holdoff-test *",)),
}
# Those that change every name or label, or nothing but the mode.
PLAIN: dict[str, dict[str, Any]] = {
    "default": {},
    **{mode: {"store": {"mode": mode}} for mode in ("external", "sentinel", "cluster")},
    "names": {"nameOverride": "locks", "fullnameOverride": "our-locks"},
    "stopped": {"replicaCount": 0},
}
CASES = PLAIN | {name: values for name, (values, _) in TOGGLES.items()}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embedded replicas": ({"replicaCount": 2}, "set store.mode to external, sentinel or cluster"),
    "embedded scaling": ({"autoscaling": {"enabled": True}}, "one pod"),
    "number as text": ({"replicaCount": "2"}, "/replicaCount.*got string, want integer"),
    "negative": ({"replicaCount": -1}, "/replicaCount.*minimum"),
    "unknown value": ({"replicas": 2}, "'replicas' not allowed"),
    "unknown inside": ({"store": {"url": "redis://x"}}, "'/store'.*'url' not allowed"),
    "mode": ({"store": {"mode": "redis"}}, "/store/mode.*one of 'embedded', 'external'"),
    "scheme": ({"store": {"external": {"url": "http://x"}}}, "/store/external/url.*rediss"),
    "password in the URL": (
        {"store": {"mode": "external", "external": {"url": "redis://u:hush@x:6379"}}},
        r"store\.passwordSecret",
    ),
    "two certificates": (
        {"tls": {"secretName": "t", "certManager": {"enabled": True}}},
        "set one of them",
    ),
    "no issuer": ({"tls": {"certManager": {"enabled": True}}}, "issuerRef.name"),
    "access alone": ({"access": {"grants": [GRANT]}}, r"set tls\.secretName"),
    "role": ({"access": {"grants": [GRANT | {"role": "boss"}]}}, "/access/grants/0/role.*'admin'"),
    "resource": (
        {"access": {"grants": [GRANT | {"resources": ["tokens/x"]}]}},
        "/access/grants/0/resources/0.*does not match",
    ),
    "client CA alone": ({"tls": {"clientCA": {"secretName": "c"}}}, r"set tls\.secretName"),
    "bounds": (EXTERNAL | {"autoscaling": {"enabled": True, "maxReplicas": 1}}, "less than"),
    "no gateway": ({"grpcRoute": {"enabled": True}}, "parentRefs"),
    "policy's name": ({"policies": {"../x": ""}}, "'/policies'.*'../x' not allowed"),
    "digest": ({"image": {"digest": "latest"}}, "/image/digest.*sha256"),
    "assumption": ({"store": {"assume": "durable"}}, "/store/assume.*noeviction"),
    "port": ({"service": {"port": 70000}}, "/service/port.*want 65,535"),
}


@functools.cache
def rendered(name: str) -> Rendering:
    """Render a case once."""
    return render(CASES[name])


@functools.cache
def kubernetes() -> Any:
    """Import the validator of manifests, and let it read each of its schemas once."""
    utils = importlib.import_module("kubernetes_validate.utils")
    for name in ("all_versions", "schema_contents"):
        setattr(utils, name, functools.cache(getattr(utils, name)))
    return utils


@functools.cache
def versions() -> list[str]:
    """Return the versions of Kubernetes to validate for: the oldest and the newest, or all."""
    known = dict.fromkeys(kubernetes().all_versions())
    supported = [version for version in known if int(version.split(".")[1]) >= 30]
    return supported if LONG else [supported[0], supported[-1]]


@functools.cache
def fault(manifest: str, version: str) -> str:
    """Return what is wrong with a manifest, which is JSON so that equal ones are validated once."""
    try:
        kubernetes().validate(json.loads(manifest), version, strict=True)
    except (kubernetes().ValidationError, kubernetes().SchemaNotFoundError) as error:
        return f"{getattr(error, 'json_path', '$')}: {error.message}"
    return ""


def manifests_are_valid(name: str) -> None:
    """Fails when a field is misspelt: `hostnames:` instead of `hosts:` in the Ingress."""
    faults = {
        (version, key): fault(json.dumps(manifest, sort_keys=True), version)
        for version in versions()
        for key, manifest in rendered(name).manifests.items()
        if manifest["kind"] not in OTHERS
    }
    assert {key: found for key, found in faults.items() if found} == {}


def the_pod_runs_a_coordinator(name: str) -> None:
    """Fails when a mode of store has no workload."""
    assert rendered(name).pod()["containers"][0]["name"] == "coordinator"


def a_value_changes_just_what_it_should(name: str) -> None:
    """Fails when `--insecure` stays with mutual TLS, or a Secret is mounted in any mode."""
    if name not in TOGGLES:
        return
    values, expected = TOGGLES[name]
    mode = values.get("store", {}).get("mode", "embedded")
    changed = differences(rendered(mode if mode != "embedded" else "default"), rendered(name))
    unexpected = {one for one in changed if not any(fnmatchcase(one, it) for it in expected)}
    idle = {it for it in expected if not any(fnmatchcase(one, it) for one in changed)}
    assert (unexpected, idle) == (set(), set())


def pods_are_safe(name: str) -> None:
    """Fails when a pod's security context is left out; secrets are never in the environment."""
    for key, manifest in rendered(name).manifests.items():
        if manifest["kind"] not in {"Deployment", "StatefulSet", "Pod"}:
            continue
        pod = manifest["spec"] if manifest["kind"] == "Pod" else rendered(name).pod()
        assert pod["securityContext"]["runAsNonRoot"], key
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, key
        assert not pod["automountServiceAccountToken"], key
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"], key
            assert not context["allowPrivilegeEscalation"], key
            assert context["capabilities"] == {"drop": ["ALL"]}, key
            assert container["resources"]["requests"], key
            assert all("valueFrom" not in one for one in container.get("env", [])), key
            assert "envFrom" not in container, key


def insecure_is_what_is_not_safe(name: str) -> None:
    """Fails when `--insecure` is left out, or stays once TLS is there and callers are known."""
    safe = name == "access" or "mutual TLS" in name
    assert ("--insecure" not in rendered(name).pod()["containers"][0]["args"]) == safe


def the_grace_period_covers_the_drain(name: str) -> None:
    """Fails when the grace period does not follow `drainSeconds`."""
    pod = rendered(name).pod()
    (drain,) = (
        int(one.partition("=")[2])
        for one in pod["containers"][0]["args"]
        if one.startswith("--drain-seconds=")
    )
    hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {})
    least = drain + hook.get("seconds", 0) + 5
    if any(one.startswith("--custody-key-dir=") for one in pod["containers"][0]["args"]):
        least += TAKEOVER_US / SECOND
    assert pod["terminationGracePeriodSeconds"] >= least


def the_spool_outlives_a_container(name: str) -> None:
    """Fails when the directory of the spool is in no volume, or in one that others write to."""
    container = rendered(name).pod()["containers"][0]
    spools = [one for one in container["args"] if one.startswith("--custody-spool-dir=")]
    places = [f"{one['mountPath']}/" for one in container["volumeMounts"] if "readOnly" not in one]
    for spool in spools:
        assert any(spool.partition("=")[2].startswith(one) for one in places), places


def what_is_selected_exists(name: str) -> None:
    """Fails when a Service or a policy selects labels that no pod has."""
    manifests = rendered(name).manifests
    (labels,) = (
        manifest["spec"]["template"]["metadata"]["labels"]
        for manifest in manifests.values()
        if manifest["kind"] in {"Deployment", "StatefulSet"}
    )
    for key, manifest in manifests.items():
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector") or {}
        if manifest["kind"] == "ServiceMonitor":  # which selects a Service
            labels = manifests["Service/holdoff-headless"]["metadata"]["labels"]
        assert selector.get("matchLabels", selector).items() <= labels.items(), key


CHECKS = (
    manifests_are_valid,
    the_pod_runs_a_coordinator,
    a_value_changes_just_what_it_should,
    pods_are_safe,
    insecure_is_what_is_not_safe,
    the_grace_period_covers_the_drain,
    the_spool_outlives_a_container,
    what_is_selected_exists,
)


@pytest.mark.timeout(180)
def test_every_case_passes_every_check(subtests: pytest.Subtests) -> None:
    """Fails as the sentence of the failed check says; the failure names the case and the check.

    One test has all cases because each process that renders one loads Helm and the schemas.
    """
    assert len(CASES) >= 30
    for name in CASES:
        for check in CHECKS:
            with subtests.test(name, check=check.__name__):
                check(name)


@pytest.mark.timeout(180)
def test_lint_has_nothing_to_say(subtests: pytest.Subtests) -> None:
    """Fails when `Chart.yaml` has no icon or a template is no YAML."""
    for name, values in CASES.items():
        with subtests.test(name):
            report = helm().lint(CHART, values, strict=True, kube_version="v1.30.0")
            assert (report["messages"], report["errors"]) == ([], [])


def test_what_cannot_work_is_refused(subtests: pytest.Subtests) -> None:
    """Fails when the check of `embedded` with several replicas is left out."""
    for name, (values, message) in REFUSED.items():
        with subtests.test(name):
            with pytest.raises(helm().HelmError) as refusal:
                render(values)
            assert re.search(message, str(refusal.value), re.DOTALL)
            assert "hush" not in str(refusal.value)


def test_notes_warn_of_what_is_unsafe() -> None:
    """Fails when the warning about TLS or authentication is left out of the notes."""
    assert "no TLS" in rendered("default").notes
    assert "no authentication" in rendered("TLS by secret").notes
    assert "no roles" in rendered("mutual TLS").notes
    assert "WARNING" not in rendered("access").notes
    issue = (
        "holdoff-coordinator token issue IDENTITY --output-file=- --data-dir=/var/lib/holdoff/data"
    )
    assert f"statefulset/holdoff -- {issue}\n" in rendered("access").notes
    assert "nothing to run" in rendered("mutual TLS, no certificate to test with").notes


def test_a_change_of_policies_rolls_the_pods() -> None:
    """Fails when the checksum is not of the policies' text."""
    old, new = (
        render({"policies": {"ours": text}}).flat()[
            "StatefulSet/holdoff spec.template.metadata.annotations.checksum/policies"
        ]
        for text in ("interval = 1", "interval = 2")
    )
    assert old != new


def test_kinds_of_prometheus_only_where_they_exist() -> None:
    """Fails when a ServiceMonitor or PrometheusRule is made whatever the cluster knows.

    Kubernetes has no schemas for kinds of others: their few fields are looked at one by one.
    """
    monitor = {"interval": "10s", "labels": {"release": "p"}}
    values = {"metrics": {"enabled": True, "serviceMonitor": monitor}}
    without = render(values, kinds=())
    assert not {one["kind"] for one in without.manifests.values()} & OTHERS
    assert "no ServiceMonitor" in without.notes
    known = render(values).manifests
    rules = yaml.safe_load((DEPLOY / "alerts/holdoff.yaml").read_text())
    assert known["PrometheusRule/holdoff"]["spec"] == rules
    spec = known["ServiceMonitor/holdoff"]["spec"]
    assert spec["endpoints"] == [{"port": "metrics", "interval": "10s"}]
    assert spec["selector"]["matchLabels"].items() <= (
        known["Service/holdoff-headless"]["metadata"]["labels"].items()
    )
    [port] = (
        one
        for one in known["Service/holdoff-headless"]["spec"]["ports"]
        if one["name"] == "metrics"
    )
    assert port["targetPort"] == "metrics"
    assert known["ServiceMonitor/holdoff"]["metadata"]["labels"]["release"] == "p"


def test_the_dashboard_is_that_of_deploy() -> None:
    """Fails when Helm reads the braces in it, or Grafana's sidecar does not find it."""
    found = render({"dashboards": {"enabled": True}}).manifests["ConfigMap/holdoff-dashboards"]
    text = (DEPLOY / "dashboards/holdoff.json").read_text()
    assert json.loads(found["data"]["holdoff.json"]) == json.loads(text)
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_keys_of_custody_are_files_that_only_the_coordinator_reads() -> None:
    """Fails when the coordinator would refuse their mode, or the container could change them."""
    pod = render({"custody": {"keysSecret": "k"}}).pod()
    (volume,) = (one for one in pod["volumes"] if one["name"] == "custody-keys")
    # Kubernetes gives them to root and the group of the pod.
    assert volume["secret"] == {"secretName": "k", "defaultMode": 0o440}
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    (container,) = pod["containers"]
    (mount,) = (one for one in container["volumeMounts"] if one["name"] == "custody-keys")
    assert mount["readOnly"] is True
    assert f"--custody-key-dir={mount['mountPath']}" in container["args"]


def test_certificate_and_route() -> None:
    """Fails when the certificate lacks a name that clients call, or the route its port."""
    certificate = rendered("TLS by cert-manager").manifests["Certificate/holdoff"]["spec"]
    assert {"holdoff", "holdoff-headless.prod.svc"} <= set(certificate["dnsNames"])
    assert certificate["secretName"] == "holdoff-tls"
    assert certificate["issuerRef"]["name"] == "i"
    route = rendered("route").manifests["GRPCRoute/holdoff"]["spec"]
    assert route["rules"] == [{"backendRefs": [{"name": "holdoff", "port": 50051}]}]


def test_the_readme_is_made_from_the_schema() -> None:
    """Fails when a value is described in the schema and `make generate` was not called."""
    assert (CHART / "README.md").read_text(encoding="utf-8") == chart_values.readme()


def test_the_schema_knows_every_value_and_its_default() -> None:
    """Fails when values.yaml and values.schema.json differ."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))

    def defaults(node: dict[str, Any]) -> Any:
        if "default" in node or "properties" not in node:
            return node.get("default")
        return {key: defaults(child) for key, child in node["properties"].items()}

    known = defaults(schema)
    assert known.pop("global") is None
    assert known == yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
