"""Which samples a data-parallel rank sees at which step, and how samples become a batch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class ConsumedSamplesSampler(Sampler[list[int]]):
    """Batch sampler: an item is this data-parallel rank's samples of one optimizer step.

    Step s takes the samples s * global_batch_size and following, of which each rank has a
    contiguous slice of global_batch_size / data_parallel_size. It begins at `consumed_samples`, so
    a resumed run sees what it would have seen, and its length is the number of steps of the whole
    run. ValueError where the sizes do not divide.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        num_steps: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % data_parallel_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not divisible by "
                f"data_parallel_size {data_parallel_size}"
            )
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples {consumed_samples} is negative")
        _check_rank(data_parallel_rank, data_parallel_size)
        self.global_batch_size, self.num_steps = global_batch_size, num_steps
        self.local_batch_size = global_batch_size // data_parallel_size
        self.data_parallel_rank, self.consumed_samples = data_parallel_rank, consumed_samples

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        end = self.num_steps * self.global_batch_size
        for step_start in range(self.consumed_samples, end, self.global_batch_size):
            start = step_start + self.data_parallel_rank * self.local_batch_size
            yield list(range(start, start + self.local_batch_size))


class ShardedValidationSampler(Sampler[list[int]]):
    """Batch sampler: every sample exactly once over the data-parallel ranks, without padding.

    Ranks differ by at most one sample, so possibly by one batch: what is reduced over ranks must be
    sums and counts, after the last batch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not positive")
        _check_rank(data_parallel_rank, data_parallel_size)
        self.indices = range(data_parallel_rank, num_samples, data_parallel_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack samples of equal shapes [...] into tensors [B, ...] of the same types."""
    return {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples]))
        for name in samples[0]
    }


def _check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"data_parallel_rank {rank} is not below data_parallel_size {size}")
