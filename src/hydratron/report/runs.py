"""Run directories as data: each job's result, overrides and logged metrics, and which jobs of a
sweep are missing.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from hydratron.report.files import (
    is_number,
    parse_overrides,
    parse_value,
    plain,
    read_lines,
    read_metrics,
    read_node,
    read_result,
)

STATUSES = ("ok", "failed", "preempted", "running", "missing")
# The seed is the axis that is summarised, never a group; the others say where a run lives, not what
# it is.
NEVER_SWEPT = frozenset({"seed", "resume", "logger"})
# Facts of result.json that tell runs apart even where no override names them (other experiment
# files).
RESULT_KEYS = ("model", "size", "layernorm", "tensor_parallel_size", "data_parallel_size")
# How a loss or a score was computed, not what it is of: shown only where nothing else differs.
COMPUTE_KEYS = (
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.async_checkpoints",
    "data.num_workers",
    "data.micro_batch_size",
)
UNREADABLE = "unreadable"
# More jobs than anybody starts: a sweep that says so is not written out.
MOST_JOBS = 100_000
KEY_ORDER = ("task", "model", "size", "model.num_layers", "layernorm", "optimizer.lr")


def _split_top_level(text: str) -> list[str]:
    """Split at the commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (not quote) * ((char in "([{") - (char in ")]}"))
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def sweep_choices(value: Any) -> list[Any] | None:
    """The values that one override of a multirun takes, as Hydra's basic sweeper reads it.

    `a,b`, `choice(a,b)` and `range(start,stop,step)` are understood; None for what cannot be
    counted from the text alone (`glob(*)`, `interval(0,1)`).
    """
    text = str(value).strip()
    call = re.fullmatch(r"(\w+)\((.*)\)", text, re.DOTALL)
    if call is None:
        return [parse_value(part) for part in _split_top_level(text)]
    name, arguments = call[1], _split_top_level(call[2])
    if name == "choice":
        return [parse_value(part) for part in arguments]
    numbers = [parse_value(part.rpartition("=")[2]) for part in arguments]
    if name == "range" and all(map(is_number, numbers)):
        start, stop, step = (0, *numbers, 1)[:3] if len(numbers) == 1 else (*numbers, 1)[:3]
        count = max(0.0, (stop - start) / step) if step else math.inf
        if count <= MOST_JOBS:
            return [start + i * step for i in range(math.ceil(count))]
    return None


@dataclass(frozen=True)
class Run:
    """One job's directory. `result` is empty while the job runs, or when it was killed before it
    could write.
    """

    path: Path
    result: dict[str, Any]
    overrides: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return plain(self.path.name)

    @property
    def status(self) -> str:
        """ok, failed or preempted as the job wrote it; running when it wrote no result (or was
        killed); unreadable where its files are not what they should be.
        """
        return str(self.result.get("status", "running"))

    @property
    def command(self) -> str:
        return str(self.result.get("command", "pretrain"))

    @property
    def error(self) -> str:
        """The first line of the error, never empty for a failed run."""
        return self.result.get("error") or "no error was recorded"

    @property
    def seed(self) -> Any:
        return self.value("seed")

    def value(self, key: str) -> Any:
        """What `key` was in this run: its override, else the result's, else the configuration's;
        None if unknown.
        """
        if key in self.overrides:
            return self.overrides[key]
        if not isinstance(self.result.get(key), dict | list | None):
            return parse_value(self.result[key])
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is None or isinstance(node, dict):  # a group: its name is a choice, not a value
            node = self.choices.get(key)
        return parse_value(node)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """metrics.csv indexed by step, one row per step; empty if nothing was logged."""
        return read_metrics(self.path / "metrics.csv")

    def series(self, metric: str) -> pd.Series:
        """The logged values of a metric by step. A logged nan is given as inf, so that it cannot
        pass for a gap.
        """
        if metric not in self.metrics:
            return pd.Series(dtype=float)
        return pd.Series(self.metrics[metric]).dropna()

    def measured(self, metric: str) -> float | None:
        """A number of result.json; None if it has none, or a word."""
        value = parse_value(self.result.get(metric))
        return float(value) if is_number(value) else None

    def final(self, metric: str) -> float | None:
        """The metric's final value: from result.json, else the last one logged; nan counts as inf;
        None if absent.
        """
        if metric in self.result:
            value = parse_value(self.result[metric])
            return float(value) if isinstance(value, int | float) else math.inf
        series = self.series(metric)
        return None if series.empty else float(series.iloc[-1])

    @property
    def last_written(self) -> float:
        """When the job last wrote its metrics, or else started (Unix seconds)."""
        candidates = (self.path / "metrics.csv", self.path / ".hydra" / "overrides.yaml", self.path)
        return next(path.stat().st_mtime for path in candidates if path.exists())

    @property
    def started(self) -> float:
        """When Hydra wrote the job's configuration (Unix seconds)."""
        hydra = self.path / ".hydra" / "overrides.yaml"
        return (hydra if hydra.exists() else self.path).stat().st_mtime


@dataclass(frozen=True)
class Sweep:
    """A Hydra multirun directory: the jobs it was to run. `expected` is None where they cannot be
    counted; `problem` says what is wrong with its multirun.yaml.
    """

    path: Path
    expected: int | None
    combinations: list[dict[str, Any]]
    problem: str = ""

    def missing(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """The combinations of swept values that no run of this sweep has."""
        here = [run.overrides for run in runs if run.path.is_relative_to(self.path)]
        return [
            wanted
            for wanted in self.combinations
            if not any(wanted.items() <= overrides.items() for overrides in here)
        ]


def load_sweep(path: Path) -> Sweep | None:
    """Read `path/multirun.yaml`; None if it is no sweep of its own (one that resumes another)."""
    file = path / "multirun.yaml"
    try:
        sweeper = read_node(file, "hydra", "sweeper")
        num_trials = parse_value(sweeper.get("n_trials"))
        params = read_node(file, "hydra", "sweeper", "params")
        overrides = read_node(file, "hydra", "overrides").get("task") or []
        if not isinstance(overrides, list) or not all(isinstance(line, str) for line in overrides):
            raise ValueError(f"{file.name}: overrides.task is not a list of words")
        if num_trials is not None and not is_number(num_trials, 0):
            raise ValueError(f"{file.name}: n_trials {num_trials} is not a number")
    except (OSError, ValueError) as error:
        return Sweep(path, None, [], problem=plain(str(error)))
    texts = {str(key): value for key, value in params.items()}
    texts |= {line.partition("=")[0]: line.partition("=")[2] for line in overrides}
    texts = {plain(k.lstrip("+")): v for k, v in texts.items() if not k.startswith("~")}
    if "resume" in texts:
        return None
    if num_trials is not None:  # a search, not a grid: values are drawn as it goes
        return Sweep(path, int(num_trials), [])
    choices = {key: sweep_choices(value) for key, value in texts.items()}
    swept = {key: values for key, values in choices.items() if values and len(values) > 1}
    expected = math.prod(map(len, swept.values()))
    if any(values is None for values in choices.values()) or expected > MOST_JOBS:
        return Sweep(path, None, [])
    combinations = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    return Sweep(path, expected, combinations)


def load_run(path: Path) -> Run:
    """Read one run directory; `unreadable`, with the reason as its error, where a file of it is
    not what it should be.
    """
    try:
        result = read_result(path / "result.json")
        read_metrics(path / "metrics.csv")
        try:
            return Run(path, result, _overrides(path, result), *_configuration(path))
        except ValueError:
            if result:
                raise
            return Run(path, {}, {})  # Hydra is still writing them, or was killed
    except (OSError, ValueError) as error:
        problem = {"status": UNREADABLE, "error": plain(str(error))}
    with contextlib.suppress(OSError, ValueError):
        return Run(path, problem, _overrides(path, {}))
    return Run(path, problem, {})


def _configuration(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Hydra composed, and the choices of its groups."""
    hydra = path / ".hydra"
    return (
        read_node(hydra / "config.yaml"),
        read_node(hydra / "hydra.yaml", "hydra", "runtime", "choices"),
    )


def _overrides(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    written = result.get("overrides")
    if written is not None:
        return {plain(key.lstrip("+")): parse_value(value) for key, value in written.items()}
    return parse_overrides(read_lines(path / ".hydra" / "overrides.yaml"))


def _walk(directory: Path) -> Iterator[Path]:
    """`directory` and what lies below it, but nothing inside a run: its checkpoints hold thousands
    of files.
    """
    yield directory
    if is_run(directory) and not (directory / "multirun.yaml").exists():
        return
    for child in sorted(directory.iterdir(), key=lambda path: (len(path.name), path.name)):
        if child.is_dir() and not child.is_symlink() and child.name != ".hydra":
            yield from _walk(child)


def is_run(path: Path) -> bool:
    """Whether a job has started in `path`, or may have: nobody knows where it cannot be looked
    into.
    """
    if not os.access(path, os.R_OK | os.X_OK):
        return True
    return (path / "result.json").exists() or (path / ".hydra" / "overrides.yaml").exists()


@dataclass(frozen=True)
class Collection:
    """All runs and sweeps found below the directories that were asked for."""

    runs: list[Run]
    sweeps: list[Sweep]

    @property
    def readable(self) -> list[Run]:
        return [run for run in self.runs if run.status != UNREADABLE]

    @cached_property
    def missing(self) -> list[dict[str, Any]]:
        """Swept values of the jobs that should be there and are not, over all sweeps."""
        return [wanted for sweep in self.sweeps for wanted in sweep.missing(self.runs)]

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many jobs there are of each status, missing ones included."""
        counts: dict[str, int] = {status: 0 for status in STATUSES}
        for run in self.runs:
            counts[run.status] = counts.get(run.status, 0) + 1
        for sweep in self.sweeps:
            here = sum(run.path.is_relative_to(sweep.path) for run in self.runs)
            known = len(sweep.missing(self.runs))
            counts["missing"] += (
                known if sweep.combinations else max(0, (sweep.expected or 0) - here)
            )
        return counts

    @property
    def num_expected(self) -> int:
        return sum(self.counts.values())

    @property
    def complete(self) -> bool:
        """Whether every expected job has ended, well or not."""
        return bool(self.runs) and self.counts["running"] == self.counts["missing"] == 0

    def describe(self) -> str:
        """One line: `8 of 8 jobs ok`, or `partial: 5 of 8 jobs ok, 1 failed, 2 missing`."""
        counts = self.counts
        text = f"{counts['ok']} of {self.num_expected} jobs ok"
        for status, count in counts.items():
            if status != "ok" and count:
                text += f", {count} " + ("running or killed" if status == "running" else status)
        running = [run.last_written for run in self.runs if run.status == "running"]
        if running:
            text += f" (last wrote {(time.time() - max(running)) / 60:.0f} min ago)"
        return text if counts["ok"] == self.num_expected else f"partial: {text}"


def load_runs(directories: Sequence[Path]) -> Collection:
    """Find every run and sweep below `directories`, each once. ValueError for a path that is no
    directory.
    """
    runs: dict[Path, Run] = {}
    sweeps: dict[Path, Sweep] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        for path in _walk(directory.resolve()):
            if path not in runs and is_run(path):
                runs[path] = load_run(path)
            if path not in sweeps and (path / "multirun.yaml").exists():
                sweep = load_sweep(path)
                if sweep is not None:
                    sweeps[path] = sweep
    return Collection(list(runs.values()), list(sweeps.values()))


def _count_groups(runs: Sequence[Run], keys: Sequence[str]) -> int:
    """How many groups of runs these keys tell apart."""
    return len({tuple(run.value(key) for key in keys) for run in runs})


def find_swept_keys(runs: Sequence[Run]) -> list[str]:
    """The keys whose values differ between runs, never `seed`, in the order a table shows them.

    A fact of result.json (model, size, ...) joins only if it tells apart runs that the overrides do
    not. What only says how it was computed is left out where other keys tell the runs apart, unless
    their speed is the question.
    """
    named = {key for run in runs for key in run.overrides} - NEVER_SWEPT
    keys = sorted(key for key in named if len({run.value(key) for run in runs}) > 1)
    for key in RESULT_KEYS:
        split = _count_groups([run for run in runs if run.result], [*keys, key])
        if key not in keys and split > _count_groups(runs, keys):
            keys.append(key)
    for key in list(keys):
        group = key.partition(".")[0]
        is_place = key.endswith("path") and group != key and group in keys
        # where a task's files lie follows from which one it is
        if is_place and _count_groups(runs, [group, key]) == _count_groups(runs, [group]):
            keys.remove(key)
    if all(run.command != "benchmark" for run in runs):
        for key in COMPUTE_KEYS:
            others = [name for name in keys if name != key]
            if key in keys and _count_groups(runs, others) == _count_groups(runs, keys):
                keys = others
    return sorted(keys, key=lambda key: (KEY_ORDER.index(key) if key in KEY_ORDER else 99, key))
