"""Talk with a registered model in the terminal, without a server or Ray.

    python -m jobs.chat [--preset demo] [--version 3] [--system "Be brief."]

Ctrl-C stops an answer; what it has said stays. /again asks the last question again, /new begins a new conversation,
/quit or Ctrl-D ends.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from jobs.command import make_parser, run_plainly, set_environment

if TYPE_CHECKING:
    from model.chat import Message
    from pipeline.config import Config

NO_TEMPLATE = (
    "version {version} of {name} has no chat template, for it was not trained on conversations; train one with"
    " source.kind=conversations, or take python -m jobs.generate."
)
Answering = Callable[["list[Message]"], Iterator[str]]


def load(config: "Config", options: argparse.Namespace) -> Answering:
    """Load the version that the registry names; return what answers a conversation."""
    import torch

    from model.generation import Correspondent
    from model.sampling import SamplingSettings
    from pipeline import registry, tracking

    settings = SamplingSettings(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    tracking.connect(config)
    record = registry.resolve(config.registered_name, options.version)
    loaded, model = registry.load(record, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if loaded.chat_template is None:
        raise ValueError(NO_TEMPLATE.format(version=record.version, name=record.name))
    return Correspondent(model, loaded.tokenizer, loaded.chat_template, settings).stream_answer


def talk(answering: Answering, system: str) -> None:
    """Read questions until there are no more, and print each answer as it comes."""
    beginning: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            messages = list(beginning)
            continue
        if line == "/again":
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
        elif line:
            messages.append({"role": "user", "content": line})
        if not messages or messages[-1]["role"] != "user" or not line:
            continue
        said: list[str] = []
        answer = answering(messages)
        try:
            for piece in answer:
                said.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            answer.close()  # type: ignore[attr-defined]
        except ValueError as error:  # it cannot be answered: as if it had not been asked
            messages.pop()
            print(f"{error} /new begins another.")
            continue
        if said:
            messages.append({"role": "assistant", "content": "".join(said)})
        print()


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over the preset")
    named = "its name is the model's, unless name=NAME says another [%(default)s]"
    parser.add_argument("--preset", default="demo", help=named)
    parser.add_argument("--version", default="champion", help="a version number or an alias [%(default)s]")
    parser.add_argument("--system", default="", help="what the assistant is told before the first question")
    parser.add_argument("--max-tokens", type=int, default=400, help="of one answer at most [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy [%(default)s]")
    parser.add_argument("--top-k", type=int, default=50, help="0 keeps all tokens [%(default)s]")
    parser.add_argument("--top-p", type=float, default=1.0, help="[%(default)s]")
    parser.add_argument("--seed", type=int, help="the same seed, the same answers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    set_environment()
    from pipeline.config import load_config

    return run_plainly(lambda: talk(load(load_config(options.preset, options.settings), options), options.system))


if __name__ == "__main__":
    sys.exit(main())
