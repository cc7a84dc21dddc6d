"""Chat templates of strangers, rendered by a process that can do no harm: bounded in time, memory and size.

    process = TemplateProcess(template, {"eos_token": "</s>"})
    text, spoken = process.render([{"role": "user", "content": "Hi"}], ask=True)

Jinja's sandbox keeps a template from Python's internals, but not from a loop of ten thousand million rounds or a text
of as many characters, and a thread cannot be stopped. So the sandbox runs in a process of its own: this file, started
as a program, which ends with its parent. What templates may use is what `transformers` gives them; only the clock is
missing, for a conversation shall have the same tokens tomorrow.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 2.0  # of a processor, for one conversation; usual ones take a thousandth of it
WAITING_SECONDS = 60.0  # by the clock: on a busy machine the process may wait for a processor
TEXT_BYTES = 2**24
MEMORY_BYTES = 2**29


class TemplateProcess:
    """Renders one template in a process that is started at first use, and again after it had to be ended."""

    def __init__(self, template: str, special_tokens: Mapping[str, str], seconds: float = SECONDS) -> None:
        self._first = {"template": template, "special_tokens": dict(special_tokens), "seconds": seconds}
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], ask: bool) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the ranges of characters inside `{% generation %}`.

        Raises `ValueError` where the template refuses the conversation, is no template, or takes too much.
        """
        question = {"messages": [dict(message) for message in messages], "ask": ask}
        with self._lock:
            if self._process is None:
                self._start()
            answer = self._exchange(question)
        if "error" in answer:
            raise ValueError(f"The chat template cannot render this conversation: {answer['error']}")
        return answer["text"], [(start, stop) for start, stop in answer["spoken"]]

    def close(self) -> None:
        """End the process; it is started again if it is needed."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        # -P: this file's neighbours must not pass for modules of the same names.
        command = [sys.executable, "-P", str(Path(__file__))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        answer = self._exchange(self._first)
        if "error" in answer:
            self.close()
            raise ValueError(f"The chat template is not one: {answer['error']}")

    def _exchange(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line and read one; the process is ended if it does not answer as it should."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        too_slow = f"The chat template was stopped: it did not end within {self._seconds:g} s."
        deadline = time.monotonic() + WAITING_SECONDS
        received = bytearray()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            descriptor = self._process.stdout.fileno()
            while not received.endswith(b"\n"):
                ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise ValueError(too_slow)
                content = os.read(descriptor, 2**20)
                if not content:
                    is_slow = self._process.wait() == -signal.SIGPROF
                    raise ValueError(too_slow if is_slow else "The chat template was stopped: its process has ended.")
                received += content
            answer: dict[str, Any] = json.loads(received)
            return answer
        except BrokenPipeError:
            self.close()
            raise ValueError("The chat template was stopped: its process has ended.") from None
        except BaseException:
            self.close()
            raise


# In the process ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Read a template, then conversations, a line of JSON each, and answer each with one; ends with its input.

    The timer counts what a processor does for this process, and its signal ends it, in the middle of anything.
    """
    import resource

    import jinja2.ext
    import jinja2.sandbox  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compiled, nonce = None, secrets.token_hex(8)
    names: dict[str, str] = {}
    seconds = 0.0
    for line in sys.stdin.buffer:
        question = json.loads(line)
        seconds = question.get("seconds", seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if compiled is None:
                names = question["special_tokens"]
                compiled = compile_template(question["template"], nonce)
                answer: dict[str, Any] = {}
            else:
                written = compiled.render(messages=question["messages"], add_generation_prompt=question["ask"], **names)
                if len(written) > TEXT_BYTES // 4:
                    raise ValueError(f"it writes {len(written):,} characters.")
                text, spoken = find_spoken(written, nonce)
                answer = {"text": text, "spoken": spoken}
        except MemoryError:
            answer = {"error": "it takes too much memory."}
        except RecursionError:
            answer = {"error": "it calls itself without end."}
        except Exception as error:  # whatever a template does wrong is told to the one who uses it
            answer = {"error": " ".join(str(error).split())[:500] or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def compile_template(template: str, nonce: str) -> Any:
    """Compile for Jinja's sandbox with what `transformers` offers to templates; answers are wrapped in marks."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"\0{nonce}({caller()}\0{nonce})"

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def find_spoken(written: str, nonce: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks out of a text; return it with the ranges that lay between them."""
    opening, closing = f"\0{nonce}(", f"\0{nonce})"
    parts: list[str] = []
    spoken = []
    length = 0
    for number, piece in enumerate(written.split(opening)):
        inside, _, rest = piece.rpartition(closing) if number else ("", "", piece)
        if number:
            spoken.append((length, length + len(inside)))
        parts += [inside, rest]
        length += len(inside) + len(rest)
    return "".join(parts), spoken


if __name__ == "__main__":
    serve()
