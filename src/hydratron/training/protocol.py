"""The published protocol's choices: the best of a grid, the median of the seeds.

Shoeybi et al. 2019, section 5.3: batch size and learning rate are tuned first; the median of five
seeds on the development set is reported, and RACE's test score is that of the median's checkpoint.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
