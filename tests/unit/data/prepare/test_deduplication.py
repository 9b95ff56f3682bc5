"""Near duplicates against brute force over exact Jaccard indices."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from hydratron.data.deduplication import (
    NearDuplicates,
    candidate_pairs,
    exact_duplicates,
    jaccard,
    minhash,
    near_duplicates,
    shingles,
    text_digest,
)
from hydratron.data.text import read_text_folder, split_documents

SETTINGS = NearDuplicates()
SHIPPED = Path(__file__).parents[4] / "src/hydratron/data/shipped"


def signatures_of(texts: list[str]) -> np.ndarray:
    return np.stack([minhash(text, SETTINGS) for text in texts])


def change_words(text: str, share: float, rng: np.random.Generator) -> str:
    """The text with a share of its words replaced by others of it."""
    words = text.split()
    for i in rng.choice(len(words), round(share * len(words)), replace=False):
        words[i] = words[rng.integers(len(words))][::-1]
    return " ".join(words)


@pytest.fixture(scope="module")
def originals() -> list[str]:
    """About 400 distinct documents of 200 words of the shipped novels."""
    texts = [d for _, text in read_text_folder(SHIPPED) for d in split_documents(text)]
    words = " ".join(texts).split()
    return [" ".join(words[i : i + 200]) for i in range(0, len(words) - 200, 200)][:400]


def test_the_agreement_of_hashes_estimates_the_jaccard_index(originals: list[str]) -> None:
    rng = np.random.default_rng(1)
    errors = []
    for text in originals[:60]:
        other = change_words(text, float(rng.uniform(0, 0.3)), rng)
        a, b = signatures_of([text, other])
        errors.append((a == b).mean() - jaccard(shingles(text, 5), shingles(other, 5)))
    # a proportion of 180 draws deviates by at most 0.037; the mean of 60 by 0.005
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.05


def test_planted_near_duplicates_are_found_and_nothing_else_is_lost(originals: list[str]) -> None:
    rng = np.random.default_rng(2)
    num_planted = len(originals) // 20  # 5 % of the documents
    sources = rng.choice(len(originals), num_planted, replace=False)
    planted = [change_words(originals[i], 0.05, rng) for i in sources]
    texts = originals + planted
    indices = [
        jaccard(shingles(originals[i], 5), shingles(text, 5))
        for i, text in zip(sources, planted, strict=True)
    ]
    assert 0.75 < np.mean(indices) < 0.95
    removed = near_duplicates(signatures_of(texts), texts.__getitem__, SETTINGS)
    gone = {pair.document for pair in removed}
    found = sum(len(originals) + i in gone for i in range(num_planted))
    assert found >= 0.95 * num_planted
    lost = [i for i in gone if i < len(originals)]
    assert len(lost) <= 0.01 * len(originals)
    for pair in removed:
        exact = jaccard(shingles(texts[pair.kept], 5), shingles(texts[pair.document], 5))
        assert pair.jaccard == exact > 0.7
        assert pair.kept < pair.document
        assert pair.kept not in gone


def test_recall_against_brute_force(originals: list[str]) -> None:
    rng = np.random.default_rng(3)
    texts = [change_words(originals[i % 10], 0.0005 * i, rng) for i in range(60)]
    sets = [shingles(text, 5) for text in texts]
    similar = {(i, j) for i, j in combinations(range(60), 2) if jaccard(sets[i], sets[j]) > 0.85}
    found = set(map(tuple, candidate_pairs(signatures_of(texts), SETTINGS).tolist()))
    assert len(similar) > 20
    assert len(similar & found) >= 0.95 * len(similar)


def test_a_large_group_leaves_one(originals: list[str]) -> None:
    rng = np.random.default_rng(4)
    texts = [originals[0]] + [change_words(originals[0], 0.01, rng) for _ in range(199)]
    removed = near_duplicates(signatures_of(texts), texts.__getitem__, SETTINGS)
    assert len(removed) == 199
    assert {pair.kept for pair in removed} == {0}


def test_skipped_documents_neither_go_nor_stand_for_others(originals: list[str]) -> None:
    texts = [originals[0], originals[0] + " x", originals[0] + " y"]
    removed = near_duplicates(signatures_of(texts), texts.__getitem__, SETTINGS, skip=[0])
    assert [(pair.document, pair.kept) for pair in removed] == [(2, 1)]


def test_exact_duplicates_keep_the_first_and_ignore_white_space() -> None:
    texts = ["b c", "a", "b  c\n", "a", "d"]
    digests = np.stack([np.frombuffer(text_digest(text), np.uint8) for text in texts])
    assert [(p.document, p.kept) for p in exact_duplicates(digests)] == [(2, 0), (3, 1)]


@pytest.mark.parametrize("text", ["", "abc", "abcde"])
def test_the_shortest_texts_have_a_signature(text: str) -> None:
    assert minhash(text, SETTINGS).shape == (180,)


def test_hashes_must_divide_into_bands() -> None:
    with pytest.raises(ValueError, match="num_hashes 100 is not divisible by num_bands 30"):
        NearDuplicates(num_hashes=100, num_bands=30)


def test_no_document_has_no_duplicate() -> None:
    settings = NearDuplicates()
    assert near_duplicates(np.empty((0, settings.num_hashes), np.uint32), str, settings) == []
    assert exact_duplicates(np.empty((0, 16), np.uint8)) == []
