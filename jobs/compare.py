"""Compare two models: settings, bits per byte of held-out text, tasks, samples side by side. No Ray is started.

    python -m jobs.compare A B [--preset demo] [--html page.html] [--json] [section.key=value ...]

A and B are each a version's number or an alias of the preset's model, the id of a training's run in MLflow, or the
folder of a training or of any checkpoint. The held-out text is the preset's, so its `prepare` must be done. Tasks and
prompts are those of `evaluate.tasks` and `evaluate.prompts`.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import make_parser, print_json, run_plainly, set_environment

if TYPE_CHECKING:
    from pipeline.config import Config


def compare(config: "Config", options: argparse.Namespace) -> None:
    """Measure both and show it."""
    import torch

    from model.tokenizer import load_tokenizer
    from pipeline import orchestrator, tracking
    from pipeline.corpus.documents import read_documents
    from pipeline.evaluation.contrast import describe, draw_page, find_side, measure
    from pipeline.evaluation.tasks import load_task

    tracking.connect(config)
    artifacts = orchestrator.locate(config)
    for stage in ("tokenizer", "prepare"):
        if not artifacts[stage].is_done:
            raise ValueError(
                f"The held-out text is not prepared with these settings; run python -m jobs.{stage} first."
            )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(artifacts["tokenizer"].download(Path(folder)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contrast = measure(
        find_side(config, options.first, device),
        find_side(config, options.second, device),
        read_documents(artifacts["prepare"], tokenizer, config.register.gate_documents),
        [load_task(entry) for entry in config.evaluate.tasks],
        config.evaluate.prompts,
        sample_tokens=config.evaluate.sample_tokens,
        seed=config.seed,
    )
    if options.json:
        print_json(asdict(contrast))
    else:
        print(describe(contrast), end="")
    if options.html:
        Path(options.html).write_text(draw_page(contrast), encoding="utf-8")
    if options.html and not options.json:
        print(f"\nThe same as a page: {options.html}")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("first", metavar="A", help="the model to compare with")
    parser.add_argument("second", metavar="B", help="the model whose gain is asked for")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over the preset")
    parser.add_argument("--preset", default="demo", help="[%(default)s]")
    parser.add_argument("--html", default="", metavar="FILE", help="write a page too")
    parser.add_argument("--json", action="store_true", help="print JSON, for another program")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(argv)
    set_environment()
    from pipeline.config import load_config

    return run_plainly(lambda: compare(load_config(options.preset, options.settings), options))


if __name__ == "__main__":
    sys.exit(main())
