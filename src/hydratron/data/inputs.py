"""What a preparation reads, known by content: a finished corpus was made of it or it was not."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydratron.data.files import file_hash
from hydratron.data.readers import list_files, load_rows
from hydratron.data.sources import CorpusConfig, Source
from hydratron.data.tokenizer import TOKENIZER_KINDS, load_tokenizer, tokenizer_hash


def read_inputs(corpus: CorpusConfig) -> dict[str, Any]:
    """Return [bytes, SHA-256] by path of each file of the sources, titles and evaluation sets.

    A dataset of the Hub is known by its rows and its fingerprint there, a given tokenizer by what
    decides its ids. Each file is read once, about a second a gigabyte and thread.

    Raises:
        ValueError: something is missing or cannot be read.
    """
    titles = {s.exclude_titles for s in corpus.sources.values() if s.exclude_titles}
    inputs: dict[str, Any] = {
        "sources": {name: _read_source(source) for name, source in corpus.sources.items()},
        "exclude_titles": _hash_files(map(Path, sorted(titles))),
        "decontaminate": _hash_files(map(Path, corpus.steps.decontaminate)),
    }
    if corpus.tokenizer not in TOKENIZER_KINDS:
        inputs["tokenizer"] = tokenizer_hash(load_tokenizer(corpus.tokenizer))
    return inputs


def _read_source(source: Source) -> dict[str, Any]:
    path = Path(source.path).expanduser()
    if source.kind != "huggingface":
        return _hash_files(list_files(source))
    if path.is_dir():
        return _hash_files(file for file in sorted(path.rglob("*")) if file.is_file())
    rows = load_rows(source)
    return {source.path: [len(rows), rows._fingerprint]}


def _hash_files(files: Iterable[Path]) -> dict[str, Any]:
    files = list(files)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(file_hash, files))
    return {str(f): [f.stat().st_size, h] for f, h in zip(files, hashes, strict=True)}
