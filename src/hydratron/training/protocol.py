"""The published protocol: a grid, seeds at its best point, their median and their ensemble.

Shoeybi et al. 2019, section 5.3: batch size and learning rate are tuned first; the median of five
seeds on the development set is reported, and RACE's test score is that of the median's checkpoint.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NULL_THRESHOLD = "val/null_threshold"


@dataclass(frozen=True)
class Scored:
    """A finished run and the score that decides."""

    path: Path
    score: float
    result: Mapping[str, Any]


def read_sweep(directory: Path) -> list[Scored]:
    """Return the jobs of a sweep in their order.

    Raises:
        ValueError: a job did not end well; names the first and its error.
    """
    found: list[Scored] = []
    jobs = [path for path in directory.iterdir() if path.name.isdigit()]
    for path in sorted(jobs, key=lambda path: int(path.name)):
        file = path / "result.json"
        result = json.loads(file.read_text()) if file.is_file() else {"status": "unfinished"}
        if result["status"] != "ok":
            reason = result.get("error") or result["status"]
            raise ValueError(f"{path}: {reason}; the same command goes on from here")
        found.append(Scored(path, float(result[result["selection_metric"]]), result))
    return found


def best(runs: Sequence[Scored]) -> Scored:
    """Return the run of the highest score, the first of equal ones."""
    return max(runs, key=lambda run: run.score)


def median(runs: Sequence[Scored]) -> Scored:
    """Return the run of the median score, the lower one of an even number."""
    return sorted(runs, key=lambda run: run.score)[(len(runs) - 1) // 2]


def summarize(runs: Sequence[Scored]) -> dict[str, Any]:
    """Return the median over runs of every metric, and which run is the median."""
    metric = runs[0].result["selection_metric"]
    keys = [k for k in runs[0].result if k.startswith("val/")]
    return {
        "selection_metric": metric,
        "scores": [run.score for run in runs],
        "median_run": str(median(runs).path),
    } | {key: statistics.median(run.result[key] for run in runs) for key in keys}


@dataclass(frozen=True)
class Protocol:
    """Runs the protocol's commands below `output`, each unless it has been run.

    `hydratron` runs a command by its arguments and raises where it does not end well.
    """

    output: Path
    hydratron: Callable[..., None]

    def choose(self, given: Mapping[str, str], grid: Sequence[str], seed: str) -> dict[str, str]:
        """Return the best point of `grid`, the keys of `given` with several values, each point
        trained with `seed`.
        """
        if not grid:
            return {}
        winner = best(self._sweep(dict(given) | {"seed": seed}, self.output / "grid"))
        chosen = winner.result["overrides"]
        return {key: str(chosen[key.lstrip("+")]) for key in grid}

    def score(self, given: Mapping[str, str], seeds: str) -> dict[str, Any]:
        """Train all seeds; return medians and the ensemble, and test scores where a test is named.

        The test scores are those of the median's checkpoint.
        """
        runs = self._sweep(dict(given) | {"seed": seeds}, self.output / "seeds")
        paths = ",".join(str(run.path) for run in runs)
        summary = summarize(runs)
        summary["ensemble"] = self._evaluate(self.output / "ensemble", f"runs=[{paths}]")
        if "task.test_path" not in given:
            return summary
        return summary | self._test(runs, summary["ensemble"].get(NULL_THRESHOLD))

    def _test(self, runs: Sequence[Scored], threshold: float | None) -> dict[str, Any]:
        """Return the test scores of the median's checkpoint, and the ensemble's at `threshold`, the
        one that was tuned for it in validation (SQuAD 2.0; each run has its own).
        """
        folders = [self.output / "test" / run.path.name for run in runs]
        found = [
            self._evaluate(folder, f"checkpoint={run.path}", "split=test")
            for run, folder in zip(runs, folders, strict=True)
        ]
        paths = ",".join(map(str, folders))
        tuned = [] if threshold is None else [f"task.null_threshold={threshold}"]
        directory = self.output / "test_ensemble"
        mean = self._evaluate(directory, f"runs=[{paths}]", "split=test", *tuned)
        return found[runs.index(median(runs))] | {"test_ensemble": mean}

    def _sweep(self, given: Mapping[str, str], directory: Path) -> list[Scored]:
        """Finetune every point of a sweep, or what is missing of it."""
        if (directory / "multirun.yaml").is_file():
            self.hydratron("finetune", "-m", f"resume={directory}")
        else:
            overrides = [f"{key}={value}" for key, value in given.items()]
            self.hydratron("finetune", "-m", *overrides, f"hydra.sweep.dir={directory}")
        return read_sweep(directory)

    def _evaluate(self, directory: Path, *arguments: str) -> dict[str, float]:
        file = directory / "result.json"
        if not file.is_file() or json.loads(file.read_text())["status"] != "ok":
            file.unlink(missing_ok=True)
            self.hydratron("evaluate", *arguments, f"hydra.run.dir={directory}")
        result = json.loads(file.read_text())
        return {key: value for key, value in result.items() if key.startswith(("val/", "test/"))}
