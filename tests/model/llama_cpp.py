"""llama.cpp, by whichever of its packages is installed: xllamacpp, which brings its server, or llama-cpp-python."""

import importlib.util
import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

IS_THERE = any(importlib.util.find_spec(name) for name in ("llama_cpp", "xllamacpp"))
HAS_SERVER = importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file at work."""

    def __init__(self, file: Path, context: int) -> None:
        self._library: Any
        self._address = ""
        if not HAS_SERVER:
            import llama_cpp

            self._library = llama_cpp.Llama(str(file), n_ctx=context, n_threads=1, verbose=False)
            return
        import xllamacpp

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.port = context, 1, port
        settings.cpuparams.n_threads = 1
        settings.warmup, settings.verbosity, settings.use_jinja = False, 0, True
        self._library = xllamacpp.Server(settings)
        self._address = self._library.listening_address

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, in which names of special tokens are text."""
        if not self._address:
            return list(self._library.tokenize(text.encode(), add_bos=False, special=False))
        return self.ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def likeliest(self, prompt: list[int], end_of_text: int) -> int:
        """The token that is likeliest to follow."""
        if not self._address:
            return int(next(self._library.generate(prompt, temp=0.0, repeat_penalty=1.0)))
        answer = self.ask(
            "/completion", prompt=prompt, n_predict=1, temperature=0, return_tokens=True, cache_prompt=False
        )
        return int(answer["tokens"][0]) if answer["stop_type"] == "limit" else end_of_text  # which it does not return

    def ask(self, path: str, **body: Any) -> Any:
        """One request to its server."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)
