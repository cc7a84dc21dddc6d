"""Answer one prompt in the terminal, streamed, without a server or Ray.

    python -m jobs.generate "Return a new" [--preset demo] [--version 3] [--max-tokens 100]

The prompt `-` is read from standard input.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jobs.command import make_parser, run_plainly, set_environment

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


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("prompt", help="the text to go on with; - reads it from standard input")
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(argv)
    set_environment()
    return run_plainly(lambda: print_answer(options))


if __name__ == "__main__":
    sys.exit(main())
