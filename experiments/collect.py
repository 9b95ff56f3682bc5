"""From the run directories of an experiment to the files that are kept of them.

python experiments/collect.py DIR experiments/NN_SLUG --hardware "1 x NVIDIA H200" --commit 1a2b3c4

writes results.csv, a row for each run with its held-out losses along the way, and
gradient_norms.csv, if runs were made with trainer.log_layer_norms.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import pandas as pd

from hydratron.report.groups import UNIGRAM_ENTROPY
from hydratron.report.layers import LAYER_NORM
from hydratron.report.runs import Run, load_runs

SWEPT = ("seed", "model.num_layers", "layernorm", "init", "optimizer.lr")
KEPT = ("status", "num_parameters", "steps", "tokens", "train/loss", "val/loss", UNIGRAM_ENTROPY)


def command_line(run: Run) -> str:
    """What repeats this run alone."""
    given = {k: v for k, v in run.overrides.items() if k != "resume"}
    return " ".join(["hydratron", run.command, *(f"{k}={v}" for k, v in given.items())])


def result_row(run: Run) -> dict[str, Any]:
    """Settings, final metrics, seconds of training steps, and `val/loss@STEP`.

    The last logged values stand in for those that a failed run could not write.
    """
    row: dict[str, Any] = {key: run.value(key) for key in SWEPT}
    row |= {key: run.final(key) if "/" in key else run.result.get(key) for key in KEPT}
    pace = run.series("perf/step_ms")
    num_steps = pd.Series(pace.index, pace.index).diff().fillna(pace.index[0])
    row["training_s"] = round(float((pace * num_steps).sum() / 1e3), 1)
    row |= {f"val/loss@{step}": value for step, value in run.series("val/loss").items()}
    return row


def layer_rows(run: Run, steps: list[int]) -> list[dict[str, Any]]:
    """The gradient norm of every layer at `steps`."""
    frame = run.metrics.filter(regex=LAYER_NORM)
    settings = {key: run.value(key) for key in SWEPT}
    return [
        {**settings, "step": step, "layer": int(re.findall(r"\d+", name)[0]), "norm": norm}
        for step in steps
        for name, norm in (frame.loc[step].items() if len(frame.columns) else ())
    ]


def main() -> None:
    """Read the runs, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--layer-steps", type=int, nargs="*", default=[])
    options = parser.parse_args()
    runs = load_runs([options.directory]).runs
    if options.layer_steps:
        frame = pd.DataFrame([row for run in runs for row in layer_rows(run, options.layer_steps)])
        name = "gradient_norms.csv"
    else:
        frame = pd.DataFrame([result_row(run) for run in runs])
        name = "results.csv"
    # a run that was stopped and went on also validated where it stopped
    along = [name for name in frame if name.startswith("val/loss@") and frame[name].isna().any()]
    keys = [key for key in (*SWEPT, "step", "layer") if key in frame]
    frame = frame.drop(columns=along).sort_values(keys, kind="stable")
    frame["hardware"], frame["commit"] = options.hardware, options.commit
    if not options.layer_steps:
        frame["command"] = frame.index.map(lambda index: command_line(runs[index]))
    frame.to_csv(options.output / name, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
