import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hydratron.data.buckets import LengthBucketedSampler, collate
from hydratron.data.encodings import stack_sequences


def some_lengths(size: int) -> np.ndarray:
    return np.random.default_rng(3).integers(5, 200, size)


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [7, 48, 97, 1003])
def test_evaluation_sees_every_example_once_under_any_data_parallel_size(
    size: int, data_parallel_size: int
) -> None:
    lengths = some_lengths(size)
    seen: list[int] = []
    for rank in range(data_parallel_size):
        sampler = LengthBucketedSampler(
            lengths,
            batch_size=8,
            shuffle=False,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
        )
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(0 < len(batch) <= 8 for batch in batches)
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(size))


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [7, 48, 97, 1003])
def test_training_keeps_ranks_in_step_and_leaves_out_fewer_examples_than_ranks(
    size: int, data_parallel_size: int
) -> None:
    lengths = some_lengths(size)
    for epoch in range(2):
        ranks: list[list[list[int]]] = []
        for rank in range(data_parallel_size):
            sampler = LengthBucketedSampler(
                lengths,
                batch_size=8,
                seed=5,
                data_parallel_rank=rank,
                data_parallel_size=data_parallel_size,
            )
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
            assert len(ranks[-1]) == len(sampler)
        assert len({len(batches) for batches in ranks}) == 1
        for together in zip(*ranks, strict=True):
            sizes = [len(batch) for batch in together]
            assert max(sizes) - min(sizes) <= 1
        seen = [index for batches in ranks for batch in batches for index in batch]
        assert len(seen) == len(set(seen))
        remainder = size % (8 * data_parallel_size)
        assert size - len(seen) == (remainder if remainder < data_parallel_size else 0)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = some_lengths(300)

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBucketedSampler(lengths, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(1, 0)
    torch.manual_seed(9)
    assert order(1, 0) == first
    assert order(1, 1) != first
    assert order(2, 0) != first


def test_examples_left_out_differ_from_epoch_to_epoch() -> None:
    sampler = LengthBucketedSampler(some_lengths(33), batch_size=8, data_parallel_size=2)
    other = LengthBucketedSampler(
        some_lengths(33), batch_size=8, data_parallel_rank=1, data_parallel_size=2
    )
    left_out = set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        other.set_epoch(epoch)
        seen = {index for s in (sampler, other) for batch in s for index in batch}
        left_out |= set(range(33)) - seen
    assert len(left_out) > 2


def test_batches_hold_similar_lengths_in_random_order() -> None:
    lengths = some_lengths(20_000)
    batches = list(LengthBucketedSampler(lengths, batch_size=32))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert lengths.sum() / padded > 0.97
    longest = [lengths[batch].max() for batch in batches]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2


def test_skipping_resumes_within_the_epoch_once() -> None:
    sampler = LengthBucketedSampler(some_lengths(100), batch_size=8)
    whole = list(sampler)
    sampler.skip(5)
    sampler.set_epoch(0)
    assert list(sampler) == whole[5:]
    assert list(sampler) == whole
    assert sampler.sampler is sampler


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 examples"):
        LengthBucketedSampler([], batch_size=2, shuffle=False)
    with pytest.raises(ValueError, match="3 examples for data_parallel_size=4"):
        LengthBucketedSampler([1, 2, 3], batch_size=2, data_parallel_size=4)
    with pytest.raises(ValueError, match="data_parallel_rank=2 is not below"):
        LengthBucketedSampler([1, 2, 3], batch_size=2, data_parallel_rank=2, data_parallel_size=2)


def items(lengths: list[int], num_choices: int = 1) -> list[dict]:
    ids = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    types = [np.ones(n, np.uint8) for n in lengths]
    size = len(lengths) // num_choices
    values = {"labels": range(size)}
    if num_choices == 1:
        values["start_positions"] = [1] * size
    encodings = stack_sequences(
        zip(ids, types, strict=True), values=values, num_choices=num_choices
    )
    return [encodings[i] for i in range(size)]


def test_collate_pads_to_the_longest_and_to_a_multiple() -> None:
    batch = collate(items([2, 3]), pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [1, 2, 3]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True] * 3]
    assert batch["index"].tolist() == batch["labels"].tolist() == [0, 1]
    assert collate(items([2, 3]), pad_id=9, pad_multiple=8)["input_ids"].shape == (2, 8)
    assert collate(items([8, 3]), pad_id=9, pad_multiple=8)["input_ids"].shape == (2, 8)


def test_collate_on_the_left_moves_positions_with_their_tokens() -> None:
    batch = collate(items([2, 3]), pad_id=9, pad_side="left", pad_token_type_id=3)
    assert batch["input_ids"].tolist() == [[9, 1, 2], [1, 2, 3]]
    assert batch["token_type_ids"].tolist() == [[3, 1, 1], [1, 1, 1]]
    assert batch["start_positions"].tolist() == [2, 1]


def test_collate_stacks_choices() -> None:
    batch = collate(items([2, 3, 1, 4], num_choices=2), pad_id=0)
    assert batch["input_ids"].tolist() == [
        [[1, 2, 0, 0], [1, 2, 3, 0]],
        [[1, 0, 0, 0], [1, 2, 3, 4]],
    ]
    assert batch["attention_mask"].shape == (2, 2, 4)
    assert batch["labels"].shape == (2,)


def test_workers_change_nothing() -> None:
    lengths = [int(n) for n in some_lengths(40)]
    ids = [np.arange(n, dtype=np.int32) for n in lengths]
    encodings = stack_sequences(zip(ids, ids, strict=True), values={})
    sampler = LengthBucketedSampler(encodings.lengths, batch_size=8)

    def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
        return collate(rows, pad_id=0)

    loaders = [
        DataLoader(encodings, batch_sampler=sampler, collate_fn=pad, num_workers=n) for n in (0, 2)
    ]
    for plain, worker in zip(*loaders, strict=True):
        assert torch.equal(plain["input_ids"], worker["input_ids"])
        assert torch.equal(plain["index"], worker["index"])
