"""Raw text of a source: files and datasets become documents, in shards of about equal size."""

import re
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from yaml import YAMLError

from hydratron.data.files import (
    JSON_ENDINGS,
    TEXT_ENDINGS,
    find_files,
    read_json_lines,
    read_text,
)
from hydratron.data.sources import Source
from hydratron.data.text import split_documents
from hydratron.data.zeroshot import wikitext_detokenize

_ENDINGS = {
    "text": TEXT_ENDINGS,
    "jsonl": JSON_ENDINGS,
    "wikitext": (".tokens", ".raw", *TEXT_ENDINGS),
}
# " = Title = ", not " = = Section = = "
_ARTICLE = re.compile(r"^ ?= (?!=)(?P<title>[^\n]+?) (?<!= )= ?$", re.MULTILINE)


class RawDocument(NamedTuple):
    """A document as it was found; `name` says where, `title` is empty where there is none."""

    text: str
    name: str
    title: str


class Shard(NamedTuple):
    """What one task reads: files, or rows start..stop of a dataset."""

    source: str
    files: list[str]
    start: int = 0
    stop: int = 0


def list_files(source: Source) -> list[Path]:
    """The files of a source, sorted; ValueError as find_files."""
    return find_files(source.path, _ENDINGS[source.kind])


def plan_shards(name: str, source: Source, *, shard_bytes: int, shard_rows: int) -> list[Shard]:
    """Cut a source into consecutive shards, a function of its files' names and sizes only."""
    if source.kind == "huggingface":
        rows = len(load_rows(source))
        starts = range(0, rows, shard_rows)
        return [Shard(name, [], start, min(start + shard_rows, rows)) for start in starts]
    shards: list[Shard] = []
    room = 0
    for file in list_files(source):
        size = file.stat().st_size * (3 if file.suffix.lower() in (".gz", ".zst") else 1)
        if not shards or size > room:
            shards.append(Shard(name, []))
            room = shard_bytes
        shards[-1].files.append(str(file))
        room -= size
    return shards


def load_rows(source: Source) -> Dataset:
    """The rows of a Hugging Face dataset: a folder of save_to_disk or of data files, or a name."""
    path = Path(source.path).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded: Any = load_from_disk(str(path))
        else:
            loaded = load_dataset(str(source.path), source.subset, split=source.split)
    except (OSError, ValueError, DatasetsError, TarError, YAMLError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"dataset {source.path!r} is not to be had: {reason}") from error
    if isinstance(loaded, DatasetDict):
        if source.split not in loaded:
            raise ValueError(f"dataset {source.path!r} has no split {source.split!r}")
        loaded = loaded[source.split]
    if source.text_key not in loaded.column_names:
        known = ", ".join(loaded.column_names)
        raise ValueError(f"dataset {source.path!r} has no column {source.text_key!r}: {known}")
    return loaded


def read_shard(source: Source, shard: Shard) -> Iterator[RawDocument]:
    """The documents of a shard in order; ValueError names file and position of what is broken."""
    if source.kind == "huggingface":
        rows = load_rows(source)
        for i in range(shard.start, shard.stop):
            row = rows[i]
            title = str(row.get(source.title_key) or "")
            yield RawDocument(str(row[source.text_key] or ""), f"{source.path}:{i}", title)
        return
    read = {"text": _read_text_file, "jsonl": _read_json_lines, "wikitext": _read_wikitext}
    for file in shard.files:
        yield from read[source.kind](source, Path(file))


def _read_text_file(source: Source, file: Path) -> Iterator[RawDocument]:
    text = read_text(file)
    documents = split_documents(text) if source.split_files else [text]
    for i, document in enumerate(documents):
        yield RawDocument(document, f"{file}:{i}", "")


def _read_wikitext(source: Source, file: Path) -> Iterator[RawDocument]:
    text = read_text(file)
    headings = list(_ARTICLE.finditer(text))
    if not headings:
        raise ValueError(f"{file}: not WikiText, it has no line ' = Title = '")
    stops = [*(heading.start() for heading in headings[1:]), len(text)]
    for heading, stop in zip(headings, stops, strict=True):
        body = wikitext_detokenize(text[heading.start() : stop])
        yield RawDocument(body, f"{file}:{heading.start()}", heading["title"])


def wikitext_titles(file: Path) -> list[str]:
    """The titles of the articles of a WikiText file."""
    return [heading["title"] for heading in _ARTICLE.finditer(read_text(file))]


def _read_json_lines(source: Source, file: Path) -> Iterator[RawDocument]:
    for number, row in read_json_lines(file):
        if not isinstance(row, dict) or not isinstance(row.get(source.text_key), str):
            raise ValueError(f"{file}: line {number}: no text under {source.text_key!r}")
        title = str(row.get(source.title_key) or "")
        yield RawDocument(row[source.text_key], f"{file}:{number}", title)
