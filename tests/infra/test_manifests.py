"""What infra/ names must be there: modules, presets, settings, variables, versions, files."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.command import ENVIRONMENT
from tests.infra.manifests import INFRA, OVERLAYS, ROOT, build, containers, load, pod_templates

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
DOCKERFILE = (INFRA / "images/Dockerfile").read_text()
TEXTS = sorted(path for path in INFRA.rglob("*") if path.is_file() and path.suffix != ".pyc")
# Read by the programs of images that are not ours.
FOREIGN_PREFIXES = ("POSTGRES_", "PGDATA", "PGPASSWORD", "MINIO_ROOT_", "MC_HOST_", "GF_", "PYTHON", "NVIDIA_")


def all_manifests() -> list[Any]:
    paths = [path for path in INFRA.rglob("*.yaml") if "overlays/gpu" not in str(path)]
    return [document for path in paths for document in load(path)] + [build(overlay) for overlay in OVERLAYS]


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_module_and_preset_it_names_exists(path: Path) -> None:
    text = path.read_text()
    for module in re.findall(r"\bjobs\.[a-z_]+", text):
        assert importlib.util.find_spec(module), module
    for preset in re.findall(r"\bjobs/presets/[\w.-]+\.yaml", text):
        assert (ROOT / preset).is_file(), preset
    for preset in re.findall(r"\bPRESET=([\w.-]+)", text):
        assert (ROOT / f"jobs/presets/{preset}.yaml").is_file(), preset
    for file in re.findall(r"(?<![\w/])(?:infra|tests)/[\w./-]+\w", text):
        assert (ROOT / file).exists() or file == "infra/.env", file
    for target in re.findall(r"(?:`|^ {4,}|&& )make ([a-z][a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_setting_it_names_exists(path: Path) -> None:
    from pipeline.config import describe_settings

    known = {key for key, _, _ in describe_settings()}
    sections = {key.partition(".")[0] for key in known if "." in key}
    for section, name in re.findall(r"\b([a-z]+)\.([a-z_]+)\b(?=\s*[=:]\s*\S)", path.read_text()):
        if section in sections:
            assert f"{section}.{name}" in known, f"{section}.{name}"


def test_every_variable_it_sets_is_read_by_something() -> None:
    names = {name for each in all_manifests() for name in _variables(each)}
    names |= set(re.findall(r"--env ([A-Z_]+)=", (INFRA / "aws/cluster.yaml").read_text()))
    names |= set(re.findall(r"^(?:ENV )?\s+([A-Z_]+)=", DOCKERFILE, re.MULTILINE))
    code = "\n".join(path.read_text() for room in ("jobs", "pipeline", "model") for path in (ROOT / room).glob("*.py"))
    manifests = "\n".join(path.read_text() for path in TEXTS)
    assert {"MLFLOW_TRACKING_URI", "STORAGE", "RAY_AUTH_MODE"} <= names
    for name in sorted(names):
        if name.startswith(FOREIGN_PREFIXES):
            continue
        used = f"${name}" in manifests or f"$({name})" in manifests or "${" + name in manifests
        assert used or re.search(rf"\b{name}\b", code) or _is_known_to_a_package(name), name


def _variables(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for each in node for name in _variables(each)]
    if not isinstance(node, dict):
        return []
    found = [each["name"] for each in node.get("env", []) if isinstance(node.get("env"), list)]
    if isinstance(node.get("environment"), dict):
        found += node["environment"]
    if node.get("kind") == "ConfigMap":
        found += node["data"]
    return found + [name for value in node.values() for name in _variables(value)]


def _is_known_to_a_package(name: str) -> bool:
    if name.startswith("MLFLOW_"):
        from mlflow import environment_variables

        return hasattr(environment_variables, name)
    if name.startswith("AWS_"):
        from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES as VARIABLES

        read = [entry[1] for entry in VARIABLES.values() if entry[1]]
        return name in [*read, "AWS_REGION"] or any(name in each for each in read if isinstance(each, list))
    if name.startswith("RAY_AUTH_"):
        from ray._private import authentication_test_utils

        return name in authentication_test_utils._AUTH_ENV_VARS
    if name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        from torch._inductor.runtime import cache_dir_utils

        return name in Path(cache_dir_utils.__file__).read_text()
    if name == "RAY_USAGE_STATS_ENABLED":
        from ray._private.usage import usage_constants

        return name == usage_constants.USAGE_STATS_ENABLED_ENV_VAR
    return False


# ---------------------------------------------------------------------------------------------- versions


def test_versions_are_those_of_the_constraints_file() -> None:
    for overlay in OVERLAYS:
        for text in re.findall(r'"rayVersion": "([^"]+)"', json.dumps(build(overlay))):
            assert text == PINS["ray"]
    images = {container["image"] for overlay in OVERLAYS for each in build(overlay) for container in containers(each)}
    images |= {service["image"] for service in COMPOSE["services"].values()}
    images.add(yaml.safe_load((INFRA / "aws/cluster.yaml").read_text())["docker"]["image"])
    ours = {image for image in images if "gpt-53m" in image}
    assert {image.rpartition(":")[2] for image in ours} == {f"{PROJECT['version']}-cpu", f"{PROJECT['version']}-gpu"}
    for image in images - ours:
        assert re.search(r":v?[\w.-]*\d+\.\d+|:RELEASE\.", image), f"{image} needs a fixed version"
    assert re.findall(r"postgres:[\w.-]+", json.dumps(build("cpu")))[0] == COMPOSE["services"]["postgres"]["image"]


def test_the_image_installs_what_the_constraints_file_pins() -> None:
    installs = [line for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines() if "pip install" in line]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs)
    for line in installs:
        for package in re.findall(r"(?<=\s)(torch|psycopg2-binary)(?=\s|$)", line):
            assert package in PINS, package
    python = re.search(r"^ARG PYTHON=(\d+\.\d+)", DOCKERFILE, re.MULTILINE)
    assert python is not None
    assert PROJECT["requires-python"].startswith(f">={python[1]}"), "the oldest Python that is promised is what runs"


# ---------------------------------------------------------------------------------------------- the image


def test_the_image_runs_as_nobody_special_and_says_how_it_is() -> None:
    for target in ("cpu", "gpu"):
        stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
        (own,) = [each for each in stage if re.match(rf"\S+ AS {target}\n", each)]
        assert re.search(r"^USER 1000:1000$", own, re.MULTILINE)
        assert "HEALTHCHECK" in own
    assert "uid 1000" in DOCKERFILE


def test_what_the_image_copies_exists_and_reaches_the_build() -> None:
    ignored = (INFRA / "images/Dockerfile.dockerignore").read_text().split("\n")
    assert "*" in ignored, "nothing goes to the build unless it is named"
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    rooms = hatch["build"]["targets"]["wheel"]["packages"]
    assert {line[1:] for line in ignored if line.startswith("!")} == {*rooms} | {"pyproject.toml", "constraints.txt"}


def stage_of_image(name: str) -> str:
    """The Dockerfile's lines of one stage, without its comments and with continued lines joined."""
    stages = re.split(r"^FROM ", re.sub(r"\\\n", " ", DOCKERFILE), flags=re.MULTILINE)
    (text,) = [stage for stage in stages if re.match(rf"\S+ AS {name}$", stage, re.MULTILINE)]
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def test_the_gpu_image_asks_the_container_runtime_for_the_gpus() -> None:
    assert re.search(r"^torch-gpu AS gpu$", stage_of_image("gpu"), re.MULTILINE)
    given = dict(re.findall(r"\b(NVIDIA_\w+)=(\S+)", stage_of_image("torch-gpu")))
    assert given["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert given["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "NVIDIA_" not in stage_of_image("base") + stage_of_image("cpu"), "a CPU's image asks for none"


def test_the_driver_that_the_documents_ask_for_is_the_one_that_the_image_needs() -> None:
    minimum = {"12": "525", "13": "580"}  # NVIDIA's table of minor version compatibility, by CUDA's major version
    cuda = re.search(r"NVIDIA_REQUIRE_CUDA=cuda>=(\d+)\.\d+", stage_of_image("torch-gpu"))
    assert cuda is not None
    for text in (DOCKERFILE, (INFRA / "README.md").read_text(), (INFRA / "aws/cluster.yaml").read_text()):
        assert set(re.findall(r"(\d{3}) or newer", text)) == {minimum[cuda[1]]}


def test_what_is_compiled_lies_in_a_folder_that_the_image_has_and_volumes_are_mounted_on() -> None:
    image = stage_of_image("base")
    folders = re.findall(r"(?:TORCHINDUCTOR|TRITON)_CACHE_DIR=(\S+)/\w+", image)
    assert folders == ["/home/ray/compiled"] * 2
    assert re.search(r"install .*--owner=ray .*/home/ray/compiled\b", image), "a volume takes over its owner"
    for name in ("worker", "worker-gpu"):
        assert "compiled:/home/ray/compiled" in COMPOSE["services"][name]["volumes"]
    aws = yaml.safe_load((INFRA / "aws/cluster.yaml").read_text())
    assert any(
        option.startswith("--volume /mnt/compiled:/home/ray/compiled") for option in aws["docker"]["run_options"]
    )


def test_an_aws_node_starts_with_and_without_a_file_system_for_compiled_code(tmp_path: Path) -> None:
    aws = yaml.safe_load((INFRA / "aws/cluster.yaml").read_text())
    (command,) = [each for each in aws["initialization_commands"] if "/mnt/compiled" in each]
    for mounts in (True, False):
        log = tmp_path / f"{mounts}.log"
        sudo = f'sudo() {{ echo "$*" >> {log}; [ "$1" != timeout ] || {str(mounts).lower()}; }}; '
        done = subprocess.run(["bash", "-c", sudo + command], capture_output=True, text=True, check=True)
        assert ("compiles by itself" in done.stdout) is not mounts
        asked = log.read_text().splitlines()
        assert asked[0] == "install --directory --owner=1000 --group=1000 /mnt/compiled"
        assert ("chown 1000:1000 /mnt/compiled" in asked) is mounts


def test_the_image_sets_nothing_otherwise_than_the_jobs_do() -> None:
    """Servers and `ray start` run in it without a job's first lines."""
    in_image = dict(re.findall(r"\b((?:RAY|MLFLOW|AWS)_\w+)=(\S+)", stage_of_image("base")))
    shared = in_image.keys() & ENVIRONMENT.keys()
    assert {name: in_image[name] for name in shared} == {name: ENVIRONMENT[name] for name in shared}
    assert in_image.keys() == shared
    assert {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"} <= shared


# ---------------------------------------------------------------------------------------------- compose


def test_compose_publishes_nothing_beyond_this_machine() -> None:
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
        assert "network_mode" not in service
        assert not service.get("privileged")


def test_compose_names_services_volumes_and_files_that_exist() -> None:
    services, volumes = COMPOSE["services"], COMPOSE["volumes"]
    dockerfile_targets = set(re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE))
    for name, service in services.items():
        for dependency in service.get("depends_on", []):
            assert dependency in services, f"{name} depends on {dependency}"
            wanted = service["depends_on"]
            if isinstance(wanted, dict) and wanted[dependency]["condition"] == "service_healthy":
                own_image = services[dependency]["image"].startswith("gpt-53m")
                assert "healthcheck" in services[dependency] or own_image, dependency
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (INFRA / source).exists() if source.startswith(".") else source in volumes, volume
        if "build" in service:
            assert service["build"]["target"] in dockerfile_targets
            assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_compose_has_no_secret_in_it_and_says_how_to_make_them() -> None:
    text = (INFRA / "compose.yaml").read_text()
    made = subprocess.run([INFRA / "make-secrets"], capture_output=True, text=True, check=True).stdout
    secrets = dict(line.split("=", 1) for line in made.splitlines())
    assert set(re.findall(r"\$\{(\w+)", text)) == set(secrets)
    assert len(set(secrets.values())) == len(secrets)
    assert all(len(value) >= 40 for value in secrets.values())
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            if any(word in name for word in ("PASSWORD", "SECRET", "TOKEN", "_KEY")):
                assert value.startswith("${"), name


def test_docker_accepts_the_compose_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    secrets = subprocess.run([INFRA / "make-secrets"], capture_output=True, text=True, check=True).stdout
    environment = os.environ | dict(line.split("=", 1) for line in secrets.splitlines())
    command = [docker, "compose", "-f", str(INFRA / "compose.yaml"), "--profile", "gpu", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- ray start, ray up


def _ray_start_commands() -> list[str]:
    commands = [
        shlex.join(service["command"])
        for service in COMPOSE["services"].values()
        if service.get("command", [""])[:2] == ["ray", "start"]
    ]
    aws = yaml.safe_load((INFRA / "aws/cluster.yaml").read_text())
    for command in aws["head_start_ray_commands"] + aws["worker_start_ray_commands"]:
        commands += list(re.findall(r"ray start .*", command))
    for overlay in OVERLAYS:
        for parameters in re.findall(r'"rayStartParams": (\{.*?\})', json.dumps(build(overlay))):
            commands.append(
                "ray start " + " ".join(f"--{key}={value}" for key, value in json.loads(parameters).items())
            )
    return commands


def test_every_option_of_ray_start_exists() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    commands = _ray_start_commands()
    assert len(commands) >= 5
    for command in commands:
        for option in re.findall(r"--[a-z][a-z-]*", command):
            assert option in known, f"{option} in {command}"


def test_every_option_of_mlflow_server_exists() -> None:
    from mlflow.cli import server

    known = {option for parameter in server.params for option in parameter.opts}
    lists = [COMPOSE["services"]["mlflow"]["command"]]
    lists += [container["command"] for each in build("cpu") for container in containers(each) if "command" in container]
    assert len(lists) == 2
    aws = yaml.safe_load((INFRA / "aws/cluster.yaml").read_text())["head_start_ray_commands"][0]
    text = " ".join(word for words in lists for word in words) + aws
    for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", text):
        assert option in known, option


def test_ray_up_accepts_the_aws_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((INFRA / "aws/cluster.yaml").read_text()))
    validate_config(config)
    for name, node in config["available_node_types"].items():
        market = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert market == (None if name == "head" else "spot"), name
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert "IamInstanceProfile" in node["node_config"]
    opened = config["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in opened] == [(22, 22)]
    text = (INFRA / "aws/cluster.yaml").read_text()
    assert "0.0.0.0/0" not in text
    assert not re.search(r"AKIA|aws_secret|SECRET_ACCESS_KEY", text)


def test_every_aws_node_may_pull_the_private_image() -> None:
    config = yaml.safe_load((INFRA / "aws/cluster.yaml").read_text())
    (login,) = [
        each for each in config["initialization_commands"] if "docker login" in each
    ]  # run on the node itself, before its container is started
    registry = config["docker"]["image"].partition("/")[0]
    assert re.search(rf"docker login .*--password-stdin {re.escape(registry)}$", login.strip())
    assert f"--region {config['provider']['region']} " in login
    assert registry.endswith(f".ecr.{config['provider']['region']}.amazonaws.com")


def test_a_gpu_container_may_lock_memory_for_the_network_card() -> None:
    config = yaml.safe_load((INFRA / "aws/cluster.yaml").read_text())
    assert "--ulimit memlock=-1:-1" in config["docker"]["run_options"]
    assert COMPOSE["services"]["worker-gpu"]["ulimits"]["memlock"] == -1
    # Ray sets these two itself, unless they are given or switched off here.
    assert not [option for option in config["docker"]["run_options"] if "--shm-size" in option or "--runtime" in option]
    assert not config["docker"].keys() & {"disable_shm_size_detection", "disable_automatic_runtime_detection"}


def test_every_pod_gives_ray_room_in_shared_memory_and_a_scratch_disk() -> None:
    for overlay in OVERLAYS:
        for resource in build(overlay):
            if resource["kind"] in ("RayCluster", "RayService"):
                for template in pod_templates(resource):
                    mounts = {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
                    assert {"/tmp", "/dev/shm"} <= mounts
