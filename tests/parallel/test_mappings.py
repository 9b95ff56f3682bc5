"""Forward and backward of the collectives at the borders of tensor-parallel regions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hydratron.parallel.mappings import (
    copy_to_tensor_parallel_region,
    gather_into_replicated_region,
    gather_into_tensor_parallel_region,
    local_tokens,
    reduce_scatter_from_tensor_parallel_region,
)
from tests.distributed import run_distributed
from tests.parallel.twins import deviation, random_values

TOKENS, HIDDEN = 12, 5
TOLERANCE = 1e-12  # float64 sums of at most four terms of size 1
Mapping = Callable[[Tensor, ProcessGroup | None], Tensor]


def rows(full: Tensor, rank: int, world_size: int) -> Tensor:
    return full.chunk(world_size)[rank]


def forward_backward(mapping: Mapping, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = mapping(x, dist.group.WORLD)
    (y * gradient).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def deviations(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """Of output and input gradient of each mapping from what one process computes."""
    whole = random_values(TOKENS, HIDDEN, seed=0)
    of_ranks = [random_values(TOKENS, HIDDEN, seed=1 + r) for r in range(world_size)]
    total = torch.stack(of_ranks).sum(0)
    mine = of_ranks[rank]
    found: dict[str, tuple[float, float]] = {}

    # every rank uses the whole of x for a different part of the loss: gradients add up
    y, grad = forward_backward(
        gather_into_tensor_parallel_region, rows(whole, rank, world_size), mine
    )
    found["gather"] = deviation(y, whole), deviation(grad, rows(total, rank, world_size))
    # every rank computes the same loss: its gradient is whole already
    y, grad = forward_backward(
        gather_into_replicated_region, rows(whole, rank, world_size), of_ranks[0]
    )
    found["gather_replicated"] = (
        deviation(y, whole),
        deviation(grad, rows(of_ranks[0], rank, world_size)),
    )
    # partial sums; the loss is over the rows that each rank keeps
    y, grad = forward_backward(
        reduce_scatter_from_tensor_parallel_region, mine, rows(whole, rank, world_size)
    )
    found["reduce_scatter"] = deviation(y, rows(total, rank, world_size)), deviation(grad, whole)
    y, grad = forward_backward(copy_to_tensor_parallel_region, whole, mine)
    found["copy"] = deviation(y, whole), deviation(grad, total)
    found["local_tokens"] = (
        deviation(local_tokens(whole, dist.group.WORLD), rows(whole, rank, world_size)),
        0.0,
    )
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_mappings_match_a_dense_computation_forward_and_backward(
    world_size: int, tmp_path: Path
) -> None:
    for found in run_distributed(deviations, world_size, tmp_path):
        assert len(found) == 5
        for mapping, (output, gradient) in found.items():
            assert output <= TOLERANCE, mapping
            assert gradient <= TOLERANCE, mapping


@pytest.mark.parametrize(
    "mapping",
    [
        copy_to_tensor_parallel_region,
        gather_into_replicated_region,
        gather_into_tensor_parallel_region,
        reduce_scatter_from_tensor_parallel_region,
        local_tokens,
    ],
)
def test_mappings_are_the_identity_without_a_group(mapping: Mapping) -> None:
    x = random_values(TOKENS, HIDDEN, seed=0)
    assert mapping(x, None) is x
