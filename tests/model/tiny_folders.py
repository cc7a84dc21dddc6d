"""Folders of random weights as `transformers` writes them, of every family and shape that is read."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 300
CONTEXT = 64
MODERN = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}
CLASSIC = {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
# Waves of all three kinds: stretched, left alone, and between.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", CLASSIC),
    "gpt2 untied": (
        "GPT2",
        {**CLASSIC, "tie_word_embeddings": False, "n_inner": 80, "layer_norm_epsilon": 1e-3},
    ),
    "qwen3": ("Qwen3", {**MODERN, "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3 untied, biases": ("Qwen3", {**MODERN, "head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {**MODERN, "tie_word_embeddings": True}),
    "llama": ("Llama", {**MODERN, "tie_word_embeddings": True}),
    "llama untied, ungrouped": ("Llama", {**MODERN, "num_key_value_heads": 4, "head_dim": 20}),
    "llama3": ("Llama", {**MODERN, "rope_parameters": LLAMA3_ROPE}),
    "llama linear": ("Llama", {**MODERN, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama biases": ("Llama", {**MODERN, "attention_bias": True, "mlp_bias": True}),
}


def random_theirs(shape: str, **changes: Any) -> Any:
    """A model of `transformers` none of whose weights is zero, or one, by its initialisation."""
    family, settings = SHAPES[shape]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write_folder(folder: Path, shape: str, **changes: Any) -> Any:
    """Write the model of a shape and return it."""
    model = random_theirs(shape, **changes)
    model.save_pretrained(folder)
    return model
