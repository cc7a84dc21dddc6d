"""What a model writes: the continuation of each prompt, always with the same seed, so that samples compare."""

from collections.abc import Sequence

import torch

from model.generation import complete
from model.gpt import GPT
from model.sampling import SamplingSettings
from model.tokenizer import Tokenizer
from model.training import autocast


def write_samples(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, seed: int, precision: torch.dtype
) -> dict[str, str]:
    """Return the continuation of each prompt; the model stays in the mode in which it was."""
    settings = SamplingSettings(max_tokens=num_tokens, temperature=0.8, top_k=50, seed=seed)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        # Each length of a text would be compiled anew, and thrown away after it.
        with torch.no_grad(), autocast(device, precision), torch.compiler.set_stance("force_eager"):
            return {prompt: complete(model, tokenizer, prompt, settings) for prompt in prompts}
    finally:
        model.train(was_training)


def check_prompts(tokenizer: Tokenizer, key: str, prompts: Sequence[str], num_tokens: int, context_length: int) -> None:
    """Raise `ValueError` for a prompt that leaves no room in the context for its continuation."""
    for prompt in prompts:
        length = max(1, len(tokenizer.encode(prompt)))
        if length + num_tokens > context_length:
            raise ValueError(
                f"{key} holds {prompt!r}, {length} tokens long, which {num_tokens} more are to follow: together they"
                f" do not fit model.context_length, {context_length}. Shorten it, or lower the number of tokens."
            )
