"""GLUE tasks as data: rows from the GLUE download, JSON lines or the hub; encoding; scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict
from warnings import warn

import numpy as np
from transformers import PreTrainedTokenizerFast

from hydratron.data import classification
from hydratron.data.encodings import (
    Encodings,
    make_frame,
    stack_sequences,
    tokenize,
    truncate_longest_first,
)
from hydratron.data.examples import (
    get_field,
    load_from_hub,
    read_json_lines,
    read_lines,
    write_text,
)
from hydratron.settings import Text, check

# GLUE's QQP has a few rows in 360,000 that a line feed inside a question broke in two, and every
# published result leaves them out. More than this share means another kind of file.
_MAX_MALFORMED_SHARE = 0.001

_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": classification.accuracy,
    "f1": classification.binary_f1,
    "matthews": classification.matthews_correlation,
}


class GlueRow(TypedDict):
    """One or two texts and the index of their label, -1 in a test split."""

    id: str
    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class GlueTask:
    """A sentence or sentence-pair classification task: all that tells one from another.

    Attributes:
        text_columns: one or two, as JSON lines and the hub name them.
        labels: as the GLUE files write them, in the order of the model's classes.
        integer_labels: the label each integer of JSON lines and of the hub stands for; `labels`
            if empty. The hub's MNLI is (entailment, neutral, contradiction).
        tsv_text_columns, tsv_label_column: the GLUE download's names; the others if empty.
        tsv_header: all columns, for a task whose files have no header line (CoLA).
        validation_splits: two for MNLI.
        metrics: of accuracy, f1 (of the second of two labels), matthews; the first decides.

    Raises:
        ValueError: no or more than two text columns, fewer than two labels or repeated ones,
            integer labels that are not a reordering of them, f1 of more than two, an unknown
            metric.
    """

    name: Text
    text_columns: tuple[Text, ...]
    labels: tuple[Text, ...]
    label_column: Text = "label"
    integer_labels: tuple[Text, ...] = ()
    tsv_text_columns: tuple[Text, ...] = ()
    tsv_label_column: str = ""
    tsv_header: tuple[Text, ...] = ()
    hub_name: Text = "nyu-mll/glue"
    hub_config: str = ""
    validation_splits: tuple[Text, ...] = ("validation",)
    metrics: tuple[Text, ...] = ("accuracy",)

    def __post_init__(self) -> None:
        check(self, "task.spec")
        defaults = {
            "integer_labels": self.labels,
            "tsv_text_columns": self.text_columns,
            "tsv_label_column": self.label_column,
            "hub_config": self.name,
        }
        for name, default in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or default)
        if not 1 <= len(self.text_columns) == len(self.tsv_text_columns) <= 2:
            raise ValueError(f"task {self.name}: text_columns must be one or two, the same in tsv")
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"task {self.name}: labels {self.labels} must be two or more, unequal")
        if sorted(self.integer_labels) != sorted(self.labels):
            raise ValueError(f"task {self.name}: integer_labels are not a reordering of labels")
        for metric in self.metrics:
            if metric not in _METRICS or (metric == "f1" and len(self.labels) > 2):
                raise ValueError(f"task {self.name}: no metric {metric!r} of {self.labels}")


def load_glue(spec: GlueTask, path: Path | None, split: str) -> list[GlueRow]:
    """Return the rows of one split, in order; a row's id is its place among the rows from 0.

    Args:
        path: a GLUE `.tsv`, JSON lines (`.jsonl`, `.json`, also `.gz`), or a folder with one of
            either per split (`train.tsv`, `dev_matched.tsv`, ...). None: the hub, nothing else.
        split: as the hub names it. Labels are required unless it starts with `test`.

    Raises:
        ValueError: naming file and line: a missing column, a label that is not the task's, a text
            that is not a string, JSON that is not; or no rows, too many malformed ones (in a test
            split: one), no file.
    """
    if path is None:
        source = f"{spec.hub_name}/{spec.hub_config}/{split}"
        numbered = enumerate(load_from_hub(spec.hub_name, spec.hub_config, split=split))
        rows = _parse_rows(spec, numbered, source, split)
    else:
        path = _find_file(Path(path), split)
        source = str(path)
        if ".tsv" in path.suffixes:
            rows = _parse_rows(spec, _read_tsv(spec, path, split), source, split)
        elif {".jsonl", ".json"} & set(path.suffixes):
            rows = _parse_rows(spec, read_json_lines(path), source, split)
        else:
            raise ValueError(f"{path}: a {spec.name} file must be .tsv, .jsonl or .json")
    if not rows:
        raise ValueError(f"{source}: no rows")
    return rows


def _find_file(path: Path, split: str) -> Path:
    if not path.is_dir():
        return path
    stems = (split, split.replace("validation", "dev"))
    names = [f"{stem}{end}" for stem in stems for end in (".tsv", ".jsonl", ".json", ".jsonl.gz")]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path}: no file for split {split} (looked for {', '.join(names)})")


def _parse_rows(
    spec: GlueTask, numbered: Iterator[tuple[int, Any]] | Any, source: str, split: str
) -> list[GlueRow]:
    rows: list[GlueRow] = []
    for number, row in numbered:
        where = f"{source}:{number}"
        texts = tuple(get_field(row, column, str, where) for column in spec.text_columns)
        if split.startswith("test") and row.get(spec.label_column, -1) in (-1, "-1", ""):
            label = -1
        else:
            label = _label_index(spec, get_field(row, spec.label_column, object, where), where)
        rows.append({"id": str(len(rows)), "texts": texts, "label": label})
    return rows


def _label_index(spec: GlueTask, value: Any, where: str) -> int:
    if isinstance(value, str) and value in spec.labels:
        return spec.labels.index(value)
    if type(value) is int and 0 <= value < len(spec.integer_labels):
        return spec.labels.index(spec.integer_labels[value])
    raise ValueError(f"{where}: label {value!r} is not one of {', '.join(spec.labels)}")


def _read_tsv(spec: GlueTask, path: Path, split: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield rows under the names of JSON lines. GLUE's quotation marks are text, never quoting."""
    names = dict(zip(spec.tsv_text_columns, spec.text_columns, strict=True))
    names[spec.tsv_label_column] = spec.label_column
    header = list(spec.tsv_header)
    is_test = split.startswith("test")
    malformed: list[int] = []
    number = 0
    for number, line in read_lines(path):
        if not line.strip(" "):
            continue
        fields = line.split("\t")
        if not header:
            header = fields
            missing = [n for n in names if n not in header]
            if missing and not (is_test and missing == [spec.tsv_label_column]):
                raise ValueError(
                    f"{path}:{number}: missing column {missing[0]!r} (has {', '.join(header)})"
                )
        elif len(fields) != len(header):
            malformed.append(number)
        else:
            row = zip(header, fields, strict=True)
            yield number, {names[n]: text for n, text in row if n in names}
    if is_test and malformed:
        raise ValueError(
            f"{path}:{malformed[0]}: not {len(header)} columns: a test file must be whole, because"
            " a prediction is known by its row"
        )
    if len(malformed) > number * _MAX_MALFORMED_SHARE:
        raise ValueError(
            f"{path}:{malformed[0]}: not {len(header)} columns, as in {len(malformed)} of"
            f" {number} lines (at most 1 in 1,000 may be)"
        )
    if malformed:
        warn(f"{path}: left out malformed lines {malformed}", stacklevel=2)


def encode_glue(
    rows: Sequence[GlueRow], tokenizer: PreTrainedTokenizerFast, *, max_seq_len: int
) -> Encodings:
    """Return `[CLS] a [SEP] b [SEP]` (`[CLS] a [SEP]`) cut longest first to `max_seq_len`.

    The value column is `labels`. A tokenizer with its own special tokens (RoBERTa) keeps them.

    Raises:
        ValueError: `max_seq_len` leaves no token to a segment.
    """
    num_segments = len(rows[0]["texts"])
    frame = make_frame(tokenizer, num_segments)
    room = max_seq_len - frame.num_special_tokens
    if room < num_segments:
        raise ValueError(f"max_seq_len {max_seq_len} has no room beside the special tokens")
    segments = [tokenize(tokenizer, [row["texts"][i] for row in rows]) for i in range(num_segments)]
    if num_segments == 2:
        pairs = zip(*segments, strict=True)
        sequences = [frame.assemble(*truncate_longest_first(a, b, room)) for a, b in pairs]
    else:
        sequences = [frame.assemble(ids[:room]) for ids in segments[0]]
    return stack_sequences(sequences, values={"labels": [row["label"] for row in rows]})


def glue_metrics(
    spec: GlueTask, predictions: np.ndarray, labels: np.ndarray, *, split: str = "validation"
) -> dict[str, float]:
    """Return the task's metrics of class indices int [E], as fractions.

    MNLI's splits say which they are: `accuracy_matched`, `accuracy_mismatched`.
    """
    _, _, suffix = split.partition("_")
    end = f"_{suffix}" if suffix else ""
    return {f"{name}{end}": _METRICS[name](predictions, labels) for name in spec.metrics}


def write_glue_predictions(path: Path, spec: GlueTask, predictions: np.ndarray) -> None:
    """Write class indices int [E] as the GLUE site takes them: `index`, `prediction`, tabs."""
    lines = [f"{index}\t{spec.labels[label]}" for index, label in enumerate(predictions)]
    write_text(path, "\n".join(["index\tprediction", *lines]) + "\n")
