"""Talk with a registered model in the terminal, without a server or Ray.

    python -m jobs.chat [--preset demo] [--version 3] [--system "Be brief."] [--keep talk.json]

Ctrl-C stops an answer; what it has said stays. Lines that begin with a stroke are commands:

    /again          ask the last question again
    /edit [N]       change question N, or the last one, and ask it instead; what followed is dropped
    /system [TEXT]  what the model is told before the first question; without a text, shows it
    /show           the conversation so far, questions numbered
    /forget         drop the first question and its answer, where the context is full
    /new            begin a new conversation
    /help           these lines
    /quit           end, as Ctrl-D does
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
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


class Conversation:
    """What was said so far; kept in a file where one is named."""

    def __init__(self, system: str = "", file: Path | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self._file = file
        if file is not None and file.exists():
            self._load(file)

    @property
    def messages(self) -> "list[Message]":
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    @property
    def questions(self) -> list[int]:
        """The places of the questions among the turns."""
        return [place for place, turn in enumerate(self.turns) if turn["role"] == "user"]

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})
        self.save()

    def cut(self, place: int) -> None:
        """Drop all turns from a place on."""
        del self.turns[place:]

    def forget_first(self) -> None:
        """Drop the first question, and what was answered to it."""
        del self.turns[: self.questions[1] if len(self.questions) > 1 else len(self.turns)]
        self.save()

    def save(self) -> None:
        if self._file is not None:
            content = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
            self._file.write_text(f"{content}\n", encoding="utf-8")

    def _load(self, file: Path) -> None:
        try:
            messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
            told = [(str(each["role"]), str(each["content"])) for each in messages]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f'{file} holds no conversation: it should be JSON, {{"messages": [{{"role": …, "content": …}}, …]}}.'
            ) from None
        self.system = self.system or next((content for role, content in told if role == "system"), "")
        self.turns = [{"role": role, "content": content} for role, content in told if role in ("user", "assistant")]


def read_line(prompt: str, given: str = "") -> str:
    """Read a line, with a text in it already where the terminal can edit lines."""
    try:
        import readline
    except ImportError:  # not on this system: the line is typed anew
        return input(prompt)
    readline.set_startup_hook(lambda: readline.insert_text(given))
    try:
        return input(prompt)
    finally:
        readline.set_startup_hook(None)


def talk(answering: Answering, conversation: Conversation) -> None:
    """Read questions and commands until there are no more, and print each answer as it comes."""
    while True:
        try:
            line = read_line("> ").strip()
            is_command = re.match(r"/[a-z]+(\s|$)", line) is not None
            asks = obey(line, conversation) if is_command else bool(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of a line being typed: another one may follow
            print()
            continue
        if asks is None:
            return
        if asks and not is_command:
            conversation.add("user", line)
        if asks:
            answer(answering, conversation)


def obey(line: str, conversation: Conversation) -> bool | None:
    """Do what a command says; returns whether the last question is to be answered now, None at the end."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    questions = conversation.questions
    if command == "/quit":
        return None
    if command in ("/again", "/edit", "/forget") and not questions:
        print("Nothing was asked yet.")
    elif command == "/again":
        conversation.cut(questions[-1] + 1)
        return True
    elif command == "/edit":
        if rest and not (rest.isdecimal() and 1 <= int(rest) <= len(questions)):
            print(f"There are questions 1 to {len(questions)}; /show numbers them.")
            return False
        place = questions[int(rest) - 1 if rest else -1]
        changed = ""
        with suppress(KeyboardInterrupt):
            changed = read_line("edit> ", str(conversation.turns[place]["content"])).strip()
        if changed:
            conversation.cut(place)
            conversation.add("user", changed)
        return bool(changed)
    elif command == "/system":
        if rest:
            conversation.system = rest
            conversation.save()
        print(conversation.system or "No system prompt is set.")
    elif command == "/show":
        number = 0
        for turn in conversation.messages:
            number += turn["role"] == "user"
            named = {"user": f"{number}>", "assistant": "", "system": "system:"}[turn["role"]]
            print(f"{named} {turn['content']}".strip())
    elif command == "/forget":
        conversation.forget_first()
        print("The first question is forgotten; /again asks the last one again." if conversation.turns else "All is.")
    elif command == "/new":
        conversation.cut(0)
        conversation.save()
    elif command == "/help":
        print((__doc__ or "").partition("commands:\n\n")[2].rstrip())
    else:
        print(f"There is no command {command}; /help names those that there are.")
    return False


def answer(answering: Answering, conversation: Conversation) -> None:
    """Answer the last question, and print it as it comes; Ctrl-C stops it, and what was said stays."""
    said: list[str] = []
    pieces = answering(conversation.messages)
    try:
        for piece in pieces:
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    except ValueError as error:
        print(f"{error} /forget drops the first question, /edit changes the last, /new begins another.")
        return
    print()
    if said:
        conversation.add("assistant", "".join(said))


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over the preset")
    named = "its name is the model's, unless name=NAME says another [%(default)s]"
    parser.add_argument("--preset", default="demo", help=named)
    parser.add_argument("--version", default="champion", help="a version number or an alias [%(default)s]")
    parser.add_argument("--system", default="", help="what the assistant is told before the first question")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="go on with the conversation in a file, and keep it there"
    )
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

    def run() -> None:
        conversation = Conversation(options.system, options.keep)
        talk(load(load_config(options.preset, options.settings), options), conversation)

    return run_plainly(run)


if __name__ == "__main__":
    sys.exit(main())
