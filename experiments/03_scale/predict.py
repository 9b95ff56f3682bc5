"""Predict the configurations of `configurations.csv`; writes `predictions.csv` beside it.

    python experiments/03_scale/predict.py

Nothing is measured here: the file is committed before anybody measures.
"""

import csv
from pathlib import Path
from typing import Any

import yaml

from hydratron.models.config import ModelConfig
from hydratron.perf.estimates import Estimator
from hydratron.perf.hardware import GIB, Hardware
from hydratron.perf.step import StepConfig

HERE = Path(__file__).parent
CONF = HERE.parents[1] / "conf"
BERT_PREDICTIONS = 77  # 15 % of 512 tokens less three special ones, rounded up


def read(group: str, name: str) -> dict[str, Any]:
    """Return what a file of the configuration tree holds."""
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())


def model_of(family: str, size: str, **changes: Any) -> ModelConfig:
    """Return the network of a size, as `hydratron pretrain model= size=` has it."""
    values = read("model", family)["model"] | read("size", size)["model"]
    values |= {"layernorm": "pre", "init": "scaled", "layernorm_eps": 1e-5}
    return ModelConfig(**(values | changes))


def step_of(row: dict[str, str]) -> StepConfig:
    """Return the step of a row of `configurations.csv`."""
    changes: dict[str, Any] = {"recompute": row["recompute"], "layernorm": row["layernorm"]}
    if row["num_heads"]:
        changes["num_heads"] = int(row["num_heads"])
    model = model_of(row["model"], row["size"], **changes)
    is_bert = model.family == "bert"
    return StepConfig(
        model,
        seq_len=model.max_seq_len,
        num_predictions=BERT_PREDICTIONS if is_bert else model.max_seq_len,
        micro_batch_size=int(row["batch"]) // int(row["data_parallel_size"]),
        tensor_parallel_size=int(row["tensor_parallel_size"]),
        data_parallel_size=int(row["data_parallel_size"]),
    )


def main() -> None:
    """Write a row of figures for each configuration."""
    estimator = Estimator()
    hardware = Hardware(**read("hardware", "h200"))
    with (HERE / "configurations.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        made = estimator.estimate(step_of(row), hardware)
        row["predicted_step_ms"] = f"{made.time.total * 1e3:.1f}"
        row["predicted_peak_memory_gib"] = f"{made.peak_bytes / GIB:.2f}"
        row["predicted_tflops_per_gpu"] = f"{made.tflops_per_gpu:.0f}"
        row["predicted_mfu"] = f"{made.mfu:.3f}"
    with (HERE / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
