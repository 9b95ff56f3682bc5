"""The shape of a network, as true global numbers: nothing here depends on the parallel layout."""

from dataclasses import dataclass
from typing import Annotated

from hydratron.settings import BelowOne, Interval, Length, Positive, PositiveShare, check, one_of

RECOMPUTE = ("none", "selective", "full")
LayerNormPlacement = Annotated[str, one_of("pre", "post")]
Initialisation = Annotated[str, one_of("scaled", "plain")]
Recompute = Annotated[str, one_of(*RECOMPUTE)]
Width = Annotated[int, Interval(1, 2**20)]


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

    family: Annotated[str, one_of("bert", "gpt2")]
    hidden_size: Width
    num_layers: Annotated[int, Interval(1, 10_000)]
    num_heads: Width
    vocab_size: Annotated[int, Interval(1, 2**24)]
    max_seq_len: Length
    intermediate_size: Width | None = None
    num_token_types: Width = 2
    layernorm: LayerNormPlacement = "pre"
    init: Initialisation = "scaled"
    init_std: Positive = 0.02
    layernorm_eps: PositiveShare = 1e-5
    activation: Annotated[str, one_of("gelu", "gelu_tanh")] = "gelu"
    hidden_dropout: BelowOne = 0.1
    attention_dropout: BelowOne = 0.1
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        check(self, "model")
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )

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
