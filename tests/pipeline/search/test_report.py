"""The page answers first and says what it stands on; best.yaml is a preset that loads, whatever was found."""

import csv
import io
import math
from pathlib import Path

import pytest

from pipeline.artifacts import Artifact
from pipeline.config import Config, load_config
from pipeline.search import report
from pipeline.search.ladder import count_flops, plan_ladder
from pipeline.search.space import Point, configure
from pipeline.search.study import PRESET, Final, Findings
from pipeline.search.trial import DONE, FAILED, STOPPED, Record, Trial
from pipeline.search.verdict import fit_scaling, judge
from tests.pipeline.search.plain_demo import PLAIN

POINTS: list[Point] = [PRESET, {"train.batch_tokens": "8192"}, {"optimizer.muon_learning_rate": "0.04"}]
NOWHERE = Artifact("/nowhere", "search", "s" * 20)


@pytest.fixture
def demo() -> Config:
    return load_config("demo", [*PLAIN, "search.space=[train.batch_tokens = 8192]", "storage=/elsewhere"])


@pytest.fixture
def findings(demo: Config) -> Findings:
    trials = [
        Trial(number, point, configure(demo, point), {}, Artifact("/nowhere", "train", f"{number:020}"), NOWHERE)
        for number, point in enumerate(POINTS)
    ]
    records = [
        Record(DONE, points=[[85, 348_160, 2.5], [170, 696_320, 2.31]], seconds=80.0),
        Record(DONE, points=[[42, 344_064, 2.45], [85, 696_320, 2.22]], seconds=70.0),
        Record(STOPPED, points=[[85, 348_160, 2.9]], reason="others were better after 348,160 tokens"),
    ]
    finals = [Final(PRESET, [2.31, 2.33, 2.35]), Final(POINTS[1], [2.20, 2.26, 2.23])]
    finals[1].verdict = judge(finals[0].bits, finals[1].bits)
    return Findings(trials, records, finals, target_bits=2.33)


def test_the_page_answers_first(demo: Config, findings: Findings) -> None:
    page = report.write_page(demo, findings)
    assert page.splitlines()[2].startswith("batch_tokens=8192 is better than the preset: +0.1000 bits per byte (95 %")
    assert "| batch_tokens=8192 | 2.2000, 2.2600, 2.2300 | 2.2300 | +0.1000 bits per byte" in page
    assert "differ by 0.0255 (standard deviation)" in page
    rows = [line for line in page.splitlines() if line.startswith(("| 0 |", "| 1 |", "| 2 |"))]
    assert [row[2] for row in rows] == ["1", "0", "2"], "those that came to their end first, the best at the top"
    assert "stopped: others were better after 348,160 tokens" in rows[2]


def test_a_winner_becomes_a_preset_with_its_evidence(demo: Config, findings: Findings, tmp_path: Path) -> None:
    text = report.write_preset(demo, findings, "f" * 20)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments[0] == f"# Search {'f' * 20} of demo."
    assert "batch_tokens=8192 is better than the preset" in comments[1]
    assert "# the preset: 2.3100, 2.3300, 2.3500 bits per byte" in comments
    (tmp_path / "best.yaml").write_text(text)
    best = load_config(tmp_path / "best.yaml")
    assert (best.train.batch_tokens, best.train.steps) == (8192, 85)
    assert best.model == demo.model
    assert (best.name, best.storage, best.search) == ("demo", Config().storage, Config().search)


def test_no_difference_gives_the_preset_back(demo: Config, findings: Findings, tmp_path: Path) -> None:
    findings.finals[1] = Final(POINTS[1], [2.30, 2.36, 2.28], judge([2.31, 2.33, 2.35], [2.30, 2.36, 2.28]))
    assert findings.winner is None
    assert "Result: no difference from the preset is shown. batch_tokens=8192: +0.0167" in report.conclude(findings)
    (tmp_path / "best.yaml").write_text(report.write_preset(demo, findings, "f" * 20))
    best = load_config(tmp_path / "best.yaml", ["storage=/elsewhere", "search.space=[train.batch_tokens = 8192]"])
    assert best == demo
    findings.finals = findings.finals[:1]
    assert "no difference. No point was as good as the preset" in report.conclude(findings)


def test_the_table_has_every_trial_with_its_settings(findings: Findings) -> None:
    rows = list(csv.DictReader(io.StringIO(report.write_table(findings.trials, findings.records))))
    assert [row["train.batch_tokens"] for row in rows] == ["8192", "4096", "4096"]
    assert [row["optimizer.muon_learning_rate"] for row in rows] == ["0.02", "0.02", "0.04"]
    assert [row["state"] for row in rows] == ["done", "done", "stopped"]
    assert rows[0]["bits_per_byte"] == "2.2200"


@pytest.mark.parametrize("broken", [False, True])
def test_pictures_are_drawn_of_whatever_there_is(findings: Findings, broken: bool) -> None:
    if broken:  # nothing but failures
        findings.records = [Record(FAILED, reason="The loss of step 3 is nan") for _ in findings.records]
        assert math.isinf(findings.records[0].bits_per_byte)
    for draw in (report.draw_parallel, report.draw_curves):
        assert draw(findings.trials, findings.records).startswith(b"\x89PNG")


def test_the_presets_real_figure_stands_beside_the_prediction(demo: Config) -> None:
    larger = ["model.width=256", "model.num_heads=4"]
    config = load_config("demo", [*larger, "search.widths=[64,128,192]"])
    rungs = plan_ladder(config, 2048)
    assert [rung.point["model.num_heads"] for rung in rungs] == ["1", "2", "3"]
    assert rungs[0].parameters < rungs[1].parameters < rungs[2].parameters
    assert rungs[2].flops < count_flops(config, 2048)
    per_parameter = [rung.config.train.steps * 4096 / rung.parameters for rung in rungs]
    assert per_parameter == pytest.approx([per_parameter[-1]] * 3, rel=0.05)
    bits = [3.0, 2.6, 2.4]
    scaling = fit_scaling([rung.flops for rung in rungs], bits)
    findings = Findings(rungs=list(zip(rungs, bits, strict=True)), scaling=scaling, target_flops=1e13, target_bits=2.5)
    page = report.write_page(config, findings)
    middle = scaling.predict(1e13)[0]
    assert f"that predicts {middle:.4f} (95 % interval" in page
    assert f"it really reached 2.5000, {abs(2.5 - middle):.4f} {'more' if middle < 2.5 else 'less'}." in page
    assert report.draw_scaling(findings).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"search\.widths: 100 is no multiple of a head's 64 channels"):
        plan_ladder(load_config("demo", ["search.widths=[64,100]"]), 2048)
    with pytest.raises(ValueError, match=r"search\.widths: 192 is not below the preset's 192"):
        plan_ladder(load_config("demo", ["search.widths=[64,192]"]), 2048)
