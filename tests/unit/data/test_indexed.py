import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from hydratron.data.indexed import IndexedCorpus, IndexedWriter, split_by_document

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[1, 2, 3, 4], [65_000], [11, 12]]]
SENTENCES = [sentence for document in DOCUMENTS for sentence in document]


def write(prefix: Path, dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add_document([np.array(sentence) for sentence in document])
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "text.v1")


def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset",
            reason="megatron-core 0.16.1 is the reference of the file format",
        )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_is_written_is_read_token_for_token(tmp_path: Path, dtype: type) -> None:
    corpus = IndexedCorpus(write(tmp_path / "text", dtype))
    assert [sentence.tolist() for sentence in corpus] == SENTENCES
    assert corpus.dtype == dtype
    assert (corpus.num_sequences, corpus.num_documents, corpus.num_tokens) == (6, 3, 13)
    assert corpus.sizes.tolist() == [3, 1, 2, 4, 1, 2]
    assert corpus.documents.tolist() == [0, 2, 3, 6]
    assert corpus.pointers.tolist() == [n * corpus.dtype.itemsize for n in (0, 3, 4, 6, 10, 11)]
    assert corpus.document_offsets().tolist() == [0, 4, 6, 13]


def test_token_ranges_run_across_sentences_and_documents(prefix: Path) -> None:
    corpus = IndexedCorpus(prefix)
    assert corpus.tokens(2, 4).tolist() == [7, 8, 9, 10]
    assert corpus.tokens_at(np.array([12, 0])).tolist() == [12, 5]
    with pytest.raises(IndexError, match="13"):
        corpus.tokens(12, 2)
    with pytest.raises(IndexError):
        corpus[6]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_core_reads_our_files_token_for_token(tmp_path: Path, dtype: type) -> None:
    theirs = megatron().IndexedDataset(str(write(tmp_path / "text", dtype)))
    assert [theirs[i].tolist() for i in range(len(theirs))] == SENTENCES
    assert theirs.document_indices.tolist() == [0, 2, 3, 6]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_the_files_of_megatron_core_token_for_token(tmp_path: Path, dtype: type) -> None:
    torch = pytest.importorskip("torch")
    builder = megatron().IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=dtype)
    for document in DOCUMENTS:
        for sentence in document:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "text.idx"))
    corpus = IndexedCorpus(tmp_path / "text")
    assert [sentence.tolist() for sentence in corpus] == SENTENCES
    assert corpus.documents.tolist() == [0, 2, 3, 6]
    ours = write(tmp_path / "ours", dtype)
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == (tmp_path / f"text{suffix}").read_bytes()


def test_a_pickled_corpus_is_its_path_and_reads_the_same(prefix: Path) -> None:
    corpus = IndexedCorpus(prefix)
    corpus.tokens(0, 1)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 400
    assert pickle.loads(pickled)[3].tolist() == [1, 2, 3, 4]


def test_nothing_has_its_name_before_it_is_complete(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "text", np.uint16)
    writer.add_document([np.array([1])])
    assert {path.name for path in tmp_path.iterdir()} == {"text.bin.tmp"}
    writer.finalize()
    assert {path.name for path in tmp_path.iterdir()} == {"text.bin", "text.idx"}


def fail_while_writing(prefix: Path) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([np.array([1])])
        raise KeyError("stop")


def test_an_exception_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_while_writing(tmp_path / "text")
    assert not list(tmp_path.iterdir())


def test_a_corpus_without_documents_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one document"):
        IndexedWriter(tmp_path / "text", np.uint16).finalize()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [65_536, -1])
def test_a_token_that_does_not_fit_is_refused_not_wrapped(tmp_path: Path, token: int) -> None:
    writer = IndexedWriter(tmp_path / "text", np.uint16)
    with pytest.raises(ValueError, match=f"token {token} does not fit in uint16"):
        writer.add_document([np.array([1, token])])
    with pytest.raises(ValueError, match="at least one token"):
        writer.add_document([np.array([], dtype=np.int64)])
    writer.add_document([np.array([1])])
    writer.finalize()


def test_a_float_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float32 is not an integer type"):
        IndexedWriter(tmp_path / "text", np.float32)


def overwrite(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "value", "rule"),
    [
        (0, b"NOTMIDX", "does not begin with MMIDIDX"),
        (9, struct.pack("<Q", 2), "version 2 is not supported"),
        (17, b"\x2a", "dtype code 42"),
        (17, b"\x07", "dtype code 7"),
        (34 + 12 * 6 + 8 * 3, struct.pack("<q", 5), "do not cover its 6 sequences"),
    ],
)
def test_a_wrong_index_is_refused_by_name_and_rule(
    prefix: Path, offset: int, value: bytes, rule: str
) -> None:
    overwrite(Path(f"{prefix}.idx"), offset, value)
    with pytest.raises(ValueError, match=rf"text\.v1\.idx: .*{rule}"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("length", [0, 8, 20, 34, 100, 137])
def test_a_truncated_index_is_refused(prefix: Path, length: int) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"text\.v1\.idx: (truncated|not an indexed corpus)"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-2], lambda raw: raw + b"\0\0", lambda raw: b""]
)
def test_tokens_that_do_not_match_the_index_are_refused(prefix: Path, change) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"text\.v1\.bin: \d+ bytes do not match the 26"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"text\.v1\{suffix}: no such file"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize(("num_documents", "held"), [(2, 1), (10, 1), (82, 2), (1000, 30)])
def test_small_corpora_hold_out_exactly_three_percent(num_documents: int, held: int) -> None:
    train, validation = split_by_document(num_documents, seed=3)
    assert (len(train), len(validation)) == (num_documents - held, held)
    assert sorted([*train, *validation]) == list(range(num_documents))
    assert train.dtype == validation.dtype == np.int64


def test_a_growing_corpus_keeps_its_split() -> None:
    small, large = split_by_document(5_000, seed=3)[1], split_by_document(50_000, seed=3)[1]
    assert small.tolist() == large[large < 5_000].tolist()
    assert len(large) / 50_000 == pytest.approx(0.03, abs=0.003)


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    splits = [split_by_document(500, seed=seed)[1].tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_a_single_document_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        split_by_document(1, seed=0)
    with pytest.raises(ValueError, match=r"holdout 1\.5"):
        split_by_document(9, holdout=1.5, seed=0)
