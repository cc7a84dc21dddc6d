import math

import numpy as np
import pytest

from pipeline.evaluation.evaluators import (
    EVALUATORS,
    Item,
    ItemAnswer,
    accuracies_by_group,
    chance_of,
    headline_outcomes,
    summarise,
)

QUESTION = EVALUATORS["choices"].read({"context": "Q:", "choices": ["no", "certainly not", "жё"], "gold": 2})


def said(*nats: float, greedy: tuple[bool, ...] | None = None) -> ItemAnswer:
    return ItemAnswer(nats, greedy or (False,) * len(nats))


def test_every_shape_names_its_columns_its_metrics_and_reads_a_row():
    assert list(EVALUATORS) == ["pair", "choices", "continuation", "document"]
    for evaluator in EVALUATORS.values():
        assert evaluator.columns
        assert evaluator.headline in evaluator.metrics
        assert "bits_per_byte" in evaluator.metrics


def test_a_space_stands_before_every_choice_and_does_not_count():
    assert QUESTION.endings == (" no", " certainly not", " жё")
    assert QUESTION.texts() == ("no", "certainly not", "жё")
    assert EVALUATORS["pair"].read({"good": "A b.", "bad": "B a."}).endings == (" A b.", " B a.")


# By characters "жё" is as long as "no", by bytes twice as long.
@pytest.mark.parametrize(
    ("nats", "acc", "acc_norm", "acc_bytes"),
    [
        ((-1.0, -9.0, -0.5), 1, 1, 1),
        ((-1.0, -9.0, -1.1), 0, 0, 1),
        ((-1.0, -2.0, -0.9), 1, 0, 0),
        ((-1.0, -6.5, -1.0), 0, 0, 1),  # of equals the first one is taken
    ],
)
def test_choices_are_right_by_nats_by_characters_and_by_bytes(nats, acc, acc_norm, acc_bytes):
    figures = summarise("choices", [QUESTION], [said(*nats)])
    assert [figures[name].value for name in ("acc", "acc_norm", "acc_bytes")] == [acc, acc_norm, acc_bytes]
    assert figures["bits_per_byte"].value == pytest.approx(-nats[2] / math.log(2) / 4)


def test_a_continuation_is_right_where_greedy_decoding_says_it():
    items = [Item((" Paris",), "France:"), Item((" a",), "x")]
    answers = [said(-1.0, greedy=(True,)), said(-3.0)]
    figures = summarise("continuation", items, answers)
    assert figures["acc"].value == 0.5
    assert figures["perplexity"].value == pytest.approx(math.exp(2.0))
    assert figures["bits_per_byte"].value == pytest.approx(4 / math.log(2) / 8)
    assert headline_outcomes("continuation", items, answers) == [True, False]


def test_a_document_counts_the_words_and_bytes_that_it_says_to_count():
    item = EVALUATORS["document"].read({"text": "a, b", "counted": "a , b"})
    figures = summarise("document", [item, item], [said(-6.0), said(-9.0)])
    assert figures["word_perplexity"].value == pytest.approx(math.exp(15 / 6))
    assert figures["byte_perplexity"].value == pytest.approx(math.exp(15 / 10))
    assert figures["bits_per_byte"].value == pytest.approx(15 / 10 / math.log(2))
    assert headline_outcomes("document", [item], [said(-6.0)]) is None
    assert math.isnan(chance_of("document", [item]))


def test_an_accuracys_error_is_that_of_a_mean():
    items = [QUESTION] * 10
    answers = [said(0.0, -1.0, -1.0 if wrong else 1.0) for wrong in [True] * 3 + [False] * 7]
    figure = summarise("choices", items, answers)["acc"]
    assert (figure.value, figure.n) == (0.7, 10)
    assert figure.standard_error == pytest.approx(np.std([0] * 3 + [1] * 7, ddof=1) / math.sqrt(10))


def test_a_quotients_error_is_what_resampling_gives():
    drawn = np.random.default_rng(0)
    items = [Item((" " + "x" * int(n),), "c") for n in drawn.integers(3, 40, 300)]
    answers = [said(-float(n)) for n in drawn.gamma(4, 2, 300)]
    figures = summarise("continuation", items, answers)
    resampled: dict[str, list[float]] = {"perplexity": [], "bits_per_byte": []}
    for _ in range(400):
        chosen = drawn.integers(300, size=300)
        again = summarise("continuation", [items[i] for i in chosen], [answers[i] for i in chosen])
        for name, values in resampled.items():
            values.append(again[name].value)
    for name, values in resampled.items():
        assert figures[name].standard_error == pytest.approx(np.std(values), rel=0.15)


def test_one_item_leaves_no_error():
    assert math.isnan(summarise("choices", [QUESTION], [said(0.0, 0.0, 0.0)])["acc"].standard_error)


def test_guessing_scores_by_the_number_of_choices():
    other = EVALUATORS["choices"].read({"context": "Q:", "choices": ["a", "b"], "gold": 0})
    assert chance_of("choices", [QUESTION, other]) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert chance_of("continuation", [Item(("x",))]) == 0


def test_accuracies_are_given_by_group_where_items_have_one():
    items = [Item((" a", " b"), group=group) for group in ("x", "y", "y")]
    assert accuracies_by_group(items, [said(-1, -2), said(-1, -2), said(-2, -1)]) == {"x": 1.0, "y": 0.5}
    assert accuracies_by_group([QUESTION], [said(-1, -2, -3)]) == {}
