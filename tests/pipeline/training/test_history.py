from pathlib import Path

from matplotlib.image import imread

from pipeline.training.history import History


def test_loss_plot_is_red_and_blue(tmp_path: Path) -> None:
    picture = History(training=[[1, 5.0], [2, 4.0]], validation=[[0, 5.5, 2.7], [2, 4.2, 2.1]]).draw("tiny")
    (tmp_path / "loss.png").write_bytes(picture)
    pixels = imread(tmp_path / "loss.png")[..., :3]
    assert ((pixels[..., 0] > 0.9) & (pixels[..., 1:].max(-1) < 0.4)).any()
    assert ((pixels[..., 2] > 0.9) & (pixels[..., :2].max(-1) < 0.2)).any()
