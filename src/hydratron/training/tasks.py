"""The finetuning tasks: where their rows come from, which head they need, how they are scored.

They differ by data set, encoding, head and metric; the loop is the same. Letters: E examples
(windows for SQuAD), C classes or choices, S tokens, H hidden.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from hydratron.data import race, squad, squad_scoring
from hydratron.data.classification import mean_probabilities
from hydratron.data.encodings import Encodings
from hydratron.data.glue import (
    GlueRow,
    GlueTask,
    encode_glue,
    glue_metrics,
    load_glue,
    write_glue_predictions,
)
from hydratron.data.tokenizer import PreTrainedTokenizerFast
from hydratron.models.heads import Classifier, SpanExtractor
from hydratron.settings import BelowOne, Count, Finite, Interval, Length, Text, check, one_of

# What a model says of a split: per name a row for each example, in order.
Scores = dict[str, list[np.ndarray]]
ROW_KEYS = "row_keys"  # of a scores file
GROUPS = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Split:
    """Examples and their encodings; `name` says which, as `validation_matched` does."""

    name: str
    examples: Sequence[Any]
    encodings: Encodings


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What every task has. Paths are files or folders in the official formats, None is the hub.

    `max_seq_len` is cut to what the model has. `patience`: validations without a better score after
    which training stops and the best one counts; None trains to the end. `new_head`: do not take
    the head of a finetuned checkpoint. `scored_with` names what beside a row's logits decides its
    score: runs of an ensemble share it.
    """

    name: Text
    train_path: Text | None = None
    validation_path: Text | None = None
    test_path: Text | None = None
    epochs: Annotated[int, Interval(1, 10_000)] = 3
    max_seq_len: Length = 512
    head_dropout: BelowOne = 0.1
    patience: Count | None = None
    new_head: bool = False
    scored_with: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check(self, "task")

    def path(self, group: str) -> Path | None:
        """Return the path of `train`, `validation` or `test`."""
        value = getattr(self, f"{group}_path")
        return None if value is None else Path(value).expanduser()


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(TaskSettings):
    """A GLUE task: `spec` is all that tells it from another."""

    spec: GlueTask
    kind: ClassVar[str] = "classification"
    scored_with: ClassVar[tuple[str, ...]] = ("spec",)

    def read(self, group: str) -> dict[str, list[GlueRow]]:
        """Return the rows by split: MNLI's validation has two where the path does not say which."""
        path = self.path(group)
        if group == "train":
            return {"train": load_glue(self.spec, path, "train")}
        names = [n.replace("validation", group) for n in self.spec.validation_splits]
        if path is not None and not path.is_dir() and len(names) > 1:
            # "mismatched" holds "matched": the longest that fits
            fitting = [n for n in names if n.partition("_")[2] in path.stem]
            names = [max(fitting, key=len, default=group)]
        return {name: load_glue(self.spec, path, name) for name in names}

    def encode(
        self, rows: Sequence[GlueRow], tokenizer: PreTrainedTokenizerFast, *, max_seq_len: int
    ) -> Encodings:
        return encode_glue(rows, tokenizer, max_seq_len=max_seq_len)

    def encoding_settings(self) -> dict[str, Any]:
        """Return what beside rows, tokenizer and length decides the encodings."""
        return {"kind": self.kind}

    def build_network(self, encoder: nn.Module, hidden_size: int) -> Classifier:
        return Classifier(
            encoder, hidden_size, num_labels=len(self.spec.labels), dropout=self.head_dropout
        )

    def rows_read(self, split: Split) -> Iterable[Any]:
        """Return what a model reads of each row."""
        return (row["texts"] for row in split.examples)

    @property
    def main_metric(self) -> str:
        """The metric that decides, where its split is there."""
        return self.spec.metrics[0]

    def metrics(self, split: Split, scores: Scores) -> dict[str, float]:
        """Return the metrics of logits [E, C]; nothing without labels."""
        labels = np.array([row["label"] for row in split.examples])
        if (labels < 0).any():
            return {}
        logits = np.stack(scores["logits"])
        found = glue_metrics(self.spec, logits.argmax(axis=1), labels, split=split.name)
        return found | {"loss": _mean_loss(logits, labels)}

    def write_predictions(self, path: Path, split: Split, scores: Scores) -> Path:
        """Write what the GLUE site takes: `path` with `.tsv`."""
        predictions = np.stack(scores["logits"]).argmax(axis=1)
        write_glue_predictions(path.with_suffix(".tsv"), self.spec, predictions)
        return path.with_suffix(".tsv")

    def ensemble(self, runs: Sequence[Scores]) -> Scores:
        """Return the logarithm of the mean of the runs' softmax."""
        return mean_of_softmax(runs)


@dataclass(frozen=True, kw_only=True)
class RaceTask(TaskSettings):
    """RACE: four options a question (Lai et al. 2017)."""

    max_question_len: Length = 128
    kind: ClassVar[str] = "multiple_choice"
    main_metric: ClassVar[str] = "accuracy"

    def read(self, group: str) -> dict[str, list[race.RaceQuestion]]:
        return {group: race.load_race(self.path(group), group)}

    def encode(
        self,
        rows: Sequence[race.RaceQuestion],
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_seq_len: int,
    ) -> Encodings:
        return race.encode_race(
            rows, tokenizer, max_seq_len=max_seq_len, max_question_len=self.max_question_len
        )

    def encoding_settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_question_len": self.max_question_len}

    def build_network(self, encoder: nn.Module, hidden_size: int) -> Classifier:
        return Classifier(encoder, hidden_size, num_labels=1, dropout=self.head_dropout)

    def rows_read(self, split: Split) -> Iterable[Any]:
        """Return what a model reads of each question."""
        return ((row.article, row.question, row.options) for row in split.examples)

    def metrics(self, split: Split, scores: Scores) -> dict[str, float]:
        """Return the metrics of logits [E, 4]."""
        logits = np.stack(scores["logits"])
        labels = np.array([question.label for question in split.examples])
        found = race.race_metrics(split.examples, logits.argmax(axis=1))
        return found | {"loss": _mean_loss(logits, labels)}

    def write_predictions(self, path: Path, split: Split, scores: Scores) -> Path:
        """Write question id to letter: `path` with `.json`."""
        predictions = np.stack(scores["logits"]).argmax(axis=1)
        race.write_race_predictions(path.with_suffix(".json"), split.examples, predictions)
        return path.with_suffix(".json")

    def ensemble(self, runs: Sequence[Scores]) -> Scores:
        """Return the logarithm of the mean of the runs' softmax over the options."""
        return mean_of_softmax(runs)


@dataclass(frozen=True, kw_only=True)
class SquadTask(TaskSettings):
    """SQuAD 1.1 or 2.0; `null_threshold` None is tuned on the questions that are scored (2.0).

    A question counts `max_query_len` tokens at most, an answer `max_answer_length`; of each window
    the `num_best` highest starts and ends are paired.
    """

    version: Annotated[str, one_of("1.1", "2.0")] = "1.1"
    doc_stride: Length = 128
    max_query_len: Length = 64
    num_best: Annotated[int, Interval(1, 1000)] = 20
    max_answer_length: Length = 30
    null_threshold: Finite | None = None
    kind: ClassVar[str] = "span"
    main_metric: ClassVar[str] = "f1"
    scored_with: ClassVar[tuple[str, ...]] = (
        "version", "num_best", "max_answer_length", "null_threshold"
    )  # fmt: skip

    def read(self, group: str) -> dict[str, list[squad.SquadQuestion]]:
        return {group: squad.load_squad(self.path(group), group, version=self.version)}

    def encode(
        self,
        rows: Sequence[squad.SquadQuestion],
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_seq_len: int,
    ) -> Encodings:
        return squad.encode_squad(
            rows,
            tokenizer,
            max_seq_len=max_seq_len,
            doc_stride=self.doc_stride,
            max_query_len=self.max_query_len,
        )

    def encoding_settings(self) -> dict[str, Any]:
        limits = {"doc_stride": self.doc_stride, "max_query_len": self.max_query_len}
        return {"kind": self.kind} | limits

    def build_network(self, encoder: nn.Module, hidden_size: int) -> SpanExtractor:
        return SpanExtractor(
            encoder, hidden_size, answerability=self.version == "2.0", dropout=self.head_dropout
        )

    @property
    def tunes_threshold(self) -> bool:
        """Whether the questions that are scored decide the null threshold."""
        return self.version == "2.0" and self.null_threshold is None

    def rows_read(self, split: Split) -> Iterable[Any]:
        """Return question and tokens of each window: logits of another tokenizer do not pair."""
        windows = split.encodings
        for number, question in enumerate(windows.values["question_index"]):
            row = split.examples[question]
            yield row.id, row.question, row.context, windows.get("input_ids", number).tobytes()

    def _decode(self, split: Split, scores: Scores) -> list[squad_scoring.SpanPrediction]:
        return squad_scoring.decode_spans(
            split.examples,
            split.encodings,
            _span_logits(scores),
            num_best=self.num_best,
            max_answer_length=self.max_answer_length,
        )

    def _threshold(
        self, split: Split, predictions: Sequence[squad_scoring.SpanPrediction]
    ) -> float | None:
        if not self.tunes_threshold:
            return self.null_threshold
        return squad_scoring.tune_null_threshold(split.examples, predictions).f1_threshold

    def metrics(self, split: Split, scores: Scores) -> dict[str, float]:
        """Return the official script's metrics in percent; for 2.0 at the threshold it names."""
        predictions = self._decode(split, scores)
        threshold = self._threshold(split, predictions)
        answers = squad_scoring.choose_answers(predictions, null_threshold=threshold)
        found = squad_scoring.squad_metrics(split.examples, answers, version=self.version)
        found = {name.replace("exact", "exact_match"): value for name, value in found.items()}
        return found if threshold is None else found | {"null_threshold": threshold}

    def write_predictions(self, path: Path, split: Split, scores: Scores) -> Path:
        """Write the official scripts' files: `path` with `.json`, null odds beside it (2.0)."""
        predictions = self._decode(split, scores)
        threshold = self._threshold(split, predictions)
        answers = squad_scoring.choose_answers(predictions, null_threshold=threshold)
        squad_scoring.write_squad_predictions(path.with_suffix(".json"), answers)
        if self.version == "2.0":
            squad_scoring.write_null_odds(path.with_suffix(".null_odds.json"), predictions)
        return path.with_suffix(".json")

    def ensemble(self, runs: Sequence[Scores]) -> Scores:
        """Return the mean of the runs' logits, which gives the mean of the span scores."""
        mean = squad_scoring.mean_span_logits([_span_logits(scores) for scores in runs])
        found: Scores = {"start": list(mean.start), "end": list(mean.end)}
        return found if mean.answerable is None else found | {"answerable": list(mean.answerable)}


Task = ClassificationTask | RaceTask | SquadTask


def _mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross entropy in nats of logits [E, C]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen))


def mean_of_softmax(runs: Sequence[Scores]) -> Scores:
    """Return the logarithm of the mean over runs of the softmax of their logits [E, C]."""
    mean = mean_probabilities([np.stack(scores["logits"]) for scores in runs])
    return {"logits": list(np.log(np.maximum(mean, np.finfo(np.float64).tiny)))}


def _span_logits(scores: Scores) -> squad_scoring.SpanLogits:
    answerable = scores.get("answerable")
    return squad_scoring.SpanLogits(
        scores["start"], scores["end"], None if answerable is None else np.array(answerable)
    )


def row_keys(task: Task, split: Split) -> np.ndarray:
    """Return a key of each row, uint64 [E]: a hash of what a model reads there, no two the same.

    Equal rows count up, so that the first one of a file is that of any other order.
    """
    seen: Counter[bytes] = Counter()
    keys = []
    for row in task.rows_read(split):
        digest = hashlib.sha256(repr(row).encode("utf-8", "surrogatepass")).digest()
        keys.append((int.from_bytes(digest[:8], "big") + seen[digest]) % 2**64)
        seen[digest] += 1
    return np.array(keys, np.uint64)


def save_scores(path: Path, scores: Scores, keys: np.ndarray) -> None:
    """Write scores as safetensors: per name all rows end to end, and the length of each; `keys`."""
    tensors: dict[str, np.ndarray] = {ROW_KEYS: keys}
    for name, rows in scores.items():
        flat = [np.atleast_1d(row) for row in rows]
        tensors[f"{name}.values"] = np.concatenate(flat).astype(np.float32)
        tensors[f"{name}.lengths"] = np.array([len(row) for row in flat], np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    save_file(tensors, partial)
    partial.replace(path)


def load_scores(path: Path, keys: np.ndarray | None = None) -> Scores:
    """Read what `save_scores` wrote, in the order of `keys` if they are given.

    Raises:
        ValueError: no such file, one that cannot be read, or one of other rows than `keys`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file: this run has not been evaluated on that split")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    scores: Scores = {}
    for name in (key.removesuffix(".values") for key in tensors if key.endswith(".values")):
        ends = np.cumsum(tensors[f"{name}.lengths"])
        scores[name] = np.split(tensors[f"{name}.values"], ends[:-1])
    if "answerable" in scores:
        scores["answerable"] = [row[0] for row in scores["answerable"]]
    if keys is None:
        return scores
    if ROW_KEYS not in tensors:
        raise ValueError(f"{path} does not say which rows it scores: evaluate that run again")
    places = {key: place for place, key in enumerate(tensors[ROW_KEYS].tolist())}
    missing = sum(key not in places for key in keys.tolist())
    if missing or len(places) != len(keys):
        raise ValueError(
            f"{path} scores other rows: it has {len(places)}, and lacks {missing} of the"
            f" {len(keys)} to be scored (another file or, for SQuAD, other windows or tokenizer)"
        )
    order = [places[key] for key in keys.tolist()]
    return {name: [rows[place] for place in order] for name, rows in scores.items()}


def write_outputs(directory: Path, task: Task, split: Split, scores: Scores) -> None:
    """Write predictions in the official format and the scores that ensembles are made of."""
    task.write_predictions(directory / split.name, split, scores)
    save_scores(directory / f"{split.name}.safetensors", scores, row_keys(task, split))
