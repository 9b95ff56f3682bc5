"""The process runner that the parallel tests stand on."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed


def summed_ranks(rank: int, world_size: int, offset: float) -> torch.Tensor:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return total


def environment(rank: int, world_size: int) -> tuple[str, str, int]:
    return os.environ["RANK"], os.environ["FROM_THE_TEST"], torch.get_num_threads()


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("hidden_size 100 is not divisible by 8")
    dist.barrier()


def exit_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def hang(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(3600)


def test_results_come_back_in_rank_order_from_one_group(tmp_path: Path) -> None:
    for world_size, expected in ((2, 2.0), (4, 8.0)):
        results = run_distributed(summed_ranks, world_size, tmp_path, 0.5)
        assert [result.item() for result in results] == [expected] * world_size


def test_ranks_see_the_environment_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_THE_TEST", "yes")
    assert run_distributed(environment, 2, tmp_path) == [("0", "yes", 1), ("1", "yes", 1)]


def test_exception_of_the_first_failing_rank_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not divisible by 8") as caught:
        run_distributed(fail_on_rank_1, 3, tmp_path)
    assert "raised on rank 1" in caught.value.__notes__[0]
    assert "in fail_on_rank_1" in caught.value.__notes__[0]


def test_exit_code_of_a_rank_that_just_dies_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_distributed(exit_on_rank_1, 2, tmp_path)
    assert "[1, 3]" in caught.value.__notes__[0]


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 still ran"):
        run_distributed(hang, 2, tmp_path, timeout=5.0)
