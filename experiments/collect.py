"""From the run directories of an experiment to the files that are kept of them.

python experiments/collect.py DIR experiments/NN_SLUG --hardware "1 x NVIDIA H200" --commit 1a2b3c4

writes results.csv, a row for each run with its held-out losses along the way or its scores. Instead
--layer-steps 1 10: gradient_norms.csv, of runs with trainer.log_layer_norms; --curves: curves.csv,
the losses by step. --name FILE is another file name; --add keeps the rows that the file has of
other runs; --replace /tmp/corpus corpora/novels changes what stands in the commands.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hydratron.report.groups import SCORE, UNIGRAM_ENTROPY
from hydratron.report.layers import LAYER_NORM
from hydratron.report.runs import UNREADABLE, Run, load_runs

SWEPT = ("seed", "model.num_layers", "layernorm", "init", "optimizer.lr")
# columns where runs differ in them
ALSO_SWEPT = ("task", "size", "model.hidden_size", "warmup_steps")
KEPT = ("status", "num_parameters", "steps", "tokens", "train/loss", "val/loss", UNIGRAM_ENTROPY)
CURVES = ("train/loss", "val/loss")


def setting(run: Run, key: str) -> Any:
    """A run's value of a column; of its warmup the steps, also where a fraction was given."""
    if key != "warmup_steps":
        return run.value(key)
    steps = run.value("optimizer.warmup_steps")
    fraction, max_steps = map(run.value, ("optimizer.warmup_fraction", "trainer.max_steps"))
    if steps is None and fraction is not None and max_steps is not None:
        return round(fraction * max_steps)
    return steps


def swept_keys(runs: Sequence[Run], columns: Sequence[str] = ()) -> list[str]:
    """The columns that tell runs apart, from each other and from those of a file with `columns`."""
    also = [k for k in ALSO_SWEPT if k in columns or len({setting(run, k) for run in runs}) > 1]
    return [SWEPT[0], *also, *SWEPT[1:]]


def hydra_text(value: Any) -> str:
    """An override's value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def command_line(run: Run, replaced: Sequence[Sequence[str]]) -> str:
    """What repeats this run alone, with each old of `replaced` as its new."""
    given = {k: hydra_text(v) for k, v in run.overrides.items() if k != "resume"}
    line = " ".join(["hydratron", run.command, *(f"{k}={v}" for k, v in given.items())])
    for old, new in replaced:
        line = line.replace(old, new)
    return line


def result_row(run: Run) -> dict[str, Any]:
    """Final metrics, seconds of training steps, and `val/loss@STEP`.

    The last logged values stand in for those that a failed run could not write.
    """
    row: dict[str, Any] = {}
    for key in (*KEPT, *filter(SCORE.search, run.result)):
        row[key] = run.final(key) if "/" in key else run.result.get(key)
    row["status"] = run.status
    if not run.result:  # killed after its last step, before it could write one
        row |= {"steps": run.metrics.index.max(), "tokens": run.final("train/tokens")}
    pace = run.series("perf/step_ms")
    if len(pace):
        num_steps = pd.Series(pace.index, pace.index).diff().fillna(pace.index[0])
        row["training_s"] = round(float((pace * num_steps).sum() / 1e3), 1)
    if run.command == "pretrain":
        row |= {f"val/loss@{step}": value for step, value in run.series("val/loss").items()}
    return row


def stray_validations(runs: Sequence[Run]) -> list[str]:
    """The `val/loss@STEP` where a run that was stopped and went on validated besides: others that
    trained as far did not. One that ended before says nothing of a step.
    """
    validated = {run.path: set(run.series("val/loss").index) for run in runs}
    reached = {
        run.path: max(run.result.get("steps") or 0, *run.series("train/loss").index, 0)
        for run in runs
    }
    steps = sorted(set().union(*validated.values()))
    is_stray = {
        step: not any(reached[path] >= step for path in validated)
        or any(reached[path] >= step and step not in validated[path] for path in validated)
        for step in steps
    }
    return [f"val/loss@{step}" for step in steps if is_stray[step]]


def layer_rows(run: Run, steps: Sequence[int]) -> list[dict[str, Any]]:
    """The gradient norm of every layer at `steps`."""
    frame = run.metrics.filter(regex=LAYER_NORM)
    return [
        {"step": step, "layer": int(re.findall(r"\d+", name)[0]), "norm": norm}
        for step in steps
        for name, norm in (frame.loc[step].items() if len(frame.columns) else ())
    ]


def curve_rows(run: Run) -> list[dict[str, Any]]:
    """The losses of every step at which one was logged."""
    frame = pd.DataFrame({key: run.series(key) for key in CURVES})
    size = run.value("size")
    return [{"size": size, "step": step, **row.dropna()} for step, row in frame.iterrows()]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--layer-steps", type=int, nargs="*", default=[])
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--name")
    parser.add_argument("--add", action="store_true")
    replaced = {"nargs": 2, "action": "append", "default": [], "metavar": ("OLD", "NEW")}
    parser.add_argument("--replace", **replaced)
    return parser.parse_args()


def main() -> None:
    """Read the runs, write the file."""
    options = parse_arguments()
    collection = load_runs([options.directory])
    runs = collection.readable
    for run in collection.runs:
        if run.status == UNREADABLE:
            print(f"left out: {run.name}: {run.error}")
    name, by_run = "results.csv", [[result_row(run)] for run in runs]
    if options.layer_steps:
        name = "gradient_norms.csv"
        by_run = [layer_rows(run, options.layer_steps) for run in runs]
    elif options.curves:
        name, by_run = "curves.csv", [curve_rows(run) for run in runs]
    path = options.output / (options.name or name)
    kept = pd.read_csv(path) if options.add else pd.DataFrame()
    swept = swept_keys(runs, list(kept.columns))
    facts = {"hardware": options.hardware, "commit": options.commit}
    rows = []
    for run, found in zip(runs, by_run, strict=True):
        if name == "results.csv":
            facts["command"] = command_line(run, options.replace)
        settings = {key: setting(run, key) for key in swept}
        rows += [settings | row | facts for row in found]
    frame = pd.DataFrame(rows)
    stray = [column for column in stray_validations(runs) if column in frame]
    if stray:
        print(f"left out, as not every run that got there validated there: {', '.join(stray)}")
    frame = frame.drop(columns=stray).dropna(axis="columns", how="all")
    keys = [key for key in (*swept, "step", "layer") if key in frame or key in kept]
    if options.add:
        frame = pd.concat([kept, frame]).drop_duplicates(keys, keep="last")
    ends = [column for column in facts if column in frame]
    frame = frame[[*(c for c in frame if c not in ends), *ends]].sort_values(keys, kind="stable")
    options.output.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
