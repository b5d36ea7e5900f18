"""The manifests: schemas of Kubernetes and of Dask's operator, what pods may do, and who reaches whom."""

from __future__ import annotations

import copy
import ipaddress
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import files as files_of
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from tests.infra.files import INFRA, OVERLAYS, UID, WRITABLE, document, pods, rendered

KUBERNETES = "1.34"
NAMESPACE = "channel-merging"


def resource_schemas() -> dict[str, Any]:
    """Kind -> schema, as the operator's chart installs them."""
    found = {}
    for path in files_of("dask-kubernetes") or []:
        if "helm" in path.parts and "crds" in path.parts:
            described = yaml.safe_load(path.read_text("utf-8"))
            (version,) = described["spec"]["versions"]
            assert (described["spec"]["group"], version["name"]) == ("kubernetes.dask.org", "v1")
            found[described["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    return found


def strict(schema: Any) -> Any:
    """A schema that knows no further keys, as a server asked for strict validation."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    common = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    found = resource_schemas()
    for schema in found.values():
        schema["properties"] |= common
    return {kind: strict(schema) for kind, schema in found.items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_documents_are_of_their_schemas(overlay: str, schemas: dict[str, Any]) -> None:
    kinds = []
    for one in rendered(overlay):
        kinds.append(one["kind"])
        if one["kind"] in schemas:
            assert [error.message for error in Draft202012Validator(schemas[one["kind"]]).iter_errors(one)] == []
        else:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == NAMESPACE
    assert {"DaskCluster", "DaskAutoscaler", "Deployment", "Job", "Role", "NetworkPolicy", "PodDisruptionBudget"} <= set(kinds)
    assert "Secret" not in kinds


def test_the_schemas_would_find_a_wrong_key(schemas: dict[str, Any]) -> None:
    cluster = copy.deepcopy(document("DaskCluster", "merge"))
    cluster["spec"]["worker"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    cluster["spec"]["worker"]["replica"] = 3
    assert len(list(Draft202012Validator(schemas["DaskCluster"]).iter_errors(cluster))) >= 2


def test_the_example_of_a_secret_holds_none() -> None:
    secret = yaml.safe_load((INFRA / "kubernetes" / "secret.example.yaml").read_text())
    kubernetes_validate.validate(secret, KUBERNETES, strict=True)
    assert (secret["metadata"]["namespace"], secret["metadata"]["name"]) == (NAMESPACE, "credentials")
    assert set(secret["stringData"].values()) == {""}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_pass_the_restricted_standard_and_write_to_their_volumes_alone(overlay: str) -> None:
    labels = document("Namespace", NAMESPACE, overlay)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    found = pods(overlay)
    assert len(found) == 4
    for name, pod in found.items():
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "spec": pod}, KUBERNETES, strict=True)
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == UID
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is (name == "Deployment/prefect-worker")
        assert document("ServiceAccount", pod["serviceAccountName"])["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == wanted
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == WRITABLE
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        if not name.startswith("Job/"):
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            ports = {port["name"] for port in container["ports"]}
            assert {
                container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
            } <= ports


def test_ports_that_are_named_are_those_of_the_commands() -> None:
    for name, options in {
        "DaskCluster/merge/scheduler": {"--port": "tcp-comm", "--dashboard-address": "http-dashboard"},
        "DaskCluster/merge/worker": {
            "--worker-port": "worker", "--nanny-port": "nanny", "--dashboard-address": "http-dashboard",
        },
    }.items():  # fmt: skip
        (container,) = pods()[name]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        given = dict(zip(container["args"], container["args"][1:], strict=False))
        assert {port: int(given[option].removeprefix(":")) for option, port in options.items()} == ports
    service = document("DaskCluster", "merge")["spec"]["scheduler"]["service"]
    assert {port["name"]: port["port"] for port in service["ports"]} == {"tcp-comm": 8786, "http-dashboard": 8787}
    assert {port["targetPort"] for port in service["ports"]} == {"tcp-comm", "http-dashboard"}


def test_each_gpu_has_one_worker_with_one_thread() -> None:
    (container,) = pods("gpu")["DaskCluster/merge/worker"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "--nthreads 1 --resources GPU=1" in " ".join(container["args"])
    (plain,) = pods()["DaskCluster/merge/worker"]["containers"]
    assert "GPU" not in " ".join(plain["args"])
    counted = (list(plain["args"]), list(container["args"]))
    counted[0][counted[0].index("--nthreads") + 1] = "1"
    at = counted[1].index("--resources")
    del counted[1][at : at + 2]
    assert counted[0] == counted[1]
    others = [one for one in rendered("gpu") if one["kind"] != "DaskCluster"]
    assert others == [one for one in rendered() if one["kind"] != "DaskCluster"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_dask_keeps_under_the_containers_memory(overlay: str) -> None:
    (container,) = pods(overlay)["DaskCluster/merge/worker"]["containers"]
    limit = container["args"][container["args"].index("--memory-limit") + 1]
    assert re.fullmatch(r"\d+GiB", limit)
    assert int(limit[:-3]) < int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_the_worker_may_make_jobs_in_its_namespace_and_no_more() -> None:
    assert not [one for one in rendered() if one["kind"].startswith("Cluster")]
    rules = {
        (group, resource): set(rule["verbs"])
        for rule in document("Role", "prefect-worker")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert set(rules) == {("batch", "jobs"), ("", "pods"), ("", "pods/status"), ("", "pods/log"), ("", "events")}
    assert {"create", "delete", "watch"} <= rules["batch", "jobs"]
    assert all(verbs <= {"get", "list", "watch"} for (group, _), verbs in rules.items() if not group)
    environment = pods()["Deployment/prefect-worker"]["containers"][0]["env"]
    assert any(entry["name"] == "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES" for entry in environment)


RUN = {"prefect.io/flow-run-id": "x", "app.kubernetes.io/component": "flow-run"}
SCHEDULER = {"dask.org/cluster-name": "merge", "dask.org/component": "scheduler"}
WORKER = {"dask.org/cluster-name": "merge", "dask.org/component": "worker"}
SUBMITTER = {"app.kubernetes.io/name": "prefect-worker"}
REGISTER = {"app.kubernetes.io/name": "register"}
Place = tuple[str, dict[str, str]]
"""A namespace and labels of a pod there."""


def selected(selector: Any, labels: dict[str, str]) -> bool:
    """Whether a selector takes a pod with these labels."""

    def fulfilled(key: str, operator: str, values: Sequence[str] = ()) -> bool:
        return {
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
        }[operator]

    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(fulfilled(**one) for one in selector.get("matchExpressions", []))


def matches(peer: Any, place: Place | str) -> bool:
    """Whether a peer of a rule stands for a pod, or for an address outside."""
    if isinstance(place, str):
        block = peer.get("ipBlock")
        address = ipaddress.ip_address(place)
        return (
            block is not None
            and address in ipaddress.ip_network(block["cidr"])
            and not any(address in ipaddress.ip_network(one) for one in block.get("except", []))
        )
    namespace, labels = place
    if "ipBlock" in peer:
        return False
    spaces = peer.get("namespaceSelector")
    here = namespace == NAMESPACE if spaces is None else selected(spaces, {"kubernetes.io/metadata.name": namespace})
    return here and selected(peer.get("podSelector", {}), labels)


def rules(labels: dict[str, str], way: str) -> Iterator[Any]:
    policies = [one["spec"] for one in rendered() if one["kind"] == "NetworkPolicy"]
    mine = [spec for spec in policies if way.title() in spec["policyTypes"] and selected(spec["podSelector"], labels)]
    assert mine, "no policy: all would be open"
    for spec in mine:
        yield from spec.get(way, [])


def lets(labels: dict[str, str], way: str, other: Place | str, port: int, protocol: str) -> bool:
    peers = "from" if way == "ingress" else "to"
    return any(
        (peers not in rule or any(matches(peer, other) for peer in rule[peers]))
        and ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        for rule in rules(labels, way)
    )


def connects(source: Place, target: Place | str, port: int, protocol: str = "TCP") -> bool:
    """Whether both ends let a connection through; other namespaces and the world let all."""
    sends = source[0] != NAMESPACE or lets(source[1], "egress", target, port, protocol)
    takes = isinstance(target, str) or target[0] != NAMESPACE or lets(target[1], "ingress", source, port, protocol)
    return sends and takes


def mine(labels: dict[str, str]) -> Place:
    return NAMESPACE, labels


DNS: Place = ("kube-system", {"k8s-app": "kube-dns"})
PREFECT: Place = ("prefect", {"app": "server"})
OPERATOR: Place = ("dask-operator", {"app": "operator"})
STRANGER: Place = ("elsewhere", {**SCHEDULER, **RUN})
HUB = "203.0.113.7"
METADATA = "169.254.169.254"


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (mine(RUN), mine(SCHEDULER), 8786),
        (mine(WORKER), mine(SCHEDULER), 8786),
        (mine(SCHEDULER), mine(WORKER), 9000),
        (mine(SCHEDULER), mine(WORKER), 9001),
        (mine(WORKER), mine(WORKER), 9000),
        (OPERATOR, mine(SCHEDULER), 8787),
        (mine(RUN), PREFECT, 4200),
        (mine(SUBMITTER), PREFECT, 4200),
        (mine(REGISTER), PREFECT, 4200),
        (mine(RUN), HUB, 443),
        (mine(WORKER), HUB, 443),
        (mine(SUBMITTER), HUB, 6443),
    ],
)
def test_what_has_to_talk_can(source: Place, target: Place | str, port: int) -> None:
    assert connects(source, target, port)
    assert source[0] != NAMESPACE or connects(source, DNS, 53, "UDP")


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (mine(RUN), mine(WORKER), 9000),
        (mine(RUN), mine(SCHEDULER), 8787),
        (mine(RUN), mine(RUN), 8080),
        (mine(SUBMITTER), mine(SCHEDULER), 8786),
        (mine(SCHEDULER), HUB, 443),
        (mine(SCHEDULER), PREFECT, 4200),
        (mine(WORKER), PREFECT, 4200),
        (mine(WORKER), HUB, 6443),
        (mine(RUN), HUB, 6443),
        (mine(RUN), METADATA, 443),
        (mine(WORKER), METADATA, 80),
        (STRANGER, mine(SCHEDULER), 8786),
        (STRANGER, mine(WORKER), 9000),
        (OPERATOR, mine(WORKER), 9000),
    ],
)
def test_nothing_else_can(source: Place, target: Place | str, port: int) -> None:
    assert not connects(source, target, port)
