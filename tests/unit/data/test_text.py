import errno
import gzip
import itertools
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from hydratron.data import text
from hydratron.data.indexed import IndexedCorpus
from hydratron.data.text import (
    prepare_text_corpus,
    read_text_folder,
    split_documents,
    split_sentences,
)
from hydratron.data.tokenizer import load_tokenizer, train_tokenizer

PROSE = (
    "It was a long day, and the road to Casterbridge was dusty under the sun of that late summer, "
    "Michael said. "
)


def chapters(*headings: str) -> str:
    return "\n\n".join(f"{heading}\n\n{PROSE}" for heading in headings)


@pytest.mark.parametrize(
    "headings",
    [
        ("CHAPTER I", "CHAPTER II", "CHAPTER III"),
        ("CHAPTER I. The Man Who Died", "CHAPTER II. A Road"),
        ("Chapter 1", "Chapter 2"),
        ("CHAPTER ONE", "CHAPTER TWENTY-TWO"),
        ("BOOK THE FIRST", "BOOK THE SECOND"),
        ("CHAPTER I--THE PARSONAGE", "CHAPTER II--THE ROAD"),
        ("PART I.", "PART II."),
    ],
)
def test_chapters_are_documents(headings: tuple[str, ...]) -> None:
    documents = split_documents(chapters(*headings))
    assert [document.splitlines()[0] for document in documents] == list(headings)


def test_a_book_heading_goes_with_its_first_chapter_and_a_preface_stands_alone() -> None:
    documents = split_documents(PROSE + "\n\nBOOK I\n\n" + chapters("CHAPTER I", "CHAPTER II"))
    assert [d.splitlines()[0] for d in documents] == [PROSE.strip(), "BOOK I", "CHAPTER II"]


def test_a_sentence_about_chapters_is_no_heading() -> None:
    prose = "Part one of the plan had failed, and they knew it.\n\nBook ten was lost for good.\n\n"
    assert len(split_documents(prose * 3)) == 1


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_text_without_chapters_becomes_runs_that_end_at_a_paragraph(separator: str) -> None:
    paragraph = " ".join(["word"] * 300)
    documents = split_documents(separator.join([paragraph] * 20))
    assert [len(document.split()) for document in documents] == [2100, 2100, 1800]
    assert all(set(map(len, map(str.split, d.split("\n\n")))) == {300} for d in documents)


def test_a_short_last_run_joins_the_one_before() -> None:
    paragraph = " ".join(["word"] * 900)
    documents = split_documents("\n\n".join([paragraph] * 7))
    assert [len(document.split()) for document in documents] == [2700, 3600]


def test_no_word_of_a_text_is_lost_between_documents() -> None:
    for _, novel in read_text_folder(text._SHIPPED):
        documents = split_documents(novel)
        assert " ".join(documents).split() == novel.split()
        assert 20 < len(documents) < 100


def test_blank_text_has_no_documents_and_no_sentences() -> None:
    assert split_documents(" \n\n ") == []
    assert split_sentences(" \n\n ") == []


@pytest.mark.parametrize(
    ("prose", "sentences"),
    [
        ("He went. She stayed.", ["He went.", "She stayed."]),
        ("Mr. Henchard met Dr. J. H. Watson.", ["Mr. Henchard met Dr. J. H. Watson."]),
        ("“Go!” he said. “I will.” She left.", ["“Go!” he said.", "“I will.”", "She left."]),
        ("'Is it you?' The man nodded.", ["'Is it you?'", "The man nodded."]),
        ("Who was he? It was I. Nobody knew.", ["Who was he?", "It was I.", "Nobody knew."]),
        ("At No. 12, St. Mary's. Then home.", ["At No. 12, St. Mary's.", "Then home."]),
        ("He paid 3.50 for it... and left.", ["He paid 3.50 for it... and left."]),
        ("A line\nwrapped here. And\nthere.", ["A line wrapped here.", "And there."]),
        ("A HEADING\n\nThe text.", ["A HEADING", "The text."]),
    ],
)
def test_sentences_of_novels(prose: str, sentences: list[str]) -> None:
    assert split_sentences(prose) == sentences


def test_no_word_of_a_text_is_lost_between_sentences() -> None:
    for _, novel in read_text_folder(text._SHIPPED):
        sentences = split_sentences(novel)
        assert " ".join(sentences).split() == novel.split()
        assert 10 < np.mean([len(sentence.split()) for sentence in sentences]) < 25


def test_a_folder_is_read_in_order_with_its_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt.gz").write_bytes(gzip.compress(b"zwei\r\n"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfeins")
    (tmp_path / "ignored.md").write_text("no")
    with pytest.warns(UserWarning, match=r"2 files are read, left out: .*ignored\.md$"):
        found = [(file.name, content) for file, content in read_text_folder(tmp_path)]
    assert found == [("a.txt", "eins"), ("two.txt.gz", "zwei\n")]
    assert [content for _, content in read_text_folder(tmp_path / "a.txt")] == ["eins"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent: no such file or folder"):
        read_text_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no file ending in \.txt"):
        read_text_folder(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") + b"...")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 at byte 3"):
        list(read_text_folder(tmp_path))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text")[:-6])
    with pytest.raises(ValueError, match=r"a\.txt\.gz: broken after byte 4 .* truncated"):
        list(read_text_folder(tmp_path))


def prepare(path: Path | None, cache_dir: Path, **changes: object) -> text.PreparedText:
    settings = {
        "tokenizer": "character",
        "vocab_size": 128,
        "lowercase": True,
        "split_into_sentences": True,
    }
    return prepare_text_corpus(path, cache_dir=cache_dir, **(settings | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(chapters("CHAPTER I", "CHAPTER II") + "He said [MASK]. " * 9)
    (folder / "b.txt").write_text(PROSE * 3)
    return folder


def test_a_corpus_holds_the_sentences_of_the_text(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(folder, tmp_path / "cache")
    corpus = IndexedCorpus(prepared.prefix)
    tokenizer = load_tokenizer(str(prepared.tokenizer_path))
    assert (corpus.num_documents, corpus.num_tokens) == (
        prepared.num_documents,
        prepared.num_tokens,
    )
    assert prepared.num_documents == 3
    assert corpus.dtype == np.uint16
    offsets = corpus.document_offsets()
    decoded = [tokenizer.decode(corpus.tokens(a, b - a)) for a, b in itertools.pairwise(offsets)]
    assert decoded[2] == (PROSE * 3).strip().lower()
    assert decoded[0] == f"chapter i {PROSE.strip().lower()}"
    # a text that says [MASK] contains no mask token
    assert tokenizer.mask_token_id not in corpus.tokens(0, corpus.num_tokens)
    assert corpus.documents.tolist()[:2] == [0, 2]


def test_without_sentences_a_document_is_one_sequence(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(folder, tmp_path / "cache", split_into_sentences=False)
    assert IndexedCorpus(prepared.prefix).num_sequences == prepared.num_documents == 3


def test_a_prepared_corpus_is_found_again_and_not_rewritten(folder: Path, tmp_path: Path) -> None:
    first = prepare(folder, tmp_path / "cache")
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*")}
    assert prepare(folder, tmp_path / "cache") == first
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*")} == files


def test_other_content_or_settings_give_another_corpus(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prefixes = {prepare(folder, cache).prefix}
    prefixes |= {prepare(folder, cache, lowercase=False).prefix}
    prefixes |= {prepare(folder, cache, vocab_size=64).prefix}
    prefixes |= {prepare(folder, cache, tokenizer="wordpiece").prefix}
    prefixes |= {prepare(folder, cache, split_into_sentences=False).prefix}
    (folder / "b.txt").write_text(PROSE * 4)
    prefixes |= {prepare(folder, cache).prefix}
    assert len(prefixes) == 6


def test_processes_that_prepare_at_once_agree_and_leave_no_rest(
    folder: Path, tmp_path: Path
) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(prepare, [(folder, tmp_path / "cache")] * 2)
    assert results[0] == results[1]
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [results[0].prefix.parent.name]


def test_the_slower_of_two_builders_gives_way(folder: Path, tmp_path: Path, monkeypatch) -> None:
    build, cache, reference = text._build, tmp_path / "cache", prepare(folder, tmp_path / "other")

    def overtaken(*arguments: object) -> None:
        build(*arguments)
        monkeypatch.setattr(text, "_build", build)
        prepare(folder, cache)

    monkeypatch.setattr(text, "_build", overtaken)
    assert prepare(folder, cache).num_tokens == reference.num_tokens
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\0" * 4096])
@pytest.mark.parametrize("tokenizer", ["bpe", "wordpiece", "character", "vocabulary"])
def test_a_text_without_a_token_is_named_and_leaves_nothing_behind(
    tmp_path: Path, tokenizer: str, content: bytes
) -> None:
    if tokenizer == "vocabulary":
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
        tokenizer = str(tmp_path)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match="a.txt: no document is left of it") as raised:
        prepare(tmp_path / "a.txt", tmp_path / "cache", tokenizer=tokenizer, vocab_size=300)
    assert "cache" not in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_to_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in (Path("/proc/nope"), folder / "a.txt/cache"):
        with pytest.raises(ValueError, match=f"data.cache_dir {cache}: cannot be made: N"):
            prepare(folder, cache)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"data\.cache_dir .*: cannot be written to"):
        prepare(folder, tmp_path / "cache")


def test_a_full_disk_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text.IndexedWriter, "add_document", fail)
    with pytest.raises(OSError, match="No space left on device: '.*cache.*tmp'"):
        prepare(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_loaded_tokenizer_serves_and_must_fit_the_vocabulary(
    folder: Path, tmp_path: Path
) -> None:
    trained = train_tokenizer("bpe", [PROSE], vocab_size=270)
    trained.save_pretrained(tmp_path / "mine")
    spec = str(tmp_path / "mine")
    prepared = prepare(folder, tmp_path / "cache", tokenizer=spec, vocab_size=270)
    tokens = IndexedCorpus(prepared.prefix).tokens(0, 20)
    assert load_tokenizer(str(prepared.tokenizer_path)).decode(tokens) == trained.decode(tokens)
    with pytest.raises(
        ValueError, match="vocabulary of 128 is smaller than the tokenizer's 270 entries .*mine"
    ):
        prepare(folder, tmp_path / "cache", tokenizer=spec)
