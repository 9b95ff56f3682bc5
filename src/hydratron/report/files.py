"""The files of a run as checked values. What a file should not hold is a ValueError that names it:
a run directory may be damaged, or somebody else's.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

ReadT = TypeVar("ReadT")
# What a report reads of result.json; it ignores every other key.
WORDS = ("status", "command", "error", "model", "size", "layernorm", "git_commit", "device")
LEAST_NUMBERS = {
    "num_parameters": 1,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "batch": 1,
    "seq_len": 1,
    "steps": 0,
    "tokens": 0,
    "duration_s": 0,
}
METRIC = re.compile(r"\w+/[\w/.@+-]{1,100}")
LOGGED = ("train/", "val/", "test/", "perf/", "peer/")
NOTHING = (None, "", "~", "null")  # YAML's


def plain(text: str) -> str:
    """`text` on one line, with what is not printed (newlines, terminal escapes) spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def parse_value(value: Any) -> Any:
    """A Hydra override value as a number, bool, None or string (YAML alone would leave 1e-3 a
    string). A nan is the word: it is equal to nothing, so that no group could be found again.
    """
    if not isinstance(value, str):
        is_scalar = value is None or type(value) is bool or is_number(value) or value == math.inf
        return value if is_scalar else plain(str(value))
    text = value.strip()
    if text.lower() in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
            float(number)
        except (ValueError, OverflowError):
            continue
        return number if number == number else text
    return plain(text.strip("'\""))


def parse_overrides(lines: Iterable[str]) -> dict[str, Any]:
    """Hydra's `key=value` lines as a dict; the `+` of an added key is dropped, a deletion (`~key`)
    ignored.
    """
    pairs = (line.lstrip("+").partition("=") for line in lines if not line.startswith("~"))
    return {plain(key): parse_value(value) for key, _, value in pairs}


def read_text(path: Path) -> str:
    """What a file holds, nothing where there is none."""
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path.name} is not a file")
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8") from error


def _once(read: Callable[[Path], ReadT]) -> Callable[[Path], ReadT]:
    """`read`, but of a file as it is only once: a sweep that is watched is loaded again and
    again.
    """

    @cache
    def remembered(path: Path, *_version: int) -> ReadT:
        return read(path)

    def reader(path: Path) -> ReadT:
        if not path.is_file():
            return read(path)
        found = path.stat()
        return remembered(path, found.st_mtime_ns, found.st_size)

    return reader


@_once
def read_yaml(path: Path) -> Any:
    """A YAML file whose scalars are all strings: no tag of it is obeyed. None if it is empty."""
    try:
        return yaml.load(read_text(path), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML") from error


def read_node(path: Path, *keys: str) -> dict[str, Any]:
    """The mapping below `keys` in a YAML file, empty where there is none."""
    node, where = read_yaml(path), path.name
    for key in keys:
        node, where = _mapping(node, where).get(key), f"{path.name}: {key}"
    return _mapping(node, where)


def _mapping(node: Any, where: str) -> dict[str, Any]:
    if node in NOTHING:
        return {}
    if not isinstance(node, dict):
        raise ValueError(f"{where} is not a mapping")
    return node


def read_lines(path: Path) -> list[str]:
    """A YAML file that is a list of strings."""
    lines = read_yaml(path) or []
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{path.name} is not a list of words")
    return lines


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not an object")
    return found


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether a value is a finite number, and not below `least`."""
    try:
        return type(value) in (int, float) and math.isfinite(value) and value >= least
    except OverflowError:  # an int that no float holds
        return False


def read_result(path: Path) -> dict[str, Any]:
    """A result.json with its strings printable; of the error the first line. Empty where there is
    none.

    Raises:
        ValueError: something that a report reads is not what it should be, by name.
    """
    if not path.exists():
        return {}
    result = read_object(path)
    for key in WORDS:
        if not isinstance(result.get(key), str | None):
            raise ValueError(f"{path.name}: {key} is not a word")
    for key in ("status", "command"):  # names of files begin with the command
        if not re.fullmatch(r"[\w-]{1,40}", result.get(key) or "ok"):
            raise ValueError(f"{path.name}: {key} {result[key]!r} is not a word")
    for key, least in LEAST_NUMBERS.items():
        if result.get(key) is not None and not is_number(result[key], least):
            raise ValueError(f"{path.name}: {key} is not a number from {least} on")
    if isinstance(result.get("seed"), dict | list):
        raise ValueError(f"{path.name}: seed is not a value")
    for key in ("overrides", "versions"):
        if not isinstance(result.get(key), dict | None):
            raise ValueError(f"{path.name}: {key} is not an object")
    for key, value in result.items():
        if key.startswith(LOGGED) and not is_metric(value):
            raise ValueError(f"{path.name}: {key} is not a number")
    if result.get("error"):
        result["error"] = (result["error"].strip().splitlines() or [""])[0]
    return {plain(k): plain(v) if isinstance(v, str) else v for k, v in result.items()}


def is_metric(value: Any) -> bool:
    """Whether a value is a number, or None or a word for one that JSON does not have: a loss that
    is nan or inf is a result.
    """
    if isinstance(value, str):
        value = math.nan if value.strip().lower() == "nan" else parse_value(value)
    return value is None or type(value) in (int, float)


@_once
def read_metrics(path: Path) -> pd.DataFrame:
    """Read a metrics.csv as floats by step, also one that is being written, or was resumed and
    repeats steps.
    """
    text = read_text(path)
    text = text[: text.rfind("\n") + 1]  # a row without its line end is not all there
    if not text.strip():
        return pd.DataFrame()
    lines = [line.split(",") for line in text.splitlines() if line.strip()]
    header, *rows = lines
    whole = [row for row in rows if len(row) == len(header)]
    if "step" not in header or len({*header}) < len(header) or (rows and not whole):
        raise ValueError(f"{path.name} is no table of metrics by step")
    frame = pd.DataFrame(whole, columns=pd.Index(header))
    # An empty cell is a gap and a "nan" is a result: pandas' own reader takes one for the other.
    frame = frame.replace(to_replace=r"(?i)^[+-]?nan$", value="inf", regex=True)
    frame = pd.DataFrame({name: pd.to_numeric(frame[name], errors="coerce") for name in frame})
    known = pd.DataFrame(frame[frame["step"].notna()])
    if not known["step"].between(0, 2**53).all():
        raise ValueError(f"{path.name} is no table of metrics by step")
    return known.astype({"step": int}).groupby("step").last()
