"""A checkpoint is a Hugging Face model folder: GPT-2's names for the classic family, Qwen3's for the modern one.

save_model(folder, model, tokenizer)        # config.json, model.safetensors, tokenizer.json, ...
model = load_model(folder)                  # also what `transformers` saved, or the hub's gpt2
save_training_state(folder, {"optimizer": optimizer.state_dict(), "step": step})
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from model.gpt import GPT, ModelConfig

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
TRAINING_STATE = "training_state.pt"

# Our module -> (theirs, and how the weight lies there). GPT-2 keeps its matrices transposed (Conv1D).
CLASSIC_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.output": "mlp.c_proj",
}
CLASSIC = {"embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm": "transformer.ln_f"}
MODERN_BLOCK: dict[str, str | tuple[str, ...]] = {
    "attention_norm": "input_layernorm",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.output": "mlp.down_proj",
}
# What older versions of transformers saved beside the weights: masks and tables that are computed, not learnt.
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
MODERN = {"embedding": "model.embed_tokens", "norm": "model.norm"}


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
    end_of_text = None if tokenizer is None else tokenizer.end_of_text
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    _write_json(folder / "config.json", export_config(config, vocab_size, dtype, end_of_text))
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # safetensors lets only the owner read its file
    ends = {} if end_of_text is None else {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
    if tokenizer is not None:
        tokenizer.save(folder, max_length=config.context_length)


def load_model(folder: Path | str, device: str | torch.device = "cpu") -> GPT:
    """Build the model that a folder describes, in evaluation mode."""
    folder = Path(folder)
    config, vocab_size = load_config(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files and list(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} holds its weights as pytorch_model.bin, a pickle, which can run code and is not read here."
            f" Convert it with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            f".save_pretrained(another folder), which writes {WEIGHTS}."
        )
    if not files:
        raise ValueError(f"{folder} holds no {WEIGHTS}; it is not a finished checkpoint.")
    weights: dict[str, Tensor] = {}
    try:
        for file in files:
            weights |= load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); use the checkpoint before it.") from None
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    model.to_empty(device=device)
    model.restore_derived()
    import_weights(model, weights, str(folder))
    return model.eval()


@torch.no_grad()
def export_weights(model: GPT) -> dict[str, Tensor]:
    """Copy all weights to the CPU under their Hugging Face names, without padding rows.

    Every rank must call it if the model is sharded, because the ranks exchange their parts.
    """
    weights = {}
    for ours, theirs, transposed in _names(model.config):
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
        given.pop("lm_head.weight", None)
    for ours, theirs, transposed in _names(model.config):
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


def export_config(
    config: ModelConfig, vocab_size: int, dtype: str = "float32", end_of_text: int | None = None
) -> dict[str, Any]:
    """Return what `config.json` holds, under the names of `transformers`."""
    common = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5, which other engines read
    }
    if config.is_modern:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.width,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.channels_per_head,
            "intermediate_size": config.mlp_channels,
            "max_position_embeddings": config.context_length,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "rms_norm_eps": config.norm_epsilon,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            **common,
        }
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.num_layers,
        "n_embd": config.width,
        "n_head": config.num_heads,
        "n_inner": config.mlp_channels,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        **common,
    }


def load_config(folder: Path | str) -> tuple[ModelConfig, int]:
    """Read a folder's `config.json`: the model's settings and its vocabulary's size.

    Raises `ValueError` naming the setting that is missing, or under which this project's model would compute something
    else than theirs.
    """
    path = Path(folder) / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; name the folder of a checkpoint.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"{path} is not the settings of a model: it holds no JSON object.")
    kind = theirs.get("model_type")
    if kind not in FIXED:
        raise ValueError(f"{path} describes a {kind!r} model; this project knows {' and '.join(FIXED)}.")
    for name, allowed in (FIXED[kind] | FIXED_FOR_ALL).items():
        if name in theirs and theirs[name] not in allowed:
            raise ValueError(f"{path} has {name}={theirs[name]!r}, not supported.")
    for name in REQUIRED[kind]:
        if name not in theirs:
            raise ValueError(f"{path} lacks {name}; it does not describe a whole {kind} model.")
        if type(theirs[name]) is not int:
            raise ValueError(f"{path} has {name}={theirs[name]!r}; that must be a whole number.")
    config = _read_qwen3(theirs, path) if kind == "qwen3" else _read_gpt2(theirs)
    return config, theirs["vocab_size"]


# What a model of a kind must say of itself; and settings that it may have, with the values under which our model
# computes the same. The first of them is what `transformers` assumes where the setting is missing.
REQUIRED = {
    "gpt2": ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size"),
    "qwen3": (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "vocab_size"),
    ),
}
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    },
    "qwen3": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False, None),
        "use_sliding_window": (False, None),
        "rms_norm_eps": (1e-6,),
    },
}
FIXED_FOR_ALL: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "pruned_heads": ({}, None)}


def _read_gpt2(theirs: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        family="classic",
        num_layers=theirs["n_layer"],
        width=theirs["n_embd"],
        num_heads=theirs["n_head"],
        mlp_width=theirs.get("n_inner") or 0,
        context_length=theirs["n_positions"],
        dropout=theirs.get("resid_pdrop", 0.1),
        tie_embeddings=theirs.get("tie_word_embeddings", True),
    )


def _read_qwen3(theirs: Mapping[str, Any], path: Path) -> ModelConfig:
    rope = theirs.get("rope_parameters") or {}
    for name, found in (("rope_parameters", rope), ("rope_scaling", theirs.get("rope_scaling") or {})):
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        if any(found.get(key, value) != value for key, value in plain.items()):
            raise ValueError(f"{path} has {name}={found!r}, not supported.")
    others = set(theirs.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise ValueError(f"{path} has layer_types with {min(others)!r}, not supported.")
    return ModelConfig(
        family="modern",
        num_layers=theirs["num_hidden_layers"],
        width=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs.get("num_key_value_heads", 32) or 0,  # 32 and 128 are Qwen3's own defaults
        head_dim=theirs.get("head_dim", 128) or 0,
        mlp_width=theirs["intermediate_size"],
        context_length=theirs["max_position_embeddings"],
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0),
    )


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


def _names(config: ModelConfig) -> list[tuple[str, tuple[str, ...], bool]]:
    """List every parameter: our name, its names in Hugging Face's folders, and whether it is transposed there."""
    top: dict[str, str] = dict(MODERN if config.is_modern else CLASSIC)
    if not config.tie_embeddings:
        top["head"] = "lm_head"
    block: Mapping[str, str | tuple[str, ...]] = MODERN_BLOCK if config.is_modern else CLASSIC_BLOCK
    prefix = "model.layers" if config.is_modern else "transformer.h"
    modules: list[tuple[str, tuple[str, ...]]] = [(ours, (theirs,)) for ours, theirs in top.items()]
    for layer in range(config.num_layers):
        for ours, theirs in block.items():
            listed = (theirs,) if isinstance(theirs, str) else theirs
            modules.append((f"blocks.{layer}.{ours}", tuple(f"{prefix}.{layer}.{name}" for name in listed)))
    names = []
    for ours, their_modules in modules:
        has_bias = not config.is_modern and ours not in ("embedding", "position_embedding", "head")
        is_matrix = ours.startswith("blocks.") and not ours.endswith("norm")
        for kind in ("weight", "bias") if has_bias else ("weight",):
            transposed = is_matrix and kind == "weight" and not config.is_modern
            names.append((f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in their_modules), transposed))
    return names


def _sections(model: GPT, name: str) -> list[int]:
    return next(list(sections) for ours, _, sections in model.matrices() if ours == name)


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
