"""Which files of a folder are read, and their contents: text or JSON lines, packed or not."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any
from warnings import warn

import zstandard

_PACKED = (".gz", ".zst")
JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
TEXT_ENDINGS = (".txt",)
# macOS's ._x.txt, .ipynb_checkpoints and editors' copies; Office's locks
_SHADOWS = (".", "~$")
_NAMED_AT_MOST = 5
_CHUNK = 1 << 20


def has_ending(file: Path, endings: Sequence[str]) -> bool:
    """Whether a file's name has one of these endings, in any case, packed (.gz, .zst) or not."""
    name = file.name.lower()
    name = name.rpartition(".")[0] if name.endswith(_PACKED) else name
    return name.endswith(tuple(endings))


def find_files(path: str | Path, endings: Sequence[str]) -> list[Path]:
    """List the files with these endings at or below `path`, sorted; a warning names the others.

    `path` is a folder, a file or a pattern with `*`, `?` and `**`. A file that it names is read
    whatever its ending. Links are followed, and nothing is read twice. Files that begin with a dot
    are left out: the copies of editors and operating systems.

    Raises:
        ValueError: nothing is there, nothing that has such an ending, or JSON where text belongs.
    """
    path = Path(path).expanduser()
    found = [path] if path.exists() else map(Path, sorted(glob(str(path), recursive=True)))
    is_named = bool(path.name.strip("*"))
    files: dict[Path, Path] = {}  # by what they are without links
    left_out: dict[Path, None] = {}
    folders: set[Path] = set()

    def visit(entry: Path, is_named: bool) -> None:
        if entry.is_dir():
            if entry.resolve() in folders:
                return
            folders.add(entry.resolve())
            for inside in sorted(entry.iterdir()):
                if inside.name.startswith(_SHADOWS):
                    left_out[inside] = None
                else:
                    visit(inside, False)
        elif entry.is_file() and (is_named or has_ending(entry, endings)):
            files.setdefault(entry.resolve(), entry)
        else:
            left_out[entry] = None

    try:
        for entry in found:
            visit(entry, is_named)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if not folders and not files and not left_out:
        raise ValueError(f"{path}: no such file or folder")
    if not files:
        raise ValueError(f"{path}: no file ending in {', '.join(endings)} (.gz, .zst) in it")
    for file in files.values():
        if set(JSON_ENDINGS).isdisjoint(endings) and has_ending(file, JSON_ENDINGS):
            raise ValueError(f"{file}: JSON, not text: a source of `kind: jsonl` reads it")
    if left_out:
        names = name_some(list(map(str, left_out)))
        warn(f"{path}: {len(files)} files are read, left out: {names}", stacklevel=2)
    return list(files.values())


def name_some(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def read_text(file: Path) -> str:
    """Read a whole text file, unpacked, its newlines made "\\n".

    Raises:
        ValueError: it is not UTF-8, or its packing is broken, with the position.
    """
    raw = b"".join(_unpacked(file))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}: not UTF-8 at byte {error.start} (line {line}): {error.reason}"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of each line that is not blank.

    Raises:
        ValueError: a line is not UTF-8 or not JSON, or the packing is broken, with the position.
    """
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, column {error.colno}: not JSON: {error.msg}") from error
        except RecursionError as error:
            raise ValueError(f"{where}: JSON nested too deeply") from error


def file_hash(file: Path) -> str:
    """Return the SHA-256, in hex, of a file's bytes.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error


def make_cache_folder(folder: Path) -> None:
    """Make `data.cache_dir` where it is missing.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir {folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"data.cache_dir {folder}: cannot be written to")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number, line = 1, list[bytes]()
    for chunk in _unpacked(file):
        rest, *others = chunk.split(b"\n")
        line.append(rest)
        for other in others:
            yield number, b"".join(line)
            number, line = number + 1, [other]
    yield number, b"".join(line)


def _unpacked(file: Path) -> Iterator[bytes]:
    """The contents in chunks; a truncated or broken .gz or .zst is a ValueError with its place."""
    ending = file.suffix.lower()
    if ending == ".gz":
        chunks = _decompress(file, lambda: zlib.decompressobj(wbits=31))
    elif ending == ".zst":
        chunks = _decompress(file, zstandard.ZstdDecompressor().decompressobj)
    else:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
        return
    done = 0
    try:
        for chunk in chunks:
            done += len(chunk)
            yield chunk
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{file}: broken after byte {done} of its contents: {error}") from error


def _decompress(file: Path, make: Callable[[], Any]) -> Iterator[bytes]:
    """Both formats may have several members one after the other."""
    member = None
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            while chunk:
                if member is None:
                    if not chunk.strip(b"\0"):  # tape padding after the last member
                        break
                    member = make()
                yield member.decompress(chunk)
                chunk = member.unused_data if member.eof else b""
                member = None if member.eof else member
    if member is not None:
        raise EOFError("the compressed file is truncated")
