"""What `hydratron protocol` found: medians of seeds, their ensemble, and test scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydratron.report.files import is_number, plain, read_object
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
    directory = run.path.parent.parent
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


def _read_summary(directory: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The number of seeds, and the numbers of the median and of the ensemble."""
    summary = read_object(directory / SUMMARY)
    ensemble, test = summary.get("ensemble"), summary.get("test_ensemble", {})
    scores = summary.get("scores")
    if not isinstance(ensemble, dict) or not isinstance(test, dict) or not isinstance(scores, list):
        raise ValueError(f"{SUMMARY} is no summary of a finished protocol")
    median, both = (
        {k: v for k, v in d.items() if is_number(v)} for d in (summary, ensemble | test)
    )
    return len(scores), median, both


def read_protocols(runs: Sequence[Run]) -> tuple[list[ProtocolScores], list[tuple[str, str]]]:
    """The finished protocols that `runs` belong to, in their order, each once; and those that
    cannot be read, by name, each with the reason.
    """
    found, problems = [], []
    for directory, run in {
        d: run for run in reversed(runs) if (d := protocol_directory(run))
    }.items():
        try:
            scores = _read_summary(directory)
        except (OSError, ValueError) as error:
            problems.append((plain(directory.name), plain(str(error))))
            continue
        model = run.value("model.path") or run.value("checkpoint") or directory.name
        name = plain(Path(str(model)).name)
        found.append(ProtocolScores(directory, str(run.value("task")), name, *scores))
    return found[::-1], problems
