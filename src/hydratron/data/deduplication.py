"""Exact and near duplicates: MinHash finds candidates, the exact Jaccard index decides.

Broder 1997; the threshold of 0.7 over sets of character 5-grams is that of Shoeybi et al. 2019,
section 4.1. Legend: D documents, K hashes, B bands of K / B hashes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np

from hydratron.settings import Interval, OpenShare, check

_SEED = 1  # of the hash functions: part of the format, not a setting
_NEIGHBOURS = 64  # members of a bucket each document is paired with, besides the bucket's first
_PAIRS_AT_ONCE = 20_000
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class NearDuplicates:
    """What counts as a near duplicate, and how hard to look for it.

    Two documents become candidates with probability 1 - (1 - J**r)**num_bands, where r is
    num_hashes / num_bands: for 20 bands of 9 that is 0.56 at J = 0.7, 0.94 at 0.8, 0.999 at 0.87.
    Fewer hashes a band find more and compare more. ValueError for values that cannot be.
    """

    threshold: OpenShare = 0.7
    ngram: Annotated[int, Interval(1, 1000)] = 5
    num_hashes: Annotated[int, Interval(1, 10_000)] = 180
    num_bands: Annotated[int, Interval(1, 10_000)] = 20

    def __post_init__(self) -> None:
        check(self, "steps.near_duplicates")
        if self.num_hashes % self.num_bands:
            raise ValueError(
                f"num_hashes {self.num_hashes} is not divisible by num_bands {self.num_bands}"
            )

    @property
    def least_estimate(self) -> float:
        """Candidates whose hashes agree less often are not compared: 4 standard deviations."""
        deviation = (self.threshold * (1 - self.threshold) / self.num_hashes) ** 0.5
        return self.threshold - 4 * deviation


def text_digest(text: str) -> bytes:
    """16 bytes that two texts share only if they are equal, white space aside."""
    words = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(words, digest_size=16).digest()


def shingles(text: str, n: int) -> frozenset[str]:
    """The set of all runs of n characters; the text itself where it is shorter."""
    return frozenset(text[i : i + n] for i in range(max(1, len(text) - n + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over size of the union."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def _shingle_hashes(text: str, n: int) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    length = max(1, len(codes) - n + 1)
    hashes = np.zeros(length, np.uint64)
    for i in range(min(n, len(codes))):
        hashes *= _MIX
        hashes += codes[i : i + length]
    hashes ^= hashes >> np.uint64(29)
    hashes *= _MIX
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


@lru_cache(maxsize=4)
def _hash_functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(_SEED)
    multipliers = rng.integers(0, 2**32, count, dtype=np.uint32) | np.uint32(1)
    return multipliers, rng.integers(0, 2**32, count, dtype=np.uint32)


def minhash(text: str, settings: NearDuplicates) -> np.ndarray:
    """uint32 [K]: for each hash function the least value over the text's shingles."""
    hashes = _shingle_hashes(text, settings.ngram)
    values, signature = np.empty_like(hashes), np.empty(settings.num_hashes, np.uint32)
    for k, (multiplier, offset) in enumerate(zip(*_hash_functions(len(signature)), strict=True)):
        np.multiply(hashes, multiplier, out=values)
        np.add(values, offset, out=values)
        signature[k] = values.min()
    return signature


def band_keys(signatures: np.ndarray, settings: NearDuplicates) -> np.ndarray:
    """uint64 [D, B]: equal keys of a band are equal hashes."""
    bands = signatures.reshape(len(signatures), settings.num_bands, -1).astype(np.uint64)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for i in range(bands.shape[2]):
        keys = (keys ^ (keys >> np.uint64(31))) * _MIX + bands[:, :, i]
    return keys


class Removed(NamedTuple):
    """A document that goes, the one that stays in its place, their exact Jaccard index."""

    document: int
    kept: int
    jaccard: float


def exact_duplicates(digests: np.ndarray) -> list[Removed]:
    """All but the first document of each digest, for digests [D, 16] of uint8."""
    rows = np.ascontiguousarray(digests).view("V16").ravel()
    order = np.argsort(rows, kind="stable")
    is_first = np.ones(len(rows), bool)
    is_first[1:] = rows[order][1:] != rows[order][:-1]
    firsts = order[np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))]
    pairs = zip(order[~is_first].tolist(), firsts[~is_first].tolist(), strict=True)
    return [Removed(document, kept, 1.0) for document, kept in sorted(pairs)]


def near_duplicates(
    signatures: np.ndarray,
    text: Callable[[int], str],
    settings: NearDuplicates,
    *,
    skip: Sequence[int] = (),
) -> list[Removed]:
    """Documents with an exact Jaccard index above the threshold to one that stays.

    `signatures` [D, K] may be mapped from disk; `text` gives a document's text; those in `skip` are
    gone already. Documents are visited in order, so the first of a group stays, whatever the number
    of tasks that prepared them.
    """
    num_documents = len(signatures)
    gone = np.zeros(num_documents, bool)
    gone[list(skip)] = True
    stands_for = list(range(num_documents))  # the document that stays in its place
    removed = []

    @lru_cache(maxsize=256)
    def shingles_of(document: int) -> frozenset[str]:
        return shingles(text(document), settings.ngram)

    for first, second in candidate_pairs(signatures, settings).tolist():
        kept = stands_for[first]
        if gone[first] or gone[second] or stands_for[second] != second or kept == second:
            continue
        similarity = jaccard(shingles_of(kept), shingles_of(second))
        if similarity > settings.threshold:
            stands_for[second] = kept
            removed.append(Removed(second, kept, similarity))
    return removed


def candidate_pairs(signatures: np.ndarray, settings: NearDuplicates) -> np.ndarray:
    """int64 [pairs, 2], first < second, ordered by the second: likely enough to be duplicates."""
    num_documents = len(signatures)
    found = np.empty(0, np.int64)
    if not num_documents:
        return found.reshape(0, 2)
    keys = band_keys(signatures, settings)
    for band in range(settings.num_bands):
        pairs = np.unique(_bucket_pairs(keys[:, band]))
        pairs = np.setdiff1d(pairs, found, assume_unique=True)
        likely = [
            part[_agreement(signatures, part, num_documents) >= settings.least_estimate]
            for part in np.array_split(pairs, len(pairs) // _PAIRS_AT_ONCE + 1)
        ]
        found = np.union1d(found, np.concatenate(likely))
    return np.stack([found % num_documents, found // num_documents], axis=1)


def _bucket_pairs(keys: np.ndarray) -> np.ndarray:
    """Pairs of documents with equal keys [D], as second * D + first."""
    num_documents = len(keys)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(starts, num_documents))
    first = np.repeat(order[starts], sizes)
    pairs = [order * num_documents + first]
    pairs[0] = pairs[0][order != first]
    for lag in range(1, min(_NEIGHBOURS, int(sizes.max()))):
        same = ordered[lag:] == ordered[:-lag]
        pairs.append(order[lag:][same] * num_documents + order[:-lag][same])
    return np.concatenate(pairs)


def _agreement(signatures: np.ndarray, pairs: np.ndarray, num_documents: int) -> np.ndarray:
    """Share of equal hashes of each pair: the estimate of its Jaccard index."""
    a, b = signatures[pairs % num_documents], signatures[pairs // num_documents]
    return (a == b).mean(axis=1)
