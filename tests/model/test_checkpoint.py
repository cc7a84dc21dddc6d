"""A checkpoint is a folder that transformers opens, and computes the same with."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import load_model, load_training_state, save_model, save_training_state
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
    tokens, cache = random_tokens(1, 8), model.new_cache(slots=1)
    logits = model(tokens, cache)
    for _ in range(20):
        token = logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, token), dim=1)
        logits = model(token, cache)
    assert tokens.tolist() == theirs.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_comes_back_as_it_was_saved(shape: str, tmp_path: Path) -> None:
    model = random_model(SHAPES[shape])
    save_model(tmp_path, model, extra={"step": 7})
    loaded = load_model(tmp_path)
    assert loaded.config.tie_embeddings == model.config.tie_embeddings
    for (name, saved), (_, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(saved, found), name
    assert torch.equal(model(random_tokens()), loaded(random_tokens()))
    assert json.loads((tmp_path / "training.json").read_text()) == {"step": 7}


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


def test_a_model_loads_in_bfloat16_with_exact_positions(tmp_path: Path) -> None:
    model = random_model(SHAPES["modern"])
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert loaded.head.weight.dtype == torch.bfloat16
    assert loaded.cosines.dtype == torch.float32
    difference = (loaded(random_tokens()).float() - model(random_tokens())).norm() / model(random_tokens()).norm()
    assert difference < 0.05


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
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="llama"):
        load_model(tmp_path)
    save_model(tmp_path, random_model(SHAPES["modern"]))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="not a finished checkpoint"):
        load_model(tmp_path)
