import random

import pytest
import torch

from model.config import ModelConfig
from model.gpt import GPT
from model.likelihood import Request, cut, encode_requests, fill_rows, score
from model.tokenizer import Tokenizer, train_bpe

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "Grüße", "then", "it", "slept")
FAMILIES = ("classic", "modern")


def tiny_model(family: str, vocab_size: int = 300, context_length: int = 24) -> GPT:
    torch.manual_seed(3)
    config = ModelConfig(
        family=family,
        num_layers=2,
        width=32,
        num_heads=4,
        context_length=context_length,
        num_kv_heads=2 * (family == "modern"),
    )
    model = GPT(config, vocab_size).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.clear_padding()
    return model


def by_hand(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One text alone, all of its logits."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logprobs = model(tokens[:, :-1])[0].double().log_softmax(dim=-1)[-len(continuation) :]
    wanted = torch.tensor(continuation)
    return logprobs.gather(1, wanted[:, None]).sum().item(), bool((logprobs.argmax(dim=-1) == wanted).all())


def random_requests(count: int) -> list[Request]:
    """Texts that share beginnings of many lengths, repeat each other, and begin one another."""
    drawn = random.Random(5)
    stems = [[drawn.randrange(300) for _ in range(drawn.randint(1, 12))] for _ in range(6)]
    requests = []
    for _ in range(count):
        stem = drawn.choice(stems)
        context = stem[: drawn.randint(1, len(stem))] + [drawn.randrange(300) for _ in range(drawn.randint(0, 3))]
        requests.append(Request(context, [drawn.randrange(4) for _ in range(drawn.randint(1, 8))]))
    return [*requests, requests[0], Request(requests[1].context, requests[1].continuation[:1])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row_tokens", [1, 16, 64])
def test_every_text_scores_as_if_it_were_alone(family, row_tokens):
    model, requests = tiny_model(family), random_requests(60)
    scores = score(model, requests, row_tokens=row_tokens, batch_tokens=128)
    for number, request in enumerate(requests):
        nats, greedy = by_hand(model, request.context, request.continuation)
        assert scores.nats[number] == pytest.approx(nats, abs=1e-4)
        assert scores.greedy[number] == greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_would_say_itself_is_greedy(family):
    model, context, said = tiny_model(family), [5, 7], []
    for _ in range(6):
        with torch.no_grad():
            said.append(int(model(torch.tensor([context + said]))[0, -1].argmax()))
    other = [*said[:-1], (said[-1] + 1) % 300]
    assert score(model, [Request(context, said), Request(context, other)]).greedy.tolist() == [True, False]


def test_a_shared_beginning_is_read_once():
    context = list(range(10, 20))
    windows = sorted(([*context, ending], 1, ending) for ending in range(4))
    [row] = fill_rows(windows, 128)
    assert row.tokens == context
    assert len(row.edges) == 4


def test_a_long_context_loses_its_beginning():
    model = tiny_model("classic")
    drawn = random.Random(1)
    context, continuation = [drawn.randrange(300) for _ in range(40)], [1, 2, 3]
    nats, _ = by_hand(model, context[-22:], continuation)  # 22 + 3 - 1 read: the whole context length of 24
    assert score(model, [Request(context, continuation)]).nats[0] == pytest.approx(nats, abs=1e-4)


def test_a_long_continuation_is_cut_into_windows_that_score_each_token_once():
    drawn = random.Random(2)
    tokens = [drawn.randrange(300) for _ in range(60)]
    windows = list(cut(Request([299], tokens), 24))
    assert [count for _, count in windows] == [24, 24, 12]
    assert [token for window, count in windows for token in window[-count:]] == tokens
    assert windows[0][0][0] == 299
    assert [len(window) for window, _ in windows] == [25, 25, 25]  # the last one sees as much as fits
    model = tiny_model("modern")
    by_window = sum(by_hand(model, window[:-count], window[-count:])[0] for window, count in windows)
    assert score(model, [Request([299], tokens)]).nats[0] == pytest.approx(by_window, abs=1e-3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([" ".join(random.Random(0).choices(WORDS, k=500))], 320)


def test_no_context_is_the_beginning_of_a_document(tokenizer):
    [request] = encode_requests(tokenizer, [("", " the cat")])
    assert request == Request([tokenizer.end_of_text], tokenizer.encode(" the cat").tolist())


def test_white_space_before_a_continuation_goes_to_it(tokenizer):
    loose, tight = encode_requests(tokenizer, [("the ", "cat"), ("the", " cat")])
    assert loose == tight
    assert tokenizer.decode(loose.continuation) == " cat"


def test_a_continuation_of_nothing_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"Nothing is left to score of '' after 'the cat'"):
        encode_requests(tokenizer, [("the cat", "")])
