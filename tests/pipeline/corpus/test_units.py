"""What units run in starts ahead of them, and leaves Ray Data as it was."""

import pytest
import ray

from pipeline import prepare
from pipeline.config import load_config


def test_getting_ready_changes_no_setting_of_ray_data_and_starts_no_ray(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, ["source.kind=files", "source.paths=[texts]"])
    context = ray.data.DataContext.get_current()
    names = ("enable_progress_bars", "op_resource_reservation_enabled", "target_max_block_size")
    before = [getattr(context, name) for name in names]
    prepare.get_ready(config)
    assert ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator"), "as Ray Data calls it"
    assert [getattr(context, name) for name in names] == before
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: pytest.fail("which would start one"))
    prepare.get_ready(config)
