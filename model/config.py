"""The settings of the model and its optimizer, apart from the code that needs torch, whose import takes seconds."""

import math
from dataclasses import dataclass

from model.settings import require, setting


@dataclass(frozen=True)
class ModelConfig:
    family: str = setting("modern", "modern (Qwen3, Llama, Qwen2) or classic (GPT-2)")
    num_layers: int = setting(8, "transformer blocks")
    width: int = setting(512, "channels of the residual stream")
    num_heads: int = setting(4, "attention heads")
    num_kv_heads: int = setting(0, "modern: heads of keys and values, shared by groups of heads; 0: num_heads")
    head_dim: int = setting(0, "modern: channels of each head; 0: width / num_heads")
    mlp_width: int = setting(0, "channels inside the MLP; 0: 4 x width (classic), 8/3 x width up to a 128th (modern)")
    context_length: int = setting(1024, "tokens the model sees at once")
    dropout: float = setting(0.0, "classic: share of activations dropped while training")
    tie_embeddings: bool = setting(False, "one matrix for the token embedding and the head, as GPT-2 has")
    rope_theta: float = setting(10_000.0, "modern: base of the rotary wavelengths; larger for long contexts")
    rope_scaling: str = setting(
        "none", "modern: how wavelengths are stretched for longer contexts: none, linear or llama3", added_later=True
    )
    rope_factor: float = setting(1.0, "rope_scaling: by how much they are stretched", added_later=True)
    rope_original_context: int = setting(0, "rope_scaling=llama3: the context before stretching", added_later=True)
    rope_low_frequency_factor: float = setting(
        1.0, "rope_scaling=llama3: waves that turn less often in the original context are stretched", added_later=True
    )
    rope_high_frequency_factor: float = setting(
        4.0, "rope_scaling=llama3: waves that turn more often in it stay as they are", added_later=True
    )
    qk_norm: bool = setting(
        True, "modern: RMSNorm over each head's queries and keys, as Qwen3 has and Llama has not", added_later=True
    )
    attention_bias: str = setting(
        "none", "modern: biases of the attention's layers: none, qkv (as Qwen2) or all", added_later=True
    )
    mlp_bias: bool = setting(False, "modern: biases of the MLP's layers, as some Llamas have", added_later=True)
    norm_epsilon: float = setting(
        0.0, "added to a norm's mean square; 0: 1e-5 (classic), 1e-6 (modern)", added_later=True
    )

    def __post_init__(self) -> None:
        require(
            self.family in ("modern", "classic"),
            f"model.family is {self.family!r}; it can be modern or classic.",
        )
        for name in ("num_layers", "width", "num_heads"):
            require(getattr(self, name) > 0, f"model.{name} must be positive.")
        # Evaluation and the probe cut a text into windows; shorter ones would leave nothing to predict in them.
        require(self.context_length >= 4, "model.context_length must be at least 4.")
        for name in ("num_kv_heads", "head_dim", "mlp_width"):
            require(getattr(self, name) >= 0, f"model.{name} cannot be negative; 0 derives it.")
        require(0 <= self.dropout < 1, "model.dropout must be at least 0 and below 1.")
        require(1 < self.rope_theta < math.inf, "model.rope_theta must be a number above 1.")
        require(0 <= self.norm_epsilon < 1, "model.norm_epsilon must be at least 0 and below 1; 0 takes the family's.")
        require(
            self.head_dim > 0 or self.width % self.num_heads == 0,
            "model.width must be divisible by model.num_heads.",
        )
        if self.family == "classic":
            require(
                self.num_kv_heads in (0, self.num_heads) and self.head_dim in (0, self.width // self.num_heads),
                "model.family=classic is GPT-2, which has no model.num_kv_heads or model.head_dim; leave them 0.",
            )
            require(
                self.rope_scaling == "none" and self.attention_bias == "none" and self.qk_norm and not self.mlp_bias,
                "model.family=classic is GPT-2, which has no model.rope_scaling, model.qk_norm or biases to choose;"
                " leave them out.",
            )
        else:
            require(
                self.dropout == 0,
                "model.family=modern has no dropout; set model.dropout=0, or model.family=classic.",
            )
            require(
                self.num_heads % self.kv_heads == 0,
                "model.num_heads must be divisible by model.num_kv_heads.",
            )
            require(self.channels_per_head % 2 == 0, "model.head_dim must be even: RoPE turns pairs of channels.")
            self._check_rope_scaling()
            self._check_biases()

    def _check_rope_scaling(self) -> None:
        kinds = ("none", "linear", "llama3")
        require(
            self.rope_scaling in kinds, f"model.rope_scaling is {self.rope_scaling!r}; it can be {', '.join(kinds)}."
        )
        require(1 <= self.rope_factor < math.inf, "model.rope_factor must be a number of at least 1.")
        require(
            0 < self.rope_low_frequency_factor < self.rope_high_frequency_factor < math.inf,
            "model.rope_low_frequency_factor must be positive and below model.rope_high_frequency_factor.",
        )
        require(
            self.rope_scaling != "llama3" or self.rope_original_context > 0,
            "model.rope_scaling=llama3 needs model.rope_original_context, the context before stretching.",
        )

    def _check_biases(self) -> None:
        kinds = ("none", "qkv", "all")
        require(
            self.attention_bias in kinds,
            f"model.attention_bias is {self.attention_bias!r}; it can be {', '.join(kinds)}.",
        )
        # Qwen3 has QK-norm and no bias in its MLP, Qwen2 biases of queries, keys and values alone, Llama the rest.
        require(
            not self.qk_norm or (self.attention_bias != "qkv" and not self.mlp_bias),
            "No family of transformers has model.qk_norm=true with model.attention_bias=qkv or model.mlp_bias=true;"
            " set model.qk_norm=false.",
        )
        require(
            not (self.attention_bias == "qkv" and self.mlp_bias),
            "No family of transformers has model.attention_bias=qkv with model.mlp_bias=true.",
        )

    @property
    def is_modern(self) -> bool:
        return self.family == "modern"

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def channels_per_head(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @property
    def mlp_channels(self) -> int:
        if self.mlp_width:
            return self.mlp_width
        # SwiGLU has three matrices and GELU two, so 8/3 x width gives as many parameters as 4 x width.
        return math.ceil(8 * self.width / 3 / 128) * 128 if self.is_modern else 4 * self.width

    @property
    def epsilon(self) -> float:
        return self.norm_epsilon or (1e-6 if self.is_modern else 1e-5)

    @property
    def has_qk_norm(self) -> bool:
        return self.is_modern and self.qk_norm

    @property
    def has_qkv_bias(self) -> bool:
        return not self.is_modern or self.attention_bias != "none"

    @property
    def has_output_bias(self) -> bool:
        return not self.is_modern or self.attention_bias == "all"

    @property
    def has_mlp_bias(self) -> bool:
        return not self.is_modern or self.mlp_bias


@dataclass(frozen=True)
class OptimizerConfig:
    kind: str = setting("muon", "muon (2-D block weights, AdamW for the rest) or adamw (all weights)")
    learning_rate: float = setting(6e-4, "adamw: peak learning rate of all weights")
    muon_learning_rate: float = setting(0.02, "muon: peak learning rate of the blocks' matrices")
    embedding_learning_rate: float = setting(0.2, "muon: peak learning rate of the token embedding")
    head_learning_rate: float = setting(0.004, "muon: peak learning rate of the head, or of a tied embedding")
    scalar_learning_rate: float = setting(0.01, "muon: peak learning rate of norms and biases")
    weight_decay: float = setting(0.1, "pull of the matrices to zero, in units of their learning rate")
    weight_decay_to_zero: bool = setting(True, "muon: the weight decay falls linearly to zero over the run")
    beta1: float = setting(0.9, "AdamW: memory of the gradient")
    beta2: float = setting(0.95, "AdamW: memory of its square")
    epsilon: float = setting(1e-8, "AdamW: added to the root of the square")
    momentum: float = setting(0.95, "muon: memory of the gradient")
    momentum_start: float = setting(0.85, "muon: momentum at the first step")
    momentum_warmup_steps: int = setting(300, "muon: steps from momentum_start to momentum")
    schedule: str = setting("linear", "linear (warm-up, constant, linear decay) or cosine (warm-up, cosine decay)")
    warmup_steps: int = setting(0, "steps over which the learning rate rises to its peak")
    decay_fraction: float = setting(0.65, "linear: share of the steps, at the end, over which the rate falls")
    final_ratio: float = setting(0.05, "learning rate at the end, as a share of its peak")
    clip_norm: float = setting(0.0, "gradients longer than this are shortened to it; 0: never")

    def __post_init__(self) -> None:
        require(self.kind in ("muon", "adamw"), f"optimizer.kind is {self.kind!r}; it can be muon or adamw.")
        require(
            self.schedule in ("linear", "cosine"),
            f"optimizer.schedule is {self.schedule!r}; it can be linear or cosine.",
        )
        rates = ("learning_rate", "muon_learning_rate", "embedding_learning_rate")
        for name in (*rates, "head_learning_rate", "scalar_learning_rate", "epsilon"):
            require(0 < getattr(self, name) < math.inf, f"optimizer.{name} must be a positive number.")
        for name in ("weight_decay", "warmup_steps", "momentum_warmup_steps", "clip_norm"):
            require(0 <= getattr(self, name) < math.inf, f"optimizer.{name} must be a number and not negative.")
        for name in ("beta1", "beta2", "momentum", "momentum_start"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must be at least 0 and below 1.")
        for name in ("decay_fraction", "final_ratio"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name} must lie between 0 and 1.")


@dataclass(frozen=True)
class LoraSettings:
    """How large the factors are, how much they count, and beside which matrices they stand."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()  # ends of Hugging Face's names, such as q_proj; none: every matrix of the blocks

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
