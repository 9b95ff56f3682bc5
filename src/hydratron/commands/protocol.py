"""`hydratron protocol`: grid, then seeds at its best, their median and their ensemble.

The arguments are those of `hydratron finetune`; what has several values is the grid, `seed=` are
the seeds. A protocol that was interrupted goes on when the same command is given again.
"""

import datetime
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydratron import launch
from hydratron.training.protocol import Scored, best, median, read_sweep, summarize

SEEDS = "1,2,3,4,5"


def is_grid(value: str) -> bool:
    """Whether Hydra would sweep over this value: a comma outside of any bracket, or a function."""
    depth = 0
    for character in value:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            return True
    return value.startswith(("choice(", "range(", "glob("))


def main(arguments: list[str]) -> None:
    """Run the protocol; write `protocol.json` and print where everything is."""
    wrong = [a for a in arguments if "=" not in a]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not KEY=VALUE: give what hydratron finetune takes")
    given = dict(argument.split("=", 1) for argument in arguments)
    now = datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    output = Path(given.pop("output", f"outputs/protocol/{now}"))
    seeds = given.pop("seed", SEEDS)
    grid = [key for key, value in given.items() if is_grid(value)]
    chosen: dict[str, str] = {}
    if grid:
        first = seeds.partition(",")[0]
        winner = best(sweep(given | {"seed": first}, output / "grid"))
        chosen = {key: str(winner.result["overrides"][key]) for key in grid}
        print(f"best of the grid: {settings(chosen)}  {winner.score:.4f}", flush=True)
    runs = sweep(given | chosen | {"seed": seeds}, output / "seeds")
    summary: dict[str, Any] = {"chosen": chosen} | summarize(runs)
    summary["ensemble"] = ensemble(runs, output)
    if "task.test_path" in given:
        summary |= test(runs, output)
    (output / "protocol.json").write_text(json.dumps(summary, indent=2) + "\n")
    metric = summary["selection_metric"]
    spread = f"{min(summary['scores']):.4f} to {max(summary['scores']):.4f}"
    print(f"median of {len(runs)} seeds: {metric} {summary[metric]:.4f} ({spread})")
    print(output / "protocol.json")


def settings(given: dict[str, str]) -> str:
    """Return overrides as they are typed."""
    return " ".join(f"{key}={value}" for key, value in given.items())


def sweep(given: dict[str, str], directory: Path) -> list[Scored]:
    """Finetune every point of a sweep, or what is missing of it."""
    if (directory / "multirun.yaml").is_file():
        hydratron("finetune", "-m", f"resume={directory}")
    else:
        overrides = [f"{key}={value}" for key, value in given.items()]
        hydratron("finetune", "-m", *overrides, f"hydra.sweep.dir={directory}")
    return read_sweep(directory)


def ensemble(runs: list[Scored], output: Path) -> dict[str, Any]:
    """Score the mean of all seeds on the development set."""
    paths = ",".join(str(run.path) for run in runs)
    return evaluate(output / "ensemble", f"runs=[{paths}]")


def test(runs: list[Scored], output: Path) -> dict[str, Any]:
    """Score the median's checkpoint and the ensemble on the test set."""
    folders = [output / "test" / run.path.name for run in runs]
    found = [
        evaluate(folder, f"checkpoint={run.path}", "split=test")
        for run, folder in zip(runs, folders, strict=True)
    ]
    paths = ",".join(map(str, folders))
    mean = evaluate(output / "test_ensemble", f"runs=[{paths}]", "split=test")
    return found[runs.index(median(runs))] | {"test_ensemble": mean}


def evaluate(directory: Path, *arguments: str) -> dict[str, float]:
    """Run `hydratron evaluate` unless it has been, and return its metrics."""
    file = directory / launch.RESULT
    if not file.is_file() or json.loads(file.read_text())["status"] != "ok":
        file.unlink(missing_ok=True)
        hydratron("evaluate", *arguments, f"hydra.run.dir={directory}")
    result = json.loads(file.read_text())
    return {key: value for key, value in result.items() if key.startswith(("val/", "test/"))}


def hydratron(*arguments: str) -> None:
    """Run a command as a process of its own; SIGTERM is passed on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hydratron.cli", *arguments], preexec_fn=launch.end_with_parent
    )
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if status:
        raise launch.JobFailed(f"hydratron {arguments[0]} ended with {status}", status=status)
