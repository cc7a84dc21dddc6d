"""Answer one prompt in the terminal, streamed, without a server or Ray; or files of prompts, with Ray.

    python -m jobs.generate "Return a new" [--preset demo] [--version 3] [--max-tokens 100]
    python -m jobs.generate --input prompts.jsonl --output answers.parquet [the same options]

The prompt `-` is read from standard input. Files of prompts are .jsonl or .parquet: one, a folder or a glob of them,
here or on s3://. A row has `prompt` or `messages`, any setting of the endpoint's requests, and an `id`; the options
stand for what it does not say. Lines of OpenAI's batches are read too. Stopped anywhere, the same command goes on.
"""

import argparse
import os
import posixpath
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jobs.command import make_parser, ray_session, run_plainly, set_environment

if TYPE_CHECKING:
    from pipeline.config import Config


def generate(config: "Config", prompt: str, options: argparse.Namespace) -> Iterator[str]:
    """Load the version that the registry names and yield its answer as it comes."""
    import torch

    from model.generation import stream_text
    from model.sampling import SamplingSettings
    from pipeline import registry, tracking

    settings = SamplingSettings(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=tuple(options.stop),
    )
    tracking.connect(config)
    record = registry.resolve(config.registered_name, options.version)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, model = registry.load(record, device)
    yield from stream_text(model, loaded.tokenizer, prompt, settings)


def print_answer(options: argparse.Namespace) -> None:
    from pipeline.config import load_config

    config = load_config(options.preset, options.settings)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    answer = generate(config, prompt, options)
    first = next(answer, "")  # nothing is printed before it is known that there is an answer
    print("" if options.no_echo else prompt, first, sep="", end="", flush=True)
    for piece in answer:
        print(piece, end="", flush=True)
    print()


def answer_files(options: argparse.Namespace) -> None:
    """Answer every row of the files of prompts on Ray, and say what came of it."""
    from pipeline import lease, tracking
    from pipeline.config import load_config
    from pipeline.corpus.progress import Progress
    from pipeline.serve import backend_starter
    from pipeline.serving import batch

    config = load_config(options.preset, options.settings)
    names = ("max_tokens", "temperature", "top_k", "top_p")
    defaults = {name: getattr(options, name) for name in names} | ({"stop": options.stop} if options.stop else {})
    tracking.connect(config)
    plan = batch.plan_batch(config, options.version, options.input, options.output, defaults, options.seed or 0)
    counts = batch.finished_counts(plan)
    speed = ""
    if counts is None:
        progress: Progress | None = None
        tokens = 0

        def begin(rows: int, done: int) -> None:
            nonlocal progress
            progress = Progress("generate", rows, " rows", done=done)

        def told(part: batch.PartDone) -> None:
            nonlocal tokens, speed
            tokens += part.tokens
            speed = f"{tokens / max(0.1, time.time() - part.ready_at):,.0f} tokens/s"
            assert progress is not None
            progress.add(part.rows, speed)
            held.check()

        # Ray's core calls it an error that Ray Data's actors may be restarted, though that is what they are to be.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        with lease.hold(*posixpath.split(plan.work.url)) as held, ray_session():
            counts = batch.answer_batch(plan, backend_starter(config.serve), begin, told)
        if progress is not None:
            progress.finish()
    failed = f", {counts.failed:,} with an error (the first is {counts.first_error})" if counts.failed else ""
    print(
        f"{plan.output}: {counts.rows - counts.failed:,} of {counts.rows:,} rows answered{failed};"
        f" {counts.completion_tokens:,} tokens by {plan.record.name} version {plan.record.version}"
        + (f", {speed}" if speed else "")
    )
    if counts.failed == counts.rows:
        raise ValueError("No row could be answered; the file says of each why.")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("prompt", nargs="?", help="the text to go on with; - reads it from standard input")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over the preset")
    named = "its name is the model's, unless name=NAME says another [%(default)s]"
    parser.add_argument("--preset", default="demo", help=named)
    parser.add_argument("--version", default="champion", help="a version number or an alias [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=100, help="[%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy [%(default)s]")
    parser.add_argument("--top-k", type=int, default=50, help="0 keeps all tokens [%(default)s]")
    parser.add_argument("--top-p", type=float, default=1.0, help="[%(default)s]")
    parser.add_argument("--seed", type=int, help="the same seed, the same answer")
    parser.add_argument("--stop", action="append", default=[], help="a string to stop at; may be repeated")
    parser.add_argument("--no-echo", action="store_true", help="print the answer only, without the prompt before it")
    parser.add_argument("--input", metavar="PATH", help="answer the prompts of a file, a folder or a glob")
    parser.add_argument("--output", metavar="FILE", help="of --input: the file of answers, .jsonl or .parquet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_intermixed_args(argv)
    if bool(options.input) != bool(options.output):
        parser.error("--input and --output go together: files of prompts, and the file for their answers")
    if options.input and options.prompt is not None:  # what argparse takes for one is the first setting
        options.settings.insert(0, options.prompt)
    elif not options.input and options.prompt is None:
        parser.error("say what to answer: a prompt, or --input and --output")
    set_environment()
    return run_plainly(lambda: answer_files(options) if options.input else print_answer(options))


if __name__ == "__main__":
    sys.exit(main())
