from collections import Counter
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from model.gpt import GPT
from model.tokenizer import load_tokenizer
from model.training import parallelize
from pipeline.training.samples import write_samples
from tests.pipeline.tiny_training import tiny_config, tiny_inputs


def test_samples_of_a_compiled_model_compile_nothing(storage: str) -> None:
    config = tiny_config(storage)
    tokenizer = load_tokenizer(Path(tiny_inputs(config)["tokenizer"].url))
    model = GPT(config.model, tokenizer.vocab_size)
    parallelize(model, compile=True)
    compiled = Counter(counters["frames"])
    samples = write_samples(model, tokenizer, ["The "], 4, 7, torch.float32)
    assert all(samples.values())
    assert Counter(counters["frames"]) == compiled
