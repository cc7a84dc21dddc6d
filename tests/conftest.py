"""What every test may use: one quiet local Ray cluster, and storage in a temporary folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.command import ENVIRONMENT as JOBS_ENVIRONMENT

ENVIRONMENT = JOBS_ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
# Set before anything imports ray or mlflow: both read some of these at import.
os.environ.update(ENVIRONMENT)

from tests.mlflow_store import forget_mlflow  # noqa: E402


@pytest.fixture(autouse=True)
def mlflow_forgotten() -> Iterator[None]:
    """Set up before any `monkeypatch` of a test, so taken down after it has put back what it found."""
    forget_mlflow()
    yield
    forget_mlflow()


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A storage root of the test's own."""
    return str(tmp_path / "storage")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need one; four logical CPUs on however many cores there are."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
