"""Two corpora, and two tokenizers, have one identity exactly where they train alike."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hydratron.data import identity
from hydratron.data.identity import corpus_identity, tokenizer_identity
from hydratron.data.indexed import IndexedCorpus
from hydratron.data.manifest import Manifest
from hydratron.data.tokenizer import train_tokenizer

Write = Callable[[list[list[list[int]]]], IndexedCorpus]
DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]]]


def test_a_corpus_that_moves_is_the_same(write_corpus: Write, tmp_path: Path) -> None:
    corpus = write_corpus(DOCUMENTS)
    for path in corpus.files:
        shutil.copy(path, tmp_path / f"moved{path.suffix}")
    here, there = (corpus_identity({tmp_path / name: 1.0}) for name in ("corpus", "moved"))
    assert here.hash == there.hash
    assert here.description.startswith("corpus: 6 tokens in 2 documents (")
    assert corpus_identity({tmp_path / "corpus": 0.5}) == here  # one weight alone decides nothing


@pytest.mark.parametrize(
    "documents",
    [[[[1, 2, 3], [4]], [[5, 7]]], [[[1, 2], [3, 4]], [[5, 6]]], [[[1, 2, 3]], [[4], [5, 6]]]],
    ids=["a token", "a sentence", "a document"],
)
def test_another_content_is_another_corpus(
    write_corpus: Write, tmp_path: Path, documents: list[list[list[int]]]
) -> None:
    write_corpus(DOCUMENTS)
    before = corpus_identity({tmp_path / "corpus": 1.0})
    write_corpus(documents)
    assert corpus_identity({tmp_path / "corpus": 1.0}).hash != before.hash


def test_large_files_are_sampled_and_prepared_ones_known_whole(
    write_corpus: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(tokens: list[int], prepared: str | None = None) -> str:
        write_corpus([[tokens]])
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        if prepared:
            Manifest({}, "", {"corpus": {"sha256": prepared}}, {}).write(tmp_path)
        return corpus_identity({tmp_path / "corpus": 1.0}).hash

    monkeypatch.setattr(identity, "_WHOLE", 16)
    monkeypatch.setattr(identity, "_SAMPLE", 2)
    monkeypatch.setattr(identity, "_NUM_SAMPLES", 3)
    tokens = list(range(101))
    first, middle, last = [9, *tokens[1:]], [*tokens[:50], 9, *tokens[51:]], [*tokens[:100], 9]
    between = [*tokens[:30], 9, *tokens[31:]]
    assert len({of(t) for t in (tokens, first, middle, last, tokens[:-1])}) == 5
    assert of(tokens) == of(between)
    assert of(tokens, "a") != of(between, "b")
    (tmp_path / "manifest.json").write_text('{"version": 3}')  # some other program's
    assert corpus_identity({tmp_path / "corpus": 1.0}).hash == of(tokens)


def test_order_and_proportions_are_part_of_a_blend(write_corpus: Write, tmp_path: Path) -> None:
    write_corpus(DOCUMENTS)
    for name in ("a", "b"):
        for ending in ("bin", "idx"):
            shutil.copy(tmp_path / f"corpus.{ending}", tmp_path / f"{name}.{ending}")
    a, b = tmp_path / "a", tmp_path / "b"
    blend = corpus_identity({a: 0.75, b: 0.25})
    assert "weight 0.75 (75.0%); b: 6 tokens" in blend.description
    assert corpus_identity({a: 3.0, b: 1.0}).hash == blend.hash
    assert corpus_identity({a: 0.25, b: 0.75}).hash != blend.hash
    assert corpus_identity({a: 1.0}).hash != blend.hash


def test_tokenizers_are_known_by_their_entries() -> None:
    first, again, other = (
        train_tokenizer("bpe", ["a text"], vocab_size=size) for size in (265, 265, 266)
    )
    assert tokenizer_identity(first) == tokenizer_identity(again)
    assert tokenizer_identity(first).hash != tokenizer_identity(other).hash
    assert tokenizer_identity(first).description.startswith("BPE of 26")
