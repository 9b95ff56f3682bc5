"""Reading the files that examples come in, and the Hugging Face hub; writing predictions."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import datasets


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text, gzipped if named `.gz`.

    Only a line feed ends a line: the other separators of Unicode occur inside sentences.

    Raises:
        ValueError: the file is missing, is not UTF-8 (with the line), or is a damaged gzip.
    """
    number = 0
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file after line {number} ({error})") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: no such file") from error


def read_json(path: Path) -> Any:
    """Return the JSON document in `path` (gzipped if named `.gz`).

    Raises:
        ValueError: as `read_lines`, or the text is not JSON (with the line).
    """
    text = "\n".join(line for _, line in read_lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line that is not blank.

    Raises:
        ValueError: as `read_lines`, or a line is not a JSON object (with the line).
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object a line, got {line[:40]!r}")
        yield number, row


def load_from_hub(name: str, config: str | None, *, split: str) -> Any:
    """Return one split of a Hugging Face data set.

    Raises:
        ValueError: it cannot be had: no network, no such data set, configuration or split.
    """
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot load {name} ({config}, {split}) from the Hugging Face hub: {reason};"
            " offline, give a path to the task's files"
        ) from error


def get_field(row: Any, name: str, kind: type, where: str) -> Any:
    """Return `row[name]`, which must be there and of type `kind`.

    Raises:
        ValueError: it is not, naming `where` (file and line), the field and the rule.
    """
    if not isinstance(row, dict) or name not in row:
        raise ValueError(f"{where}: missing field {name!r}")
    value = row[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {name!r} must be {kind.__name__}, got {str(value)[:40]!r}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
