"""`KernelRunner` runs the model for the engine on a CPU, through the C++ forward pass of kernel.cpp.

`load_kernel` compiles the source once per machine, with the first C++ compiler it finds, into the user's cache folder.
Where that fails it says why and returns None, and the engine takes `TorchRunner`. `summarise_logits` is in the same
library.
"""

import ctypes
import functools
import hashlib
import logging
import math
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.gpt import GPT, GeluMLP
from model.runner import quantize
from model.sampling import MAX_LOOKUP_TOKENS
from model.sequence import Work

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernel.cpp")
# Contraction rounds a*b+c once, everywhere alike; no fast-math: it would reorder sums.
FLAGS = ("-O3", "-march=native", "-std=gnu++20", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC", "-Wno-psabi")
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap does not name it
TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}  # `Type` in kernel.cpp
PANELS, TILES, PAIRS = range(3)  # `Layout` in kernel.cpp


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """Return the compiled forward pass; it is compiled at the first call on a machine. None if it cannot be."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    try:
        library = _library_path(compiler)
        if not library.exists():
            if compiler is None:
                log.info("There is no C++ compiler, so the model runs in torch, several times slower.")
                return None
            _compile(compiler, library)
        kernel = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or str(error)
        log.warning("kernel.cpp could not be compiled, so the model runs in torch, several times slower: %s", details)
        return None
    kernel.workspace_floats.restype = ctypes.c_int64
    return kernel


def _library_path(compiler: str | None) -> Path:
    """Return where the library is kept. Its name is a hash of all that decides its machine code, because machines of
    different kinds may share a cache folder.
    """
    cpu = Path("/proc/cpuinfo")
    features = (
        next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        if (cpu.exists())
        else platform.processor()
    )
    parts = (SOURCE.read_text(), " ".join(FLAGS), platform.machine(), features)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "gpt-kernel" / f"{digest}.so"


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        # The compiler writes elsewhere and the file is moved: a process that starts meanwhile never loads half of it.
        built = Path(folder) / library.name
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(built)], check=True, capture_output=True, text=True, timeout=300
        )
        built.rename(library)


# The structs of kernel.cpp, field by field.


class _Linear(ctypes.Structure):
    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int32),
        ("stored_inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, _Linear) for name in ("qkv", "attention_output", "up", "mlp_output")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "layout",
                "modern",
                "num_layers",
                "width",
                "heads",
                "kv_heads",
                "head_dim",
                "mlp_width",
                "context",
                "slots",
                "weight_type",
                "cache_type",
            )
        ),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "position_embedding", "cosines", "sines")),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", _Norm),
        ("head", _Linear),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "num_logits", "threads", "vocabulary")),
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "slots", "positions", "logit_rows", "workspace", "logits", "best")
        ),
    ]


def kernel_cache_dtype(weights: str) -> torch.dtype:
    """Return the precision in which the kernel keeps keys and values, and its embedding tables."""
    return torch.float32 if weights == "float32" else torch.bfloat16


def summarise_logits(kernel: ctypes.CDLL, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the sum of exponentials of each row of `logits` [N, V], and the first place of its largest.

    Logits are float32 or bfloat16, what is returned is [N], float32 and int32. A row with a logit that is not finite
    has NaN. Torch would write the logits in float32 and pass over them several times.
    """
    assert logits.stride(1) == 1
    log_sums = torch.empty(len(logits))
    best = torch.empty(len(logits), dtype=torch.int32)
    kernel.summarise_logits(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int32(TYPES[str(logits.dtype).removeprefix("torch.")]),
        ctypes.c_int64(len(logits)),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_int32(logits.shape[1]),
        ctypes.c_int32(torch.get_num_threads()),
        ctypes.c_void_p(log_sums.data_ptr()),
        ctypes.c_void_p(best.data_ptr()),
    )
    return log_sums, best


class HugePages:
    """Zeroed memory in large pages, where the system has them.

    A pass reads all weights once, and the processor has to look up the address of every page. With pages of 4 KiB
    reading the weights and the cache took 5 to 7 % longer.
    """

    BLOCK_BYTES = 2**26  # the unused end of a block takes address space, but no memory
    ALIGNMENT = 64  # bytes: a line of the processor's cache

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        taken = -(-num_bytes // self.ALIGNMENT) * self.ALIGNMENT
        if taken > len(self._free):
            block = mmap.mmap(-1, max(taken, self.BLOCK_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(AttributeError, OSError):  # not Linux, or a Linux without them
                block.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(block, dtype=torch.uint8)
        memory, self._free = self._free[:num_bytes], self._free[taken:]
        return memory.view(dtype).view(*shape)

    @staticmethod
    def reserve(memory: Tensor) -> None:
        """Have the system give memory to all pages of a tensor that `zeros` returned and nobody has written to."""
        begin = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        num_bytes = memory.data_ptr() + memory.nbytes - begin
        with suppress(AttributeError, OSError):  # no Linux
            madvise = ctypes.CDLL(None).madvise
            if madvise(ctypes.c_void_p(begin), ctypes.c_size_t(num_bytes), MADV_POPULATE_WRITE) == 0:
                return
        memory.zero_()  # zeros over zeros: what is written to has its memory


class KernelRunner:
    """Runs all work of a step in one call of the kernel, on `threads` threads.

    The kernel computes every row alone, so what a slot gets does not depend on the other slots.
    """

    has_independent_rows = True

    def __init__(
        self,
        kernel: ctypes.CDLL,
        model: GPT,
        num_slots: int,
        weights: str,
        threads: int,
        max_draft_tokens: int = MAX_LOOKUP_TOKENS,
    ) -> None:
        config = model.config
        self.threads = threads
        self.num_slots = num_slots
        self.weights = weights
        self.cache_dtype = kernel_cache_dtype(weights)
        self.max_draft_tokens = max_draft_tokens
        self.vocab_size = model.vocab_size
        self._kernel = kernel
        self._panel = int(kernel.panel_width())
        self._layout = PANELS
        if weights == "bfloat16":
            self._layout = TILES if kernel.has_tiles() else PAIRS if kernel.has_pairs() else PANELS
        self._memory = HugePages()
        self._tensors: list[Tensor] = []  # whose memory the structs point to
        self._weight_bytes = 0
        head_dim = config.channels_per_head
        slots = (config.num_layers, num_slots, config.kv_heads)
        panels = -(-config.context_length // self._panel)
        channels = -(-head_dim // self._panel) * self._panel
        self.keys = self._memory.zeros((*slots, panels, head_dim, self._panel), self.cache_dtype)
        self.values = self._memory.zeros((*slots, config.context_length, channels), self.cache_dtype)
        layers = (_Layer * config.num_layers)(*map(self._layer, model.blocks))
        position_embedding = model.position_embedding
        self._model = _Model(
            layout=self._layout,
            modern=config.is_modern,
            num_layers=config.num_layers,
            width=config.width,
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=head_dim,
            mlp_width=config.mlp_channels,
            context=config.context_length,
            slots=num_slots,
            weight_type=TYPES[weights],
            cache_type=TYPES["float32" if self.cache_dtype == torch.float32 else "bfloat16"],
            epsilon=config.epsilon,
            embedding=self._keep(model.embedding.weight, self.cache_dtype),
            position_embedding=self._keep(position_embedding.weight, self.cache_dtype) if position_embedding else None,
            cosines=self._keep(model.cosines) if config.is_modern else None,
            sines=self._keep(model.sines) if config.is_modern else None,
            layers=layers,
            norm=self._norm(model.norm),
            head=self._linear(model.head),
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
        )
        self._workspace = torch.empty(0)
        self._best: Any = ()  # of the last pass, one for each row of logits

    def run(self, work: list[Work]) -> Tensor:
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for item in work:
            tokens += item.tokens
            slots += [item.slot] * len(item.tokens)
            positions += range(item.start, item.start + len(item.tokens))
            logit_rows += range(len(tokens) - item.num_logits, len(tokens))
        needed = self._kernel.workspace_floats(ctypes.byref(self._model), len(tokens), self.threads)
        if len(self._workspace) < needed:
            self._workspace = torch.empty(needed)
        # Arrays of ctypes: torch's operations give up Python's lock, and the engine's thread then waits for it.
        integers = ctypes.c_int32 * len(tokens)
        inputs = [integers(*tokens), integers(*slots), integers(*positions), integers(*logit_rows)]
        logits = torch.empty(len(logit_rows), self._model.head.outputs)
        self._best = (ctypes.c_int32 * len(logit_rows))()
        batch = _Batch(
            len(tokens),
            len(logit_rows),
            self.threads,
            self.vocab_size,
            *(ctypes.addressof(each) for each in inputs),
            self._workspace.data_ptr(),
            logits.data_ptr(),
            ctypes.addressof(self._best),
        )
        self._kernel.forward(ctypes.byref(self._model), ctypes.byref(batch))
        return logits[:, : self.vocab_size]

    def best_tokens(self) -> list[int]:
        return list(self._best)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        panels = -(-num_tokens // self._panel)
        self.keys[:, target, :, :panels] = self.keys[:, source, :, :panels]
        self.values[:, target, :, :num_tokens] = self.values[:, source, :, :num_tokens]

    def clear(self, slot: int) -> None:
        """Do nothing: a row reads only the positions up to its own, and its own text has written all of those."""

    def reserve_memory(self) -> None:
        """Take the cache's memory now. On a virtual machine, 1 GiB took 2.5 s as a burst of requests touched it."""
        for cache in (self.keys, self.values):
            HugePages.reserve(cache)

    def enter_thread(self) -> None:
        """Keep torch's own operations in the calling thread to one core.

        The engine chooses tokens with torch after each pass. Woken for some rows of logits, torch's second thread
        spins for a while afterwards, and the kernel's second thread does not get that core: a pass of 16 rows took
        half as long again. `torch.set_num_threads` would also decide with how many threads every later thread of the
        process begins, so this sets OpenMP's number, which belongs to the calling thread alone.
        """
        torch.get_num_threads()  # torch sets a thread's number at its first use, so this has to come before
        with suppress(AttributeError):  # a torch that was built without OpenMP
            ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)

    def weight_bytes(self) -> int:
        return self._weight_bytes

    def _layer(self, block: Any) -> _Layer:
        attention, mlp = block.attention, block.mlp
        modern = not isinstance(mlp, GeluMLP)
        return _Layer(
            attention_norm=self._norm(block.attention_norm),
            query_norm=self._norm(attention.query_norm),
            key_norm=self._norm(attention.key_norm),
            mlp_norm=self._norm(block.mlp_norm),
            qkv=self._linear(attention.qkv),
            attention_output=self._linear(attention.output),
            up=self._linear(mlp.gate_up if modern else mlp.up),
            mlp_output=self._linear(mlp.output),
        )

    def _norm(self, norm: Any) -> _Norm:
        if norm is None:
            return _Norm()
        bias = getattr(norm, "bias", None)
        return _Norm(self._keep(norm.weight), None if bias is None else self._keep(bias))

    def _linear(self, linear: nn.Linear) -> _Linear:
        outputs = -(-linear.out_features // self._panel) * self._panel
        scale = None
        if self.weights == "int8":
            weight, scale = quantize(linear.weight.detach())
        else:
            weight = linear.weight.detach().to(torch.float32 if self.weights == "float32" else torch.bfloat16)
        inputs = -(-linear.in_features // self._panel) * self._panel if self._layout != PANELS else linear.in_features
        padded = weight.new_zeros(outputs, inputs)
        padded[: linear.out_features, : linear.in_features] = weight
        if self._layout != PANELS:
            # A tile: 16 pairs of inputs by 16 outputs.
            packed = padded.view(-1, 2, 16, inputs // 32, 16, 2).permute(0, 3, 1, 4, 2, 5)
        else:
            packed = padded.view(-1, self._panel, inputs).transpose(1, 2)
        return _Linear(
            self._keep(packed, packed.dtype),
            None if scale is None else self._keep(nn.functional.pad(scale, (0, outputs - len(scale)))),
            None
            if linear.bias is None
            else self._keep(nn.functional.pad(linear.bias, (0, outputs - len(linear.bias)))),
            linear.in_features,
            inputs,
            outputs,
        )

    def _keep(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Copy a tensor to memory that this runner keeps, and return its address."""
        kept = self._memory.zeros(tensor.shape, dtype).copy_(tensor.detach())
        self._tensors.append(kept)
        self._weight_bytes += kept.numel() * kept.element_size()
        return kept.data_ptr()
