"""What `hydratron plan` says: a table, a CSV and two figures from rows of estimates.

A row is flat: layout, `step_ms` with its parts, `peak_gib` with its parts, `days`, `gpu_hours`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from rich.console import Console

from hydratron.report.canvas import (
    FAINT,
    INK,
    RC,
    STYLES,
    add_legend,
    add_title,
    make_panels,
    save_figure,
    style_of,
)
from hydratron.report.tables import Table, print_table

Row = dict[str, Any]
MEMORY_PARTS = ("parameters", "optimizer", "gradients", "activations")


def describe_split(row: Row) -> str:
    """A split in a few words, `TP 4 x DP 128, 8 a pass`."""
    words = f"TP {row['tensor_parallel_size']} x DP {row['data_parallel_size']}"
    words += f", {row['micro_batch_size']} a pass"
    if row["recompute"] != "none":
        words += f", recompute {row['recompute']}"
    return words + (", sharded optimizer" if row["shard_optimizer"] else "")


def describe_replica(row: Row) -> str:
    """What one replica of a split is, `TP 4, 8 x 1 sequences`."""
    batch = f"{row['micro_batch_size']} x {row['num_micro_batches']} sequences"
    return f"TP {row['tensor_parallel_size']}, {batch} a replica"


def plan_table(rows: Sequence[Row], title: str, notes: Sequence[str]) -> Table:
    """The rows in their order, ranked."""
    columns = ["", "TP", "DP", "micro-batch", "recompute", "sharded", "step (ms)"]
    columns += ["TFLOP/s per GPU", "of peak (%)", "peak (GiB)", "days", "GPU-hours"]
    cells = [
        [
            str(rank),
            str(row["tensor_parallel_size"]),
            str(row["data_parallel_size"]),
            f"{row['micro_batch_size']} x {row['num_micro_batches']}",
            row["recompute"],
            "yes" if row["shard_optimizer"] else "no",
            f"{row['step_ms']:,.1f}",
            f"{row['tflops_per_gpu']:.0f}",
            f"{100 * row['mfu']:.1f}",
            f"{row['peak_gib']:.1f}",
            f"{row['days']:.1f}",
            f"{row['gpu_hours']:,.0f}",
        ]
        for rank, row in enumerate(rows, start=1)
    ]
    return Table(title, columns, cells, notes=list(notes))


def own_note(own: Row | None, rows: Sequence[Row], *, wanted_gpus: int, limit_gib: float) -> str:
    """What became of the split that the configuration itself names."""
    if own is None:
        return f"The configuration's own split is for {wanted_gpus} GPU{'s' * (wanted_gpus > 1)}."
    said = f"The configuration's own split ({describe_split(own)})"
    memory = f"{own['peak_gib']:.1f} of {limit_gib:.1f} GiB"
    if not own["fits"]:
        return f"{said} does not fit: {memory}."
    fitting = [row for row in rows if row["fits"]]
    slower = 100 * (own["step_ms"] / fitting[0]["step_ms"] - 1)
    rank = f"rank {fitting.index(own) + 1} of {len(fitting)}"
    behind = f", {slower:.1f} % slower than the first" if slower else ""
    return f"{said} fits, {memory}: {rank}{behind}."


def show_plan(
    rows: Sequence[Row],
    console: Console,
    directory: Path,
    *,
    own: Row | None,
    wanted_gpus: int,
    impossible: Sequence[str],
    scaling: Sequence[Row],
    limit_gib: float,
    num_shown: int,
    title: str,
) -> list[Path]:
    """Print the fastest rows and why others do not fit; write plan.csv, scaling.csv, two figures.

    `rows`: those that fit from the fastest on, then the others from the smallest on.
    """
    fitting = [row for row in rows if row["fits"]]
    too_big = [row for row in rows if not row["fits"]]
    notes = [own_note(own, rows, wanted_gpus=wanted_gpus, limit_gib=limit_gib)]
    notes += [f"Too big: {row['peak_gib']:.1f} GiB, {describe_split(row)}" for row in too_big[:3]]
    if len(too_big) > 3:
        notes.append(f"Too big: {len(too_big) - 3} more, in plan.csv")
    print_table(plan_table(fitting[:num_shown], title, [*notes, *impossible]), console)
    bars = [*fitting[:num_shown], *too_big[:2]]
    pd.DataFrame(rows).to_csv(directory / "plan.csv", index=False)
    pd.DataFrame(scaling).to_csv(directory / "scaling.csv", index=False)
    return [
        directory / "plan.csv",
        directory / "scaling.csv",
        memory_bars(bars, directory / "memory", limit_gib=limit_gib, title=title),
        scaling_curves({describe_replica(scaling[0]): scaling}, directory / "scaling", title=title),
    ]


def memory_bars(rows: Sequence[Row], path: Path, *, limit_gib: float, title: str) -> Path:
    """Peak memory of each row by what fills it, with the line of what a GPU has."""
    with mpl.rc_context(RC):
        figure, grid = make_panels(1, 1, height=0.8 + 0.34 * len(rows), labels=MEMORY_PARTS)
        axes = grid.flat[0]
        left = [0.0] * len(rows)
        for (color, _, _), part, hatch in zip(
            STYLES, MEMORY_PARTS, ("", "////", "xxxx", "\\\\\\\\"), strict=False
        ):
            widths = [row[f"{part}_gib"] for row in rows]
            axes.barh(
                range(len(rows)), widths, left=left, height=0.66, color=color, alpha=0.85,
                hatch=hatch, edgecolor="white", linewidth=0.4,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.axvline(limit_gib, color=INK, linestyle=(0, (1, 2)), linewidth=1.2)
        axes.annotate(
            f"{limit_gib:.1f} GiB", (limit_gib, len(rows) - 0.5), ha="right", va="bottom",
            xytext=(-3, 2), textcoords="offset points", fontsize=8,
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [describe_split(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", color=FAINT)
        axes.set_xlabel("peak memory of a GPU (GiB)")
        add_legend(
            figure,
            {part: (style[0], "-", "s") for part, style in zip(MEMORY_PARTS, STYLES, strict=False)},
        )
        add_title(figure, "Memory of a GPU by split", title)
        return save_figure(figure, path)


def scaling_curves(curves: dict[str, Sequence[Row]], path: Path, *, title: str) -> Path:
    """Weak scaling: TFLOP/s of a GPU, over the GPUs, and its share of the first point."""
    entries = {name: style_of(None, None, i) for i, name in enumerate(curves)}
    with mpl.rc_context(RC):
        figure, grid = make_panels(1, 1, height=2.9, labels=list(curves))
        axes = grid.flat[0]
        for name, rows in curves.items():
            color, dashes, marker = entries[name]
            x, y = [row["gpus"] for row in rows], [row["tflops_per_gpu"] for row in rows]
            axes.plot(x, y, color=color, linestyle=dashes, marker=marker, ms=4.5)
            share = 100 * y[-1] / y[0]
            axes.annotate(
                f"{share:.0f} %", (x[-1], y[-1]), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=8, color=color,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08)
        axes.set_xlabel("GPUs, each replica's batch the same")
        axes.set_ylabel("model TFLOP/s per GPU")
        add_legend(figure, entries)
        add_title(figure, "Weak scaling", title)
        return save_figure(figure, path)
