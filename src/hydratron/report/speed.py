"""Benchmarks: a row for each configuration and its peer, and how throughput scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hydratron.report.groups import Section
from hydratron.report.runs import Run
from hydratron.report.tables import Table, save_csv

OURS = "hydratron"
Row = dict[str, Any]
BREAKDOWN = ("matrix_products", "attention", "other_kernels", "exposed_communication", "idle")
# What is not in result.json under its own name.
SETTINGS = {
    "precision": "trainer.precision",
    "recompute": "model.recompute",
    "dropout": "model.hidden_dropout",
    "cuda_graphs": "trainer.cuda_graphs",
    "interleave": "parallel.interleave",
}
# How our kernels are launched, where not one by one in the layers' order; a peer's always are.
LAUNCHING = ("cuda_graphs", "interleave")
RATES = (
    "step_ms",
    "step_ms_low",
    "step_ms_high",
    "tokens_per_second",
    "sequences_per_second",
    "tflops_per_gpu",
    "tflops_per_gpu_with_recomputation",
    "mfu",
    "peak_memory_gib",
    "lightning_overhead",
    *(f"breakdown/{kind}_ms" for kind in BREAKDOWN),
)
SHAPE = (
    "model",
    "size",
    "layernorm",
    "precision",
    "recompute",
    *LAUNCHING,
    "tensor_parallel_size",
    "data_parallel_size",
    "batch",
    "seq_len",
    "dropout",
)


def speed_rows(run: Run) -> list[Row]:
    """Return what a benchmark measured: a row for our step and, if there was one, the peer's.

    `mfu` is a fraction of the device's 16-bit peak, times are in ms, memory in GiB.
    """
    shape = {key: run.value(SETTINGS.get(key, key)) for key in SHAPE}
    shape["num_parameters"] = run.result.get("num_parameters")
    shape["batch"] = run.result.get("batch")
    for key in ("tensor_parallel_size", "data_parallel_size"):
        shape[key] = run.result.get(key) or 1
    peer = run.value("timing.peer") or "peer"
    rows = []
    for prefix, name in (("perf", OURS), ("peer", peer)):
        found = {key: run.measured(f"{prefix}/{key}") for key in RATES}
        if found["step_ms"] is not None:
            launching = {} if name == OURS else dict.fromkeys(LAUNCHING, False)
            rows.append(shape | launching | {"implementation": name} | found)
    settings = " ".join(f"{key}={value}" for key, value in run.overrides.items())
    for row in rows:
        row |= {"device": run.result.get("device"), "commit": run.result.get("git_commit")}
        row["command"] = f"hydratron {run.command} {settings}"
    return rows


def section_rows(section: Section) -> list[Row]:
    """Return the rows of every finished run of a section."""
    return [row for run in section.runs for row in speed_rows(run)]


def write_rows(section: Section, path: Path) -> None:
    """Write the rows of a section as CSV."""
    save_csv(pd.DataFrame(section_rows(section)), path, float_format="%.6g")


@dataclass(frozen=True)
class Scaling:
    """Throughput beside that of the first row: three definitions, as fractions.

    `flops`: TFLOP/s per GPU over the first row's. `parameters`: parameters per GPU and second over
    the first row's, which reproduces Megatron's published table. `time`: the first row's step time
    over this one's.
    """

    flops: float
    parameters: float
    time: float


# What a row has to share with the one-GPU row that it is compared with; the size grows.
ALIKE = ("model", "layernorm", "precision", "recompute", "seq_len", "dropout")


def _alike(row: Row) -> tuple[Any, ...]:
    """Settings, how kernels are launched, and the batch of a replica."""
    batch = row["batch"] / row["data_parallel_size"] if row["batch"] else None
    return (*(row[key] for key in ALIKE), *(bool(row[key]) for key in LAUNCHING), batch)


def one_gpu_row(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the row of one GPU that `row` scales from: of `rows`, the one alike whose size is
    nearest to what a GPU of `row` holds. None if there is none.
    """
    if not row["num_parameters"]:
        return None
    share = row["num_parameters"] / row["tensor_parallel_size"]
    alike = [r for r in rows if r["num_parameters"] and _alike(r) == _alike(row)]
    alike = [r for r in alike if _num_gpus(r) == 1]
    return min(alike, key=lambda r: abs(math.log(r["num_parameters"] / share)), default=None)


def weak_scaling(row: Row, first: Row | None) -> Scaling | None:
    """Return how `row` scales against `first`, where each tensor-parallel GPU has its own share.

    None where there is no such row, or a figure of either is missing.
    """
    needed = ("num_parameters", "tflops_per_gpu", "step_ms")
    if first is None or not all(r[key] and r[key] > 0 for r in (row, first) for key in needed):
        return None

    def parameters_per_second(r: Row) -> float:
        return r["num_parameters"] / r["tensor_parallel_size"] / r["step_ms"]

    return Scaling(
        flops=row["tflops_per_gpu"] / first["tflops_per_gpu"],
        parameters=parameters_per_second(row) / parameters_per_second(first),
        time=first["step_ms"] / row["step_ms"],
    )


def format_cell(value: float | None, form: str, *, factor: float = 1.0) -> str:
    """A number in Python's `form`, times `factor`; a dash for None."""
    return "–" if value is None else format(factor * value, form)


def _name(row: Row) -> str:
    name = f"{row['model']} {row['size']} {row['layernorm']}, {row['precision']}"
    if row["recompute"] not in (None, "none"):
        name += f", recompute {row['recompute']}"
    name += _launching(row)
    return name if row["implementation"] == OURS else f"{row['implementation']}: {name}"


def _launching(row: Row) -> str:
    return "".join(f", {key}" for key in LAUNCHING if row[key])


def _grid(row: Row) -> str:
    return f"{row['tensor_parallel_size']} x {row['data_parallel_size']}"


def speed_tables(section: Section) -> list[Table]:
    """Return the table of steps, where the time goes, and scaling where there is any."""
    rows = section_rows(section)
    return [_steps(rows), *_breakdown(rows), *_scaling(rows)] if rows else []


def _steps(rows: Sequence[Row]) -> Table:
    columns = ["", "TP x DP", "batch", "step (ms)", "quartiles", "sequences/s", "TFLOP/s per GPU"]
    columns += ["with recomputation", "of peak (%)", "memory (GiB)", "Lightning (%)"]
    cells = [
        [
            _name(row),
            _grid(row),
            f"{row['batch']} x {row['seq_len']}",
            format_cell(row["step_ms"], ".2f"),
            f"{format_cell(row['step_ms_low'], '.2f')} – {format_cell(row['step_ms_high'], '.2f')}",
            format_cell(row["sequences_per_second"], ".1f"),
            format_cell(row["tflops_per_gpu"], ".4g"),
            format_cell(row["tflops_per_gpu_with_recomputation"], ".4g"),
            format_cell(row["mfu"], ".1f", factor=100),
            format_cell(row["peak_memory_gib"], ".1f"),
            format_cell(row["lightning_overhead"], ".1f", factor=100),
        ]
        for row in rows
    ]
    notes = [
        "Medians. TFLOP/s: model FLOPs, three passes; 'with recomputation' counts the layers a"
        " fourth time, as Megatron's 96-formula does, whether or not anything is recomputed",
        "Lightning: how much longer the step takes than a bare loop over the same network",
    ]
    return Table("benchmark: training steps", columns, cells, notes=notes)


def _breakdown(rows: Sequence[Row]) -> list[Table]:
    names = [f"breakdown/{kind}_ms" for kind in BREAKDOWN]
    cells = [
        [_name(row), str(row["tensor_parallel_size"]), *(format_cell(row[n], ".1f") for n in names)]
        for row in rows
        if any(row[name] is not None for name in names)
    ]
    columns = ["ms a step", "TP", *(kind.replace("_", " ") for kind in BREAKDOWN)]
    return [Table("benchmark: where the time goes", columns, cells)] if cells else []


def _num_gpus(row: Row) -> int:
    return row["tensor_parallel_size"] * row["data_parallel_size"]


def _scaling(rows: Sequence[Row]) -> list[Table]:
    ours: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["implementation"] == OURS:
            ours.setdefault((row["model"], row["precision"]), []).append(row)
    columns = ["size", "TP x DP", "by TFLOP/s (%)", "by parameters (%)", "by step time (%)"]
    note = "Against one GPU at the same batch of a replica, settings and launching; –: not run"
    tables = []
    for (model, precision), part in ours.items():
        found = [weak_scaling(row, one_gpu_row(row, part)) for row in part]
        if min(map(_num_gpus, part)) > 1 or max(map(_num_gpus, part)) == 1:
            continue
        cells = []
        for row, scaling in zip(part, found, strict=True):
            shares = (scaling.flops, scaling.parameters, scaling.time) if scaling else [None] * 3
            name = f"{row['size']}{_launching(row)}"
            cells.append([name, _grid(row), *(format_cell(s, ".1f", factor=100) for s in shares)])
        title = f"benchmark: weak scaling, {model} {precision}"
        tables.append(Table(title, columns, cells, notes=[note]))
    return tables
