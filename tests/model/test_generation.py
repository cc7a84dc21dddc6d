"""Text from a prompt in one call."""

import pytest
import torch

from model.engine import EngineSettings
from model.generation import complete, stream_text
from model.gpt import GPT, ModelConfig
from model.sampling import SamplingSettings
from model.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the quick brown fox; naïve cafés, 你好 🙂 and more. " * 20], 280)


@pytest.fixture(scope="module", params=["modern", "classic"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(2)
    made = GPT(
        ModelConfig(family=request.param, num_layers=2, width=32, num_heads=2, context_length=48), tokenizer.vocab_size
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    made.clear_padding()
    return made


def test_greedy_text_is_that_of_the_model_run_from_the_start_for_each_token(model: GPT, tokenizer: Tokenizer) -> None:
    model.eval()
    tokens = tokenizer.encode("the quick").tolist()
    prompt_length = len(tokens)
    for _ in range(15):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    text = complete(model, tokenizer, "the quick", SamplingSettings(max_tokens=15, temperature=0))
    assert text == tokenizer.decode(tokens[prompt_length:]).split("<|endoftext|>")[0]


def test_pieces_are_whole_characters_and_make_up_the_text(model: GPT, tokenizer: Tokenizer) -> None:
    # Only the bytes of 🙂 may come, so most tokens are parts of a character.
    smile = dict.fromkeys(tokenizer.encode("🙂").tolist(), 100.0)
    settings = SamplingSettings(max_tokens=40, seed=4, logit_bias=smile)
    pieces = list(stream_text(model, tokenizer, "a", settings))
    assert "".join(pieces) == complete(model, tokenizer, "a", settings)
    assert len(pieces) > 1
    text = b"".join(tokenizer.token_bytes[token] for token in smile)
    assert text.decode() == "🙂"


def test_an_empty_prompt_starts_a_document(model: GPT, tokenizer: Tokenizer) -> None:
    assert complete(model, tokenizer, "", SamplingSettings(max_tokens=8, seed=1))


def test_the_model_is_left_in_the_mode_it_was_in(model: GPT, tokenizer: Tokenizer) -> None:
    for training in (True, False):
        model.train(training)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        complete(model, tokenizer, "the", SamplingSettings(max_tokens=2, seed=1))
        next(stream_text(model, tokenizer, "the", SamplingSettings(max_tokens=9, seed=1)))  # left in the middle
        assert model.training == training
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_several_answers_and_beams_give_the_first(model: GPT, tokenizer: Tokenizer) -> None:
    one = complete(model, tokenizer, "the", SamplingSettings(max_tokens=6, seed=1))
    assert complete(model, tokenizer, "the", SamplingSettings(max_tokens=6, seed=1, n=3)) == one
    assert complete(model, tokenizer, "the", SamplingSettings(max_tokens=6, num_beams=3))


def test_the_engines_settings_can_be_chosen(model: GPT, tokenizer: Tokenizer) -> None:
    settings = SamplingSettings(max_tokens=6, temperature=0)
    engine_settings = EngineSettings(max_batch_size=1, weights="float32")
    assert "".join(stream_text(model, tokenizer, "the", settings, engine_settings)) == complete(
        model, tokenizer, "the", settings
    )


def test_a_prompt_too_long_is_refused_in_a_sentence(model: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="context of 48"):
        complete(model, tokenizer, "the quick " * 50, SamplingSettings())
