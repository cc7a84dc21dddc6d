"""LoRA (arXiv:2106.09685): the weights stay as they are, and beside each matrix two small factors are learnt.

    adapt(model, LoraSettings(rank=16, alpha=32))       # from here on only the factors are trained
    save_adapter(folder, export_adapter(model), settings, model.config, base)     # a folder that `peft` reads
    merge(weights, export_adapter(model), settings, model.config)   # into what `export_weights` returned

A matrix W becomes W + alpha / rank x up @ down, of which `up` begins as zeros. Of a weight in which several matrices
are stacked (queries, keys and values; gate and up) each has factors of its own, named as Hugging Face names it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.config import LoraSettings, ModelConfig
from model.families import weight_names
from model.gpt import GPT

ADAPTER_FOLDER = "adapter"  # of a checkpoint, beside the merged weights
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # before each name in a PEFT folder


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with factors beside those of its matrices that are adapted."""

    def __init__(self, linear: nn.Linear, heights: Sequence[int], names: Sequence[str], settings: LoraSettings) -> None:
        """`heights` are those of the matrices that are stacked in the weight; an empty name: that one is left alone."""
        nn.Module.__init__(self)  # not the parent's, which would draw another weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.heights, self.names = tuple(heights), tuple(names)
        self.rank, self.scale = settings.rank, settings.scale
        adapted = [height for height, name in zip(heights, names, strict=True) if name]
        # In one product all the matrices' inputs go down: [matrices x rank, C].
        self.down = nn.Parameter(linear.weight.new_empty(len(adapted) * settings.rank, linear.in_features))
        self.up = nn.ParameterList(linear.weight.new_zeros(height, settings.rank) for height in adapted)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = iter((F.linear(x, self.down) * self.scale).split(self.rank, dim=-1))
        ups = iter(self.up)
        out = F.linear(x, self.weight, self.bias)
        parts = [
            part + F.linear(next(low), next(ups)) if name else part
            for part, name in zip(out.split(self.heights, dim=-1), self.names, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def factors(self) -> list[tuple[str, Tensor, Tensor]]:
        """The name of each adapted matrix, its `down` [rank, in] and its `up` [out, rank].

        Of a sharded model every rank must ask.
        """
        downs = _whole(self.down).detach().split(self.rank)
        ups = [_whole(up).detach() for up in self.up]
        return list(zip((name for name in self.names if name), downs, ups, strict=True))


def adapt(model: GPT, settings: LoraSettings) -> None:
    """Freeze the model and put factors beside its matrices; raises `ValueError` for a target that it has not.

    The factors are drawn from torch's generator.
    """
    unknown = set(settings.targets)
    chosen: dict[str, tuple[str, ...]] = {}
    for ours, theirs in _matrices(model.config):
        found = {name: [target for target in settings.targets if f".{name}".endswith(f".{target}")] for name in theirs}
        unknown -= {target for targets in found.values() for target in targets}
        if not settings.targets or any(found.values()):
            chosen[ours] = tuple(name if found[name] or not settings.targets else "" for name in theirs)
    if unknown:
        known = ", ".join(sorted({name.rpartition(".")[2] for _, theirs in _matrices(model.config) for name in theirs}))
        raise ValueError(f"train.lora_targets holds {min(unknown)!r}, which this model has not; it has {known}.")
    model.requires_grad_(False)
    stacked = {name: heights for name, _, heights in model.matrices()}
    for ours, names in chosen.items():
        holder, _, attribute = ours.rpartition(".")
        linear = model.get_submodule(ours)
        assert isinstance(linear, nn.Linear)
        heights = stacked[f"{ours}.weight"] if len(names) > 1 else (linear.out_features,)
        setattr(model.get_submodule(holder), attribute, AdaptedLinear(linear, heights, names, settings))


def count_adapter(config: ModelConfig, settings: LoraSettings) -> int:
    """Count the numbers that are learnt, without the memory of a model."""
    with torch.device("meta"):
        model = GPT(config, 2)
        adapt(model, settings)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def export_adapter(model: GPT) -> dict[str, Tensor]:
    """Copy the factors to the CPU under PEFT's names; of a sharded model every rank must call it."""
    weights = {}
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            for name, down, up in module.factors():
                for letter, factor in (("A", down), ("B", up)):
                    copied = factor.to("cpu", torch.float32, copy=True)
                    weights[f"{PREFIX}{name}.lora_{letter}.weight"] = copied.contiguous()
    return weights


@torch.no_grad()
def import_adapter(model: GPT, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy factors into an adapted model that is not sharded yet; raises `ValueError` where they are another's."""
    left = dict(weights)
    for module in model.modules():
        if not isinstance(module, AdaptedLinear):
            continue
        for name, down, up in module.factors():
            for letter, factor in (("A", down), ("B", up)):
                key = f"{PREFIX}{name}.lora_{letter}.weight"
                if key not in left or left[key].shape != factor.shape:
                    raise ValueError(f"{source} has no {key} of shape {tuple(factor.shape)}; it is another adapter.")
                factor.copy_(left.pop(key))
    if left:
        raise ValueError(f"{source} holds {min(left)}, which this adapter has not.")


def merge(
    weights: dict[str, Tensor], adapter: Mapping[str, Tensor], settings: LoraSettings, config: ModelConfig
) -> None:
    """Add what the factors come to to Hugging Face weights, in float32."""
    for name in {key.removesuffix(".weight").rpartition(".")[0] for key in adapter}:
        down, up = (adapter[f"{name}.lora_{letter}.weight"] for letter in "AB")
        change = settings.scale * (up @ down)
        key = f"{name.removeprefix(PREFIX)}.weight"
        weights[key] = weights[key] + (change if config.is_modern else change.t())  # GPT-2 keeps them transposed


def save_adapter(
    folder: Path, adapter: Mapping[str, Tensor], settings: LoraSettings, config: ModelConfig, base: str
) -> None:
    """Write a PEFT folder; `base` names the weights that it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(adapter), folder / ADAPTER, metadata={"format": "pt"})
    names = {key.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2] for key in adapter}
    description: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(settings.targets or names),
        "fan_in_fan_out": not config.is_modern,  # GPT-2 keeps its matrices transposed
        "bias": "none",
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (folder / ADAPTER).chmod(0o644)  # safetensors lets only the owner read its file


def load_adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / ADAPTER)


def _matrices(config: ModelConfig) -> list[tuple[str, tuple[str, ...]]]:
    """The blocks' linear layers, and Hugging Face's names for the matrices in each."""
    return [
        (ours.removesuffix(".weight"), tuple(name.removesuffix(".weight") for name in theirs))
        for ours, theirs, _ in weight_names(config)
        if ours.startswith("blocks.") and ours.endswith(".weight") and "norm" not in ours
    ]


def _whole(factor: Tensor) -> Tensor:
    return factor.full_tensor() if isinstance(factor, DTensor) else factor
