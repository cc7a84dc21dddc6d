"""A checkpoint is a Hugging Face model folder, in the family that its settings belong to (model/families.py).

save_model(folder, model, tokenizer)        # config.json, model.safetensors, tokenizer.json, ...
model = load_model(folder)                  # also what `transformers` saved, or the hub's gpt2
save_training_state(folder, {"optimizer": optimizer.state_dict(), "step": step})
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from model.families import export_config, load_config, weight_names
from model.gpt import GPT, ModelConfig
from model.settings import require

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files: which of them holds each
TRAINING_STATE = "training_state.pt"

# What older versions of transformers saved beside the weights: masks and tables that are computed, not learnt.
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def save_model(folder: Path, model: GPT, tokenizer: "Tokenizer | None" = None) -> None:
    """Write the folder of a model that one process holds.

    Of a sharded model every rank calls `export_weights`, which gathers them, and one writes with `write_model`.
    """
    write_model(folder, model.config, model.vocab_size, export_weights(model), tokenizer)


def write_model(
    folder: Path,
    config: ModelConfig,
    vocab_size: int,
    weights: dict[str, Tensor],
    tokenizer: "Tokenizer | None" = None,
) -> None:
    """Write the folder from weights that `export_weights` returned, possibly long ago and in another thread."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    begin, ends = (None, None) if tokenizer is None else (tokenizer.begin_of_text, tokenizer.ends)
    _write_json(folder / "config.json", export_config(config, vocab_size, dtype, begin, ends))
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # safetensors lets only the owner read its file
    marks = {} if ends is None else {"bos_token_id": begin, "eos_token_id": ends}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **marks})
    if tokenizer is not None:
        tokenizer.save(folder, max_length=config.context_length)


def load_model(folder: Path | str, device: str | torch.device = "cpu", context_length: int = 0) -> GPT:
    """Build the model that a folder describes, in evaluation mode; `context_length`: another one than it says.

    RoPE's context can be any, that of learned positions can be cropped.
    """
    folder = Path(folder)
    config, vocab_size = load_config(folder)
    if context_length:
        config = with_context(config, context_length, str(folder))
    weights = crop_positions(read_weights(folder), config)
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    model.to_empty(device=device)
    model.restore_derived()
    import_weights(model, weights, str(folder))
    return model.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a Hugging Face folder, in one file or several, under the names that they have there."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); use the checkpoint before it.") from None
    return weights


def weight_files(folder: Path) -> list[Path]:
    """List the files that hold a folder's weights; raises `ValueError` where there are none that can be read."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("model*.safetensors"))
    if (folder / INDEX).is_file() and files != [folder / WEIGHTS]:
        try:
            listed = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(folder / name for name in listed if Path(name).name == name)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX} is damaged; copy the folder again.") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {missing[0]}, which its {INDEX} lists; copy the folder again.")
    if not files and list(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} holds its weights as pytorch_model.bin, a pickle, which can run code and is not read here."
            f" Convert it with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            f".save_pretrained(another folder), which writes {WEIGHTS}."
        )
    if not files:
        raise ValueError(f"{folder} holds no {WEIGHTS}; it is not a finished checkpoint.")
    return files


def check_weights(folder: Path, config: ModelConfig, vocab_size: int) -> None:
    """Raise `ValueError` where a folder's weights are not those of such a model; only their shapes are read."""
    shapes: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
                shapes |= {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}).") from None
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    import_weights(model, crop_positions(shapes, config), str(folder))


def with_context(config: ModelConfig, context_length: int, source: str) -> ModelConfig:
    """Return a start's settings with another context; raises `ValueError` where it has not so many positions."""
    require(
        config.is_modern or context_length <= config.context_length,
        f"A context of {context_length:,} tokens is more than {source} has: {config.context_length:,} positions, which"
        f" are learnt and can be cropped only.",
    )
    return replace(config, context_length=context_length)


def crop_positions(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Leave out the position embeddings of GPT-2 that lie behind a shorter context."""
    return {
        name: weight[: config.context_length] if name.endswith("wpe.weight") else weight
        for name, weight in weights.items()
    }


@torch.no_grad()
def export_weights(model: GPT) -> dict[str, Tensor]:
    """Copy all weights to the CPU under their Hugging Face names, without padding rows.

    Every rank must call it if the model is sharded, because the ranks exchange their parts.
    """
    weights = {}
    for ours, theirs, transposed in weight_names(model.config):
        weight = _full(model.get_parameter(ours)).detach()
        if ours in ("embedding.weight", "head.weight"):
            weight = weight[: model.vocab_size]
        heights = [len(weight)] if len(theirs) == 1 else _sections(model, ours)
        for name, part in zip(theirs, weight.split(heights), strict=True):
            # Cloned on the CPU too, because training goes on while it is written.
            weights[name] = (part.t() if transposed else part).clone(memory_format=torch.contiguous_format).cpu()
    return weights


@torch.no_grad()
def import_weights(model: GPT, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy Hugging Face weights into the model; raises `ValueError` naming what is missing, too many or misshapen."""
    # The hub's own gpt2 leaves out the prefix, and so does what transformers saves of a model without its head.
    prefix = "model." if model.config.is_modern else "transformer."
    given = {
        name if name.startswith((prefix, "lm_head.")) else f"{prefix}{name}": weight
        for name, weight in weights.items()
        if not name.endswith(BUFFERS)
    }
    if model.config.tie_embeddings:
        head, embedding = given.pop("lm_head.weight", None), given.get("model.embed_tokens.weight")
        if head is not None and embedding is not None and not head.is_meta and not torch.equal(head, embedding):
            raise ValueError(
                f"{source} says tie_word_embeddings=true and holds an lm_head.weight that is not its embedding; set"
                f" tie_word_embeddings=false in its config.json, or leave that weight out."
            )
    for ours, theirs, transposed in weight_names(model.config):
        missing = [name for name in theirs if name not in given]
        if missing:
            raise ValueError(f"{source} lacks the weight {missing[0]}; it is not a checkpoint of this model.")
        parts = [given.pop(name) for name in theirs]
        weight = torch.cat([part.t() if transposed else part for part in parts])
        target = model.get_parameter(ours).data
        padding = len(target) - model.vocab_size if ours in ("embedding.weight", "head.weight") else 0
        wanted = (len(target) - padding, *target.shape[1:])
        if weight.shape != wanted:
            raise ValueError(f"{source} holds {theirs[0]} of shape {tuple(weight.shape)}, the model needs {wanted}.")
        if padding:
            weight = torch.cat((weight, weight.new_zeros(padding, weight.shape[1])))
        target.copy_(_placed(weight, target))
    if given:
        raise ValueError(f"{source} holds the weight {min(given)}, which this model has not.")


def save_training_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `training_state.pt`, whole or not at all: nested dicts and lists of tensors and plain values."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{TRAINING_STATE}"
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / TRAINING_STATE)


def load_training_state(folder: Path) -> dict[str, Any]:
    """Read `training_state.pt`; nothing in it can run code."""
    path = Path(folder) / TRAINING_STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; this checkpoint can be loaded but not resumed.") from None
    except Exception as error:  # torch raises many kinds on damaged files
        raise ValueError(f"{path} is damaged ({type(error).__name__}); use the checkpoint before it.") from None


def _sections(model: GPT, name: str) -> list[int]:
    """Heights of what is stacked in a fused weight, or in its bias."""
    weight = f"{name.rpartition('.')[0]}.weight"
    return next(list(sections) for ours, _, sections in model.matrices() if ours == weight)


def _placed(weight: Tensor, target: Tensor) -> Tensor:
    """Shard a whole weight as FSDP2 has sharded its parameter."""
    if not isinstance(target, DTensor):
        return weight
    return distribute_tensor(weight.to(target.device, target.dtype), target.device_mesh, target.placements)


def _full(weight: Tensor) -> Tensor:
    """Gather a parameter that FSDP2 has sharded; others are whole."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
