"""Many prompts from files, answered by copies of one version, each row by its own settings.

    batch = plan_batch(config, "champion", "prompts.jsonl", "answers.parquet", {"max_tokens": 100}, seed=0)
    counts = answer_batch(batch, engine_starter(config.serve), told)

Ray Data hands parts of the input to actors. An actor holds one backend, answers several parts at once, so that no part
waits for the last row of another, and writes each part's answers as one file in `<output>.run/`. A part that is
written is done: the same command goes on with the others, and joins them at the end. Every row has a seed, its own or
one made of the command's and its number, so what is answered again has the same bytes.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import ray.data
import torch
from pydantic import ValidationError

from model.cores import count_cores
from model.sequence import GenerationRequest
from pipeline import registry, tracking
from pipeline.artifacts import Artifact, Recipe, describe_difference, filesystem_of
from pipeline.config import Config, ServeConfig
from pipeline.registry import LoadedVersion, VersionRecord
from pipeline.serving.backend import Backend, StartBackend, sequences
from pipeline.serving.batch_files import (
    Counts,
    InputFile,
    Part,
    absolute,
    cut,
    encode_answers,
    find_files,
    format_of,
    join,
    read_part,
)
from pipeline.serving.chat import NO_TEMPLATE, ChatRequest, conversation_too_long, render
from pipeline.serving.completion import choose_max_tokens, read_prompts
from pipeline.serving.errors import ApiError
from pipeline.serving.live_engine import max_active
from pipeline.serving.protocol import CompletionRequest, describe_validation
from pipeline.serving.versions import LiveVersion

FORMAT_VERSION = 1
PLAN = "plan.json"
PARTS_AT_ONCE = 4  # of one actor: while the last rows of one are written, the next ones fill the batch
NOT_IN_A_BATCH = ("stream", "stream_options", "echo", "logprobs", "top_logprobs")
IDS = ("id", "custom_id")
DATA_SETTINGS = {"enable_progress_bars": False, "print_on_execution_start": False}


@dataclass(frozen=True)
class Batch:
    """What every actor knows."""

    record: VersionRecord
    tracking_uri: str
    settings: ServeConfig
    defaults: Mapping[str, Any]  # sampling of the rows that do not say it themselves
    seed: int
    files: tuple[InputFile, ...]
    output: str
    format: str
    work: Artifact


@dataclass(frozen=True)
class PartDone:
    """What the driver hears of a part."""

    number: int
    rows: int
    tokens: int
    ready_at: float  # when the actor had its model, in seconds since 1970


# On the driver ----------------------------------------------------------------------------------------------------


def plan_batch(
    config: Config, selector: str, input_url: str, output: str, defaults: Mapping[str, Any], seed: int
) -> Batch:
    """Say what is to be done; a batch that was begun keeps the version that its alias meant then.

    Raises `ValueError` where there is nothing to read, or `output` is another batch's.
    """
    output, format_ = absolute(output), format_of(output)
    files = find_files(input_url)
    url = f"{output}.run"
    begun = _read_plan(Artifact(url, "generate", ""))
    asked = {"model": config.registered_name, "version": selector}
    if begun is not None and begun["asked"] == asked and not selector.isdigit():
        selector = begun["version"]
    record = registry.resolve(config.registered_name, selector)
    settings = {
        "input": [[file.url, file.size, file.version] for file in files],
        "model": record.name,
        "version": record.version,
        "defaults": dict(sorted(defaults.items())),
        "seed": seed,
        "weights": config.serve.weights,
    }
    recipe = Recipe(FORMAT_VERSION, settings)
    if begun is not None and begun["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"{output} was begun with other settings: {describe_difference(begun['settings'], settings)}"
            f" Give another --output, or delete {url} to begin again."
        )
    filesystem, path = filesystem_of(output)
    if begun is None and filesystem.exists(path):
        raise ValueError(f"{output} is there already, and not made by this command; give another --output.")
    work = Artifact(url, "generate", recipe.fingerprint("generate"), recipe)
    tracking_uri = mlflow.get_tracking_uri()
    batch = Batch(record, tracking_uri, config.serve, dict(defaults), seed, tuple(files), output, format_, work)
    work.write_text(PLAN, json.dumps({"asked": asked, "version": record.version, "settings": settings}, indent=1))
    return batch


def _read_plan(work: Artifact) -> dict[str, Any] | None:
    try:
        plan = json.loads(work.read_text(PLAN))
    except FileNotFoundError:
        return None
    except ValueError:
        plan = None
    if not isinstance(plan, dict) or not {"asked", "version", "settings"} <= plan.keys():
        raise ValueError(f"{work.url}/{PLAN} is damaged; delete {work.url} to begin again.")
    return plan


def finished_counts(batch: Batch) -> Counts | None:
    """What the answers hold that are there already, or None where there is something left to do."""
    manifest = batch.work.manifest()
    if manifest is None:
        return None
    filesystem, path = filesystem_of(batch.output)
    if not filesystem.exists(path) or filesystem.info(path)["size"] != manifest.counts["bytes"]:
        batch.work.filesystem.rm(batch.work.file("manifest.json"))
        return None
    return Counts(**{each.name: manifest.counts[each.name] for each in dataclasses.fields(Counts)})


def answer_batch(
    batch: Batch,
    start_backend: StartBackend,
    begin: Callable[[int, int], None] = lambda rows, done: None,
    told: Callable[[PartDone], None] = lambda part: None,
) -> Counts:
    """Answer every row that has no answer yet, and write them all in the input's order; needs Ray.

    `begin` hears how many rows there are and how many had been answered, `told` of each part. Who calls it holds the
    folder's name (`pipeline/lease.py`), where another might answer the same.
    """
    parts = cut(batch.files)
    if not parts:
        raise ValueError(f"{batch.files[0].url} holds no rows.")
    there = batch.work.list_files()
    to_do = [part for part in parts if _name(batch, part) not in there]
    rows = sum(part.rows for part in parts)
    begin(rows, rows - sum(part.rows for part in to_do))
    for done in _on_actors(batch, start_backend, to_do) if to_do else ():
        told(done)
    counts = join(batch.output, batch.work, [_name(batch, part) for part in parts], batch.format)
    size = filesystem_of(batch.output)[0].info(filesystem_of(batch.output)[1])["size"]
    batch.work.commit(counts=dataclasses.asdict(counts) | {"bytes": int(size)}, files={})
    batch.work.filesystem.rm(batch.work.file("parts"), recursive=True)
    return counts


def _name(batch: Batch, part: Part) -> str:
    return f"parts/{part.number:06d}.{batch.format}"


def _on_actors(batch: Batch, start_backend: StartBackend, parts: Sequence[Part]) -> Any:
    """The Ray Data pipeline: one block for each part, answered by a pool of actors."""
    settings = batch.settings
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in DATA_SETTINGS}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        for name, value in DATA_SETTINGS.items():
            setattr(context, name, value)
        dataset: ray.data.Dataset = ray.data.from_items(
            [{"part": part} for part in parts], override_num_blocks=len(parts)
        )
        dataset = dataset.map_batches(
            Answerer,
            fn_constructor_args=(batch, start_backend),
            batch_size=1,
            num_cpus=settings.cpus_per_replica,
            num_gpus=settings.gpus_per_replica,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(settings.replicas, len(parts)),
                max_size=min(max(settings.replicas, settings.max_replicas), len(parts)),
                max_tasks_in_flight_per_actor=PARTS_AT_ONCE,
                max_concurrent_calls_per_actor=PARTS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
        )
        for row in dataset.iter_rows():
            yield row["done"]
    finally:
        for name, value in before.items():
            setattr(context, name, value)


# On an actor ------------------------------------------------------------------------------------------------------


class Answerer:
    """One copy of the model. Several threads give it a part each; one event loop has the backend."""

    def __init__(self, batch: Batch, start_backend: StartBackend) -> None:
        self._batch = batch
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="answers", daemon=True).start()
        tracking.prepare_client(batch.tracking_uri)
        mlflow.set_tracking_uri(batch.tracking_uri)
        on_gpu = batch.settings.gpus_per_replica > 0
        if on_gpu and not torch.cuda.is_available():
            raise ValueError("serve.gpus_per_replica asks for a GPU, and torch finds none here.")
        if batch.settings.threads or not on_gpu:
            torch.set_num_threads(batch.settings.threads or count_cores())
        self._rows = asyncio.run_coroutine_threadsafe(self._start(start_backend, on_gpu), self._loop).result()
        self._ready_at = time.time()

    async def _start(self, start_backend: StartBackend, on_gpu: bool) -> "RowAnswerer":
        with tempfile.TemporaryDirectory(prefix="model-version-") as folder:
            checkpoint = registry.download(self._batch.record, Path(folder))
            loaded, model = registry.read(self._batch.record, checkpoint, torch.device("cuda" if on_gpu else "cpu"))
            backend = await start_backend(checkpoint, model, loaded.tokenizer)
        return RowAnswerer(loaded, backend, self._batch.defaults, self._batch.seed, max_active(self._batch.settings))

    def __call__(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        (part,) = given["part"]
        done = np.empty(1, dtype=object)
        done[0] = asyncio.run_coroutine_threadsafe(self._answer_part(part), self._loop).result()
        return {"done": done}

    async def _answer_part(self, part: Part) -> PartDone:
        rows = await asyncio.to_thread(lambda: list(read_part(part)))
        answers = await asyncio.gather(*(self._rows.answer(number, given) for number, given in rows))
        content = await asyncio.to_thread(encode_answers, answers, self._batch.format)
        await asyncio.to_thread(self._batch.work.write_bytes, _name(self._batch, part), content)
        tokens = sum(answer["completion_tokens"] for answer in answers)
        return PartDone(part.number, part.rows, tokens, self._ready_at)


class Places:
    """So many sequences at once; who comes first is let in first."""

    def __init__(self, number: int) -> None:
        self.number = self._free = number
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, wanted: int) -> None:
        if self._waiting or self._free < wanted:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((wanted, turn))
            await turn
        else:
            self._free -= wanted

    def give(self, number: int) -> None:
        self._free += number
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.popleft()
            self._free -= wanted
            turn.set_result(None)


class RowAnswerer:
    """Answers rows through a backend; what is wrong with a row is said in its own answer."""

    def __init__(
        self, loaded: LoadedVersion, backend: Backend, defaults: Mapping[str, Any], seed: int, places: int
    ) -> None:
        self._version = LiveVersion(loaded, backend, 0.0, 0.0)
        self._defaults = defaults
        self._seed = seed
        self._places = Places(places)

    async def answer(self, number: int, given: Mapping[str, Any] | str) -> dict[str, Any]:
        """Return a row's answer, under the names of `batch_files.SCHEMA`."""
        row_id: str | None = None
        prompt_tokens = 0
        record = self._version.record
        found: dict[str, Any] = {"text": None, "finish_reason": None, "more_choices": [], "completion_tokens": 0}
        error = given if isinstance(given, str) else None
        if not isinstance(given, str):
            try:
                row_id, body = split_row(given)
                request = await self.read(number, body)
                prompt_tokens = len(request.prompt_tokens)
                found |= await self._generate(request)
            except ApiError as refused:
                error = refused.message
            except ValueError as refused:  # what only the backend could know
                error = str(refused)
        return {
            "row": number,
            "id": row_id,
            **{name: found[name] for name in ("text", "finish_reason", "more_choices")},
            "prompt_tokens": prompt_tokens,
            "completion_tokens": found["completion_tokens"],
            "model": record.name,
            "version": record.version,
            "error": error,
        }

    async def read(self, number: int, body: Mapping[str, Any]) -> GenerationRequest:
        """Turn a row into a request, by the endpoint's own rules; raises `ApiError` where they refuse it."""
        version, loaded = self._version, self._version.loaded
        names = (loaded.record.name, f"{loaded.record.name}@{loaded.record.version}")
        if body.get("model") not in (None, *names):
            raise ApiError(404, f"The row asks for the model {body['model']!r}; here answers {names[1]}.")
        seed = body["seed"] if body.get("seed") is not None else seed_of(self._seed, number)
        given = {**self._defaults, **{name: value for name, value in body.items() if value is not None}, "seed": seed}
        says_length = any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
        try:
            if "messages" in given:
                if "prompt" in given:
                    raise ApiError(400, "The row has a prompt and messages; it can have one of them.")
                completion = await self._read_messages(ChatRequest.model_validate(given))
            else:
                prompt = given.get("prompt")
                if prompt is None:
                    raise ApiError(400, "The row has no prompt and no messages.")
                if type(prompt) is list and any(type(each) is not int for each in prompt):
                    raise ApiError(400, "A row has one prompt: a text, or its token ids.")
                completion = CompletionRequest.model_validate(given)
        except ValidationError as error:
            raise ApiError(400, describe_validation(list(map(dict, error.errors())))[0]) from None
        completion.check()
        [tokens] = [each async for each in read_prompts(completion, version)]
        if not says_length and completion.max_tokens is not None:  # the command's is a bound, not a wish of the row's
            completion.max_tokens = max(1, min(completion.max_tokens, loaded.context_length - len(tokens)))
        limit = choose_max_tokens(completion, len(tokens), loaded.context_length)
        settings = completion.sampling(limit, loaded.tokenizer.vocab_size, loaded.tokenizer.stop_tokens)
        return GenerationRequest(f"row-{number}", tokens, settings)

    async def _read_messages(self, body: ChatRequest) -> CompletionRequest:
        body.check()
        loaded = self._version.loaded
        if loaded.chat_template is None:
            raise ApiError(400, NO_TEMPLATE)
        prompt = await render(body.messages, self._version)
        room = loaded.context_length - len(prompt)
        if room < 1:
            raise conversation_too_long(str(len(prompt)), loaded.context_length)
        return body.as_completion(prompt, room, loaded.chat_template.stops)

    async def _generate(self, request: GenerationRequest) -> dict[str, Any]:
        wanted = sequences(request)
        if wanted > self._places.number:
            raise ApiError(400, f"The row asks for {wanted} sequences at once; at most {self._places.number} fit.")
        await self._places.take(wanted)
        try:
            return await self._collect(request)
        finally:
            self._places.give(wanted)

    async def _collect(self, request: GenerationRequest) -> dict[str, Any]:
        backend = self._version.backend
        texts = [""] * request.settings.n
        reasons: list[str | None] = [None] * request.settings.n
        tokens = 0
        ticket = backend.submit([request])
        try:
            while chunks := await ticket.read():
                for chunk in chunks:
                    if chunk.finish_reason not in (None, "stop", "length"):
                        raise ApiError(500, f"The engine gave this row up: {chunk.error or chunk.finish_reason}.")
                    texts[chunk.index] += chunk.text
                    tokens += len(chunk.tokens)
                    reasons[chunk.index] = chunk.finish_reason or reasons[chunk.index]
        finally:
            backend.leave(ticket)
        choices = [{"text": text, "finish_reason": reason} for text, reason in zip(texts, reasons, strict=True)]
        return {**choices[0], "more_choices": choices[1:], "completion_tokens": tokens}


def split_row(given: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return a row's id and its request, which may lie under `body`, as in the files of OpenAI's batches."""
    body = {name: value for name, value in given.items() if name not in IDS}
    row_id = next((given[name] for name in IDS if given.get(name) is not None), None)
    if isinstance(body.get("body"), dict):
        body = body["body"]
    refused = next((name for name in NOT_IN_A_BATCH if body.get(name) not in (None, False)), None)
    if refused is not None:
        raise ApiError(400, f"{refused} is for the endpoint; a batch writes texts, so leave it out.")
    return None if row_id is None else str(row_id), body


def seed_of(seed: int, number: int) -> int:
    """The seed of a row that has none of its own."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
