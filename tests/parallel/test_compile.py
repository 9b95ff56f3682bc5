"""torch.compile sees the collectives: the forward pass of a split network is one graph."""

from pathlib import Path

import torch.distributed as dist

from hydratron.parallel.placement import reduce_partial_gradients
from tests.distributed import run_distributed
from tests.parallel.twins import (
    backward_over_micro_batches,
    batch_for,
    deviation,
    gradients,
    tiny_config,
    twins,
)

TOLERANCE = 1e-10  # float64; aot_eager runs the same kernels in the same order


def compiled_networks(rank: int, world_size: int) -> dict[str, float]:
    group = dist.group.WORLD
    assert group is not None
    found = {}
    cases = (("bert", "pre", "none"), ("gpt2", "pre", "selective"), ("gpt2", "post", "full"))
    for family, layernorm, recompute in cases:
        config = tiny_config(family=family, layernorm=layernorm, recompute=recompute, num_layers=1)
        batch = batch_for(config, batch_size=3, seq_len=5, padded=True)  # T is padded too
        _, network = twins(config, group)
        expected_loss = backward_over_micro_batches(network, [batch])
        reduce_partial_gradients(network, group)
        expected = {name: g.clone() for name, g in gradients(network).items()}
        network.zero_grad()
        # fullgraph raises where tracing would break; aot_eager traces the backward pass too
        network.compile(fullgraph=True, backend="aot_eager")
        loss = backward_over_micro_batches(network, [batch])
        reduce_partial_gradients(network, group)
        found |= {f"{family} {n}": deviation(g, expected[n]) for n, g in gradients(network).items()}
        found[f"{family} loss"] = deviation(loss, expected_loss)
    return found


def test_split_networks_trace_as_one_graph_with_equal_results(tmp_path: Path) -> None:
    for found in run_distributed(compiled_networks, 2, tmp_path):
        assert len(found) > 30
        for name, size in found.items():
            assert size <= TOLERANCE, name
