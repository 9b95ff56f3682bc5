"""BERT samples: two segments of one document, in order or swapped, and masked words.

After Shoeybi et al. 2019, section 4; segments and n-gram masks are those of ALBERT (Lan et al.
2020) as Megatron implements them. Legend: S sequence length, M masked positions of a sample.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from hydratron.data.indexed import IndexedCorpus
from hydratron.data.special_tokens import SpecialTokens

NUM_SPECIAL = 3  # of a sample's tokens: [CLS] and two [SEP]
_INDEX, _ORDER, _SAMPLE = 0, 1, 2  # random streams
_DOCUMENTS_AT_ONCE = 1 << 16  # while cutting, which takes ten times what it leaves


@dataclass(frozen=True, eq=False)
class BertSampleSettings:
    """What decides a sample besides the corpus.

    `vocab_size` is the tokenizer's own, not the padded one: random replacements are drawn from it.
    `word_start` is tokenizer.word_start_table's bool [vocab_size]. Fractions: 15 % of the tokens
    are masked, 10 % of the samples aim at a random shorter length (Devlin et al. 2019); n-grams of
    up to 3 words (Shoeybi et al. 2019). ValueError for values out of range.
    """

    seq_len: int
    seed: int
    vocab_size: int
    special_tokens: SpecialTokens
    word_start: np.ndarray
    masked_fraction: float = 0.15
    max_ngram: int = 3
    short_sample_fraction: float = 0.1

    def __post_init__(self) -> None:
        special = self.special_tokens
        if self.seq_len < 5:
            raise ValueError(
                f"seq_len {self.seq_len} is below 5, two tokens beside [CLS] and two [SEP]"
            )
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative")
        if not 0 < self.masked_fraction < 1:
            raise ValueError(f"masked_fraction {self.masked_fraction} is not between 0 and 1")
        if not 0 <= self.short_sample_fraction <= 1:
            raise ValueError(f"short_sample_fraction {self.short_sample_fraction} is not in 0..1")
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram {self.max_ngram} is below 1")
        if self.word_start.shape != (self.vocab_size,):
            raise ValueError(
                f"word_start has shape {self.word_start.shape}, not the vocab_size's "
                f"({self.vocab_size},)"
            )
        if min(special.pad, special.cls, special.sep, special.mask) < 0:
            raise ValueError("BERT samples need a pad, a cls, a sep and a mask token")

    @property
    def room(self) -> int:
        """Tokens of text in a full sample."""
        return self.seq_len - NUM_SPECIAL


def most_masked(seq_len: int, masked_fraction: float) -> int:
    """M, the most masked tokens of a sample: the masked fraction of a full one, rounded up."""
    # the last digits of 0.15 * 20 must not become a position
    return max(1, math.ceil(masked_fraction * (seq_len - NUM_SPECIAL) - 1e-9))


def max_predictions(settings: BertSampleSettings) -> int:
    """M of the samples that `settings` decide."""
    return most_masked(settings.seq_len, settings.masked_fraction)


class BertSamples(Dataset[dict[str, np.ndarray]]):
    """Sample k, any k >= 0, is a pure function of (corpus, documents, settings, k).

    len() is the samples of an epoch. Each epoch has its own order and each k its own split, swap,
    truncation and mask. A sample is consecutive sentences of one document up to a target length;
    what remains of a document is a short sample. Sentences longer than a sample are read in pieces
    of half a sample, a document of one sentence as two halves, so only documents of a single token
    give none. ValueError where no document gives a sample, or where the corpus has a token that the
    vocabulary has not.
    """

    def __init__(
        self, corpus: IndexedCorpus, documents: np.ndarray, *, settings: BertSampleSettings
    ) -> None:
        self.corpus, self.settings = corpus, settings
        self.index = build_sample_index(corpus, documents, settings=settings)
        if not len(self.index.first):
            raise ValueError(f"{corpus.prefix}: {len(documents)} documents give no BERT sample")
        self.is_special = np.zeros(settings.vocab_size, dtype=bool)
        self.is_special[list(settings.special_tokens.all_ids)] = True
        self.regular_ids = np.flatnonzero(~self.is_special)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.index.first)

    def _position(self, k: int) -> int:
        epoch, i = divmod(k, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng((self.settings.seed, _ORDER, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self))
        return int(self._order[i])

    def _segments(self, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        index, i = self.index, self._position(k)
        first, last = int(index.first[i]), int(index.last[i])
        split = int(rng.integers(first + 1, last))
        begin, middle, end = (int(index.piece_offsets[piece]) for piece in (first, split, last))
        tokens = self.corpus.tokens(int(index.start[i]), end - begin).astype(np.int64)
        self.corpus.check_tokens(tokens, self.settings.vocab_size)
        a, b = tokens[: middle - begin], tokens[middle - begin :]
        swapped = bool(rng.random() < 0.5)
        if swapped:
            a, b = b, a
        return *truncate_segments(a, b, int(index.target[i]), rng), swapped

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        """One sample of numpy arrays.

        input_ids and token_type_ids int64 [S]; attention_mask bool [S], True for a real token;
        masked_positions int64 [M], ascending, 0 where unused; masked_labels int64 [M], -100 where
        unused; sentence_order int64 [], 1 where the segments are swapped.
        """
        if k < 0:
            raise IndexError(f"sample {k} is negative")
        settings, special = self.settings, self.settings.special_tokens
        rng = np.random.default_rng((settings.seed, _SAMPLE, k))
        a, b, swapped = self._segments(k, rng)
        length = len(a) + len(b) + NUM_SPECIAL

        input_ids = np.full(settings.seq_len, special.pad, dtype=np.int64)
        input_ids[:length] = np.concatenate(
            [[special.cls], a, [special.sep], b, [special.sep]], dtype=np.int64
        )
        token_type_ids = np.zeros(settings.seq_len, dtype=np.int64)
        token_type_ids[len(a) + 2 : length] = 1

        positions = self._masked_positions(a, b, rng)
        labels = input_ids[positions]
        input_ids[positions] = self._replacements(labels, rng)
        masked_positions = np.zeros(max_predictions(settings), dtype=np.int64)
        masked_labels = np.full(max_predictions(settings), -100, dtype=np.int64)
        masked_positions[: len(positions)] = positions
        masked_labels[: len(positions)] = labels
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "attention_mask": np.arange(settings.seq_len) < length,
            "masked_positions": masked_positions,
            "masked_labels": masked_labels,
            "sentence_order": np.array(int(swapped), dtype=np.int64),
        }

    def _masked_positions(
        self, a: np.ndarray, b: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        settings, tokens = self.settings, np.concatenate([a, b])
        starts_word = settings.word_start[tokens]
        starts_word[[0, len(a)]] = True  # what is left of a truncated word
        starts = np.flatnonzero(starts_word)
        stops = np.append(starts[1:], len(tokens))
        # n-grams end where their segment does
        words_in_a = int(np.searchsorted(starts, len(a)))
        limits = np.where(starts < len(a), words_in_a, len(starts))
        covered = np.logical_or.reduceat(self.is_special[tokens], starts)
        expected = settings.masked_fraction * int((~self.is_special[tokens]).sum())
        # rounded at random, so that short samples keep the fraction too; one at least, as in
        # Megatron
        budget = max(1, math.floor(expected + rng.random()))
        spans = choose_spans(
            Words(starts.tolist(), stops.tolist(), limits.tolist(), covered.tolist()),
            min(budget, max_predictions(settings)),
            rng,
            max_ngram=settings.max_ngram,
        )
        positions = [i for start, stop in spans for i in range(start, stop)]
        chosen = np.sort(np.array(positions, dtype=np.int64))
        return chosen + 1 + (chosen >= len(a))  # after [CLS], and after the first [SEP]

    def _replacements(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # 80 % [MASK], 10 % kept, 10 % random (Devlin et al. 2019, section 3.1)
        draw, random_ids = rng.random(len(labels)), rng.choice(self.regular_ids, len(labels))
        replaced = np.where(draw < 0.8, self.settings.special_tokens.mask, labels)
        return np.where(draw >= 0.9, random_ids, replaced)


class SampleIndex(NamedTuple):
    """The samples of an epoch before shuffling, over pieces: sentences, or parts of long ones."""

    piece_offsets: np.ndarray  # int64 [num_pieces + 1], in tokens of the chosen documents
    start: np.ndarray  # int64 [num_samples], first token in the corpus
    first: np.ndarray  # int64 [num_samples], first piece
    last: np.ndarray  # int64 [num_samples], the piece after the last; at least first + 2
    target: np.ndarray  # int64 [num_samples], most tokens in the sample, 2..room


def build_sample_index(
    corpus: IndexedCorpus, documents: np.ndarray, *, settings: BertSampleSettings
) -> SampleIndex:
    """Cut the documents into samples, as Megatron's build_mapping does but all documents at once.

    From its first piece on, a sample takes pieces until it has its target length and at least two;
    a document's last piece never stays alone.
    """
    chunks = np.split(documents, range(_DOCUMENTS_AT_ONCE, len(documents), _DOCUMENTS_AT_ONCE))
    cut = [_cut_into_pieces(corpus, chunk, settings.room) for chunk in chunks]
    document_pieces = np.concatenate([per_document for _, per_document in cut])
    offsets = np.zeros(int(document_pieces.sum()) + 1, np.int64)
    np.cumsum(np.concatenate([lengths for lengths, _ in cut]), out=offsets[1:])
    del cut
    ends = np.cumsum(document_pieces)
    first = ends - document_pieces
    shift = corpus.document_offsets()[documents] - offsets[first]
    rng = np.random.default_rng((settings.seed, _INDEX))
    rounds = []
    keep = document_pieces >= 2
    while keep.any():  # round r makes the r-th sample of every document that has one
        first, ends, shift = first[keep], ends[keep], shift[keep]
        short = rng.random(len(first)) < settings.short_sample_fraction
        target = np.where(short, rng.integers(2, settings.room + 1, len(first)), settings.room)
        last = np.maximum(np.searchsorted(offsets, offsets[first] + target), first + 2)
        last = np.where(last >= ends - 1, ends, last)
        rounds.append((offsets[first] + shift, first, last, target))
        keep, first = last < ends, last
    columns = [np.concatenate(column) for column in zip(*rounds, strict=True)] or [offsets[:0]] * 4
    order = np.argsort(columns[1], kind="stable")
    return SampleIndex(offsets, *(column[order] for column in columns))


def _cut_into_pieces(
    corpus: IndexedCorpus, documents: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all pieces [num_pieces], and how many each document has [num_documents]."""
    begins, counts = corpus.documents[documents], np.diff(corpus.documents)[documents]
    document = np.repeat(np.arange(len(documents)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = corpus.sizes[begins[document] + within].astype(np.int64)
    # two halves of the room make a full sample, so no token of a long sentence is truncated away
    # for good
    piece = np.where(sizes > room, (room + 1) // 2, np.maximum(sizes, 1))
    num_sentences = np.bincount(document, sizes > 0, minlength=len(documents))
    alone = (num_sentences[document] == 1) & (sizes <= room) & (sizes > 1)
    piece[alone] = (sizes[alone] + 1) // 2
    num_pieces = -(-sizes // piece)
    lengths = np.repeat(piece, num_pieces)
    nonempty = sizes > 0
    last = np.cumsum(num_pieces)[nonempty] - 1
    lengths[last] = (sizes - (num_pieces - 1) * piece)[nonempty]
    per_document = np.bincount(document, num_pieces, minlength=len(documents)).astype(np.int64)
    return lengths.astype(np.int32), per_document


def truncate_segments(
    a: np.ndarray, b: np.ndarray, target: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shorten a [La] and b [Lb] to `target` tokens together (Devlin et al. 2019).

    The longer one loses a token, b where they are equal, at its front or back with equal chance,
    until they fit; here in one step.
    """
    keep_a = min(len(a), max(target - len(b), (target + 1) // 2))
    keep_b = min(len(b), target - keep_a)
    front_a = rng.binomial(len(a) - keep_a, 0.5)
    front_b = rng.binomial(len(b) - keep_b, 0.5)
    return a[front_a : front_a + keep_a], b[front_b : front_b + keep_b]


class Words(NamedTuple):
    """The words of a sample in token positions, lists of equal length."""

    starts: list[int]
    stops: list[int]
    limits: list[int]  # the word after the last one of its segment
    covered: list[bool]  # not to be masked; choose_spans marks what it takes


def draw_ngram_lengths(rng: np.random.Generator, count: int, *, max_ngram: int) -> np.ndarray:
    """int64 [count] in 1..max_ngram, p(n) proportional to 1/n (Lan et al. 2020).

    That is .545, .273, .182 for 1, 2, 3.
    """
    weights = 1 / np.arange(1, max_ngram + 1)
    bounds = np.cumsum(weights / weights.sum())[:-1]
    return np.searchsorted(bounds, rng.random(count), side="right") + 1


def choose_spans(
    words: Words, budget: int, rng: np.random.Generator, *, max_ngram: int
) -> list[tuple[int, int]]:
    """Spans (start, stop) of whole words to mask: random, disjoint, at most `budget` tokens.

    Words are tried in random order as the first of an n-gram of drawn length. One that does not fit
    is shortened by words, or skipped; one that meets a covered word is skipped. A covered first
    word is skipped before all that: the check that Megatron's inner `continue` was meant to be.
    """
    starts, stops, limits, covered = words
    order = rng.permutation(len(starts)).tolist()
    lengths = draw_ngram_lengths(rng, len(starts), max_ngram=max_ngram).tolist()
    spans: list[tuple[int, int]] = []
    for word, n in zip(order, lengths, strict=True):
        if budget == 0:
            break
        if covered[word]:
            continue
        end = min(word + n, limits[word])
        while end > word and stops[end - 1] - starts[word] > budget:
            end -= 1
        if end == word or any(covered[word:end]):
            continue
        covered[word:end] = [True] * (end - word)
        spans.append((starts[word], stops[end - 1]))
        budget -= stops[end - 1] - starts[word]
    return spans
