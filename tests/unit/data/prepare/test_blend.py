"""Blends: exact proportions, and nothing but k decides a sample."""

import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from hydratron.data.blend import BlendedSamples, BlendIndex, integer_weights
from hydratron.data.indexed import split_by_document
from hydratron.data.sampler import ConsumedSamplesSampler

WEIGHTS = [[0.7, 0.3], [1, 1, 1], [0.123456789, 0.2, 0.3333333, 0.15, 0.03], [1e-4, 1, 3, 5]]


class Counting(Dataset):
    """Sample k is k itself, of the source `name`."""

    def __init__(self, name: int, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        return {"source": np.array(self.name), "k": np.array(k)}


def locations(index: BlendIndex, stop: int, start: int = 0) -> np.ndarray:
    return np.array([index.locate(k) for k in range(start, stop)])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_of_a_million_is_exact_to_one_sample(weights: list[float], tmp_path) -> None:
    found = locations(BlendIndex(weights, tmp_path), 1_000_000)
    shares = [Fraction(str(w)) for w in weights]
    n = np.arange(1, len(found) + 1)
    for i, share in enumerate(shares):
        mine = found[:, 0] == i
        # below one, with room for the float of the comparison itself
        assert np.abs(np.cumsum(mine) - n * float(share / sum(shares))).max() < 1
        assert (found[mine, 1] == np.arange(mine.sum())).all()


def test_hundreds_of_sources_are_told_apart(tmp_path: Path) -> None:
    found = locations(BlendIndex([1] * 300, tmp_path), 600)
    assert len(set(map(tuple, found))) == 600
    assert set(found[:300, 0]) == set(range(300))
    with pytest.raises(ValueError, match="a blend of 16385 sources is more than 16384"):
        BlendIndex([1] * 16385, tmp_path)


def test_places_far_out_continue_the_periods(tmp_path: Path) -> None:
    index = BlendIndex([0.5, 0.3, 0.2], tmp_path)
    assert index.period == 10
    first, far = locations(index, 10), locations(index, 10**12 + 10, 10**12)
    assert (first[:, 0] == far[:, 0]).all()
    assert (far[:, 1] - first[:, 1] == np.array(index.counts)[far[:, 0]] * 10**11).all()


def test_blocks_are_built_when_needed_and_shared(tmp_path: Path) -> None:
    index = BlendIndex([0.123456789, 0.2, 0.3], tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    index.locate(3)
    assert [path.name for path in tmp_path.rglob("*.bin")] == ["0.bin"]
    stamp = next(tmp_path.rglob("0.bin")).stat().st_mtime_ns
    again = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 1000  # a worker gets no copy
    assert again.locate(600_000) == index.locate(600_000)
    assert next(tmp_path.rglob("0.bin")).stat().st_mtime_ns == stamp


def blended(tmp_path: Path) -> BlendedSamples:
    parts = [Counting(0, 70), Counting(1, 11)]
    return BlendedSamples(parts, BlendIndex([0.9, 0.1], tmp_path))


def stream(tmp_path: Path, ranks: int, consumed: int = 0) -> list[tuple[int, int]]:
    """Global batches in order, put together from the ranks' shares."""
    samples = blended(tmp_path)
    samplers = [
        ConsumedSamplesSampler(
            global_batch_size=8,
            num_steps=30,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            consumed_samples=consumed,
        )
        for rank in range(ranks)
    ]
    steps = zip(*samplers, strict=True)
    return [
        (int(samples[k]["source"]), int(samples[k]["k"]))
        for step in steps
        for share in step
        for k in share
    ]


def test_resuming_at_sample_k_gives_the_same_stream(tmp_path: Path) -> None:
    assert stream(tmp_path, 1, consumed=80) == stream(tmp_path, 1)[80:]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_data_parallel_size_does_not_change_the_stream(tmp_path: Path, ranks: int) -> None:
    assert stream(tmp_path, ranks) == stream(tmp_path, 1)


def test_the_length_is_until_a_part_has_been_seen_whole(tmp_path: Path) -> None:
    assert len(blended(tmp_path)) == 77  # 70 of the first at nine tenths


def test_the_hold_out_is_three_percent_of_documents() -> None:
    train, held_out = split_by_document(100_000)
    assert abs(len(held_out) / 100_000 - 0.03) < 0.002
    assert not set(train) & set(held_out)


def test_weights_become_integers_exactly_where_they_can() -> None:
    assert integer_weights([0.3, 0.7]) == [3, 7]
    assert sum(integer_weights([0.123456789, 0.3])) == 1 << 22


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan"), 1]])
def test_weights_must_be_positive(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="not all positive"):
        integer_weights(weights)
