"""What a model writes: the continuation of each prompt, always with the same seed, so that samples compare.

A model that has learnt conversations answers each prompt as a question.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

import torch

from model.chat import ChatTemplate, encode, render
from model.generation import complete, complete_all
from model.gpt import GPT
from model.sampling import SamplingSettings
from model.tokenizer import Tokenizer
from model.training import autocast


def write_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    seed: int,
    precision: torch.dtype,
    template: ChatTemplate | None = None,
) -> dict[str, str]:
    """Return the continuation of each prompt, or the answer to it; the model stays in the mode in which it was."""
    settings = sampling(num_tokens, seed)
    with as_in_training(model, precision):
        if template is None:
            return {prompt: complete(model, tokenizer, prompt, settings) for prompt in prompts}
        asked = [ask(tokenizer, template, prompt) for prompt in prompts]
        answers = complete_all(model, tokenizer, asked, settings)
        return {prompt: answer.text for prompt, answer in zip(prompts, answers, strict=True)}


def share_that_ends(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[list[int]], num_tokens: int, seed: int, precision: torch.dtype
) -> float:
    """Return the share of questions, given as tokens, whose answer ends by itself within `num_tokens`."""
    with as_in_training(model, precision):
        answers = complete_all(model, tokenizer, questions, sampling(num_tokens, seed))
    return sum(answer.has_ended for answer in answers) / len(answers)


def sampling(num_tokens: int, seed: int) -> SamplingSettings:
    return SamplingSettings(max_tokens=num_tokens, temperature=0.8, top_k=50, seed=seed)


def ask(tokenizer: Tokenizer, template: ChatTemplate, prompt: str) -> list[int]:
    """The tokens of a prompt as a user's turn, up to where the assistant's begins."""
    return encode(tokenizer, render(tokenizer, template, [{"role": "user", "content": prompt}], ask=True))[0].tolist()


def as_in_training(model: GPT, precision: torch.dtype) -> AbstractContextManager[None]:
    """Evaluate in the training's precision, and leave the model in the mode in which it was."""
    stack = ExitStack()
    stack.callback(model.train, model.training)
    model.eval()
    stack.enter_context(torch.no_grad())
    stack.enter_context(autocast(next(model.parameters()).device, precision, keeps_casts=True))
    # Each length of a text would be compiled anew, and thrown away after it.
    stack.enter_context(torch.compiler.set_stance("force_eager"))
    return stack  # type: ignore[return-value]


def check_prompts(
    tokenizer: Tokenizer,
    key: str,
    prompts: Sequence[str],
    num_tokens: int,
    context_length: int,
    template: ChatTemplate | None = None,
) -> None:
    """Raise `ValueError` for a prompt that leaves no room in the context for its continuation."""
    for prompt in prompts:
        tokens = tokenizer.encode(prompt) if template is None else ask(tokenizer, template, prompt)
        length = max(1, len(tokens))
        if length + num_tokens > context_length:
            raise ValueError(
                f"{key} holds {prompt!r}, {length} tokens long, which {num_tokens} more are to follow: together they"
                f" do not fit model.context_length, {context_length}. Shorten it, or lower the number of tokens."
            )
