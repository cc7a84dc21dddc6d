"""Dashboards ask only for metrics that exist: here against what the code declares, in test_cluster.py scraped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.manifests import INFRA, ROOT

DASHBOARDS = sorted((INFRA / "grafana/dashboards").glob("*.json"))
WORDS = {"sum", "max", "min", "avg", "count", "rate", "by", "or", "le", "histogram_quantile", "clamp_min"}


def queries(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return asked + [variable["query"]["query"] for variable in dashboard["templating"]["list"]]


def metric_names(query: str) -> set[str]:
    """The metrics of a query: what is left without label matchers, groupings, durations, functions and numbers."""
    bare = re.sub(r"label_values\((\w+), \w+\)", r"\1", query)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)", "", bare)
    return set(re.findall(r"\b[a-z_]\w*", bare)) - WORDS


def metrics_of(path: Path) -> set[str]:
    return {name for query in queries(json.loads(path.read_text())) for name in metric_names(query)}


def declared() -> set[str]:
    from pipeline.serving.metrics import ServingMetrics
    from pipeline.training import gauges

    names = {f"ray_{name}" for name, _ in [*gauges.GAUGES.values(), gauges.STEP, gauges.TIME]}
    page = ServingMetrics("replica").page()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_each_metric_is_declared_by_the_code_or_rays_own(path: Path) -> None:
    named = metrics_of(path)
    assert named
    assert {name for name in named if not name.startswith("ray_node_")} <= declared()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_have_a_unit_and_a_source(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    source = yaml.safe_load((INFRA / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_compose_mounts_what_grafana_and_prometheus_read() -> None:
    compose = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    provider = yaml.safe_load((INFRA / "grafana/provisioning/dashboards/gpt.yaml").read_text())["providers"][0]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
    prometheus = yaml.safe_load((INFRA / "grafana/prometheus.yaml").read_text())
    jobs = {job["job_name"]: job for job in prometheus["scrape_configs"]}
    (file,) = jobs["ray"]["file_sd_configs"][0]["files"]
    assert f"ray:{Path(file).parent}:ro" in compose["prometheus"]["volumes"]
    (target,) = jobs["endpoint"]["static_configs"][0]["targets"]
    assert target.split(":")[0] in compose
