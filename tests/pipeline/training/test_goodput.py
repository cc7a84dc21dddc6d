"""Every second of a run is charged to one activity."""

import time

import pytest
import torch

from pipeline.training.goodput import ACTIVITIES, TimeSplit, memory_metrics, peak_flops, weight_norm


def test_parts_add_up_to_the_wall_clock() -> None:
    started = time.time() - 3.0
    clock = TimeSplit({}, started, "startup")
    clock.switch("compute")
    time.sleep(0.05)
    with clock.during("evaluation"):
        time.sleep(0.1)
        with clock.during("checkpoint"):
            time.sleep(0.05)
    clock.switch("data_wait")
    time.sleep(0.02)
    seconds = clock.seconds()
    assert tuple(seconds) == ACTIVITIES
    assert sum(seconds.values()) == pytest.approx(time.time() - started, abs=0.05)
    assert seconds["startup"] == pytest.approx(3.0, abs=0.05)
    assert seconds["evaluation"] >= 0.1
    assert seconds["checkpoint"] >= 0.05


def test_restart_holds_all_that_came_after_the_checkpoint() -> None:
    saved = {"compute": 10.0, "startup": 2.0}
    clock = TimeSplit(saved, time.time() - 5.0, "restart")
    assert clock.seconds()["restart"] == pytest.approx(5.0, abs=0.05)
    assert sum(clock.seconds().values()) == pytest.approx(17.0, abs=0.05)


def test_peak_is_measured_where_no_data_sheet_knows_it() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


def test_weight_norm_is_that_of_all_weights() -> None:
    model = torch.nn.Linear(3, 1)
    torch.nn.init.constant_(model.weight, 2.0)
    torch.nn.init.constant_(model.bias, 2.0)
    assert weight_norm(model) == pytest.approx(4.0)


def test_system_metrics_have_the_names_of_mlflows_page() -> None:
    names = memory_metrics()
    assert names["system/system_memory_usage_megabytes"] > 0
    assert names["memory/worker_gigabytes"] > 0
