"""What every test may use: one quiet local Ray cluster, and storage in a temporary folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.serving.errors.proxy_middlewares",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
}
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
