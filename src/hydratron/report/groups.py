"""Runs that differ only in their seed, taken together: medians, ranges and how many diverged."""

import contextlib
import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hydratron.report.files import METRIC, is_metric
from hydratron.report.protocols import drop_repeated
from hydratron.report.runs import Collection, Run, find_swept_keys

UNIGRAM_ENTROPY = "val/unigram_entropy"
# Where the objective is a sum (masked LM + sentence order), only the language-model part compares
# with an entropy.
LANGUAGE_LOSSES = ("val/mlm_loss", "val/lm_loss", "val/loss")
# Losses of runs that differ in these are losses of different questions: no best among them.
QUESTION_KEYS = ("task", "model", "data", "data.path", "experiment")
THROUGHPUT_METRICS = ("perf/tflops_per_gpu", "perf/tokens_per_second")
SCORE = re.compile(r"/(.*_)?(accuracy|f1|exact_match|perplexity|adjusted_perplexity)(_.*)?$")
LOWER_IS_BETTER = re.compile(r"(loss|perplexity|_time|_ms|_s)$")
NOT_FINITE = re.compile(r"\b(nan|inf|infinite|non-?finite|not finite)\b", re.IGNORECASE)
SHORT_KEYS = {
    "optimizer.lr": "learning rate",
    "layernorm": "LayerNorm",
    "model.num_layers": "layers",
}


def format_number(value: Any) -> str:
    """A swept value as short as it can be said: 0.003, 1e-04, pre, null."""
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def name_value(key: str, value: Any) -> str:
    """`LayerNorm post`, `learning rate 0.003`, `12 layers`: a swept value in words."""
    if key == "model.num_layers":
        return f"{value} layers"
    if key in ("task", "model", "size"):
        return f"{value}"
    return f"{name_key(key)} {format_number(value)}"


def name_key(key: str) -> str:
    """A swept key in words: its last part, unless the field has a better name for it."""
    return SHORT_KEYS.get(key, key.rpartition(".")[2].replace("_", " "))


def lower_is_better(metric: str) -> bool:
    return LOWER_IS_BETTER.search(metric) is not None


@dataclass(frozen=True)
class Spread:
    """Median and range over `n` seeds. A run whose value is not finite counts as infinite."""

    median: float
    min: float
    max: float
    n: int


def has_diverged(run: Run) -> bool:
    """Whether the final loss is not finite, or held-out loss lies at or above the unigram entropy.

    A model there predicts no better than character (token) frequencies alone. A failed run counts
    when its error says that the loss was not finite.
    """
    losses = [run.final(metric) for metric in ("train/loss", *LANGUAGE_LOSSES)]
    if any(loss is not None and not math.isfinite(loss) for loss in losses):
        return True
    if run.status == "failed":
        return NOT_FINITE.search(run.error) is not None
    entropy = run.final(UNIGRAM_ENTROPY)
    held_out = next((loss for loss in losses[1:] if loss is not None), None)
    return entropy is not None and held_out is not None and held_out >= entropy


@dataclass(frozen=True)
class Group:
    """The runs that share all swept values; `values` is in the order of the section's keys."""

    values: dict[str, Any]
    runs: list[Run]

    @property
    def label(self) -> str:
        return ", ".join(name_value(key, value) for key, value in self.values.items()) or "all runs"

    @cached_property
    def judged(self) -> list[Run]:
        """Runs that ended with a verdict: `ok`, or failed because the loss diverged."""
        return [
            r for r in self.runs if r.status == "ok" or (r.status == "failed" and has_diverged(r))
        ]

    @cached_property
    def num_diverged(self) -> int:
        return sum(has_diverged(run) for run in self.judged)

    def spread(self, metric: str) -> Spread | None:
        """Median and range of the metric's final values; None if no judged run has it.

        A failed run counts only through a loss that ended as infinite: its last finite loss is not
        a final one.
        """
        values = []
        for run in self.judged:
            if run.status == "ok" and (value := run.final(metric)) is not None:
                values.append(value)
            elif run.status == "failed" and metric.endswith("loss"):
                values.append(math.inf)
        if not values:
            return None
        return Spread(statistics.median(values), min(values), max(values), len(values))


def _question(group: Group, metric: str) -> tuple[Any, ...]:
    """What a group's metric may be compared within: faster is not better if smaller."""
    keys = (*QUESTION_KEYS, "size") if metric.startswith("perf/") else QUESTION_KEYS
    return tuple(group.values.get(key) for key in keys)


@dataclass(frozen=True)
class Section:
    """All runs of one command, grouped by the keys that were swept."""

    command: str
    keys: list[str]
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    def name(self, key: str, value: Any) -> str:
        """A swept value in words; of paths, what lies below the folder that they share."""
        paths = {str(group.values[key]) for group in self.groups if group.values[key]}
        with contextlib.suppress(ValueError):  # some absolute, some not
            shared = os.path.commonpath(paths)
            if shared and len(paths) > 1 and str(value) in paths - {shared}:
                value = os.path.relpath(value, shared)
        return name_value(key, value)

    @cached_property
    def metrics(self) -> list[str]:
        """Every numeric metric of the judged runs' results, by name."""
        found = {
            key
            for group in self.groups
            for run in group.judged
            for key, value in run.result.items()
            if METRIC.fullmatch(key) and is_metric(value)
        }
        return sorted(found)

    @cached_property
    def main_metrics(self) -> list[str]:
        """What the command is judged by: held-out loss, scores, or throughput; the first that
        exist.
        """
        scores = [metric for metric in self.metrics if SCORE.search(metric)]
        throughput = [metric for metric in THROUGHPUT_METRICS if metric in self.metrics]
        losses = [metric for metric in ("val/loss", "train/loss") if metric in self.metrics][:1]
        order = {"pretrain": (losses, scores), "benchmark": (throughput, losses)}
        choices = order.get(self.command, (scores, losses))
        return next((metrics for metrics in (*choices, throughput) if metrics), [])

    @cached_property
    def unigram_entropies(self) -> list[float]:
        """The distinct unigram entropies of the held-out text over all runs, in nats."""
        values = {run.final(UNIGRAM_ENTROPY) for run in self.runs}
        return sorted(
            {round(value, 3) for value in values if value is not None and math.isfinite(value)}
        )

    def best(self, metric: str) -> set[int]:
        """Indices of the groups with the best median, one for each question (task, model, data)
        asked twice or more. One seed has no range to win by: such a group is none of them.
        """
        return {i for i in self._leading(metric) if i not in self._of_one_seed(metric)}

    def has_one_seed(self, metric: str) -> bool:
        """Whether a group that others are compared with has no range."""
        return bool(self._leading(metric)) and bool(self._of_one_seed(metric))

    def _of_one_seed(self, metric: str) -> set[int]:
        spreads = [group.spread(metric) for group in self.groups]
        return {index for index, spread in enumerate(spreads) if spread and spread.n == 1}

    def _leading(self, metric: str) -> list[int]:
        """The group with the best median of each question that several groups answer."""
        questions: dict[tuple[Any, ...], dict[int, float]] = {}
        for index, group in enumerate(self.groups):
            spread = group.spread(metric)
            if spread is not None and math.isfinite(spread.median):
                questions.setdefault(_question(group, metric), {})[index] = spread.median
        choose = min if lower_is_better(metric) else max
        return [
            choose(medians, key=medians.__getitem__)
            for medians in questions.values()
            if len(medians) > 1
        ]

    def is_close(self, metric: str) -> bool:
        """Whether some best group's range over the seeds overlaps that of another group of the same
        question.
        """
        for index in self.best(metric):
            best = self.groups[index]
            for other in self.groups:
                same = _question(best, metric) == _question(other, metric)
                a, b = best.spread(metric), other.spread(metric)
                if other is not best and same and a and b and a.min <= b.max and b.min <= a.max:
                    return True
        return False

    @property
    def constants(self) -> str:
        """What all runs have in common: model, size, parameters, tokens, steps, seeds."""
        parts = []
        for key in ("model", "size", "layernorm"):
            values = {run.result.get(key) for run in self.runs} - {None}
            if len(values) == 1 and key not in self.keys:
                value = values.pop()
                parts.append(f"LayerNorm {value}" if key == "layernorm" else str(value))
        for key, unit in (
            ("num_parameters", "parameters"),
            ("steps", "steps"),
            ("tokens", "tokens"),
        ):
            values = {run.result.get(key) for run in self.runs if run.status == "ok"} - {None}
            if len(values) == 1:
                parts.append(f"{values.pop():,} {unit}")
        seeds = sorted({str(run.seed) for run in self.runs if run.seed is not None}, key=_natural)
        if len(seeds) > 6:
            parts.append(f"{len(seeds)} seeds")
        elif seeds:
            parts.append(("seeds " if len(seeds) > 1 else "seed ") + ", ".join(seeds))
        return "; ".join(parts)


def _natural(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then words by letter."""
    try:
        return (False, float(value), "")
    except (OverflowError, TypeError, ValueError):
        return (True, 0.0, str(value))


def order_values(runs: Sequence[Run], key: str) -> list[Any]:
    """The values that `key` takes: sizes by parameter count, others by number or letter."""
    sizes: dict[Any, float] = {}
    for run in runs:
        sizes.setdefault(run.value(key), 0.0)
        if key == "size":
            count = float(run.result.get("num_parameters") or 0)
            sizes[run.value(key)] = max(sizes[run.value(key)], count)
    return sorted(sizes, key=lambda value: (sizes[value], _natural(value)))


def group_runs(runs: Sequence[Run], command: str) -> Section:
    """Group one command's runs by the keys that were swept, in natural order."""
    keys = find_swept_keys(runs)
    orders = [order_values(runs, key) for key in keys]
    groups: dict[tuple[int, ...], list[Run]] = {}
    for run in runs:
        at = tuple(o.index(run.value(key)) for key, o in zip(keys, orders, strict=True))
        groups.setdefault(at, []).append(run)
    named = [
        Group({key: o[i] for key, o, i in zip(keys, orders, at, strict=True)}, groups[at])
        for at in sorted(groups)
    ]
    return Section(command, keys, named)


def split_sections(collection: Collection) -> list[Section]:
    """One section for each command that was run: a pretraining loss and a finetuning score share no
    table. A run that a protocol made twice counts once.
    """
    runs = drop_repeated(collection.readable)
    commands = dict.fromkeys(run.command for run in runs if run.result.get("command"))
    default = next(iter(commands), "pretrain")  # what a job without a result yet most likely is
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(run.result.get("command") or default, []).append(run)
    return [group_runs(runs, command) for command, runs in named.items()]
