"""What a job prints, as one JSON object a line, for a cluster that collects logs: `--log-format json`.

    {"time": "2026-01-02T03:04:05.678+00:00", "level": "info", "message": "prepare   done in 3 s: s3://…"}

A text of several lines, such as a traceback, is one object.
"""

import io
import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("text", "json")


def write_json() -> None:
    """From here on all that this process prints or logs is JSON, a line each; call it before importing Ray."""
    sys.stdout = JsonLines(sys.stdout, "info")
    sys.stderr = JsonLines(sys.stderr, "warning")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.root.addHandler(handler)
    logging.captureWarnings(True)


def describe(level: str, message: str, **more: Any) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "message": message, **more}, ensure_ascii=False, default=str)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        more = {"logger": record.name}
        if record.exc_info:
            more["exception"] = self.formatException(record.exc_info)
        return describe(record.levelname.lower(), record.getMessage(), **more)


class JsonLines(io.TextIOBase):
    """A text stream that turns what is written up to the end of a line into one JSON object.

    A line that is one already, from Ray or from our own handler, passes as it is.
    """

    def __init__(self, stream: TextIO, level: str) -> None:
        self._stream = stream
        self._level = level
        self._begun = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            self._begun += text
            if self._begun.endswith("\n"):
                whole, self._begun = self._begun.strip("\n"), ""
                self._stream.write(self._describe(whole) + "\n" if whole.strip() else "")
        return len(text)

    def _describe(self, text: str) -> str:
        lines = text.splitlines()
        if all(line.startswith('{"') and line.endswith("}") for line in lines):
            return text
        is_error = text.startswith(("error: ", "Traceback "))
        return describe("error" if is_error else self._level, text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False  # no bars

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding
