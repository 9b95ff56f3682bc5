"""Batches of examples of similar length, so that little is computed on padding.

Letters: B batch, C choices, S sequence.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from hydratron.data.encodings import MODEL_COLUMNS

_POOL_BATCHES = 100  # batches sorted together: more leaves less padding and less of the shuffle


class LengthBucketedSampler(Sampler[list[int]]):
    """A batch sampler of one data-parallel rank: lists of at most `batch_size` example indices.

    The order is a function of (lengths, seed, epoch) alone. With `shuffle` (training) the examples
    are drawn anew each epoch and all ranks yield equally many batches: every example once, except
    that when the last global batch would hold fewer examples than there are ranks, those (at most
    data_parallel_size - 1, other ones each epoch) sit that epoch out; batch sizes of ranks differ
    by at most one. Without (evaluation), longest first, every example exactly once; ranks may then
    differ by one batch.

    Raises:
        ValueError: no examples, a size below 1, a rank out of range, or, with `shuffle`, fewer
            examples than ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths)
        if batch_size < 1 or data_parallel_size < 1:
            raise ValueError(f"sizes below 1: {batch_size=}, {data_parallel_size=}")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"{data_parallel_rank=} is not below {data_parallel_size=}")
        if len(self.lengths) < (data_parallel_size if shuffle else 1):
            raise ValueError(f"{len(self.lengths)} examples for {data_parallel_size=}")
        self.global_batch_size = batch_size * data_parallel_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = data_parallel_rank
        self.world_size = data_parallel_size
        self.epoch = 0
        self._num_skipped = 0

    @property
    def sampler(self) -> "LengthBucketedSampler":
        """Return self: Lightning looks for `set_epoch` on a batch sampler's `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def skip(self, num_batches: int) -> None:
        """Leave out the first `num_batches` batches of the next iteration only: how to resume."""
        self._num_skipped = num_batches

    def __len__(self) -> int:
        num_full, remainder = divmod(len(self.lengths), self.global_batch_size)
        needed = self.world_size if self.shuffle else self.rank + 1
        return num_full + (remainder >= needed)

    def __iter__(self) -> Iterator[list[int]]:
        first, self._num_skipped = self._num_skipped, 0
        global_batches = self._shuffled() if self.shuffle else self._longest_first()
        for batch in global_batches[first:]:
            if local := batch[self.rank :: self.world_size].tolist():
                yield local

    def _longest_first(self) -> list[np.ndarray]:
        order = np.argsort(-self.lengths, kind="stable")
        return _cut(order, self.global_batch_size)

    def _shuffled(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        remainder = len(order) % self.global_batch_size
        if remainder < self.world_size:
            order = order[: len(order) - remainder]
        batches: list[np.ndarray] = []
        for pool in _cut(order, self.global_batch_size * _POOL_BATCHES):
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += _cut(pool, self.global_batch_size)
        return [batches[i] for i in rng.permutation(len(batches))]


def _cut(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def collate(
    items: Sequence[dict[str, Any]],
    *,
    pad_id: int,
    pad_multiple: int = 1,
    pad_side: str = "right",
    pad_token_type_id: int = 0,
) -> dict[str, Tensor]:
    """Return a batch of `Encodings` items, padded to its longest sequence.

    input_ids, token_type_ids int64 and attention_mask bool are [B, S], or [B, C, S] with choices;
    every other column, `index` included, int64 [B]. S is rounded up to `pad_multiple`. XLNet pads
    on the `left`; columns named `*_positions` then move with their tokens.
    """
    choices = isinstance(items[0]["input_ids"], list)
    sequences = {
        name: [s for item in items for s in (item[name] if choices else [item[name]])]
        for name in MODEL_COLUMNS
    }
    lengths = np.array([len(ids) for ids in sequences["input_ids"]])
    width = -(-int(lengths.max()) // pad_multiple) * pad_multiple
    starts = width - lengths if pad_side == "left" else np.zeros_like(lengths)
    steps = np.arange(width)
    # [B, 1] against [S] -> [B, S]
    mask = (steps >= starts[:, None]) & (steps < (starts + lengths)[:, None])
    batch = {"attention_mask": torch.from_numpy(mask)}
    for name, fill in zip(MODEL_COLUMNS, (pad_id, pad_token_type_id), strict=True):
        padded = np.full(mask.shape, fill, np.int64)
        padded[mask] = np.concatenate(sequences[name])
        batch[name] = torch.from_numpy(padded)
    if choices:
        # [B * C, S] -> [B, C, S]
        batch = {name: column.view(len(items), -1, width) for name, column in batch.items()}
    for name in items[0].keys() - sequences.keys():
        column = np.array([item[name] for item in items], np.int64)
        batch[name] = torch.from_numpy(column + starts if name.endswith("_positions") else column)
    return batch
