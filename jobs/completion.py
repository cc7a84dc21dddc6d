"""What a shell offers at TAB: jobs, options, presets by name, and settings.

argcomplete asks the program itself, which is started anew for each TAB with the line in its environment.
"""

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping, MutableMapping

ASKED = "_ARGCOMPLETE"  # set by the shell's side of argcomplete, to the number of the program's word
Completer = Callable[..., Iterator[str]]
SHELLS = ("bash", "zsh", "fish")


def is_asked(environment: Mapping[str, str]) -> bool:
    """Tell whether a shell started this process to complete a line."""
    return ASKED in environment


def job_being_typed(environment: MutableMapping[str, str]) -> str | None:
    """The job that stands whole before the cursor, which the job's own parser is then to complete."""
    before = environment.get("COMP_LINE", "")[: int(environment.get("COMP_POINT", "0"))]
    try:
        words = shlex.split(before)
    except ValueError:  # inside quotes
        words = before.split()
    number = int(environment[ASKED])
    if len(words) <= number or (len(words) == number + 1 and not before[-1:].isspace()):
        return None
    environment[ASKED] = str(number + 1)
    return words[number]


def offer(action: argparse.Action, completer: Completer) -> None:
    """Say what fits in the place of one argument."""
    action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks


def complete(parser: argparse.ArgumentParser) -> None:
    """Print what fits at the cursor, and end the process."""
    import argcomplete

    for action in parser._actions:
        if action.option_strings == ["--preset"]:
            offer(action, lambda prefix, **_: iter([*offer_presets(), *offer_files(prefix)]))
        elif action.dest == "preset":
            offer(action, lambda prefix, **_: iter([*offer_presets(), *offer_files(prefix), *offer_settings(prefix)]))
        elif action.dest == "settings":
            offer(action, lambda prefix, **_: offer_settings(prefix))
    argcomplete.autocomplete(parser, always_complete_options=False)


def offer_presets() -> Iterator[str]:
    from pipeline.presets import PRESETS

    yield from (path.stem for path in sorted(PRESETS.glob("*.yaml")))


def offer_files(prefix: str) -> Iterator[str]:
    from argcomplete.completers import FilesCompleter

    yield from FilesCompleter(["yaml", "yml"])(prefix)


def offer_settings(prefix: str) -> Iterator[str]:
    """`train.steps=`, and where only two values are possible, the values."""
    from pipeline.config import kinds_of_settings

    for key, kind in kinds_of_settings().items():
        if prefix.startswith(f"{key}=") and kind is bool:
            yield from (f"{key}={value}" for value in ("true", "false"))
        else:
            yield f"{key}="


def script(shell: str) -> str:
    """What the shell evaluates once so that it asks `gpt` at TAB."""
    import argcomplete

    return str(argcomplete.shellcode(["gpt"], shell=shell))
