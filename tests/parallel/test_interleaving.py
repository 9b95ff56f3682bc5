"""Two halves in turn give what the whole gives, in every gradient, and trace as one graph."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._inductor.utils import run_and_get_code

from hydratron.models.interleaving import COMPILE_OPTIONS
from hydratron.models.transformer import Transformer, interleave_halves
from hydratron.parallel.placement import reduce_partial_gradients
from tests.distributed import run_distributed
from tests.parallel.twins import (
    backward_over_micro_batches,
    batch_for,
    deviation,
    gradients,
    shard,
    split_dimension,
    tiny_config,
    twins,
)

FAMILIES, PLACEMENTS = ("bert", "gpt2"), ("pre", "post")
TOLERANCE = 1e-10  # float64, the same sums in another order
CASES = [
    *((family, layernorm, False, False) for family, layernorm in product(FAMILIES, PLACEMENTS)),
    *(("bert", layernorm, True, False) for layernorm in PLACEMENTS),  # padded
    ("gpt2", "pre", False, True),  # compiled
]


GRIDS = [(2, 4), *(pytest.param(*grid, marks=pytest.mark.slow) for grid in ((2, 3), (4, 8)))]


def compare(rank: int, world_size: int, batch_size: int) -> dict[str, dict[str, float]]:
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, dict[str, float]] = {}
    for family, layernorm, padded, compiled in CASES:
        config = tiny_config(family=family, layernorm=layernorm)
        batch = batch_for(config, batch_size=batch_size, seq_len=5, padded=padded)
        dense, split = twins(config, group)
        (transformer,) = (m for m in split.modules() if isinstance(m, Transformer))
        interleave_halves(split)
        assert transformer.can_interleave(batch_size) == (batch_size % (2 * world_size) == 0)
        if compiled:
            split.compile(fullgraph=True, backend="aot_eager")
        expected_loss = backward_over_micro_batches(dense, [batch])
        loss = backward_over_micro_batches(split, [batch])
        reduce_partial_gradients(split, group)
        expected, local = gradients(dense), gradients(split)
        deviations = {
            name: deviation(local[name], shard(expected[name], split_dimension(name), group))
            for name in expected
        }
        found[f"{family} {layernorm} {padded} {compiled}"] = deviations | {
            "loss": deviation(loss, expected_loss)
        }
    return found


@pytest.mark.parametrize(("world_size", "batch_size"), GRIDS)
def test_halves_in_turn_equal_the_dense_network(
    tmp_path: Path, world_size: int, batch_size: int
) -> None:
    for found in run_distributed(compare, world_size, tmp_path, batch_size):
        assert len(found) == len(CASES)
        for case, deviations in found.items():
            assert len(deviations) >= 29
            for name, size in deviations.items():
                assert size <= TOLERANCE, (case, name)


def generated_code(rank: int, world_size: int) -> list[str]:
    config = tiny_config(family="gpt2", layernorm="pre", num_layers=4)
    batch = batch_for(config, batch_size=2 * world_size, seq_len=8)
    _, split = twins(config, dist.group.WORLD)
    interleave_halves(split)
    split.compile(fullgraph=True, options=COMPILE_OPTIONS)
    _, sources = run_and_get_code(backward_over_micro_batches, split, [batch])
    return sources


def work_beside_collectives(source: str) -> list[int]:
    """How many matrix products and attentions are queued between a collective's start and wait."""
    begun: dict[str, int] = {}
    found, num_products = [], 0
    for line in source[source.rindex("def call(") :].splitlines():
        call = line.strip()
        if started := re.match(r"(\w+) = torch\.ops\._c10d_functional\.(all_g|reduce_s)", call):
            begun[started[1]] = num_products
        elif waited := re.match(r"torch\.ops\._c10d_functional\.wait_tensor\S*\((\w+)\)", call):
            if waited[1] in begun:
                found.append(num_products - begun.pop(waited[1]))
        elif re.match(r"extern_kernels\.(add)?mm\(|\w+ = .*_scaled_dot_product\w+", call):
            num_products += 1
    return found


@pytest.mark.slow  # compiles for the CPU, on two ranks
def test_compiled_code_computes_while_it_communicates(tmp_path: Path) -> None:
    """All but the ends in the forward pass; in the backward pass at least two of three."""
    forward, backward = map(
        work_beside_collectives, run_distributed(generated_code, 2, tmp_path)[0]
    )
    # four layers of two sublayers, two halves, a gather and a scatter each; embeddings and head
    for beside in (forward, backward):
        assert len(beside) >= 4 * 2 * 2 * 2
    assert sum(count == 0 for count in forward) <= 4, forward
    assert sum(count > 0 for count in backward) >= 2 / 3 * len(backward), backward
