"""What a checkpoint remembers of its training."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.image import imread

from pipeline.training.history import History


def test_loss_plot_is_red_and_blue(tmp_path: Path) -> None:
    picture = History(training=[[1, 5.0], [2, 4.0]], validation=[[0, 5.5, 2.7], [2, 4.2, 2.1]]).draw("tiny")
    (tmp_path / "loss.png").write_bytes(picture)
    pixels = imread(tmp_path / "loss.png")[..., :3]
    assert ((pixels[..., 0] > 0.9) & (pixels[..., 1:].max(-1) < 0.4)).any()
    assert ((pixels[..., 2] > 0.9) & (pixels[..., :2].max(-1) < 0.2)).any()


def test_what_is_forgotten_is_a_green_curve_and_counts_from_the_first_score(tmp_path: Path) -> None:
    history = History(training=[[1, 5.0]], validation=[[0, 5.5, 2.7], [2, 4.2, 2.1]])
    assert history.note_base(1.5) == 0
    history.step = 2
    assert history.note_base(1.75) == 0.25
    (tmp_path / "loss.png").write_bytes(history.draw("tiny"))
    pixels = imread(tmp_path / "loss.png")[..., :3]
    assert ((pixels[..., 1] > 0.45) & (pixels[..., [0, 2]].max(-1) < 0.1)).any()
    history.save(tmp_path)
    assert History.load(tmp_path) == history


@pytest.mark.parametrize(
    ("skipped", "in_a_row"),
    [([], 0), ([7], 1), ([7, 8, 9], 3), ([3, 7, 8], 2), ([3, 4, 5, 9], 1), ([1, 2, 4, 5, 6], 3)],
)
def test_steps_skipped_in_a_row_are_counted_from_the_last_one(skipped: list[int], in_a_row: int) -> None:
    assert History(skipped_steps=skipped).skipped_in_a_row() == in_a_row


def test_a_history_of_before_the_precision_was_kept_is_read(tmp_path: Path) -> None:
    old = asdict(History(step=4, restarts=[{"step": 2}]))
    del old["precision"]
    (tmp_path / "progress.json").write_text(json.dumps(old))
    history = History.load(tmp_path)
    assert (history.step, history.precision) == (4, "")
    history.save(tmp_path)
    assert History.load(tmp_path) == history
