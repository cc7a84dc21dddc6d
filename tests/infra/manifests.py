"""Reads what infra/ holds, for its tests: the manifests, and the overlays as kustomize would build them."""

import copy
import gzip
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import referencing
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
OVERLAYS = ("cpu", "gpu")

Resource = dict[str, Any]


def load(path: Path) -> list[Resource]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def build(overlay: str) -> list[Resource]:
    """Build an overlay: the part of kustomize that this project uses (resources, namespace, JSON patches, images)."""
    return copy.deepcopy(_built(overlay))


@lru_cache
def _built(overlay: str) -> list[Resource]:
    return _build(KUBERAY / "overlays" / overlay, [])


def build_with(overlay: str, component: str) -> list[Resource]:
    """Build an overlay with one of the optional components named in it."""
    return _build(KUBERAY / "components" / component, build(overlay))


def _build(folder: Path, resources: list[Resource]) -> list[Resource]:
    """Add a folder's resources to those given (a component's given ones are its overlay's), and change them all."""
    (plan,) = load(folder / "kustomization.yaml")
    for name in plan["resources"]:
        path = folder / name
        resources += _build(path, []) if path.is_dir() else load(path)
    for resource in resources:
        if "namespace" in plan and resource["kind"] != "Namespace":
            resource["metadata"]["namespace"] = plan["namespace"]
    for patch in plan.get("patches", []):
        operations = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
        matching = [each for each in resources if _matches(each, patch["target"])]
        assert matching, f"{folder}: nothing matches {patch['target']}"
        for resource in matching:
            jsonpatch.apply_patch(resource, operations, in_place=True)
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in plan.get("images", [])}
    for resource in resources:
        for container in containers(resource):
            container["image"] = images.get(container["image"], container["image"])
    return resources


def _matches(resource: Resource, target: dict[str, str]) -> bool:
    return resource["kind"] == target["kind"] and resource["metadata"]["name"] == target.get(
        "name", resource["metadata"]["name"]
    )


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Every container of a resource, however deep its pod templates lie."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template of a resource."""
    if isinstance(node, dict):
        spec = node.get("spec")
        if isinstance(spec, dict) and "containers" in spec:
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


@lru_cache
def _registry() -> tuple[Path, Registry]:
    # The package's own validate() reads its 4 MB of definitions anew for each resource.
    version = kubernetes_validate.latest_version()
    data = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    (folder,) = data.glob(f"v{version}*-local-strict")
    definitions = json.loads((folder / "_definitions.json").read_text())
    return folder, referencing.Resource.from_contents(definitions) @ Registry()


@lru_cache
def _validator(kind: str, api_version: str) -> Draft202012Validator:
    folder, registry = _registry()
    group = api_version.partition("/")[0].partition(".")[0] + "-" if "/" in api_version else ""
    schema = json.loads((folder / f"{kind.lower()}-{group}{api_version.rpartition('/')[2]}.json").read_text())
    return Draft202012Validator(schema, registry=registry)


def validate(resource: Resource) -> None:
    """Check against Kubernetes' schema of that kind; a field that it does not know is an error."""
    _validator(resource["kind"], resource["apiVersion"]).validate(resource)


@lru_cache
def custom_resource_schemas() -> dict[str, dict[str, Any]]:
    """KubeRay's own schemas by kind, where a copy of its definitions is at hand; else empty."""
    folder = Path(os.environ.get("GPT_SCHEMAS") or ROOT.parent / "shared/data/schemas")
    schemas = {}
    for path in sorted(folder.glob("ray.io_*.yaml.gz")):
        definition = yaml.safe_load(gzip.decompress(path.read_bytes()))
        version = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")
        schemas[definition["spec"]["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return schemas


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, but a field that it does not know is an error, not silently dropped."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    return strict
