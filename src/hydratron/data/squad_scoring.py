"""SQuAD answers from the logits of windows, null threshold, EM and F1 as the official scripts.

Letters: W windows, S tokens of a window, Q questions, N n-best. Rajpurkar et al. 2016, 2018.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydratron.data.encodings import Encodings
from hydratron.data.examples import write_text
from hydratron.data.squad import SquadQuestion, group_windows

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_SPAN_SCORE = -1e9  # finite, so that null odds stay valid JSON


@dataclass(frozen=True)
class SpanLogits:
    """What a model says of W windows: `start`, `end` hold an array of at least S each.

    `answerable` [W] is the answerability head's logit, above 0 for yes; None without that head.
    """

    start: Sequence[np.ndarray]
    end: Sequence[np.ndarray]
    answerable: np.ndarray | None = None


@dataclass(frozen=True)
class Span:
    """A candidate answer: text, start logit plus end logit, and its characters [start, end)."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class SpanPrediction:
    """The n-best spans of a question, best first, with different texts; may be none.

    `null_odds` grows with the evidence that there is no answer: minus the highest answerability
    logit of its windows or, without that head, the lowest `[CLS]` span score less the best span's.
    """

    id: str
    spans: tuple[Span, ...]
    null_odds: float

    @property
    def text(self) -> str:
        """Return the best span's text, empty without spans."""
        return self.spans[0].text if self.spans else ""


def mean_span_logits(runs: Sequence[SpanLogits]) -> SpanLogits:
    """Return the ensemble of runs over the same windows.

    A span's score is linear in the logits, so their mean gives the mean of the span scores.

    Raises:
        ValueError: no runs, runs over different numbers of windows, or heads that differ.
    """
    if len({(len(run.start), run.answerable is None) for run in runs}) != 1:
        raise ValueError("an ensemble needs runs over the same windows with the same heads")

    def mean(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        width = min(len(array) for array in arrays)  # runs may have padded differently
        return np.asarray(np.mean([array[:width] for array in arrays], axis=0, dtype=np.float64))

    answerable = [run.answerable for run in runs if run.answerable is not None]
    return SpanLogits(
        [mean(arrays) for arrays in zip(*(run.start for run in runs), strict=True)],
        [mean(arrays) for arrays in zip(*(run.end for run in runs), strict=True)],
        np.asarray(np.mean(answerable, axis=0, dtype=np.float64)) if answerable else None,
    )


def decode_spans(
    questions: Sequence[SquadQuestion],
    windows: Encodings,
    logits: SpanLogits,
    *,
    num_best: int = 20,
    max_answer_length: int = 30,
) -> list[SpanPrediction]:
    """Return each question's best spans over its windows, as BERT's procedure does.

    In each window the `num_best` highest starts and ends are paired; a pair counts if it lies in
    the context, in order, is at most `max_answer_length` tokens, and its start has its maximal
    context in this window.

    Raises:
        ValueError: logits and windows, or windows and questions, do not belong together.
    """
    if not len(logits.start) == len(logits.end) == len(windows):
        raise ValueError(f"logits of {len(logits.start)} windows for {len(windows)} windows")
    predictions: list[SpanPrediction] = []
    for question, group in zip(questions, group_windows(windows, len(questions)), strict=True):
        found = [
            _window_candidates(windows, logits, w, (num_best, max_answer_length)) for w in group
        ]
        scores, starts, ends = (np.concatenate(column) for column in zip(*found, strict=True))
        spans: dict[str, Span] = {}
        for i in np.argsort(-scores, kind="stable"):
            text = question.context[starts[i] : ends[i]].strip()
            if text and text not in spans:
                spans[text] = Span(text, float(scores[i]), int(starts[i]), int(ends[i]))
            if len(spans) == num_best:
                break
        best = tuple(spans.values())
        predictions.append(
            SpanPrediction(question.id, best, _null_odds(windows, logits, group, best))
        )
    return predictions


def _window_candidates(
    windows: Encodings, logits: SpanLogits, window: int, limits: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (scores, first characters, end characters) of the pairs that count."""
    num_best, max_answer_length = limits
    char_start, char_end = windows.get("char_start", window), windows.get("char_end", window)
    size = len(char_start)
    start_logits = np.asarray(logits.start[window], np.float64)[:size]
    end_logits = np.asarray(logits.end[window], np.float64)[:size]
    if len(start_logits) < size or len(end_logits) < size:
        raise ValueError(f"window {window} has {size} tokens, logits for {len(start_logits)}")
    starts, ends = _highest(start_logits, num_best), _highest(end_logits, num_best)
    starts = starts[windows.get("is_max_context", window)[starts]]
    ends = ends[char_start[ends] >= 0]
    # [starts, 1] against [ends] -> [starts, ends]
    distance = ends - starts[:, None]
    rows, columns = np.nonzero((distance >= 0) & (distance < max_answer_length))
    scores = start_logits[starts[rows]] + end_logits[ends[columns]]
    return scores, char_start[starts[rows]], char_end[ends[columns]]


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:count]


def _null_odds(
    windows: Encodings, logits: SpanLogits, group: range, spans: tuple[Span, ...]
) -> float:
    if logits.answerable is not None:
        return -float(max(logits.answerable[window] for window in group))
    cls = windows.values["cls_positions"]
    null = min(float(logits.start[w][cls[w]]) + float(logits.end[w][cls[w]]) for w in group)
    return null - (spans[0].score if spans else _NO_SPAN_SCORE)


def choose_answers(
    predictions: Sequence[SpanPrediction], *, null_threshold: float | None = None
) -> dict[str, str]:
    """Return question id to text: the best span's, or "" where null odds exceed the threshold."""
    return {
        p.id: "" if null_threshold is not None and p.null_odds > null_threshold else p.text
        for p in predictions
    }


def normalize_answer(text: str) -> str:
    """Return `text` lowered, without punctuation and articles, with single spaces (official)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_score(prediction: str, truth: str) -> float:
    """Return 1 if the texts are equal once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(truth))


def f1_score(prediction: str, truth: str) -> float:
    """Return F1 of the bags of normalised words, 0 if they share none (1.1)."""
    predicted, true = normalize_answer(prediction).split(), normalize_answer(truth).split()
    num_same = sum((Counter(predicted) & Counter(true)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(true)
    return 2 * precision * recall / (precision + recall)


def f1_score_with_null(prediction: str, truth: str) -> float:
    """Return `f1_score`, but 1 if both normalise to nothing (2.0)."""
    if not normalize_answer(prediction) and not normalize_answer(truth):
        return 1.0
    return f1_score(prediction, truth)


def squad_metrics(
    questions: Sequence[SquadQuestion], answers: Mapping[str, str], *, version: str
) -> dict[str, float]:
    """Return `exact` and `f1` in percent, equal to the official scripts' to the last digit.

    For version 2.0 also `HasAns_exact`, `HasAns_f1`, `NoAns_exact`, `NoAns_f1`, where there are
    such questions. One missing from `answers` counts as 0, as in the 1.1 script.
    """
    if version == "1.1":
        truths = [[answer.text for answer in question.answers] for question in questions]
        f1_of_version = f1_score
    else:
        truths = [_truths_with_null(question) for question in questions]
        f1_of_version = f1_score_with_null
    texts = [answers.get(question.id) for question in questions]
    exact = _best_scores(exact_score, texts, truths)
    f1 = _best_scores(f1_of_version, texts, truths)
    metrics = {"exact": _percent(exact), "f1": _percent(f1)}
    if version == "1.1":
        return metrics
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        chosen = [i for i, q in enumerate(questions) if bool(q.answers) is wanted]
        if chosen:
            metrics[f"{prefix}_exact"] = _percent([exact[i] for i in chosen])
            metrics[f"{prefix}_f1"] = _percent([f1[i] for i in chosen])
    return metrics


def _percent(scores: Sequence[float]) -> float:
    # Python's sum in the file's order: numpy adds in pairs and differs in the last digits.
    return 100.0 * sum(scores) / len(scores)


def _truths_with_null(question: SquadQuestion) -> list[str]:
    """Return the ground truths that normalise to something, else [""] (2.0)."""
    return [a.text for a in question.answers if normalize_answer(a.text)] or [""]


def _best_scores(
    score: Callable[[str, str], float],
    texts: Sequence[str | None],
    truths: Sequence[Sequence[str]],
) -> list[float]:
    """Return each text's score against the nearest of its ground truths."""
    return [
        0.0 if text is None else max(score(text, truth) for truth in row)
        for text, row in zip(texts, truths, strict=True)
    ]


@dataclass(frozen=True)
class NullThreshold:
    """The best scores (percent) that any threshold on null odds gives, and where."""

    exact: float
    exact_threshold: float
    f1: float
    f1_threshold: float


def tune_null_threshold(
    questions: Sequence[SquadQuestion], predictions: Sequence[SpanPrediction]
) -> NullThreshold:
    """Return the thresholds that are best for `choose_answers` on these questions.

    One sort, then one pass: raising the threshold past a question trades the score of "" for that
    of its span. A threshold never falls between equal odds. The lowest of equally good ones wins.

    Raises:
        ValueError: predictions and questions are not the same, in the same order.
    """
    if [p.id for p in predictions] != [q.id for q in questions]:
        raise ValueError("predictions and questions differ")
    truths = [_truths_with_null(question) for question in questions]
    texts = [prediction.text for prediction in predictions]
    odds = np.array([p.null_odds for p in predictions])
    order = np.argsort(odds, kind="stable")
    odds = odds[order]
    is_last = np.append(odds[1:] != odds[:-1], True)
    # Below every odds all answers are "".
    thresholds = np.concatenate([[odds[0] - 1.0], odds[is_last]])
    best: list[float] = []
    for score in (exact_score, f1_score_with_null):
        null = np.array(_best_scores(score, [""] * len(texts), truths))
        span = np.array(_best_scores(score, texts, truths))
        gains = np.cumsum((span - null)[order])[is_last]
        totals = null.sum() + np.concatenate([[0.0], gains])
        at = int(totals.argmax())
        best += [100.0 * float(totals[at]) / len(questions), float(thresholds[at])]
    return NullThreshold(*best)


def write_squad_predictions(path: Path, answers: Mapping[str, str]) -> None:
    """Write question id to text, the official scripts' predictions file."""
    write_text(path, json.dumps(dict(answers), ensure_ascii=False) + "\n")


def write_null_odds(path: Path, predictions: Sequence[SpanPrediction]) -> None:
    """Write question id to null odds, the 2.0 script's `--na-prob-file`."""
    write_text(path, json.dumps({p.id: p.null_odds for p in predictions}) + "\n")
