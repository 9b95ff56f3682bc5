"""One seed gives one model, whatever the number of ranks that hold it."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hydratron.models.initialisation import initialize_parameters
from tests.distributed import run_distributed
from tests.parallel.twins import build, split_dimension, tiny_config

FAMILIES = ("bert", "gpt2")


def initialized(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    group = dist.group.WORLD if world_size > 1 else None
    torch.manual_seed(rank + 10 * world_size)  # the stream of the process must not matter
    found = []
    for family in FAMILIES:
        config = tiny_config(family=family)
        with torch.device("meta"):
            network = build(config, group)
        initialize_parameters(network, config, seed=5, tp_group=group)
        found.append({name: p.detach() for name, p in network.named_parameters()})
    return found


def test_the_same_seed_gives_the_same_model_at_every_tensor_parallel_size(tmp_path: Path) -> None:
    wholes = initialized(0, 1)
    for world_size in (2, 4):
        ranks = run_distributed(initialized, world_size, tmp_path)
        for family, whole in enumerate(wholes):
            for name, expected in whole.items():
                parts = [rank[family][name] for rank in ranks]
                dim = split_dimension(name)
                if dim is None:
                    assert all(torch.equal(part, expected) for part in parts), name
                else:
                    assert torch.equal(torch.cat(parts, dim), expected), name
                assert parts[0].is_contiguous()
                assert parts[0].untyped_storage().nbytes() == parts[0].nbytes, "keeps the whole"
