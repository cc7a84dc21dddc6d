"""A ladder of smaller models, each trained on as many tokens for its size as the preset: loss against compute."""

from dataclasses import dataclass

from model.gpt import count_parameters, flops_per_token
from model.settings import require
from pipeline.config import Config
from pipeline.search.space import Point, configure, target_tokens


@dataclass(frozen=True)
class Rung:
    """One size of the ladder."""

    width: int
    point: Point
    config: Config
    parameters: int
    flops: float  # of its whole training


def plan_ladder(config: Config, vocab_size: int) -> list[Rung]:
    """Plan one training for each of `search.widths`: heads keep their size and become fewer.

    Raises `ValueError` for a width that is not below the preset's, or no whole number of heads.
    """
    model = config.model
    full = count_parameters(model, vocab_size)
    rungs = []
    for width in sorted(config.search.ladder):
        require(
            width < model.width,
            f"search.widths: {width} is not below the preset's {model.width}; nothing is predicted from itself.",
        )
        require(
            width % model.channels_per_head == 0,
            f"search.widths: {width} is no multiple of a head's {model.channels_per_head} channels; heads keep their"
            " size and become fewer.",
        )
        point = {"model.width": str(width), "model.num_heads": str(width // model.channels_per_head)}
        if model.num_kv_heads:
            point["model.num_kv_heads"] = str(max(1, model.num_kv_heads * width // model.width))
        if model.mlp_width:
            point["model.mlp_width"] = str(max(1, model.mlp_width * width // model.width))
        parameters = count_parameters(configure(config, point).model, vocab_size)
        tokens = max(config.train.batch_tokens, round(target_tokens(config) * parameters / full))
        chosen = configure(config, point, tokens=tokens)
        rungs.append(Rung(width, point, chosen, parameters, count_flops(chosen, vocab_size)))
    return rungs


def count_flops(config: Config, vocab_size: int) -> float:
    """FLOPs of a whole training."""
    return float(flops_per_token(config.model, vocab_size)) * target_tokens(config)
