"""AdamW on parts: float32 masters of bf16 weights, shares of the data axis, and both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from hydratron.parallel.placement import Placement
from hydratron.parallel.zero import ShardedAdamW
from tests.distributed import run_distributed

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}
STEPS = 20


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((6, 5), (4,), (3, 8))  # the last splits along its second dimension alone
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(p.to(torch.bfloat16).to(dtype)) for p in drawn]


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = gradient.to(weight.device, torch.bfloat16).to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def reference() -> list[Tensor]:
    """What float32 weights become under gradients that bf16 can hold."""
    weights = parameters(torch.float32)
    train(AdamW(weights, fused=True, **SETTINGS), weights)
    return [w.detach() for w in weights]


def with_masters(rank: int, world_size: int) -> dict[str, Any]:
    weights = parameters(torch.bfloat16)
    placements = {w: Placement() for w in weights}
    group = dist.group.WORLD if world_size > 1 else None
    optimizer = ShardedAdamW(
        [{"params": weights}], placements=placements, dp_group=group, fused=True, **SETTINGS
    )
    train(optimizer, weights)
    shards = [optimizer.shards[w] for w in weights]
    return {
        "weights": [w.detach() for w in weights],
        "masters": [s.part.detach() for s in shards],
        "dims": [s.dp_dim for s in shards],
    }


def test_masters_of_bf16_weights_move_as_float32_weights_do() -> None:
    expected = reference()
    found = with_masters(0, 1)
    for weight, master, wanted in zip(found["weights"], found["masters"], expected, strict=True):
        assert torch.equal(master, wanted)
        assert torch.equal(weight, wanted.bfloat16())
    # without masters most of these steps, a thousandth of the weights, would be rounded away
    plain = parameters(torch.bfloat16)
    train(AdamW(plain, fused=True, **SETTINGS), plain)
    assert any(not torch.equal(p, w.bfloat16()) for p, w in zip(plain, expected, strict=True))


def test_masters_split_over_the_data_axis_give_the_same_weights(tmp_path: Path) -> None:
    expected = reference()
    for rank, found in enumerate(run_distributed(with_masters, 2, tmp_path)):
        assert found["dims"] == [0, 0, 1]
        for weight, master, dim, wanted in zip(
            found["weights"], found["masters"], found["dims"], expected, strict=True
        ):
            assert torch.equal(weight, wanted.bfloat16())
            assert torch.equal(master, wanted.chunk(2, dim)[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_device_needs_no_parts_of_full_precision(dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    placements = {w: Placement() for w in weights}
    optimizer = ShardedAdamW([{"params": weights}], placements=placements, dp_group=None)
    assert all(shard.part is weight for weight, shard in optimizer.shards.items())
