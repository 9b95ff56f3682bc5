from itertools import chain

import numpy as np
import pytest
import torch

from hydratron.data.sampler import ConsumedSamplesSampler, ShardedValidationSampler, collate


def steps(rank: int, size: int, consumed: int = 0) -> list[list[int]]:
    sampler = ConsumedSamplesSampler(
        global_batch_size=8,
        num_steps=5,
        data_parallel_rank=rank,
        data_parallel_size=size,
        consumed_samples=consumed,
    )
    assert len(sampler) == 5
    return list(sampler)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_ranks_share_each_step_in_contiguous_slices(size: int) -> None:
    ranks = [steps(rank, size) for rank in range(size)]
    for step in range(5):
        together = list(chain.from_iterable(rank[step] for rank in ranks))
        assert together == list(range(step * 8, step * 8 + 8))
        assert {len(rank[step]) for rank in ranks} == {8 // size}


def test_a_resumed_run_sees_what_it_would_have_seen() -> None:
    assert steps(1, 2, consumed=24) == steps(1, 2)[3:]
    assert steps(0, 2, consumed=40) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_parallel_size": 3}, "global_batch_size 8 is not divisible by data_parallel_size 3"),
        ({"global_batch_size": 0}, "global_batch_size 0"),
        ({"consumed_samples": -1}, "consumed_samples -1"),
        ({"data_parallel_rank": 2}, "data_parallel_rank 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    settings = {
        "global_batch_size": 8,
        "num_steps": 5,
        "data_parallel_rank": 0,
        "data_parallel_size": 2,
    }
    with pytest.raises(ValueError, match=message):
        ConsumedSamplesSampler(**(settings | change))


@pytest.mark.parametrize(("num_samples", "size"), [(0, 2), (1, 4), (10, 1), (11, 4), (12, 4)])
def test_validation_sees_every_sample_exactly_once(num_samples: int, size: int) -> None:
    samplers = [
        ShardedValidationSampler(
            num_samples, batch_size=2, data_parallel_rank=rank, data_parallel_size=size
        )
        for rank in range(size)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(of_rank) for of_rank in batches]
    flat = [index for of_rank in batches for batch in of_rank for index in batch]
    assert sorted(flat) == list(range(num_samples))
    assert all(1 <= len(batch) <= 2 for of_rank in batches for batch in of_rank)
    shares = [sum(map(len, of_rank)) for of_rank in batches]
    assert max(shares) - min(shares) <= 1


def test_a_validation_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        ShardedValidationSampler(4, batch_size=0, data_parallel_rank=0, data_parallel_size=1)


def test_collate_stacks_and_keeps_types() -> None:
    samples = [
        {"ids": np.arange(3) + i, "mask": np.ones(3, bool), "label": np.array(i)} for i in (0, 5)
    ]
    batch = collate(samples)
    assert batch["ids"].tolist() == [[0, 1, 2], [5, 6, 7]]
    assert batch["label"].tolist() == [0, 5]
    assert batch["ids"].dtype == batch["label"].dtype == torch.int64
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].shape == (2, 3)
