import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hydratron.data.bert import (
    BertSamples,
    Words,
    build_sample_index,
    choose_spans,
    draw_ngram_lengths,
    max_predictions,
    truncate_segments,
)
from hydratron.data.sampler import ConsumedSamplesSampler, collate

NUM_SAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Drawn:
    """10,000 samples with what was there before masking."""

    samples: BertSamples
    batch: dict[str, np.ndarray]  # stacked, [10,000, ...]

    @property
    def used(self) -> np.ndarray:
        return self.batch["masked_labels"] >= 0

    @property
    def original(self) -> np.ndarray:
        ids = self.batch["input_ids"].copy()
        rows, _ = np.nonzero(self.used)
        ids[rows, self.batch["masked_positions"][self.used]] = self.batch["masked_labels"][
            self.used
        ]
        return ids


def draw(shipped, seq_len: int) -> Drawn:
    samples = BertSamples(
        shipped.corpus, shipped.documents, settings=shipped.settings(seq_len=seq_len)
    )
    drawn = [samples[k] for k in range(NUM_SAMPLES)]
    return Drawn(samples, {name: np.stack([s[name] for s in drawn]) for name in drawn[0]})


@pytest.fixture(scope="module", params=["words-128", "words-16", "characters-16"])
def drawn(request: pytest.FixtureRequest) -> Drawn:
    tokenizer, seq_len = request.param.split("-")
    return draw(request.getfixturevalue(f"shipped_{tokenizer}"), int(seq_len))


def test_fifteen_percent_of_the_maskable_tokens_are_masked(drawn: Drawn) -> None:
    maskable = ~drawn.samples.is_special[drawn.original] & drawn.batch["attention_mask"]
    assert drawn.used.sum() / maskable.sum() == pytest.approx(0.15, abs=0.003)
    assert drawn.used.any(axis=1).mean() > 0.995


def test_of_the_masked_80_percent_are_mask_10_kept_10_random(drawn: Drawn) -> None:
    rows, _ = np.nonzero(drawn.used)
    labels = drawn.batch["masked_labels"][drawn.used]
    shown = drawn.batch["input_ids"][rows, drawn.batch["masked_positions"][drawn.used]]
    regular = len(drawn.samples.regular_ids)
    masked, kept = shown == drawn.samples.settings.special_tokens.mask, shown == labels
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / regular, abs=0.01)
    random = shown[~masked & ~kept]
    assert not drawn.samples.is_special[random].any()
    assert len(np.unique(random)) > 0.4 * min(regular, len(random))


def test_special_tokens_are_never_masked(drawn: Drawn) -> None:
    assert not drawn.samples.is_special[drawn.batch["masked_labels"][drawn.used]].any()


def test_masked_positions_ascend_and_unused_ones_are_zero(drawn: Drawn) -> None:
    positions, used = drawn.batch["masked_positions"], drawn.used
    assert positions.shape[1] == max_predictions(drawn.samples.settings)
    assert (np.diff(used.astype(int), axis=1) <= 0).all()
    assert (positions[~used] == 0).all()
    assert (drawn.batch["masked_labels"][~used] == -100).all()
    assert (np.diff(positions, axis=1)[used[:, 1:]] > 0).all()


def test_half_of_the_samples_are_swapped(drawn: Drawn) -> None:
    assert drawn.batch["sentence_order"].mean() == pytest.approx(0.5, abs=0.015)


def test_every_sample_is_cls_a_sep_b_sep_with_tokens_in_both(drawn: Drawn) -> None:
    special = drawn.samples.settings.special_tokens
    ids, mask, types = (drawn.batch[n] for n in ("input_ids", "attention_mask", "token_type_ids"))
    lengths = mask.sum(axis=1)
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert (ids[~mask] == special.pad).all()
    assert (types[~mask] == 0).all()
    assert (ids[:, 0] == special.cls).all()
    assert ((ids == special.sep).sum(axis=1) == 2).all()
    assert (ids[np.arange(len(ids)), lengths - 1] == special.sep).all()
    first_sep = (ids == special.sep).argmax(axis=1)
    assert (first_sep >= 2).all()
    assert (lengths - first_sep >= 3).all()
    assert (types.sum(axis=1) == lengths - first_sep - 1).all()
    assert ((types == 1).argmax(axis=1) == first_sep + 1).all()


def test_most_samples_are_full_and_a_tenth_aim_at_less(drawn: Drawn) -> None:
    index, settings = drawn.samples.index, drawn.samples.settings
    full = index.target == settings.room
    short = 0.1 * (settings.room - 2) / (settings.room - 1)
    assert 1 - full.mean() == pytest.approx(short, abs=0.02)
    assert index.target.min() >= 2
    assert drawn.batch["attention_mask"].all(axis=1).mean() > 0.8


def test_segments_are_neighbours_in_the_text_in_the_order_of_the_label(
    write_corpus, shipped_characters
) -> None:
    # token n is followed by n + 1 everywhere, so order and neighbourhood show
    documents = [[list(range(s, s + 5)) for s in range(start, start + 40, 5)] for start in (6, 46)]
    corpus = write_corpus(documents)
    settings = dataclasses.replace(
        shipped_characters.settings(seq_len=21, short_sample_fraction=0.0, masked_fraction=0.01),
        vocab_size=100,
        word_start=np.ones(100, dtype=bool),
    )
    samples = BertSamples(corpus, np.arange(2), settings=settings)
    seen = set()
    for k in range(200):
        sample = samples[k]
        ids = sample["input_ids"].copy()
        ids[sample["masked_positions"][:1]] = sample["masked_labels"][:1]
        a, b = (
            ids[(sample["token_type_ids"] == kind) & sample["attention_mask"] & (ids > 5)]
            for kind in (0, 1)
        )
        assert (np.diff(a) == 1).all()
        assert (np.diff(b) == 1).all()
        earlier, later = (b, a) if sample["sentence_order"] else (a, b)
        assert (
            earlier[-1] < later[0] <= earlier[-1] + 8
        )  # room 18, four sentences: two truncated away
        assert (earlier[0] < 46) == (later[-1] < 46)
        seen.add((len(a), len(b)))
    assert len(seen) > 2


def test_ngram_lengths_follow_one_over_n() -> None:
    lengths = draw_ngram_lengths(np.random.default_rng(0), 200_000, max_ngram=3)
    shares = np.bincount(lengths)[1:] / len(lengths)
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.005)


def test_spans_have_the_drawn_lengths_where_nothing_is_in_the_way() -> None:
    starts = list(range(3000))
    counts = Counter()
    for seed in range(400):
        words = Words(starts, [s + 1 for s in starts], [3000] * 3000, [False] * 3000)
        spans = choose_spans(words, 30, np.random.default_rng(seed), max_ngram=3)
        counts.update(stop - start for start, stop in spans[:-1])  # the last may be cut to fit
    shares = np.array([counts[n] for n in (1, 2, 3)]) / sum(counts.values())
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.015)


def test_spans_are_whole_words_disjoint_within_segments_and_within_budget() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        bounds = np.cumsum([0, *rng.integers(1, 5, 30)]).tolist()
        starts, stops = bounds[:-1], bounds[1:]
        covered = (rng.random(30) < 0.2).tolist()
        words = Words(starts, stops, [12] * 12 + [30] * 18, list(covered))
        spans = choose_spans(words, 9, rng, max_ngram=3)
        assert sum(stop - start for start, stop in spans) <= 9
        ordered = sorted(spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))
        for start, stop in spans:
            first, last = starts.index(start), stops.index(stop)
            assert last - first < 3
            assert (first < 12) == (last < 12)
            assert not any(covered[first : last + 1])


def test_a_word_is_masked_whole(shipped_words) -> None:
    settings = shipped_words.settings(seq_len=64)
    samples = BertSamples(shipped_words.corpus, shipped_words.documents, settings=settings)
    split = 0
    for k in range(300):
        sample = samples[k]
        n = int((sample["masked_labels"] >= 0).sum())
        ids, positions = sample["input_ids"].copy(), sample["masked_positions"][:n]
        ids[positions] = sample["masked_labels"][:n]
        for position in range(1, 64):
            if not settings.word_start[ids[position]] and not samples.is_special[ids[position - 1]]:
                assert (position in positions) == (position - 1 in positions)
                split += position in positions
    assert split > 100


def test_truncation_in_one_step_keeps_what_the_loop_keeps() -> None:
    rng = np.random.default_rng(0)
    for len_a, len_b, target in itertools.product(range(1, 9), range(1, 9), range(2, 12)):
        a, b = truncate_segments(np.arange(len_a), np.arange(len_b), target, rng)
        keep_a, keep_b = len_a, len_b
        while keep_a + keep_b > target:
            keep_a, keep_b = (keep_a - 1, keep_b) if keep_a > keep_b else (keep_a, keep_b - 1)
        assert (len(a), len(b)) == (keep_a, keep_b)
        assert min(keep_a, keep_b) >= 1
        assert (np.diff(a) == 1).all()


def megatron_mapping(sizes: list[int], targets: list[int]) -> list[tuple[int, int]]:
    """Megatron's build_mapping for one document: (first, last) of each sample, given its draws."""
    samples, first, length, draws = [], 0, 0, iter(targets)
    target = next(draws)
    for sentence, size in enumerate(sizes):
        length += size
        remaining = len(sizes) - sentence - 1
        if (length >= target and remaining > 1 and sentence + 1 - first >= 2) or remaining == 0:
            samples.append((first, sentence + 1))
            first, length, target = sentence + 1, 0, next(draws)
    return samples


def test_the_index_is_that_of_megatron_where_no_sentence_is_long(
    write_corpus, shipped_characters
) -> None:
    rng = np.random.default_rng(5)
    settings = shipped_characters.settings(seq_len=32)
    for _ in range(20):
        sizes = rng.integers(1, 20, rng.integers(2, 60)).tolist()
        corpus = write_corpus([[[7] * 3], [[7] * size for size in sizes]])
        index = build_sample_index(corpus, np.array([1]), settings=settings)
        assert list(zip(index.first, index.last, strict=True)) == megatron_mapping(
            sizes, [*index.target.tolist(), 0]
        )
        assert (index.start == 3 + np.array([sum(sizes[:first]) for first in index.first])).all()


def test_long_sentences_and_single_ones_are_split_and_never_dropped(
    write_corpus, shipped_characters
) -> None:
    settings = shipped_characters.settings(seq_len=16, short_sample_fraction=0.0)
    corpus = write_corpus([[[7] * 100], [[8] * 5], [[9]], [[10, 11]], [[12] * 3, [13] * 40]])
    index = build_sample_index(corpus, np.arange(5), settings=settings)
    lengths = index.piece_offsets[index.last] - index.piece_offsets[index.first]
    covered = np.zeros(corpus.num_tokens, dtype=int)
    for start, length in zip(index.start, lengths, strict=True):
        covered[start : start + length] += 1
    assert covered.tolist() == [1] * 105 + [0] + [1] * 45  # all but the document of one token
    assert (index.last - index.first >= 2).all()
    assert len(index.first) == 7 + 1 + 1 + 3
    samples = BertSamples(corpus, np.arange(5), settings=settings)
    for k in range(len(samples)):
        kinds = set(samples[k]["masked_labels"].tolist()) - {-100}
        assert kinds


def test_epochs_visit_every_sample_in_orders_of_their_own(shipped_words) -> None:
    settings = shipped_words.settings(seq_len=128)
    samples = BertSamples(shipped_words.corpus, np.arange(9), settings=settings)
    n = len(samples)
    orders = [[samples._position(k) for k in range(e * n, e * n + n)] for e in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(n))
    assert orders[0] != orders[1]
    again = orders[1].index(orders[0][0]) + n
    assert samples[0]["masked_positions"].tolist() != samples[again]["masked_positions"].tolist()


def test_the_same_index_is_the_same_sample_with_any_workers_in_any_process(
    shipped_characters,
) -> None:
    samples = BertSamples(
        shipped_characters.corpus,
        shipped_characters.documents,
        settings=shipped_characters.settings(seq_len=32),
    )
    sampler = ConsumedSamplesSampler(
        global_batch_size=4,
        num_steps=5,
        data_parallel_rank=0,
        data_parallel_size=1,
        consumed_samples=8,
    )
    here = [collate([samples[k] for k in step]) for step in sampler]
    for workers in (0, 2):
        context = "spawn" if workers else None  # new interpreters: nothing is inherited
        loader = DataLoader(
            samples,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            multiprocessing_context=context,
        )
        batches = list(loader)
        assert len(batches) == 3
        for expected, batch in zip(here, batches, strict=True):
            assert all((expected[name] == batch[name]).all() for name in expected)


def test_another_seed_gives_other_samples(shipped_characters) -> None:
    one, two = (
        BertSamples(
            shipped_characters.corpus,
            shipped_characters.documents,
            settings=shipped_characters.settings(seq_len=32, seed=seed),
        )
        for seed in (1, 2)
    )
    assert any(one[k]["input_ids"].tolist() != two[k]["input_ids"].tolist() for k in range(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 4}, "seq_len 4 is below 5"),
        ({"seed": -1}, "seed -1"),
        ({"masked_fraction": 1.0}, r"masked_fraction 1\.0"),
        ({"max_ngram": 0}, "max_ngram 0"),
        ({"short_sample_fraction": 2.0}, r"short_sample_fraction 2\.0"),
    ],
)
def test_settings_out_of_range_are_refused(
    shipped_words, change: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shipped_words.settings(**({"seq_len": 16} | change))


def test_a_vocabulary_that_is_not_the_corpus_s_is_refused(
    shipped_words, shipped_characters
) -> None:
    settings = shipped_characters.settings(seq_len=16)
    samples = BertSamples(shipped_words.corpus, shipped_words.documents, settings=settings)
    with pytest.raises(ValueError, match="the corpus was made with another tokenizer"):
        samples[0]
    with pytest.raises(ValueError, match="word_start has shape"):
        dataclasses.replace(settings, vocab_size=7)
    missing = dataclasses.replace(settings.special_tokens, mask=-1)
    with pytest.raises(ValueError, match="need a pad, a cls, a sep and a mask token"):
        dataclasses.replace(settings, special_tokens=missing)


def test_documents_without_a_sample_are_refused(write_corpus, shipped_characters) -> None:
    corpus = write_corpus([[[7]], [[8]]])
    with pytest.raises(ValueError, match="2 documents give no BERT sample"):
        BertSamples(corpus, np.arange(2), settings=shipped_characters.settings(seq_len=16))
