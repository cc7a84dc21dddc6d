"""The endpoint's description: what is known of it before Ray Serve has started anything."""

from dataclasses import replace

import pytest

from pipeline import serve
from pipeline.config import Config, load_config


@pytest.fixture
def config(storage: str) -> Config:
    return load_config(None, [f"storage={storage}", "name=tiny"])


def test_the_registered_name_is_the_pipelines_unless_it_is_set(config: Config) -> None:
    assert config.registered_name == "tiny"
    assert replace(config, register=replace(config.register, model_name="chosen")).registered_name == "chosen"


def test_storage_on_s3_needs_a_tracking_server(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    on_s3 = replace(config, storage="s3://bucket/prefix")
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        serve.describe_app(on_s3)
    serve.describe_app(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    serve.describe_app(on_s3)
