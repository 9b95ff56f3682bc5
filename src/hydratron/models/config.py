"""The shape of a network, as true global numbers: nothing here depends on the parallel layout."""

from dataclasses import dataclass

CHOICES = {
    "family": ("bert", "gpt2"),
    "layernorm": ("pre", "post"),
    "init": ("scaled", "plain"),
    "recompute": ("none", "selective", "full"),
    "activation": ("gelu", "gelu_tanh"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a BERT or GPT-2; validates itself.

    `layernorm`: "post" is the original BERT (LayerNorm after the residual sum, figure 1(a) of the
    A100 article), "pre" the rearranged order of figure 1(b). `init`: "scaled" divides the standard
    deviation of the residual outputs by sqrt(2 num_layers), "plain" does not. `recompute`: which
    activations are computed again in the backward pass: "full" keeps each layer's input alone,
    "selective" also what matrix products, attention and collectives give.

    Raises:
        ValueError: a size or a choice that cannot be, by name and rule.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_seq_len: int
    intermediate_size: int | None = None
    num_token_types: int = 2
    layernorm: str = "pre"
    init: str = "scaled"
    init_std: float = 0.02
    layernorm_eps: float = 1e-5
    activation: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    recompute: str = "none"

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"model.{key} {getattr(self, key)!r} is not one of {', '.join(choices)}"
                )
        sizes = ("hidden_size", "num_layers", "num_heads", "vocab_size", "max_seq_len")
        for key in (*sizes, "intermediate_size", "num_token_types", "init_std", "layernorm_eps"):
            if getattr(self, key) <= 0:
                raise ValueError(f"model.{key} {getattr(self, key)} is not positive")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        for key in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"model.{key} {getattr(self, key)} is not in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def feedforward_size(self) -> int:
        """Width of the MLP's hidden layer: `intermediate_size`, 4 x hidden_size by default."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    def check_tensor_parallel(self, tensor_parallel_size: int) -> None:
        """Raise ValueError where a split dimension does not divide by `tensor_parallel_size`."""
        for key in ("num_heads", "feedforward_size", "vocab_size"):
            if getattr(self, key) % tensor_parallel_size:
                raise ValueError(
                    f"{key} {getattr(self, key)} is not divisible by"
                    f" tensor_parallel_size {tensor_parallel_size}"
                )
