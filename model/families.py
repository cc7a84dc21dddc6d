"""How the families of `transformers` write a model down: the settings in `config.json`, and the names of the weights.

config, vocab_size = load_config(folder)          # refuses by name what this project's model would compute otherwise
json.dumps(export_config(config, vocab_size))     # as the family writes it that has these settings
weight_names(config)                              # our parameter -> theirs
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig

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
MODERN = {"embedding": "model.embed_tokens", "norm": "model.norm"}
QK_NORMS = ("attention.query_norm", "attention.key_norm")

# What `transformers` writes for each family, and what a model of a kind must say of itself.
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
MODERN_REQUIRED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "vocab_size"),
)
REQUIRED = {
    "gpt2": ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size"),
    **dict.fromkeys(("qwen3", "qwen2", "llama"), MODERN_REQUIRED),
}

# Settings that a model may have, with the values under which our model computes the same.
SILU: tuple[Any, ...] = ("silu", "swish")
OFF: tuple[Any, ...] = (False, None)
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": OFF,
        "add_cross_attention": OFF,
    },
    "qwen3": {"hidden_act": SILU, "use_sliding_window": OFF},
    "qwen2": {"hidden_act": SILU, "use_sliding_window": OFF, "use_mrope": OFF},
    "llama": {"hidden_act": SILU, "sliding_window": OFF, "rope_interleaved": OFF},
}
FIXED_FOR_ALL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
    "is_encoder_decoder": OFF,
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": OFF,
    "partial_rotary_factor": (1.0, None),
}
# Settings that change no logit: names and notes, how first weights were drawn, what runs keep or return, other heads.
HARMLESS = {
    *("_name_or_path", "architectures", "transformers_version", "transformers.js_config", "torch_dtype"),
    *("dtype", "is_llama_config", "unsloth_fixed", "unsloth_version", "neftune_noise_alpha"),
    *("initializer_range", "use_cache", "gradient_checkpointing", "pretraining_tp", "return_dict", "torchscript"),
    *("output_attentions", "output_hidden_states", "use_bfloat16", "chunk_size_feed_forward", "is_decoder"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class"),
    *("prefix", "task_specific_params", "problem_type", "finetuning_task", "id2label", "label2id", "num_labels"),
    *("_num_labels", "output_past", "n_special", "predict_special_tokens", "max_sequence_length"),
    *("_attn_implementation_autoset", "_attn_implementation", "attn_implementation"),
    # How `transformers` 4 generates, which it also wrote here.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "diversity_penalty", "tf_legacy_loss"),
    # Dropout acts while training alone: `modern` learns without any, and `classic` takes one of them for all.
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}
READ_OF_ALL = {"model_type", "vocab_size", "tie_word_embeddings"}
READ = {
    "gpt2": {"n_layer", "n_embd", "n_head", "n_positions", "n_ctx", "n_inner", "layer_norm_epsilon"}
    | {"reorder_and_upcast_attn"},  # another order of the same sums
    **dict.fromkeys(
        ("qwen3", "qwen2", "llama"),
        {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
        | {"intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"}
        | {"rope_parameters", "attention_bias", "mlp_bias", "layer_types", "sliding_window", "max_window_layers"},
    ),
}
# What each type of rope scaling says, by our names; `transformers` names a type in `rope_type`, earlier in `type`.
ROPE_PARAMETERS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_context",
        "low_freq_factor": "rope_low_frequency_factor",
        "high_freq_factor": "rope_high_frequency_factor",
    },
}


def family_of(config: ModelConfig) -> str:
    """Name the `model_type` whose models have such settings."""
    if not config.is_modern:
        return "gpt2"
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.attention_bias == "qkv" else "llama"


def export_config(
    config: ModelConfig,
    vocab_size: int,
    dtype: str = "float32",
    begin_of_text: int | None = None,
    end_of_text: int | list[int] | None = None,
) -> dict[str, Any]:
    """Return what `config.json` holds, under the names of `transformers`."""
    kind = family_of(config)
    head: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    common = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": begin_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5, which other engines read
    }
    if not config.is_modern:
        return {
            **head,
            "n_layer": config.num_layers,
            "n_embd": config.width,
            "n_head": config.num_heads,
            "n_inner": config.mlp_channels,
            "n_positions": config.context_length,
            "n_ctx": config.context_length,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.epsilon,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            **common,
        }
    scaling = {} if config.rope_scaling == "none" else {"rope_type": config.rope_scaling}
    scaling |= {name: getattr(config, ours) for name, ours in ROPE_PARAMETERS.get(config.rope_scaling, {}).items()}
    own = {
        "qwen3": {"attention_bias": config.attention_bias == "all", "attention_dropout": 0.0},
        "qwen2": {"attention_dropout": 0.0},
        "llama": {
            "attention_bias": config.attention_bias == "all",
            "mlp_bias": config.mlp_bias,
            "attention_dropout": 0.0,
        },
    }
    return {
        **head,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels_per_head,
        "intermediate_size": config.mlp_channels,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        **({"rope_scaling": scaling} if scaling else {}),  # the name before transformers 5
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.epsilon,
        "hidden_act": "silu",
        **own[kind],
        **({} if kind == "llama" else {"use_sliding_window": False}),
        **common,
    }


def load_config(folder: Path | str) -> tuple[ModelConfig, int]:
    """Read a folder's `config.json`: the model's settings and its vocabulary's size, which is rows of the embedding.

    Raises `ValueError` naming the setting that is missing, or under which this project's model would compute something
    else than theirs; one that is not known might be such.
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
        raise ValueError(f"{path} describes a {kind!r} model; this project knows {', '.join(FIXED)}.")
    for name, allowed in (FIXED[kind] | FIXED_FOR_ALL).items():
        if name in theirs and theirs[name] not in allowed:
            raise ValueError(f"{path} has {name}={theirs[name]!r}, not supported.")
    for name in REQUIRED[kind]:
        if name not in theirs:
            raise ValueError(f"{path} lacks {name}; it does not describe a whole {kind} model.")
        if type(theirs[name]) is not int:
            raise ValueError(f"{path} has {name}={theirs[name]!r}; that must be a whole number.")
    known = HARMLESS | READ_OF_ALL | READ[kind] | set(FIXED[kind]) | set(FIXED_FOR_ALL)
    for name in sorted(set(theirs) - known):
        if theirs[name] is not None:
            raise ValueError(
                f"{path} has {name}={_short(theirs[name])}, not supported: what it does to the model is not known here."
            )
    try:
        config = _read_gpt2(theirs) if kind == "gpt2" else _read_modern(kind, theirs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config, theirs["vocab_size"]


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
        norm_epsilon=_epsilon(theirs.get("layer_norm_epsilon", 1e-5), 1e-5),
    )


def _read_modern(kind: str, theirs: Mapping[str, Any]) -> ModelConfig:
    others = set(theirs.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise ValueError(f"layer_types has {min(others)!r}, not supported.")
    if kind == "qwen2":
        biases: dict[str, Any] = {"attention_bias": "qkv"}
    else:
        biases = {"attention_bias": "all" if theirs.get("attention_bias") else "none"}
        biases["mlp_bias"] = kind == "llama" and bool(theirs.get("mlp_bias"))
    # What `transformers` assumes of a Qwen where its folder does not say.
    default_kv_heads = None if kind == "llama" else 32
    default_head_dim = 128 if kind == "qwen3" else None
    return ModelConfig(
        family="modern",
        num_layers=theirs["num_hidden_layers"],
        width=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs.get("num_key_value_heads", default_kv_heads) or 0,
        head_dim=theirs.get("head_dim", default_head_dim) or 0,
        mlp_width=theirs["intermediate_size"],
        context_length=theirs["max_position_embeddings"],
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        norm_epsilon=_epsilon(theirs.get("rms_norm_eps", 1e-6), 1e-6),
        qk_norm=kind == "qwen3",
        **biases,
        **_read_rope(theirs),
    )


def _read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Read what is said of RoPE: `rope_scaling` and `rope_theta`, or all of it in `rope_parameters`."""
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = theirs.get(name) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_PARAMETERS or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{name}={rope!r}, not supported.")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_PARAMETERS["llama3"]}
    if set(rope) - known:
        raise ValueError(f"{name}={rope!r}, not supported: {min(set(rope) - known)} is not known here.")
    theta = rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0
    settings: dict[str, Any] = {"rope_theta": float(theta)}
    if kind != "default":
        settings["rope_scaling"] = kind
    for their_name, ours in ROPE_PARAMETERS[kind].items():
        if their_name == "original_max_position_embeddings":
            settings[ours] = int(rope.get(their_name) or theirs["max_position_embeddings"])
        elif not isinstance(rope.get(their_name), int | float):
            raise ValueError(f"{name} lacks {their_name}, which rope_type={kind} needs.")
        else:
            settings[ours] = float(rope[their_name])
    return settings


def _epsilon(theirs: Any, usual: float) -> float:
    """Return a norm's epsilon as a setting, which is 0 where it is the family's."""
    if not isinstance(theirs, int | float) or theirs <= 0:
        raise ValueError(f"a norm's epsilon is {theirs!r}; that must be a positive number.")
    return 0.0 if theirs == usual else float(theirs)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def weight_names(config: ModelConfig) -> list[tuple[str, tuple[str, ...], bool]]:
    """List every parameter: our name, its names in Hugging Face's folders, and whether it is transposed there."""
    top: dict[str, str] = dict(MODERN if config.is_modern else CLASSIC)
    if not config.tie_embeddings:
        top["head"] = "lm_head"
    block: Mapping[str, str | tuple[str, ...]] = MODERN_BLOCK if config.is_modern else CLASSIC_BLOCK
    prefix = "model.layers" if config.is_modern else "transformer.h"
    modules: list[tuple[str, tuple[str, ...]]] = [(ours, (theirs,)) for ours, theirs in top.items()]
    for layer in range(config.num_layers):
        for ours, theirs in block.items():
            if ours in QK_NORMS and not config.has_qk_norm:
                continue
            listed = (theirs,) if isinstance(theirs, str) else theirs
            modules.append((f"blocks.{layer}.{ours}", tuple(f"{prefix}.{layer}.{name}" for name in listed)))
    names = []
    for ours, their_modules in modules:
        is_matrix = ours.startswith("blocks.") and not ours.endswith("norm")
        for kind in ("weight", "bias") if _has_bias(config, ours) else ("weight",):
            transposed = is_matrix and kind == "weight" and not config.is_modern
            names.append((f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in their_modules), transposed))
    return names


def _has_bias(config: ModelConfig, module: str) -> bool:
    if module.endswith("norm"):
        return not config.is_modern  # LayerNorm has one
    if module.endswith("attention.qkv"):
        return config.has_qkv_bias
    if module.endswith("attention.output"):
        return config.has_output_bias
    return ".mlp." in module and config.has_mlp_bias
