"""What several tests of the stages share: an MLflow store with a tiny registered model, made once."""

from pathlib import Path

import pytest

from tests.pipeline.tiny_registry import TinyRegistry, make_registry


@pytest.fixture(scope="session")
def tiny_registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    """A registry whose model `tiny` has version 1, the champion."""
    folder: Path = tmp_path_factory.mktemp("registry")
    registry = make_registry(folder)
    registry.add_version(seed=1, alias="champion")
    return registry
