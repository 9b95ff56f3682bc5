"""Floating-point operations of a training step, counted as the original's tables count them."""

from hydratron.models.config import ModelConfig


def layer_forward_flops(config: ModelConfig, *, seq_len: int) -> int:
    """FLOPs of one layer's forward pass over one sequence.

    Matrix products 2 S (4 H^2 + 2 H F), attention 4 S^2 H, not halved for a causal mask: with
    F = 4H the 24 S H^2 + 4 S^2 H of Narayanan et al. 2021, appendix.
    """
    hidden, feedforward = config.hidden_size, config.feedforward_size
    products = 2 * seq_len * (4 * hidden * hidden + 2 * hidden * feedforward)
    return products + 4 * seq_len * seq_len * hidden


def head_forward_flops(config: ModelConfig, *, num_predictions: int) -> int:
    """FLOPs of the vocabulary product (and BERT's transform) at `num_predictions` positions."""
    flops = 2 * num_predictions * config.hidden_size * config.vocab_size
    if config.family == "bert":
        flops += 2 * num_predictions * config.hidden_size**2
    return flops


def train_flops(
    config: ModelConfig, *, seq_len: int, num_predictions: int, with_recomputation: bool = False
) -> int:
    """FLOPs of forward and backward over one sequence.

    Model FLOPs (three passes) by default. `with_recomputation` counts the layers a fourth time, as
    the original's 96 B S L H^2 (1 + S/6H + V/16LH) does; the vocabulary product always counts
    three times.
    """
    passes = 4 if with_recomputation else 3
    layers = config.num_layers * layer_forward_flops(config, seq_len=seq_len)
    return passes * layers + 3 * head_forward_flops(config, num_predictions=num_predictions)
