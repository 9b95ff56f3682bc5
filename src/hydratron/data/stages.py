"""The stages of corpus preparation, as steps of datatrove pipelines.

Every file of a stage takes its name only once it is complete, and the same input gives the same
bytes, so that a stage may be stopped anywhere and run again.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from hydratron.data.cleaning import (
    LanguageFilter,
    LengthFilter,
    OverlapFilter,
    TitleFilter,
    clean_text,
)
from hydratron.data.deduplication import (
    Removed,
    exact_duplicates,
    minhash,
    near_duplicates,
    text_digest,
)
from hydratron.data.indexed import IndexedWriter
from hydratron.data.readers import Shard, read_shard
from hydratron.data.sources import CorpusConfig, Source
from hydratron.data.text import (
    TRAINING_CHARACTERS,
    encode_documents,
    split_sentences,
)
from hydratron.data.tokenizer import TOKENIZER_KINDS, load_tokenizer, train_tokenizer

DUPLICATES = "duplicates.jsonl"
# datatrove prints each task's log to the terminal; the command says what there is to say
logger.disable("datatrove")
T = TypeVar("T")


@dataclass(frozen=True)
class Workspace:
    """Where a preparation keeps what its stages hand on, and the shards they work on."""

    corpus: CorpusConfig
    shards: tuple[Shard, ...]
    folder: Path

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.folder / "tokenizer"

    def documents(self, shard: int, suffix: str) -> Path:
        """A file of the cleaned documents of a shard."""
        return self.folder / "documents" / f"{shard:05d}{suffix}"

    def kept(self, shard: int) -> Path:
        """bool [documents of the shard]: which are no duplicates."""
        return self.folder / "kept" / f"{shard:05d}.npy"

    def tokens(self, shard: int) -> Path:
        """The prefix of the tokens of a shard."""
        return self.folder / "tokens" / f"{shard:05d}"

    def stats(self, stage: str) -> Path:
        """Where datatrove leaves the counts of a stage, a file a task."""
        return self.folder / "logs" / stage / "stats"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when complete; OSError names it and the byte it got to."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    position = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            try:
                yield stream
                stream.flush()
            finally:
                position = os.fstat(stream.fileno()).st_size
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.strerror or error} after byte {position}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as stream:
        np.lib.format.write_array(stream, array)


class StoredDocuments:
    """The cleaned documents of a shard, mapped."""

    def __init__(self, workspace: Workspace, shard: int) -> None:
        path = workspace.documents(shard, ".txt")
        self._text = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        self._offsets = np.load(workspace.documents(shard, ".offsets.npy"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> str:
        return self._text[self._offsets[i] : self._offsets[i + 1]].tobytes().decode("utf-8")

    @property
    def sizes(self) -> np.ndarray:
        """int64 [documents]: bytes of each."""
        return np.diff(self._offsets)


def text_step_names(corpus: CorpusConfig) -> list[str]:
    """The steps that some source goes through, in order."""
    steps = corpus.steps
    wanted = {
        "exclude_titles": any(source.exclude_titles for source in corpus.sources.values()),
        "clean": True,
        "language": steps.language is not None,
        "min_tokens": steps.min_tokens > 0,
        "decontaminate": bool(steps.decontaminate),
    }
    return [name for name, is_on in wanted.items() if is_on]


def text_function(
    name: str, workspace: Workspace, source: Source
) -> Callable[[str, str], str | None]:
    """What a step makes of a text and its title; None drops the document."""
    steps = workspace.corpus.steps
    if name == "clean":
        return lambda text, _: clean_text(text, fix=steps.fix_text, join_lines=source.join_lines)
    if name == "exclude_titles":
        if source.exclude_titles is None:
            return lambda text, _: text
        is_kept = TitleFilter(source.exclude_titles)
        return lambda text, title: text if is_kept(text, title) else None
    condition = {
        "language": lambda: LanguageFilter(str(steps.language)),
        "min_tokens": lambda: LengthFilter(steps.min_tokens, str(workspace.tokenizer)),
        "decontaminate": lambda: OverlapFilter(steps.decontaminate, steps.decontaminate_ngram),
    }[name]()
    return lambda text, _: text if condition(text) else None


class _Step(PipelineStep):
    """A step that counts documents and bytes in and out, and the seconds it takes."""

    type = "prepare"

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace, self.name = workspace, name
        super().__init__()

    def count(self, side: str, num_bytes: int) -> None:
        self.stat_update(f"documents_{side}")
        self.stat_update(f"bytes_{side}", value=num_bytes)

    def timed(self, stream: Iterator[T]) -> Iterator[T]:
        while True:
            with self.track_time():
                item = next(stream, None)
            if item is None:
                return
            yield item


class ReadShard(_Step):
    """The documents of this task's shard."""

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        shard = self.workspace.shards[rank]
        for raw in self.timed(read_shard(self.workspace.corpus.sources[shard.source], shard)):
            size = len(raw.text.encode("utf-8", "surrogatepass"))
            self.count("in", size)
            self.count("out", size)
            yield Document(raw.text, raw.name, metadata={"title": raw.title})


class TextStep(_Step):
    """One of the text steps."""

    def run(
        self, data: Iterator[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        source = self.workspace.corpus.sources[self.workspace.shards[rank].source]
        function = text_function(self.name, self.workspace, source)
        for document in data:
            self.count("in", len(document.text.encode("utf-8", "surrogatepass")))
            with self.track_time():
                text = function(document.text, document.metadata["title"])
            if text:
                self.count("out", len(text.encode("utf-8", "surrogatepass")))
                document.text = text
                yield document


class StoreDocuments(_Step):
    """Keeps the texts of a shard, and what finds duplicates among them."""

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        workspace = self.workspace
        steps = workspace.corpus.steps
        offsets, digests, signatures, names = [0], [], [], []
        with atomic_file(workspace.documents(rank, ".txt")) as stream:
            for document in data:
                with self.track_time():
                    raw = document.text.encode("utf-8", "replace")
                    stream.write(raw)
                    offsets.append(offsets[-1] + len(raw))
                    names.append(document.id)
                    digests.append(text_digest(document.text))
                    if steps.near_duplicates:
                        signatures.append(minhash(document.text, steps.near_duplicates))
                self.count("in", len(raw))
        columns = steps.near_duplicates.num_hashes if steps.near_duplicates else 0
        _save(workspace.documents(rank, ".offsets.npy"), np.array(offsets, np.int64))
        _save(
            workspace.documents(rank, ".digests.npy"),
            np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
        )
        _save(
            workspace.documents(rank, ".signatures.npy"),
            np.array(signatures, np.uint32).reshape(len(signatures), columns),
        )
        with atomic_file(workspace.documents(rank, ".names.json")) as stream:
            stream.write(json.dumps(names).encode())


class MakeTokenizer(_Step):
    """The corpus's tokenizer: loaded, or trained on an equal part of each source, cleaned."""

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        workspace, corpus = self.workspace, self.workspace.corpus
        with self.track_time():
            if corpus.tokenizer in TOKENIZER_KINDS:
                tokenizer = train_tokenizer(
                    corpus.tokenizer,
                    chain.from_iterable(map(self._sample, corpus.sources)),
                    vocab_size=corpus.vocab_size,
                    lowercase=corpus.lowercase,
                )
            else:
                tokenizer = load_tokenizer(corpus.tokenizer)
        if workspace.tokenizer.is_dir():
            return
        building = workspace.folder / f"tokenizer.{uuid.uuid4().hex}.tmp"
        tokenizer.save_pretrained(building)
        building.rename(workspace.tokenizer)

    def _sample(self, name: str) -> Iterator[str]:
        source = self.workspace.corpus.sources[name]
        clean = text_function("clean", self.workspace, source)
        left = TRAINING_CHARACTERS // len(self.workspace.corpus.sources)
        for shard in self.workspace.shards:
            for raw in read_shard(source, shard) if shard.source == name else ():
                text = (clean(raw.text[:left], "") or "")[:left]
                yield text
                left -= len(text)
                if left <= 0:
                    return


class Deduplicate(_Step):
    """Which documents of all shards stay; a list of those that go beside them."""

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        workspace, steps = self.workspace, self.workspace.corpus.steps
        shards = [StoredDocuments(workspace, i) for i in range(len(workspace.shards))]
        ends = np.cumsum([len(shard) for shard in shards])
        kept = np.ones(int(ends[-1]), bool)

        def place(document: int) -> tuple[int, int]:
            shard = int(np.searchsorted(ends, document, side="right"))
            return shard, document - int(ends[shard]) + len(shards[shard])

        def text(document: int) -> str:
            shard, i = place(document)
            return shards[shard][i]

        removed: dict[str, list[Removed]] = {}
        with self.track_time():
            if steps.exact_duplicates:
                removed["exact_duplicates"] = exact_duplicates(self._columns(".digests.npy"))
                kept[[pair.document for pair in removed["exact_duplicates"]]] = False
            if steps.near_duplicates:
                removed["near_duplicates"] = near_duplicates(
                    self._columns(".signatures.npy"),
                    text,
                    steps.near_duplicates,
                    skip=np.flatnonzero(~kept).tolist(),
                )
                kept[[pair.document for pair in removed["near_duplicates"]]] = False
        names = [
            json.loads(workspace.documents(i, ".names.json").read_bytes())
            for i in range(len(shards))
        ]
        with atomic_file(workspace.folder / DUPLICATES) as stream:
            for step, pairs in removed.items():
                for pair in pairs:
                    shard, i = place(pair.document)
                    kept_shard, kept_i = place(pair.kept)
                    row = {
                        "step": step,
                        "source": workspace.shards[shard].source,
                        "removed": names[shard][i],
                        "kept": names[kept_shard][kept_i],
                        "jaccard": round(pair.jaccard, 4),
                        "bytes": int(shards[shard].sizes[i]),
                    }
                    stream.write(json.dumps(row).encode() + b"\n")
        for i, part in enumerate(np.split(kept, ends[:-1])):
            _save(workspace.kept(i), part)

    def _columns(self, suffix: str) -> np.ndarray:
        paths = [self.workspace.documents(i, suffix) for i in range(len(self.workspace.shards))]
        return np.concatenate([np.load(path, mmap_mode="r") for path in paths])


class Tokenize(_Step):
    """The tokens of what is left of a shard; no file where nothing is."""

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        workspace = self.workspace
        tokenizer = load_tokenizer(str(workspace.tokenizer))
        stored = StoredDocuments(workspace, rank)
        kept = np.flatnonzero(np.load(workspace.kept(rank))).tolist()
        if not kept:
            return
        prefix, num_tokens = workspace.tokens(rank), 0
        documents = (self._sentences(stored[i]) for i in kept)
        try:
            with IndexedWriter(prefix, token_type(len(tokenizer))) as writer:
                for sentences in self.timed(encode_documents(tokenizer, documents)):
                    if any(map(len, sentences)):
                        writer.add_document(sentences)
                        num_tokens += sum(map(len, sentences))
        except OSError as error:
            raise OSError(
                f"{prefix}.bin: {error.strerror or error} after token {num_tokens}"
            ) from error
        for i in kept:
            self.count("in", int(stored.sizes[i]))
        self.stat_update("tokens", value=num_tokens)

    def _sentences(self, text: str) -> list[str]:
        return split_sentences(text) if self.workspace.corpus.split_into_sentences else [text]


def token_type(vocab_size: int) -> type[np.integer]:
    """Megatron's choice of type: two bytes a token while they can hold the vocabulary."""
    return np.uint16 if vocab_size < 65_500 else np.int32
