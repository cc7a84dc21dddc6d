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
    build_with,
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
COMPILED = "/home/ray/compiled"  # where the image has torch.compile keep what it compiled
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
    assert with_gpu == 3, "training on machines of eight, training on single GPUs, and serving"
    assert "nvidia.com/gpu" not in json.dumps(build("cpu"))


# ---------------------------------------------------------------------------------------------- GPUs


def launched(cluster: Resource, workers: int) -> dict[str, int]:
    """What Ray's autoscaler starts on a cluster of nothing but its head when training asks for so many GPU workers."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, ResourceRequest, ResourceRequestByCount

    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster), skip_content_hash=True)
    each = ResourceRequestByCount(request=ResourceRequest(resources_bundle={"CPU": 1, "GPU": 1}), count=workers)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=[each])],
    )
    reply = ResourceDemandScheduler().schedule(request)
    return {each.instance_type: each.count for each in reply.to_launch if each.instance_type != "headgroup"}


@pytest.mark.parametrize(
    ("workers", "pods"),
    [(1, {"gpu": 1}), (3, {"gpu": 3}), (4, {"gpu-machine": 1}), (8, {"gpu-machine": 1})],
)
def test_eight_gpus_are_one_pod_within_which_nccl_uses_nvlink(workers: int, pods: dict[str, int]) -> None:
    assert launched(find("gpu", "RayCluster"), workers) == pods


def test_two_machines_are_sixteen_gpus() -> None:
    cluster = find("gpu", "RayCluster")
    group(cluster, "gpu-machine")["maxReplicas"] = 2
    assert launched(cluster, 16) == {"gpu-machine": 2}


def test_without_machines_of_eight_training_takes_single_gpus() -> None:
    cluster = find("gpu", "RayCluster")
    group(cluster, "gpu-machine")["maxReplicas"] = 0
    assert launched(cluster, 8) == {"gpu": 8}


def group(cluster: Resource, name: str) -> dict[str, Any]:
    return next(each for each in cluster["spec"]["workerGroupSpecs"] if each["groupName"] == name)


@pytest.mark.parametrize("name", ["gpu-machine", "gpu"])
def test_the_object_store_leaves_nccl_half_of_the_shared_memory(name: str) -> None:
    pods = group(find("gpu", "RayCluster"), name)
    (shared,) = [each for each in pods["template"]["spec"]["volumes"] if each["name"] == "shared-memory"]
    assert shared["emptyDir"]["medium"] == "Memory"
    size = int(shared["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
    assert int(pods["rayStartParams"]["object-store-memory"]) <= size // 2


def test_what_is_compiled_for_gpus_outlives_a_worker() -> None:
    for name in ("gpu-machine", "gpu"):
        (container,) = group(find("gpu", "RayCluster"), name)["template"]["spec"]["containers"]
        assert {"name": "compiled", "mountPath": COMPILED} in container["volumeMounts"]


def test_the_compile_cache_can_be_one_volume_for_all_gpu_pods() -> None:
    resources = build_with("gpu", "compile-cache")
    (claim,) = [each for each in resources if each["kind"] == "PersistentVolumeClaim"]
    validate(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = next(each for each in resources if each["kind"] == "RayCluster")
    validate_custom_resource(cluster)
    for name in ("gpu-machine", "gpu"):
        volumes = {each["name"]: each for each in group(cluster, name)["template"]["spec"]["volumes"]}
        assert volumes["compiled"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert claim["metadata"]["namespace"] == cluster["metadata"]["namespace"]


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
