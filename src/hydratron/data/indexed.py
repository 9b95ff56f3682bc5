"""Megatron's indexed corpus, version 1.

`PREFIX.bin` holds the tokens, `PREFIX.idx` where sequences and documents begin. Layout of the
index, little-endian: magic (9 bytes), version u64, dtype code u8, number of sequences n u64, length
of the document index d u64, then sizes i32[n], pointers in bytes i64[n], document index i64[d].
"""

import shutil
import struct
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document index length
_CODES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


class _Index(NamedTuple):
    dtype: np.dtype
    sizes: np.ndarray  # int32 [num_sequences]
    pointers: np.ndarray  # int64 [num_sequences], bytes
    documents: np.ndarray  # int64 [num_documents + 1], sequences


def _beside(prefix: Path, suffix: str) -> Path:
    # with_suffix would cut a prefix that has a dot of its own
    return prefix.with_name(prefix.name + suffix)


class IndexedWriter:
    """Writes a corpus document by document; the files take their names only once they are complete.

    `dtype` is the integer type of a token (uint16 holds vocabularies below 65,536). As a context
    manager it finalizes on success and leaves nothing behind on an exception.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        codes = [code for code, known in _CODES.items() if known == self.dtype]
        if not codes or self.dtype.kind not in "iu":
            raise ValueError(f"dtype {self.dtype} is not an integer type of the indexed format")
        self._code = codes[0]
        self._bin_tmp, self._idx_tmp = (_beside(self.prefix, s) for s in (".bin.tmp", ".idx.tmp"))
        self._sizes, self._documents = array("i"), array("q", [0])
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._bin_tmp.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is None:
            self.finalize()
        else:
            self._discard()

    def _discard(self) -> None:
        self._stream.close()
        self._bin_tmp.unlink(missing_ok=True)
        self._idx_tmp.unlink(missing_ok=True)

    def add_document(self, sentences: Sequence[np.ndarray]) -> None:
        """Append one document, a sequence of tokens (1-D integer array) for each sentence.

        ValueError for a document without tokens, and for tokens that `dtype` cannot hold.
        """
        arrays = [np.asarray(sentence) for sentence in sentences if len(sentence)]
        if not arrays:
            raise ValueError(f"{self.prefix}: a document needs at least one token")
        tokens, limits = np.concatenate(arrays), np.iinfo(self.dtype.name)
        for token in (tokens.min(), tokens.max()):  # a cast would wrap around silently
            if not limits.min <= token <= limits.max:
                raise ValueError(f"{self.prefix}: token {token} does not fit in {self.dtype}")
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self._sizes.extend(map(len, arrays))
        self._documents.append(len(self._sizes))

    def add_corpus(self, corpus: "IndexedCorpus") -> None:
        """Append all documents of a corpus whose tokens have the same type."""
        assert corpus.dtype == self.dtype
        begun = len(self._sizes)
        with _beside(corpus.prefix, ".bin").open("rb") as stream:
            shutil.copyfileobj(stream, self._stream, 1 << 22)
        self._sizes.frombytes(corpus.sizes.astype(np.int32).tobytes())
        self._documents.frombytes((corpus.documents[1:] + begun).astype(np.int64).tobytes())

    def finalize(self) -> None:
        """Write the index and give both files their names.

        ValueError for a corpus without documents.
        """
        if not self._sizes:
            self._discard()
            raise ValueError(f"{self.prefix}: a corpus needs at least one document")
        self._stream.close()
        sizes = np.array(self._sizes, dtype=np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        with self._idx_tmp.open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, self._code, len(sizes), len(self._documents)))
            stream.write(sizes.tobytes())
            stream.write(np.concatenate([[0], ends[:-1]]).astype(np.int64).tobytes())
            stream.write(np.array(self._documents, dtype=np.int64).tobytes())
        # the index last: where there is one, its corpus is complete
        self._bin_tmp.rename(_beside(self.prefix, ".bin"))
        self._idx_tmp.rename(_beside(self.prefix, ".idx"))


class IndexedCorpus:
    """A corpus on disk, mapped on first use.

    A pickle of it is its path, so workers share the page cache, not a copy. ValueError naming the
    file for a missing, truncated or inconsistent `.bin` or `.idx`, a wrong magic, a version other
    than 1, and an unknown dtype code.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._check()

    def __getstate__(self) -> dict[str, Path]:
        return {"prefix": self.prefix}

    def __repr__(self) -> str:
        return f"IndexedCorpus({str(self.prefix)!r})"

    @cached_property
    def _index(self) -> _Index:
        path = _beside(self.prefix, ".idx")
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a corpus is a .bin and an .idx")
        raw = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        if raw[: len(_MAGIC)].tobytes() != _MAGIC:
            raise ValueError(f"{path}: not an indexed corpus, it does not begin with MMIDIDX")
        if len(raw) < _HEADER.size:
            raise ValueError(f"{path}: truncated, {len(raw)} bytes are less than its header")
        _, version, code, n, d = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if version != 1:
            raise ValueError(f"{path}: version {version} is not supported, only version 1 is")
        if code not in _CODES or np.dtype(_CODES[code]).kind not in "iu":
            raise ValueError(f"{path}: dtype code {code} is not that of an integer type")
        promised = _HEADER.size + (4 + 8) * n + 8 * d
        if len(raw) not in (promised, promised + n):  # n more: the modes of a multimodal corpus
            raise ValueError(
                f"{path}: truncated or corrupt, {len(raw)} bytes where its header promises "
                f"{promised}"
            )
        offset = _HEADER.size
        sizes = np.frombuffer(raw, np.int32, n, offset)
        pointers = np.frombuffer(raw, np.int64, n, offset + 4 * n)
        documents = np.frombuffer(raw, np.int64, d, offset + 12 * n)
        return _Index(np.dtype(_CODES[code]), sizes, pointers, documents)

    @cached_property
    def _tokens(self) -> np.ndarray:
        # a plain view of the mapping: slicing np.memmap itself costs microseconds a time
        return np.asarray(np.memmap(_beside(self.prefix, ".bin"), self.dtype, mode="r"))

    def _check(self) -> None:
        path, idx = self.files
        if not self.num_sequences or len(self.documents) < 2:
            raise ValueError(f"{idx}: the corpus has no documents")
        if self.documents[0] != 0 or self.documents[-1] != self.num_sequences:
            raise ValueError(
                f"{idx}: its documents do not cover its {self.num_sequences} sequences"
            )
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a corpus is a .bin and an .idx")
        size, promised = path.stat().st_size, int(self.sizes.sum(dtype=np.int64))
        promised *= self.dtype.itemsize
        last = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
        if size != promised or size != last:
            raise ValueError(f"{path}: {size} bytes do not match the {promised} of its .idx")

    @property
    def files(self) -> tuple[Path, Path]:
        """The `.bin` and the `.idx`."""
        return _beside(self.prefix, ".bin"), _beside(self.prefix, ".idx")

    @property
    def dtype(self) -> np.dtype:
        """Integer type of a token on disk."""
        return self._index.dtype

    @property
    def sizes(self) -> np.ndarray:
        """int32 [num_sequences]: tokens in each sequence (a sentence, or a whole document)."""
        return self._index.sizes

    @property
    def pointers(self) -> np.ndarray:
        """int64 [num_sequences]: where each sequence begins in the `.bin`, in bytes."""
        return self._index.pointers

    @property
    def documents(self) -> np.ndarray:
        """int64 [num_documents + 1]: first sequence of each document, then their number."""
        return self._index.documents

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return len(self._index.sizes)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._index.documents) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, i: int) -> np.ndarray:
        """Tokens [sizes[i]] of sequence i, a read-only view of the file."""
        if not 0 <= i < self.num_sequences:
            raise IndexError(f"sequence {i} of {self.num_sequences}")
        return self.tokens(int(self.pointers[i]) // self.dtype.itemsize, int(self.sizes[i]))

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens [length] from token `start` of the file on, a read-only view.

        The range may run across sequences and documents.
        """
        if not 0 <= start <= start + length <= self.num_tokens:
            raise IndexError(f"tokens {start}..{start + length} of {self.num_tokens}")
        return self._tokens[start : start + length]

    def tokens_at(self, positions: np.ndarray) -> np.ndarray:
        """The single tokens at these positions of the file, [n] for int64 [n]; a copy."""
        return self._tokens[positions]

    def check_tokens(self, tokens: np.ndarray, vocab_size: int) -> None:
        """ValueError where one of `tokens`, read from here, is none of the tokenizer's entries: a
        split embedding would return zeros for it, and training would go on.
        """
        largest = int(tokens.max(initial=0))
        if largest >= vocab_size:
            raise ValueError(
                f"{self.prefix}: token {largest} is beyond the tokenizer's {vocab_size} entries; "
                "the corpus was made with another tokenizer"
            )

    def document_offsets(self) -> np.ndarray:
        """int64 [num_documents + 1]: first token of each document, then the number of tokens."""
        last = self.num_sequences - 1
        starts = self.pointers[np.minimum(self.documents, last)] // self.dtype.itemsize
        return np.where(self.documents > last, self.num_tokens, starts)


def split_by_document(
    num_documents: int, *, holdout: float = 0.03, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation document ids, int64, ascending.

    About `holdout` are held out (3 % in Shoeybi et al. 2019). Which side a document is on depends
    on its id and the seed only, so a corpus that grows keeps its split; small ones, where chance
    would decide too much, hold out exactly max(1, round(holdout * num_documents)). ValueError below
    two documents.
    """
    if num_documents < 2:
        raise ValueError(f"{num_documents} document(s) cannot be split, at least 2 are needed")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout {holdout} is not between 0 and 1")
    hashes = _splitmix64(np.arange(num_documents, dtype=np.uint64), seed)
    if holdout * num_documents >= 100 and (1 - holdout) * num_documents >= 100:
        held = hashes < np.uint64(int(holdout * 2**64))
    else:
        count = min(max(1, round(holdout * num_documents)), num_documents - 1)
        held = np.zeros(num_documents, dtype=bool)
        held[np.argsort(hashes, kind="stable")[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _splitmix64(values: np.ndarray, seed: int) -> np.ndarray:
    # Steele, Lea and Flood 2014: a bijection of 64 bits that is stable over numpy versions, which a
    # generator is not
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    z = values * np.uint64(gamma) + np.uint64((seed + 1) * 0xD1342543DE82EF95 & mask)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def concatenate_corpora(prefix: str | Path, parts: Sequence[str | Path]) -> None:
    """Write the documents of `parts`, one corpus after the other, as one corpus.

    ValueError where they have different types of token, or there are none.
    """
    corpora = [IndexedCorpus(part) for part in parts]
    dtypes = {corpus.dtype for corpus in corpora}
    if len(dtypes) != 1:
        raise ValueError(f"{prefix}: parts with {len(dtypes)} types of token cannot be joined")
    with IndexedWriter(prefix, dtypes.pop()) as writer:
        for corpus in corpora:
            writer.add_corpus(corpus)
