"""Every way of choosing a token: against transformers' processors, or against arithmetic done by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.sampling import (
    Draw,
    SamplingSettings,
    choose,
    draw_tokens,
    filter_logits,
    find_best,
    penalize,
    token_logprobs,
    uniform,
)

VOCABULARY = 60


def random_logits(rows: int = 8) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3


def frequencies(logits: Tensor, settings: SamplingSettings, draws: int = 4000) -> Tensor:
    """How often each token is chosen from one row, over evenly spread uniforms."""
    rows = logits.expand(draws, -1)
    tokens = choose(rows, [settings] * draws, [(draw + 0.5) / draws for draw in range(draws)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / draws


FILTERS = {
    "top_k": [1, 2, 7, VOCABULARY, 500],
    "top_p": [0.01, 0.3, 0.9, 0.999],
    "min_p": [0.01, 0.2, 1.0],
    "typical_p": [0.01, 0.3, 0.9, 0.999],
    "temperature": [0.3, 1.7],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FILTERS.items() for value in values])
def test_each_filter_gives_what_transformers_gives(name: str, value: float) -> None:
    from transformers.generation import logits_process

    processor = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
        "typical_p": logits_process.TypicalLogitsWarper,
        "temperature": logits_process.TemperatureLogitsWarper,
    }[name](value)
    logits = random_logits()
    ours = filter_logits(logits, [SamplingSettings(**{name: value})] * len(logits))
    torch.testing.assert_close(ours, processor(None, logits))


def test_filters_together_give_what_transformers_gives_in_its_order() -> None:
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    chosen = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8}
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCABULARY))
    config = GenerationConfig(do_sample=True, **chosen)
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    logits = random_logits()
    ours = filter_logits(logits, [SamplingSettings(**chosen)] * len(logits))
    torch.testing.assert_close(ours, processors(torch.zeros(len(logits), 1, dtype=torch.long), logits))


def test_rows_of_a_batch_do_not_see_one_another() -> None:
    logits = random_logits(12)
    settings = [
        SamplingSettings(temperature=0),
        SamplingSettings(temperature=0.7),
        SamplingSettings(top_k=5),
        SamplingSettings(top_p=0.8, typical_p=0.9),
        SamplingSettings(min_p=0.1, temperature=1.4),
        SamplingSettings(typical_p=0.5, top_k=30),
    ] * 2
    uniforms = [uniform(1, row, 0) for row in range(12)]
    together = choose(logits, settings, uniforms)
    alone = [choose(logits[row : row + 1], settings[row : row + 1], uniforms[row : row + 1])[0] for row in range(12)]
    assert together == alone
    filtered = filter_logits(logits, settings)
    for row in range(12):
        assert torch.equal(filtered[row : row + 1], filter_logits(logits[row : row + 1], settings[row : row + 1]))


def test_tokens_are_chosen_as_often_as_they_are_probable() -> None:
    logits = random_logits(1)
    for settings in (SamplingSettings(), SamplingSettings(temperature=0.5), SamplingSettings(top_p=0.7, top_k=20)):
        expected = filter_logits(logits, [settings]).softmax(-1)[0]
        assert (frequencies(logits, settings) - expected).abs().max() < 1 / 2000


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]])
    settings = SamplingSettings()
    edges = [0.0, 0.5, 1 - 2**-48]
    assert {choose(logits, [settings], [number])[0] for number in edges} == {1, 3}


ANY_NUMBER = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(
    st.lists(ANY_NUMBER, min_size=7, max_size=7),
    st.fixed_dictionaries(
        {
            "temperature": st.floats(0, 100),
            "repetition_penalty": st.floats(0, 100, exclude_min=True),
            "top_k": st.integers(0, 2**62),
            "top_p": st.floats(0, 1, exclude_min=True),
            "min_p": st.floats(0, 1),
            "typical_p": st.floats(0, 1, exclude_min=True),
            "logit_bias": st.dictionaries(st.integers(0, 6), st.floats(-100, 100)),
        }
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_what_is_chosen_is_a_token_whatever_the_logits_and_settings(
    numbers: list[float], settings: dict[str, Any], drawn: float
) -> None:
    draw = Draw(SamplingSettings(**settings), drawn, [0, 3], [3, 6])
    others = Draw(SamplingSettings(top_k=3), 0.5, [1], [2])
    first, second = draw_tokens(torch.tensor([numbers, [0.0, 1, 2, 3, 2, 1, 0]]), [draw, others])
    assert first in range(7)
    assert second == draw_tokens(torch.tensor([[0.0, 1, 2, 3, 2, 1, 0]]), [others])[0]


@given(
    st.lists(st.integers(-3, 3), min_size=7, max_size=7),
    st.dictionaries(st.integers(0, 6), st.floats(-100, 0)),
)
def test_the_best_token_is_the_greedy_choice_unless_a_bias_names_it(numbers: list[int], bias: dict[int, float]) -> None:
    settings = SamplingSettings(temperature=0, logit_bias=bias)
    assert settings.takes_best
    logits = torch.tensor([numbers], dtype=torch.float32)
    [best] = find_best(logits)
    if best not in bias:
        assert draw_tokens(logits, [Draw(settings, 0.5, [0], [])]) == [best]


def test_who_counts_tokens_favours_one_or_draws_takes_more_than_the_best() -> None:
    for settings in (
        {"temperature": 1.0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {3: 0.1}},
    ):
        assert not SamplingSettings(**{"temperature": 0.0} | settings).takes_best


def test_nothing_is_best_without_numbers() -> None:
    inf, nan = math.inf, math.nan
    rows = [[1, 3, 3], [nan, 1, 2], [1, inf, 2], [-inf, -inf, -inf], [-inf, 0, -inf]]
    assert find_best(torch.tensor(rows)) == [1, -1, -1, -1, 1]


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e-20])
def test_a_tiny_repetition_penalty_makes_what_was_there_certain(penalty: float) -> None:
    settings = SamplingSettings(repetition_penalty=penalty, temperature=1e-5, logit_bias={2: 100.0})
    logits = torch.tensor([[1.0, 2.0, 3.0, -math.inf]])
    assert draw_tokens(logits, [Draw(settings, 0.0, [1, 3], [])]) == [1]
    assert logits[0, 3] == -math.inf, "what cannot be stays impossible"


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert choose(logits, [SamplingSettings(temperature=0)], [0.99]) == [1]


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1)
    prompt, generated = [3, 5, 5], [7, 3]
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + generated]), logits.clone())
    penalize(logits[0], SamplingSettings(repetition_penalty=1.4), prompt, generated)
    torch.testing.assert_close(logits[0], theirs[0])


def test_presence_and_frequency_count_what_was_generated() -> None:
    settings = SamplingSettings(presence_penalty=0.5, frequency_penalty=0.25)
    ours = torch.zeros(6)
    penalize(ours, settings, [0, 1], [1, 2, 2, 2])
    # Token 0 is of the prompt alone; 1 came once: 0.5 + 0.25; 2 came three times: 0.5 + 3 x 0.25.
    assert ours.tolist() == [0, -0.75, -1.25, 0, 0, 0]


def test_logit_bias_multiplies_the_odds() -> None:
    logits = torch.zeros(3)
    penalize(logits, SamplingSettings(logit_bias={1: math.log(2), 2: -100}), [0], [])
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([1 / 3, 2 / 3, 0.0]))


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(2)
    first, second = token_logprobs(logits, [4, 9], 3)
    expected = logits.log_softmax(-1)
    assert first.logprob == pytest.approx(expected[0, 4].item())
    assert second.logprob == pytest.approx(expected[1, 9].item())
    values, ids = expected[1].topk(3)
    assert [token for token, _ in second.top] == ids.tolist()
    assert [value for _, value in second.top] == pytest.approx(values.tolist())


def test_uniforms_are_fixed_spread_and_apart() -> None:
    assert uniform(7, 0, 12) == uniform(7, 0, 12) == pytest.approx(0.3120990437121165, abs=0)
    numbers = torch.tensor([uniform(7, candidate, place) for candidate in range(4) for place in range(500)])
    assert len(numbers.unique()) == 2000
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.03
    assert abs(numbers.var() - 1 / 12) < 0.01


WRONG = [
    {"max_tokens": 0},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"top_k": -1},
    {"top_p": 0},
    {"top_p": 1.1},
    {"min_p": 2},
    {"typical_p": 0},
    {"repetition_penalty": 0},
    {"presence_penalty": 3},
    {"frequency_penalty": -3},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: 101}},
    {"stop": ("",)},
    {"stop_tokens": (-1,)},
    {"seed": 2**64},
    {"logprobs": 21},
    {"n": 0},
    {"n": 4, "best_of": 3},
    {"num_beams": 0},
    {"num_beams": 2, "n": 3},
    {"num_beams": 2, "best_of": 2},
    {"num_beams": 2, "prompt_lookup_tokens": 2},
    {"prompt_lookup_tokens": -1},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_settings_out_of_range_are_refused_in_one_sentence(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as caught:
        SamplingSettings(**settings)
    assert next(iter(settings)).split("_")[0] in str(caught.value)
