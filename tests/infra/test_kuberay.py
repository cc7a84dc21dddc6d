import json
import shlex
import shutil
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.stages import STAGES
from tests.infra.manifests import (
    KUBERAY,
    OVERLAYS,
    Resource,
    build,
    containers,
    custom_resource_schemas,
    pod_templates,
    validate,
)

OURS = ("RayCluster", "RayJob", "RayService")
# One file is every stage's: its first lines say how to put the name in.
JOBS = {
    name: (KUBERAY / f"jobs/{file}.yaml").read_text().replace("STAGE", name)
    for file, name in [("preflight", "preflight"), ("pipeline", "pipeline"), *(("stage", stage) for stage in STAGES)]
}
RAY_PORTS = {6379, 8265, 10001}  # with the token, each of them runs code
SECRET_WORDS = ("PASSWORD", "SECRET", "TOKEN", "KEY")

resources_of_overlays = pytest.mark.parametrize(
    "resource",
    [
        pytest.param(each, id=f"{overlay}-{each['kind']}-{each['metadata']['name']}")
        for overlay in OVERLAYS
        for each in build(overlay)
    ],
)


def find(overlay: str, kind: str) -> Resource:
    return next(each for each in build(overlay) if each["kind"] == kind)


@resources_of_overlays
def test_it_validates_against_kubernetes_own_schema(resource: Resource) -> None:
    if resource["kind"] not in OURS:
        validate(resource)
    # The pods inside of KubeRay's resources are Kubernetes' own, and are checked as such.
    for template in pod_templates(resource):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        validate(pod)


@resources_of_overlays
def test_it_validates_against_kuberays_own_schema(resource: Resource) -> None:
    if resource["kind"] in OURS:
        validate_custom_resource(resource)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_validates_against_kuberays_own_schema(name: str) -> None:
    validate_custom_resource(yaml.safe_load(JOBS[name]))


def validate_custom_resource(resource: Resource) -> None:
    schemas = custom_resource_schemas()
    if not schemas:
        pytest.skip("KubeRay's definitions are not here; GPT_SCHEMAS names their folder")
    body = {key: value for key, value in resource.items() if key != "metadata"}
    jsonschema.validate(body, schemas[resource["kind"]])


def test_an_unknown_field_is_refused_by_the_schemas_as_used_here() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"prots": []}}
    with pytest.raises(jsonschema.ValidationError):
        validate(service)
    cluster = find("cpu", "RayCluster")
    cluster["spec"]["authOption"] = {}
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        validate_custom_resource(cluster)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)]
    built = yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert _by_name(built) == _by_name(build(overlay))


def _by_name(resources: Any) -> dict[str, str]:
    return {f"{each['kind']}/{each['metadata']['name']}": json.dumps(each, sort_keys=True) for each in resources}


# ---------------------------------------------------------------------------------------------- security


@resources_of_overlays
def test_pods_meet_the_restricted_pod_security_level(resource: Resource) -> None:
    for template in pod_templates(resource):
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not template["spec"].keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for volume in template["spec"].get("volumes", []):
            assert "hostPath" not in volume
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_autoscaler_beside_the_head_meets_it_too(overlay: str) -> None:
    specs = (find(overlay, "RayCluster")["spec"], find(overlay, "RayService")["spec"]["rayClusterConfig"])
    for spec in specs:
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["authOptions"] == {"mode": "token"}


@resources_of_overlays
def test_every_container_says_what_it_needs_and_may_take(resource: Resource) -> None:
    for container in containers(resource):
        for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
            assert {"cpu", "memory"} <= amounts.keys()


@resources_of_overlays
def test_secrets_are_only_named(resource: Resource) -> None:
    assert resource["kind"] != "Secret"
    for container in containers(resource):
        for variable in container.get("env", []):
            if any(word in variable["name"] for word in SECRET_WORDS):
                assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    if resource["kind"] == "ConfigMap":
        assert not [name for name in resource["data"] if any(word in name for word in SECRET_WORDS)]


@resources_of_overlays
def test_nothing_is_published_outside_of_the_cluster(resource: Resource) -> None:
    assert resource["kind"] != "Ingress"
    if resource["kind"] == "Service":
        assert resource["spec"].get("type", "ClusterIP") == "ClusterIP"
    if resource["kind"] in ("RayCluster", "RayService"):
        spec = resource["spec"].get("rayClusterConfig", resource["spec"])
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_operator_reaches_rays_ports_from_outside(overlay: str) -> None:
    policies = [each for each in build(overlay) if each["kind"] == "NetworkPolicy"]
    ingress = [each["spec"] for each in policies if "Ingress" in each["spec"]["policyTypes"]]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in ingress, "what is not allowed is denied"
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            ports = {port["port"] for port in rule.get("ports", [])}
            outside = [peer for peer in rule["from"] if "namespaceSelector" in peer or "ipBlock" in peer]
            if outside:
                assert ports, f"{policy['metadata']['name']} opens every port to another namespace"
                if ports & RAY_PORTS:
                    assert policy["metadata"]["name"] == "operator-to-ray"
                    assert "podSelector" in outside[0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_find_their_pods(overlay: str) -> None:
    resources = build(overlay)
    labels = [template["metadata"]["labels"] for each in resources for template in pod_templates(each)]
    for policy in (each for each in resources if each["kind"] == "NetworkPolicy"):
        selectors = [policy["spec"]["podSelector"]]
        for rule in policy["spec"].get("ingress", []):
            selectors += [peer["podSelector"] for peer in rule["from"] if peer.keys() == {"podSelector"}]
        for selector in selectors:
            assert any(_selects(selector, each) for each in labels), f"{policy['metadata']['name']}: {selector}"


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    exactly = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return exactly and all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", []))


def test_whoever_asks_for_a_gpu_tolerates_its_nodes() -> None:
    with_gpu = 0
    for resource in build("gpu"):
        for template in pod_templates(resource):
            limits = [container["resources"]["limits"] for container in template["spec"]["containers"]]
            if any("nvidia.com/gpu" in each for each in limits):
                with_gpu += 1
                assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in template["spec"][
                    "tolerations"
                ]
                assert all(container["image"].endswith("-gpu") for container in template["spec"]["containers"])
    assert with_gpu == 2, "training and serving"
    assert "nvidia.com/gpu" not in json.dumps(build("cpu"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_training_can_shrink_to_nothing_between_stages(overlay: str) -> None:
    for group in find(overlay, "RayCluster")["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] == 0
        assert group["maxReplicas"] > 0


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_serve_config_is_one_that_serve_would_run(overlay: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    import jobs.serve
    from pipeline.config import load_config
    from pipeline.serve import settings_of

    schema = ServeDeploySchema.model_validate(yaml.safe_load(find(overlay, "RayService")["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    assert module == "jobs.serve"
    assert callable(getattr(jobs.serve, name))
    arguments = application.args
    config = load_config(arguments["preset"], settings_of(arguments))
    assert config.serve.max_replicas <= 4
    assert (config.serve.gpus_per_replica > 0) == (overlay == "gpu")


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_a_command_that_exists_with_settings_that_exist(name: str) -> None:
    import importlib.util

    from pipeline.config import load_config

    job = yaml.safe_load(JOBS[name])
    environment = find("gpu", "ConfigMap")["data"]
    entrypoint = job["spec"]["entrypoint"]
    for variable, value in environment.items():
        entrypoint = entrypoint.replace(f"${variable}", value)
    assert "$" not in entrypoint, "every variable is in the ConfigMap"
    python, dash_m, module, preset, *rest = shlex.split(entrypoint)
    assert (python, dash_m) == ("python", "-m")
    assert module == f"jobs.{name}"
    assert job["metadata"]["generateName"] == f"gpt-{name}-"
    assert importlib.util.find_spec(module)
    config = load_config(preset, [word for word in rest if "=" in word])
    assert config.storage.startswith("s3://")
    assert config.train.device == "gpu"
    cluster = find("gpu", "RayCluster")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["metadata"]["namespace"] == cluster["metadata"]["namespace"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_configs_and_secrets_that_pods_name_are_described(overlay: str) -> None:
    made = {each["metadata"]["name"] for each in build(overlay) if each["kind"] == "ConfigMap"}
    described = (KUBERAY / "base/environment.yaml").read_text()
    for container in [container for each in build(overlay) for container in containers(each)]:
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                assert source["configMapRef"]["name"] in made
            else:
                assert source["secretRef"]["name"] in described
