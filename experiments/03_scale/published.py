"""Predict the published weak-scaling rows; writes `published.csv` and `published_scaling.png`.

    python experiments/03_scale/published.py

Each table is calibrated on its one-GPU row alone (one share of peak for matrix products). The code
that was measured differs from ours, and the step is traced as it was: 16-bit weights with masters,
attention scores in memory, no sequence parallelism, every layer computed again to its end.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from predict import model_of, read

from hydratron.models.config import ModelConfig
from hydratron.perf.calibration import calibrate
from hydratron.perf.estimates import at_batch
from hydratron.perf.hardware import Hardware
from hydratron.perf.recorder import StepTraces
from hydratron.perf.roofline import StepTime, step_time
from hydratron.perf.step import StepConfig, trace_passes, trace_update
from hydratron.report.planning import scaling_curves

HERE = Path(__file__).parent
A100_SHAPES = {"1.2b": 1, "2b": 2, "4.2b": 4, "8.7b": 8}  # tensor-parallel size
V100_SHAPES = {  # Shoeybi et al. 2019, table 1: layers, hidden size, heads, tensor-parallel size
    "1.2b": (40, 1536, 16, 1),
    "2.5b": (54, 1920, 20, 2),
    "4.2b": (64, 2304, 24, 4),
    "8.3b": (72, 3072, 32, 8),
}
# Megatron-LM of September 2020: milliseconds of an iteration
A100_MS = {"1.2b": 1076, "2b": 1026, "4.2b": 1162, "8.7b": 1343}  # batch 16
A100_DP_MS = {"1.2b": 1153, "2b": 1101, "4.2b": 1242, "8.7b": 1380}  # 128 replicas of batch 16
V100_MS = {"1.2b": 1121, "2b": 1093, "4.2b": 1238, "8.7b": 1407}  # batch 8
# Shoeybi et al. 2019, figure 5: share of 39 TFLOP/s, in percent; abstract: 76 on 512 GPUs
V100_PAPER_SHARE = {("8.3b", 1): 77.0, ("8.3b", 64): 74.0}
V100_PAPER_TFLOPS = 39.0


@dataclass(frozen=True)
class Row:
    """One configuration of a table; `published` is milliseconds, or a share in percent."""

    table: str
    size: str
    config: StepConfig
    published: float | None


def megatron_step(model: ModelConfig, batch: int, tp: int, dp: int, *, fused: bool) -> StepConfig:
    """Return the step of Megatron-LM's code."""
    return StepConfig(
        replace(model, recompute="full"),
        seq_len=1024,
        num_predictions=1024,
        micro_batch_size=batch,
        tensor_parallel_size=tp,
        data_parallel_size=dp,
        precision="bf16-true",
        compiled=fused,
        fused_attention=False,
        sequence_parallel=False,
    )


def hardware_flops(config: StepConfig) -> float:
    """Return the FLOPs of a GPU's iteration as the tables count them: four passes over the layers
    (Megatron-LM: 96 B S L H^2 (1 + S/6H + V/16LH)).
    """
    model, seq_len = config.model, config.seq_len
    hidden, layers = model.hidden_size, model.num_layers
    correction = 1 + seq_len / (6 * hidden) + model.vocab_size / (16 * layers * hidden)
    flops = 96 * config.micro_batch_size * seq_len * layers * hidden**2 * correction
    return flops / config.tensor_parallel_size


def traces_of(config: StepConfig) -> StepTraces:
    """Trace a step as it was run: fused where it says so, but with nothing left out.

    From micro-batches of two and three, whose tokens no weight has as its first dimension.
    """
    key = replace(config, data_parallel_size=min(config.data_parallel_size, 2))
    twos, threes = (replace(key, micro_batch_size=size) for size in (2, 3))
    first, second = (
        at_batch(trace_passes(twos, n), trace_passes(threes, n), config.micro_batch_size - 1)
        for n in (1, 2)
    )
    return StepTraces((first, second), (trace_update(key, 1), trace_update(key, 2)))


def tables() -> dict[str, tuple[Hardware, float, list[Row]]]:
    """Return each table's cluster, the seconds of its one-GPU row, and its rows."""
    a100 = Hardware(**(read("hardware", "a100_40gb") | {"num_nodes": 128}))
    v100 = Hardware(**(read("hardware", "v100_32gb") | {"num_nodes": 32}))

    def rows(
        name: str, sizes: dict[str, int], batch: int, dp: int, published: dict[str, int]
    ) -> list[Row]:
        steps = {
            size: megatron_step(model_of("gpt2", size), batch, tp, dp, fused=True)
            for size, tp in sizes.items()
        }
        return [Row(name, size, step, published[size]) for size, step in steps.items()]

    paper = []
    for dp in (1, 64):
        for size, (layers, hidden, heads, tp) in V100_SHAPES.items():
            shape = {"num_layers": layers, "hidden_size": hidden, "num_heads": heads}
            model = replace(model_of("gpt2", "1.2b"), intermediate_size=None, **shape)
            step = megatron_step(model, 8, tp, dp, fused=False)
            published = V100_PAPER_SHARE.get((size, dp))
            paper.append(Row(f"V100 paper, DP {dp}", size, step, published))
    first = hardware_flops(paper[0].config) / (V100_PAPER_TFLOPS * 1e12)
    a100_rows = rows("A100, batch 16", A100_SHAPES, 16, 1, A100_MS)
    a100_rows += rows("A100, batch 16, DP 128", A100_SHAPES, 16, 128, A100_DP_MS)
    return {
        "A100": (a100, A100_MS["1.2b"] / 1e3, a100_rows),
        "V100": (v100, V100_MS["1.2b"] / 1e3, rows("V100, batch 8", A100_SHAPES, 8, 1, V100_MS)),
        "V100 paper": (v100, first, paper),
    }


def predicted(hardware: Hardware, seconds: float, rows: list[Row]) -> list[tuple[Row, StepTime]]:
    """Calibrate on the first row, then time all of them."""
    first = rows[0].config
    calibrated = calibrate(hardware, first, traces_of(first), seconds)
    print(f"{rows[0].table}: product_efficiency {calibrated.product_efficiency}")
    return [(row, step_time(row.config, calibrated, traces_of(row.config))) for row in rows]


def main() -> None:
    """Write a row of figures for each published one."""
    lines: list[dict[str, Any]] = []
    for hardware, seconds, rows in tables().values():
        timed = predicted(hardware, seconds, rows)
        best = hardware_flops(rows[0].config) / timed[0][1].total
        for row, time in timed:
            rate = hardware_flops(row.config) / time.total
            is_share = row.table.startswith("V100 paper")
            guess = 100 * rate / best if is_share else time.total * 1e3
            error = None if row.published is None else guess - row.published
            if error is not None and not is_share:
                error = 100 * error / row.published
            lines.append(
                {
                    "table": row.table,
                    "size": row.size,
                    "gpus": row.config.world_size,
                    "tensor_parallel_size": row.config.tensor_parallel_size,
                    "data_parallel_size": row.config.data_parallel_size,
                    "unit": "% of 39 TFLOP/s" if is_share else "ms",
                    "published": row.published,
                    "predicted": round(guess, 1),
                    "error": None if error is None else round(error, 1),
                    "error_unit": "points" if is_share else "%",
                    "tflops_per_gpu": round(rate / 1e12, 1),
                    "tensor_parallel_ms": round(time.tensor_parallel * 1e3, 1),
                    "data_parallel_ms": round(time.data_parallel * 1e3, 1),
                }
            )
            print(lines[-1])
    with (HERE / "published.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    draw(HERE)


def draw(directory: Path) -> None:
    """Draw TFLOP/s of a GPU over the GPUs, as predicted and as published in `published.csv`."""
    lines = pd.read_csv(HERE / "published.csv").to_dict("records")
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(line["table"] for line in lines):
        rows = [line for line in lines if line["table"] == name]
        curves[f"{name}: predicted"] = rows
        if rows[0]["unit"] == "ms":
            curves[f"{name}: published"] = [
                row
                | {"tflops_per_gpu": row["tflops_per_gpu"] * row["predicted"] / row["published"]}
                for row in rows
            ]
    title = "GPT-2, recomputed FLOPs counted, as published"
    scaling_curves(curves, directory / "published_scaling", title=title)


if __name__ == "__main__":
    main()
