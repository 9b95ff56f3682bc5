"""Blends: which sample of which corpus stands at each place of a weighted mixture."""

import hashlib
import os
import uuid
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from hydratron.data.files import make_cache_folder

_LONGEST_PERIOD = 1 << 22  # weights are rounded to multiples of its inverse where they must
_BLOCK = 1 << 18  # places built at a time
_ORDINAL_BITS = 18  # an ordinal is counted within its block
_MOST_SOURCES = 1 << (32 - _ORDINAL_BITS)


class BlendIndex:
    """Source and ordinal of place k, any k >= 0, of a mixture of sources with these weights.

    Among the first n places, each source has its share of n to less than one sample, for every n:
    Tijdeman 1980, "The chairman assignment problem". The order is that of a period, built in blocks
    when one is first needed, kept in `cache_dir` and mapped from there, so that workers and ranks
    share it. ValueError for weights that are not positive or more than 16,384, and for a cache that
    cannot be written to.
    """

    def __init__(self, weights: Sequence[float], cache_dir: Path) -> None:
        if len(weights) > _MOST_SOURCES:
            raise ValueError(f"a blend of {len(weights)} sources is more than {_MOST_SOURCES}")
        self.counts = integer_weights(weights)
        self.period = sum(self.counts)
        name = hashlib.sha256(repr((2, _BLOCK, self.counts)).encode()).hexdigest()[:16]
        self.folder = Path(cache_dir) / f"blend-{name}"
        if len(self.counts) > 1 and not self.folder.is_dir():
            make_cache_folder(self.folder)
        self._blocks: dict[int, tuple[list[int], np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": {}}  # maps do not travel: workers open their own

    def locate(self, k: int) -> tuple[int, int]:
        """(source, ordinal): place k is the ordinal-th sample of that source."""
        if k < 0:
            raise IndexError(f"sample {k} is negative")
        if len(self.counts) == 1:
            return 0, k
        round_, place = divmod(k, self.period)
        block, offset = divmod(place, _BLOCK)
        before, packed = self._block(block)
        entry = int(packed[offset])
        source = entry >> _ORDINAL_BITS
        ordinal = entry & ((1 << _ORDINAL_BITS) - 1)
        return source, round_ * self.counts[source] + before[source] + ordinal

    def _block(self, number: int) -> tuple[list[int], np.ndarray]:
        """Counts before the block, and its places as source and ordinal in the block."""
        if number not in self._blocks:
            path = self.folder / f"{number}.bin"
            if not path.is_file():
                self._build(number, path)
            entries = np.asarray(np.memmap(path, np.uint32, mode="r"))
            n = len(self.counts)
            self._blocks[number] = entries[:n].tolist(), entries[n:]
        return self._blocks[number]

    def _build(self, number: int, path: Path) -> None:
        n = len(self.counts)
        before = [0] * n
        if number:
            counts, packed = self._block(number - 1)
            last = np.bincount(packed >> _ORDINAL_BITS, minlength=n)
            before = [count + int(more) for count, more in zip(counts, last, strict=True)]
        start = number * _BLOCK
        places = assign(self.counts, before, start, min(start + _BLOCK, self.period))
        sources = np.array(places, np.uint32)
        ordinals = np.empty(len(sources), np.uint32)
        for i in range(n):
            mine = sources == i
            ordinals[mine] = np.arange(mine.sum(), dtype=np.uint32)
        entries = np.concatenate([np.array(before, np.uint32), sources << _ORDINAL_BITS | ordinals])
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        entries.tofile(temporary)
        os.replace(temporary, path)


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Counts of a period with these proportions, exact where a period of 4 million allows it."""
    if not weights or any(not weight > 0 for weight in weights):
        raise ValueError(f"the weights of a blend are not all positive: {list(weights)}")
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    period = lcm(*(share.denominator for share in shares))
    if period <= _LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    counts = [max(1, int(share * _LONGEST_PERIOD)) for share in shares]
    left = _LONGEST_PERIOD - sum(counts)
    by_remainder = sorted(
        range(len(shares)), key=lambda i: (counts[i] - shares[i] * _LONGEST_PERIOD, i)
    )
    for i in by_remainder[: max(0, left)]:
        counts[i] += 1
    return counts


def assign(counts: Sequence[int], before: Sequence[int], start: int, stop: int) -> list[int]:
    """The source of places start..stop of a period, where `before` have had theirs.

    Of the sources that are due, the one whose deadline is next (Tijdeman 1980).
    """
    n, period, had = len(counts), sum(counts), list(before)
    slack = max(1, 2 * n - 2)
    due = [(period + slack * period * had[i]) / (slack * counts[i]) for i in range(n)]
    deadline = [due[i] + (slack - 2) * period / (slack * counts[i]) for i in range(n)]
    places = []
    for place in range(start + 1, stop + 1):
        best, earliest = -1, float("inf")
        for i in range(n):
            if due[i] <= place and deadline[i] < earliest:
                best, earliest = i, deadline[i]
        if best < 0:  # rounding of the last digit: the one that is due next
            best = min(range(n), key=due.__getitem__)
        places.append(best)
        step = period / counts[best]
        had[best] += 1
        due[best] = period * (1 + slack * had[best]) / (slack * counts[best])
        deadline[best] = due[best] + (slack - 2) * step / slack
    return places


class BlendedSamples(Dataset[dict[str, np.ndarray]]):
    """Sample k, any k >= 0, of a weighted mixture of samples.

    Each part's samples come in their own order, epoch after epoch, so sample k depends on nothing
    but the parts, the weights and k. len() is the samples until some part has been seen whole.
    """

    def __init__(self, parts: Sequence[Dataset[dict[str, np.ndarray]]], index: BlendIndex) -> None:
        if len(parts) != len(index.counts):
            raise ValueError(f"{len(parts)} parts do not match {len(index.counts)} weights")
        self.parts, self.index = list(parts), index

    @cached_property
    def _length(self) -> int:
        counts, period = self.index.counts, self.index.period
        sizes = [len(part) for part in self.parts]  # type: ignore[arg-type]
        return max(
            1, min(size * period // count for size, count in zip(sizes, counts, strict=True))
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        source, ordinal = self.index.locate(k)
        return self.parts[source][ordinal]
