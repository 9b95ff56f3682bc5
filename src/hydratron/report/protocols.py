"""What `hydratron protocol` found: medians of seeds, their ensemble, and test scores."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydratron.report.runs import Run

SUMMARY = "protocol.json"


@dataclass(frozen=True)
class ProtocolScores:
    """A finished protocol: its directory, task and model; metrics of the median and of the
    ensemble. A test score of the median is that of the median run's checkpoint.
    """

    directory: Path
    task: str
    model: str
    num_seeds: int
    median: Mapping[str, Any]
    ensemble: Mapping[str, Any]


def protocol_directory(run: Run) -> Path | None:
    """The directory of the protocol that a run of a grid or of seeds belongs to."""
    directory = run.path.parents[1]
    return directory if (directory / SUMMARY).is_file() else None


def drop_repeated(runs: Sequence[Run]) -> list[Run]:
    """`runs` without the one of a protocol's grid that its seeds repeat, seed and settings."""
    seeds = [
        (directory, run.overrides)
        for run in runs
        if run.path.parent.name == "seeds" and (directory := protocol_directory(run))
    ]
    return [
        run
        for run in runs
        if run.path.parent.name != "grid" or (protocol_directory(run), run.overrides) not in seeds
    ]


def find_protocols(runs: Sequence[Run]) -> list[ProtocolScores]:
    """The finished protocols that `runs` belong to, in their order, each once."""
    found: dict[Path, ProtocolScores] = {}
    for run in runs:
        directory = protocol_directory(run)
        if directory is None or directory in found:
            continue
        summary = json.loads((directory / SUMMARY).read_text())
        model = run.value("model.path") or run.value("checkpoint") or directory.name
        found[directory] = ProtocolScores(
            directory,
            task=str(run.value("task")),
            model=Path(str(model)).name,
            num_seeds=len(summary["scores"]),
            median=summary,
            ensemble=summary["ensemble"] | summary.get("test_ensemble", {}),
        )
    return list(found.values())
