"""The mesh over real processes: data-parallel replicas outside, tensor-parallel peers innermost."""

from pathlib import Path

import pytest
import torch.distributed as dist

from hydratron.parallel.mesh import build_mesh
from tests.distributed import run_distributed


def place(rank: int, world_size: int, tensor_parallel_size: int) -> tuple[int, ...]:
    mesh = build_mesh(
        "cpu",
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=world_size // tensor_parallel_size,
    )
    peers, replicas = (
        () if group is None else tuple(dist.get_process_group_ranks(group))
        for group in (mesh.tp_group, mesh.dp_group)
    )
    return mesh.dp_rank, mesh.tp_rank, peers, replicas  # type: ignore[return-value]


def test_consecutive_ranks_are_tensor_parallel_peers(tmp_path: Path) -> None:
    assert run_distributed(place, 4, tmp_path, 2) == [
        (0, 0, (0, 1), (0, 2)),
        (0, 1, (0, 1), (1, 3)),
        (1, 0, (2, 3), (0, 2)),
        (1, 1, (2, 3), (1, 3)),
    ]


def test_an_axis_of_one_process_has_no_group(tmp_path: Path) -> None:
    assert run_distributed(place, 2, tmp_path, 2) == [(0, 0, (0, 1), ()), (0, 1, (0, 1), ())]
    assert run_distributed(place, 2, tmp_path, 1) == [(0, 0, (), (0, 1)), (1, 0, (), (0, 1))]


def test_a_grid_that_is_not_the_world_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="world size 2 is not data_parallel_size 0"):
        run_distributed(place, 2, tmp_path, 4)
