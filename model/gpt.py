"""GPT, both families."""

from dataclasses import dataclass

from model.settings import require, setting


@dataclass(frozen=True)
class ModelConfig:
    family: str = setting("modern", "modern (Qwen3-compatible) or classic (GPT-2)")
    num_layers: int = setting(8, "transformer blocks")
    width: int = setting(512, "channels of the residual stream")
    num_heads: int = setting(4, "attention heads")
    context_length: int = setting(1024, "tokens the model sees at once")
    dropout: float = setting(0.0, "classic: share of activations dropped while training")

    def __post_init__(self) -> None:
        require(
            self.family in ("modern", "classic"),
            f"model.family is {self.family!r}; it can be modern or classic.",
        )
        require(self.width % self.num_heads == 0, "model.width must be divisible by model.num_heads.")
