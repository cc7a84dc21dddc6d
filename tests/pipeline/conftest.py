"""What several tests share: an MLflow store with a tiny registered model, and one to log to, each made once."""

from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.config import Config, load_config
from tests.pipeline.tiny_registry import TinyRegistry, make_registry


@pytest.fixture(scope="session")
def tiny_registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    """A registry whose model `tiny` has version 1, the champion."""
    folder: Path = tmp_path_factory.mktemp("registry")
    registry = make_registry(folder)
    registry.add_version(seed=1, alias="champion")
    return registry


@pytest.fixture(scope="session")
def tracked_storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests that log: to make it takes MLflow seconds."""
    return str(tmp_path_factory.mktemp("tracked"))


@pytest.fixture
def tracked_config(tracked_storage: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config whose MLflow store is that one, connected."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config(None, [f"storage={tracked_storage}", "name=tiny"])
    tracking.connect(config)
    return config


@pytest.fixture
def tracked_run(tracked_config: Config) -> tuple[str, str]:
    """A tracking URI and a run in it."""
    run_id = tracking.open_run(tracked_config, None, name="try", data={}, facts={"fingerprint": "f"})
    return tracking.address(tracked_config), run_id
