"""A network, its tensor-parallel twin with the same random weights, and batches for both.

What is split and where is written down here again, independently of the placements in src.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining

# How the end of a parameter's name tells the dimension that is split; all others are replicated.
SPLIT_DIMENSIONS = {
    "attention.qkv.weight": 1,  # [3, H, H]: dimension 0 stacks query, key and value
    "attention.qkv.bias": 1,
    "attention.output.weight": 1,
    "mlp.input.weight": 0,
    "mlp.input.bias": 0,
    "mlp.output.weight": 1,
    "word_embeddings.weight": 0,
    "masked_lm_head.bias": 0,
}


def split_dimension(name: str) -> int | None:
    return next((dim for end, dim in SPLIT_DIMENSIONS.items() if name.endswith(end)), None)


def shard(full: Tensor, dim: int | None, group: ProcessGroup) -> Tensor:
    return full if dim is None else full.chunk(group.size(), dim)[group.rank()]


def random_values(*shape: int, seed: int) -> Tensor:
    """The same float64 values on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "family": "bert",
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 24,
        "max_seq_len": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return ModelConfig(**(settings | changes))


def build(config: ModelConfig, group: ProcessGroup | None = None) -> nn.Module:
    network = {"bert": BertForPretraining, "gpt2": Gpt2ForPretraining}[config.family](config, group)
    return network.double()


@torch.no_grad()
def randomize(network: nn.Module) -> None:
    """Give every parameter random values, biases and LayerNorm too: zeros and ones hide errors."""
    for index, (name, parameter) in enumerate(network.named_parameters()):
        values = 0.3 * random_values(*parameter.shape, seed=index)
        parameter.copy_(values + 1.0 if name.endswith("layernorm.weight") else values)


@torch.no_grad()
def copy_shards(source: nn.Module, target: nn.Module, group: ProcessGroup) -> None:
    full = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(shard(full[name], split_dimension(name), group))


def twins(config: ModelConfig, group: ProcessGroup) -> tuple[nn.Module, nn.Module]:
    """Return the network on one device and the share of this rank."""
    dense, split = build(config), build(config, group)
    randomize(dense)
    copy_shards(dense, split, group)
    return dense, split


def batch_for(
    config: ModelConfig, *, batch_size: int, seq_len: int, padded: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """A pretraining batch; `padded` gives the sequences different lengths (BERT only)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, seq_len)

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    if config.family == "gpt2":
        ids = integers(config.vocab_size, *shape)
        labels = integers(config.vocab_size, *shape)
        labels[0, -1] = -100
        return {"input_ids": ids, "labels": labels}
    lengths = torch.arange(batch_size).remainder(3).neg().add(seq_len).clamp(min=1)
    num_masked = max(1, seq_len // 2)
    positions = torch.stack([torch.randperm(seq_len, generator=generator) for _ in range(shape[0])])
    labels = integers(config.vocab_size, batch_size, num_masked)
    if batch_size * num_masked > 1:
        labels[0, -1] = -100
    batch = {
        "input_ids": integers(config.vocab_size, *shape),
        "token_type_ids": integers(2, *shape),
        "masked_positions": positions[:, :num_masked],
        "masked_labels": labels,
        "sentence_order": integers(2, batch_size),
    }
    if padded:
        batch["attention_mask"] = torch.arange(seq_len) < lengths.unsqueeze(-1)
    return batch


def backward_over_micro_batches(network: Any, micro_batches: list[dict[str, Tensor]]) -> Tensor:
    """Accumulate the gradients of the mean loss over all micro-batches; return that loss."""
    counts: dict[str, Any] = {}
    for batch in micro_batches:
        for key, count in network.loss_counts(batch).items():
            counts[key] = counts.get(key, 0) + count
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        loss = torch.stack([s / counts[key] for key, s in network(batch).items()]).sum()
        loss.backward()
        total += loss.detach()
    return total


def gradients(network: nn.Module) -> dict[str, Tensor]:
    named = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is not None for gradient in named.values())
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def deviation(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN where there is one, shapes must agree."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.detach() - b.detach()).abs().max().item()
