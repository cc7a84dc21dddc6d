"""Rows of logits, each read once, beside torch."""

import math

import pytest
import torch

from model.cpu.kernel import load_kernel, summarise_logits


def summarise(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = load_kernel()
    if kernel is None:
        pytest.skip("needs a C++ compiler")
    return summarise_logits(kernel, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2, 31, 32, 300, 513, 50_257])
def test_each_row_has_the_sum_and_the_largest_that_torch_finds(vocabulary, dtype):
    torch.manual_seed(0)
    padded = (5 * torch.randn(7, vocabulary + 3)).to(dtype)
    padded[:, vocabulary:] = 1e4  # what pads the vocabulary does not count
    log_sums, best = summarise(padded[:, :vocabulary])
    logits = padded[:, :vocabulary].double()
    torch.testing.assert_close(log_sums.double(), logits.logsumexp(dim=-1), rtol=0, atol=2e-5)
    assert best.tolist() == logits.argmax(dim=-1).tolist()


def test_of_equal_logits_the_first_is_the_largest():
    logits = torch.zeros(1, 2000)
    logits[0, [700, 1300, 1999]] = 3.0
    assert summarise(logits)[1].tolist() == [700]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 40, 69])
def test_a_row_with_a_logit_that_is_no_number_has_none_and_the_others_theirs(bad, place):
    logits = torch.zeros(2, 70)
    logits[0, place] = bad
    log_sums, _ = summarise(logits)
    assert math.isnan(log_sums[0])
    assert log_sums[1].item() == pytest.approx(math.log(70), abs=1e-6)


def test_large_logits_do_not_overflow():
    logits = torch.full((1, 100), 3e4)
    assert summarise(logits)[0].item() == pytest.approx(3e4 + math.log(100))
