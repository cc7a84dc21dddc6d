"""The versions in service, and how one takes over from another without a request noticing.

A name such as `demo@champion` follows its alias: when that moves, the new version is loaded beside the old and
probed. If it passes, new requests go to it, while the old one finishes what it has; if not, the old one stays.
"""

import asyncio
import gc
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.gpt import GPT
from pipeline import registry, tracking
from pipeline.registry import LoadedVersion, VersionRecord, VersionRefused
from pipeline.serving.backend import Backend, StartBackend
from pipeline.serving.errors import ApiError, EngineDied
from pipeline.serving.metrics import ServingMetrics
from pipeline.serving.probe import check_answers, measure_served_probe
from pipeline.serving.protocol import ModelAnswer

logger = logging.getLogger("ray.serve")

RETRY_SECONDS = 10.0  # after the first failure to bring a version up; twice as long after each further one
LONGEST_RETRY_SECONDS = 600.0


@dataclass
class LiveVersion:
    """A version that answers."""

    loaded: LoadedVersion
    backend: Backend
    probe_bits_per_byte: float  # of the weights as registered
    served_probe_bits_per_byte: float  # of the weights as the backend stores them
    card: dict[str, Any] = field(default_factory=dict)  # loss curves and links, read once in the background

    @property
    def record(self) -> VersionRecord:
        return self.loaded.record

    @property
    def headers(self) -> dict[str, str]:
        """What answered, on every answer."""
        record = self.record
        return {
            "X-Model-Name": record.name,
            "X-Model-Version": record.version,
            "X-MLflow-Run-Id": record.run_id,
            "X-Data-Digest": record.data_digest,
        }

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: the same only for the same weights."""
        return f"{self.record.name}-v{self.record.version}"


@dataclass
class Seat:
    """One selector (an alias or a number) and the version that sits there now."""

    selector: str
    version: LiveVersion
    swap_error: str | None = None
    refused: str = ""  # the version that failed its probe: not tried again until the alias moves
    failed: str = ""  # the version that could not be brought up, perhaps for a reason that passes
    failures: int = 0  # so often in a row
    retry_at: float = 0.0  # on the clock of time.monotonic()

    def forgive(self) -> None:
        """Forget what went wrong."""
        self.swap_error, self.refused, self.failed, self.failures, self.retry_at = None, "", "", 0, 0.0


class ServedModels:
    """All seats of one registered model in one replica."""

    def __init__(
        self,
        name: str,
        selectors: Sequence[str],
        start_backend: StartBackend,
        metrics: ServingMetrics,
        *,
        device: torch.device,
        probe_tolerance: float,
        drain_seconds: float,
        mlflow_pages: str = "",
    ) -> None:
        self.name = name
        self.selectors = tuple(selectors)
        self._start_backend = start_backend
        self._metrics = metrics
        self._device = device
        self._probe_tolerance = probe_tolerance
        self._drain_seconds = drain_seconds
        self._mlflow_pages = mlflow_pages
        self._seats: dict[str, Seat] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load what every selector means now; raises `ValueError` where one means nothing or fails its probe."""
        for selector in self.selectors:
            record = await asyncio.to_thread(registry.resolve, self.name, selector)
            self._seats[selector] = Seat(selector, self._seated(record) or await self._bring_up(record))
        settle_memory()

    @property
    def versions(self) -> list[LiveVersion]:
        """The versions in service, each once."""
        return list({id(seat.version): seat.version for seat in self._seats.values()}.values())

    def find(self, model: str | None) -> tuple[str, LiveVersion]:
        """Return the id and the version that a request's `model` means; raises `ApiError` 404 for another one."""
        if model in (None, "", self.name):
            return self.name, self._seats[self.selectors[0]].version
        for selector, seat in self._seats.items():
            if model == self.model_id(selector):
                return model, seat.version
        there = ", ".join([self.name, *map(self.model_id, self.selectors)])
        raise ApiError(
            404, f"There is no model {model!r} here; there is {there}.", code="model_not_found", param="model"
        )

    def model_id(self, selector: str) -> str:
        return f"{self.name}@{selector}"

    def describe(self) -> list[ModelAnswer]:
        """The entries of /v1/models: the plain name for the first selector, then every selector's."""
        entries = [self._describe(self.name, self._seats[self.selectors[0]])]
        return entries + [self._describe(self.model_id(seat.selector), seat) for seat in self._seats.values()]

    def check(self) -> None:
        """Raise `EngineDied` if any version in service no longer works."""
        for version in self.versions:
            version.backend.check()

    async def watch(self, every_seconds: float) -> None:
        """Follow the aliases until cancelled."""
        while True:
            await asyncio.sleep(every_seconds)
            for seat in list(self._seats.values()):
                if not seat.selector.isdigit():
                    await self.follow(seat)

    async def follow(self, seat: Seat) -> None:
        """Bring one seat up to what its alias means now; on any trouble the version there stays."""
        try:
            record = await asyncio.to_thread(registry.resolve, self.name, seat.selector)
        except Exception as error:  # the store may be away in many ways; the next look may find it
            logger.warning("The registry does not say what %s is now: %s", self.model_id(seat.selector), error)
            return
        if record.version == seat.version.record.version:
            seat.forgive()
            seat.version.loaded = replace(seat.version.loaded, record=record)  # its tags say what is new about it
            return
        if record.version == seat.refused or (record.version == seat.failed and time.monotonic() < seat.retry_at):
            return
        old = seat.version
        try:
            seat.version = self._seated(record) or await self._bring_up(record)
        except VersionRefused as error:  # it must not take the working one down, now or later
            seat.forgive()
            seat.refused = record.version
            seat.swap_error = f"Version {record.version} did not take over: {error}"
            self._metrics.swaps.labels("refused").inc()
            logger.error("%s Version %s goes on serving.", seat.swap_error, old.record.version)
            return
        except Exception as error:  # a download that breaks, a full disk: it may go well another time
            failures = seat.failures + 1 if record.version == seat.failed else 1
            seat.forgive()
            seat.failed, seat.failures, wait = record.version, failures, retry_seconds(failures)
            seat.retry_at = time.monotonic() + wait
            reason = tracking.first_line(error).rstrip(".")
            seat.swap_error = f"Version {record.version} could not be loaded ({reason}); next attempt in {wait:.0f} s"
            self._metrics.swaps.labels("failed").inc()
            logger.error("%s. Version %s goes on serving.", seat.swap_error, old.record.version)
            return
        seat.forgive()
        self._metrics.swaps.labels("done").inc()
        logger.info("%s is now version %s.", self.model_id(seat.selector), record.version)
        if old not in self.versions:
            self._in_background(self._retire(old))

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*(version.backend.close(0) for version in self.versions))

    def _seated(self, record: VersionRecord) -> LiveVersion | None:
        """The same version under another selector: one copy of the weights serves both."""
        return next((each for each in self.versions if each.record.version == record.version), None)

    async def _bring_up(self, record: VersionRecord) -> LiveVersion:
        """Load, probe and start one version.

        Raises `VersionRefused` if it does not answer or is not what the registry says, anything else if it could not
        be fetched or loaded.
        """
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="model-version-") as folder:
            checkpoint = await asyncio.to_thread(registry.download, record, Path(folder))
            loaded, model, probe = await asyncio.to_thread(self._read_and_probe, record, checkpoint)
            backend = await self._start_backend(checkpoint, model, loaded.tokenizer)
        try:
            await check_answers(backend, loaded.tokenizer)
            served = await measure_served_probe(backend, loaded.tokenizer, loaded.context_length)
        except BaseException:
            await backend.close(0)
            raise
        version = LiveVersion(loaded, backend, probe, served)
        self._in_background(self._fill_card(version))
        logger.info("Version %s of %s is loaded (%.1f s).", record.version, self.name, time.monotonic() - began)
        logger.info(
            "Its weights are stored as %s: %.4f bits per byte on the probe text; the registered weights have %.4f.",
            backend.weights, served, probe,
        )  # fmt: skip
        return version

    def _read_and_probe(self, record: VersionRecord, checkpoint: Path) -> tuple[LoadedVersion, GPT, float]:
        loaded, model = registry.read(record, checkpoint, self._device)
        probe = registry.measure_probe(model, loaded.tokenizer)
        registry.check_probe(record, probe, self._probe_tolerance)
        return loaded, model, probe

    async def _fill_card(self, version: LiveVersion) -> None:
        version.card = await asyncio.to_thread(registry.read_card, version.record, self._mlflow_pages)

    async def _retire(self, version: LiveVersion) -> None:
        try:
            await version.backend.close(self._drain_seconds)
        except EngineDied:
            logger.exception("Version %s had already stopped.", version.record.version)
        del version
        settle_memory()

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _describe(self, model_id: str, seat: Seat) -> ModelAnswer:
        version, loaded = seat.version, seat.version.loaded
        return ModelAnswer(
            id=model_id,
            created=loaded.record.created,
            owned_by="mlflow",
            name=self.name,
            selector=seat.selector,
            version=loaded.record.version,
            mlflow_run_id=loaded.record.run_id,
            data_digest=loaded.record.data_digest,
            num_parameters=loaded.num_parameters,
            bits_per_byte=loaded.record.bits_per_byte,
            context_length=loaded.context_length,
            vocabulary_size=loaded.tokenizer.vocab_size,
            chat=loaded.chat_template is not None,
            weights=version.backend.weights,
            probe_bits_per_byte=round(version.served_probe_bits_per_byte, 5),
            probe_bits_per_byte_change=round(version.served_probe_bits_per_byte - version.probe_bits_per_byte, 5),
            last_swap_error=seat.swap_error,
            gate_reason=loaded.record.gate_reason or None,
            refused_challenger=loaded.record.refused_challenger or None,
        )


def retry_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** min(failures - 1, 30))


def settle_memory() -> None:
    """Collect what is garbage, and spare later collections what is not.

    A replica's million objects (torch, MLflow, the web framework) stay for its whole life; a full collection looks at
    each of them and holds the event loop for a third of a second, whenever some request happens to set it off.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
