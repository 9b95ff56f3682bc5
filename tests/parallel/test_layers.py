"""The split layers against nn.Linear and nn.Embedding with the same weights, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hydratron.parallel import layers
from hydratron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from hydratron.parallel.placement import reduce_partial_gradients
from tests.distributed import run_distributed
from tests.parallel.twins import deviation, random_values, shard

TOKENS, IN, OUT, VOCAB = 12, 8, 16, 24
TOLERANCE = 1e-10  # the bound of design section 3; float64 rounding here is near 1e-15


def fill(layer: nn.Module, **values: Tensor) -> None:
    with torch.no_grad():
        for name, value in values.items():
            layer.get_parameter(name).copy_(value)
    assert {name for name, _ in layer.named_parameters()} == set(values)


def whole(*shape: int, seed: int) -> Tensor:
    return random_values(*shape, seed=seed).requires_grad_()


def grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def column_parallel(group: Any, num_stacked: int) -> dict[str, float]:
    stack = (num_stacked,) if num_stacked > 1 else ()
    weight, bias = whole(*stack, OUT, IN, seed=1), whole(*stack, OUT, seed=2)
    x = whole(TOKENS, IN, seed=3)
    # [T, stack, OUT]: what each product gives, side by side
    y = torch.einsum("ti,soi->tso", x, weight.view(-1, OUT, IN)) + bias.view(-1, OUT)
    upstream = random_values(*y.shape, seed=4)
    (y * upstream).sum().backward()

    dim = len(stack)
    layer = ColumnParallelLinear(IN, OUT, group=group, num_stacked=num_stacked).double()
    fill(layer, weight=shard(weight, dim, group), bias=shard(bias, dim, group))
    local_x = shard(x.detach(), 0, group).clone().requires_grad_()
    local_y = layer(local_x)
    (local_y * shard(upstream, 2, group).flatten(1)).sum().backward()
    return {
        "output": deviation(local_y, shard(y, 2, group).flatten(1)),
        "weight": deviation(grad(layer.weight), shard(grad(weight), dim, group)),
        "bias": deviation(grad(layer.bias), shard(grad(bias), dim, group)),
        "input": deviation(grad(local_x), shard(grad(x), 0, group)),
    }


def row_parallel(group: Any) -> dict[str, float]:
    dense = nn.Linear(IN, OUT).double()
    fill(dense, weight=random_values(OUT, IN, seed=1), bias=random_values(OUT, seed=2))
    x = whole(TOKENS, IN, seed=3)
    y = dense(x)
    upstream = random_values(*y.shape, seed=4)
    (y * upstream).sum().backward()

    layer = RowParallelLinear(IN, OUT, group=group).double()
    fill(layer, weight=shard(dense.weight, 1, group), bias=dense.bias)
    local_x = shard(x.detach(), 1, group).clone().requires_grad_()
    local_y = layer(local_x)
    (local_y * shard(upstream, 0, group)).sum().backward()
    partial_bias = grad(layer.bias).clone()
    reduce_partial_gradients(layer, group)
    return {
        "output": deviation(local_y, shard(y, 0, group)),
        "weight": deviation(grad(layer.weight), shard(grad(dense.weight), 1, group)),
        "partial bias": deviation(partial_bias, shard(upstream, 0, group).sum(0)),
        "bias": deviation(grad(layer.bias), grad(dense.bias)),
        "input": deviation(grad(local_x), shard(grad(x), 1, group)),
    }


def vocab_parallel_embedding(group: Any) -> dict[str, float]:
    weight = whole(VOCAB, IN, seed=1)
    ids = torch.tensor([0, VOCAB - 1, 5, 6, 11, 12, 17, 18, 5, 0, 23, 7])  # borders and repeats
    y = F.embedding(ids, weight)
    upstream = random_values(*y.shape, seed=2)
    (y * upstream).sum().backward()

    layer = VocabParallelEmbedding(VOCAB, IN, group=group).double()
    fill(layer, weight=shard(weight, 0, group))
    local_y = layer(ids)
    (local_y * shard(upstream, 0, group)).sum().backward()
    return {
        "output": deviation(local_y, shard(y, 0, group)),
        "weight": deviation(grad(layer.weight), shard(grad(weight), 0, group)),
    }


def deviations(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    group = dist.group.WORLD
    return {
        "column": column_parallel(group, 1),
        "column of three": column_parallel(group, 3),
        "row": row_parallel(group),
        "vocabulary": vocab_parallel_embedding(group),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_split_layers_match_their_dense_twins(world_size: int, tmp_path: Path) -> None:
    for rank, result in enumerate(run_distributed(deviations, world_size, tmp_path)):
        for layer, found in result.items():
            for what, size in found.items():
                assert size <= TOLERANCE, f"{what} of {layer} on rank {rank}"


def dtypes_under_autocast(rank: int, world_size: int) -> list[torch.dtype]:
    layer = ColumnParallelLinear(IN, OUT, group=dist.group.WORLD)
    gathered: list[torch.dtype] = []
    gather = layers.gather_into_tensor_parallel_region

    def recording(x: Tensor, group: Any) -> Tensor:
        gathered.append(x.dtype)
        return gather(x, group)

    layers.gather_into_tensor_parallel_region = recording  # this process ends with the test
    back = RowParallelLinear(OUT, IN, group=dist.group.WORLD)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.ones(TOKENS // world_size, IN))
        x = back(y)  # its float32 bias must not widen the residual stream
    return [*gathered, y.dtype, x.dtype]


def test_collectives_and_outputs_have_the_dtype_of_autocast(tmp_path: Path) -> None:
    assert run_distributed(dtypes_under_autocast, 2, tmp_path) == [[torch.bfloat16] * 3] * 2
