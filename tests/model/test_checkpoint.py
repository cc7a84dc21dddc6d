"""A checkpoint is a folder that transformers opens, and computes the same with."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import (
    load_model,
    load_training_state,
    save_model,
    save_training_state,
)
from model.families import REQUIRED, load_config
from model.gpt import GPT, ModelConfig
from model.tokenizer import train_bpe

SHAPES = {
    "classic": ModelConfig(family="classic", num_layers=2, width=48, num_heads=3, context_length=32),
    "classic tied": ModelConfig(
        family="classic", num_layers=2, width=48, num_heads=3, context_length=32, tie_embeddings=True, mlp_width=80
    ),
    "modern": ModelConfig(num_layers=2, width=48, num_heads=3, context_length=32, mlp_width=80),
    "modern grouped": ModelConfig(
        num_layers=2, width=48, num_heads=4, num_kv_heads=2, head_dim=16, context_length=32, tie_embeddings=True
    ),
}
VOCABULARY = 300


def random_model(config: ModelConfig) -> GPT:
    """A model none of whose weights is zero, or one, by its initialisation."""
    torch.manual_seed(5)
    model = GPT(config, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.clear_padding()
    return model.eval()


def random_tokens(batch: int = 2, length: int = 32) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits_loss_and_gradients(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(SHAPES[shape])
    save_model(tmp_path, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)

    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    our_loss = model.loss(tokens, targets) / (targets != -100).sum()
    their_loss = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(our_loss, their_loss, atol=1e-4, rtol=1e-4)

    our_loss.backward()
    their_loss.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in gradients_under_their_names(model).items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


def gradients_under_their_names(model: GPT) -> dict[str, Tensor]:
    """Export the gradients as if they were the weights."""
    from model.checkpoint import export_weights

    twin = GPT(model.config, model.vocab_size)
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.data = mine.grad
    return export_weights(twin)


@pytest.mark.parametrize("shape", ["classic", "modern grouped"])
def test_transformers_generates_the_same_tokens(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(SHAPES[shape])
    save_model(tmp_path, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generate(
        random_tokens(1, 8), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens = random_tokens(1, 8)
    for _ in range(20):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert tokens.tolist() == theirs.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_comes_back_as_it_was_saved(shape: str, tmp_path: Path) -> None:
    model = random_model(SHAPES[shape])
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config.tie_embeddings == model.config.tie_embeddings
    for (name, saved), (_, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(saved, found), name
    assert torch.equal(model(random_tokens()), loaded(random_tokens()))


def test_what_transformers_saves_can_be_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(SHAPES["modern grouped"])
    save_model(tmp_path / "ours", model)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_model(tmp_path / "theirs")(random_tokens()), model(random_tokens()))


def test_the_folder_holds_a_tokenizer_that_transformers_opens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_bpe(["the cat sat on the mat, and the rat sat on the cat. " * 20], vocabulary_size=VOCABULARY)
    model = GPT(SHAPES["modern"], tokenizer.vocab_size)
    save_model(tmp_path, model, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the rat, naïve as ever, sat on the mat 你好"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.end_of_text


def test_training_state_holds_no_code(tmp_path: Path) -> None:
    state = {"step": 3, "momentum": {"a": torch.ones(2)}, "rng": torch.get_rng_state()}
    save_training_state(tmp_path, state)
    loaded = load_training_state(tmp_path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["rng"], state["rng"])

    torch.save({"bad": Path("x")}, tmp_path / "training_state.pt")
    with pytest.raises(ValueError, match="damaged"):
        load_training_state(tmp_path)


def test_a_bad_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="mamba"):
        load_model(tmp_path)
    save_model(tmp_path, random_model(SHAPES["modern"]))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="not a finished checkpoint"):
        load_model(tmp_path)


def test_weights_are_as_readable_as_the_rest_of_the_folder(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tmp_path, random_model(SHAPES["modern"]))
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("config.json", "generation_config.json", "model.safetensors"), "0o640"
    )


def test_the_tokenizer_in_the_folder_says_how_long_a_text_may_be(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_bpe(["the cat sat on the mat. " * 20], vocabulary_size=260)
    save_model(tmp_path, GPT(SHAPES["modern"], tokenizer.vocab_size), tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 32


@pytest.mark.parametrize("shape", ["classic tied", "modern grouped"])
def test_buffers_that_older_versions_saved_are_left_aside(shape: str, tmp_path: Path) -> None:
    model = random_model(SHAPES[shape])
    save_model(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    if model.config.is_modern:
        buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}
    else:
        buffers = {f"transformer.h.{layer}.attn.{name}" for layer in range(2) for name in ("bias", "masked_bias")}
    # As of a model saved without its head, whose names begin one level lower.
    for prefix in ("", "model." if model.config.is_modern else "transformer."):
        renamed = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        renamed |= {name.removeprefix(prefix): torch.ones(3) for name in buffers}
        save_file(renamed, tmp_path / "model.safetensors")
        assert torch.equal(load_model(tmp_path)(random_tokens()), model(random_tokens()))


OTHER_FUNCTIONS = [
    ("classic", "scale_attn_weights", False),
    ("classic", "scale_attn_weights", None),
    ("classic", "scale_attn_by_inverse_layer_idx", True),
    ("classic", "activation_function", "relu"),
    ("classic", "add_cross_attention", True),
    ("classic", "quantization_config", {"quant_method": "gptq"}),
    ("modern", "hidden_act", "gelu"),
    ("modern", "use_sliding_window", True),
    ("modern", "layer_types", ["full_attention", "sliding_attention"]),
    ("modern", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("modern", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}),
    ("modern", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("shape", "name", "value"), OTHER_FUNCTIONS)
def test_a_setting_under_which_ours_would_compute_something_else_is_refused_by_name(
    shape: str, name: str, value: Any, tmp_path: Path
) -> None:
    save_model(tmp_path, random_model(SHAPES[shape]))
    change_config(tmp_path, {name: value})
    with pytest.raises(ValueError, match=rf"{name}.*not supported\.$"):
        load_config(tmp_path)


@pytest.mark.parametrize("shape", ["classic", "modern"])
def test_every_setting_that_says_how_large_a_model_is_must_be_there(shape: str, tmp_path: Path) -> None:
    save_model(tmp_path, random_model(SHAPES[shape]))
    whole = json.loads((tmp_path / "config.json").read_text())
    for name in REQUIRED[whole["model_type"]]:
        change_config(tmp_path, {name: None})
        with pytest.raises(ValueError, match=f"{name}=None"):
            load_config(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({key: whole[key] for key in whole if key != name}))
        with pytest.raises(ValueError, match=f"lacks {name}"):
            load_config(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(whole))


def test_what_is_null_or_harmless_is_accepted(tmp_path: Path) -> None:
    save_model(tmp_path / "classic", random_model(SHAPES["classic"]))
    change_config(
        tmp_path / "classic", {"add_cross_attention": None, "reorder_and_upcast_attn": True, "_num_labels": 1}
    )
    assert load_config(tmp_path / "classic")[0].mlp_channels == SHAPES["classic"].mlp_channels
    save_model(tmp_path / "modern", random_model(SHAPES["modern"]))
    change_config(tmp_path / "modern", {"rope_scaling": None, "layer_types": ["full_attention"] * 2})
    assert load_config(tmp_path / "modern")[1] == VOCABULARY


def test_a_pickle_is_not_read_and_the_way_out_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, random_model(SHAPES["classic"]))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*Convert it with transformers"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '"gpt2"', "\xff"])
def test_a_config_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config.json is not"):
        load_model(tmp_path)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
