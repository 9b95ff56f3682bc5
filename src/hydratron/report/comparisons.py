"""Groups side by side: where training diverged, scores, and throughput."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from hydratron.report.canvas import (
    FAINT,
    INK,
    RC,
    add_title,
    count_seeds,
    make_panels,
    save_figure,
    style_of,
    verbatim,
)
from hydratron.report.groups import (
    Group,
    Section,
    format_number,
    name_key,
    name_value,
    order_values,
)
from hydratron.report.tables import format_metric, name_metric

DEPTH_KEYS = ("model.num_layers", "size")
# Light to dark in one direction, so that a grey print keeps the order.
SHARE_COLORS = LinearSegmentedColormap.from_list(
    "share", ["#f4f4f2", "#f0b48a", "#D55E00", "#7a2f00"]
)
# Throughputs closer than this are the machine's noise, unless throughput was the question.
NOTABLE_SPEED_RATIO = 1.1


def divergence_map(section: Section, path: Path) -> Path | None:
    """Share of diverged runs over learning rate and depth, a panel per LayerNorm placement.

    None unless learning rate and depth were both swept.
    """
    depth = next((key for key in DEPTH_KEYS if key in section.keys), None)
    if depth is None or "optimizer.lr" not in section.keys:
        return None
    placement = "layernorm" if "layernorm" in section.keys else None
    panels, rates = (
        order_values(section.runs, placement) if placement else [None],
        order_values(section.runs, "optimizer.lr"),
    )
    depths = order_values(section.runs, depth)
    with mpl.rc_context(RC):
        height = max(2.2, 0.9 + 0.5 * len(depths))
        figure, grid = make_panels(1, len(panels), height=height)
        for axes, value in zip(grid.flat, panels, strict=True):
            groups = [
                g for g in section.groups if placement is None or g.values[placement] == value
            ]
            cells: dict[tuple[int, int], list[Group]] = {}
            for group in groups:
                at = rates.index(group.values["optimizer.lr"]), depths.index(group.values[depth])
                cells.setdefault(at, []).append(group)
            _draw_cells(axes, cells, (len(rates), len(depths)))
            axes.set_xticks(range(len(rates)), [verbatim(format_number(rate)) for rate in rates])
            axes.set_yticks(range(len(depths)), [verbatim(format_number(d)) for d in depths])
            if placement:
                axes.set_title(verbatim(name_value(placement, value)), loc="left")
        figure.supxlabel("learning rate", fontsize=9)
        grid.flat[0].set_ylabel(name_key(depth))
        subtitle = "cell: diverged of all ended runs, median held-out loss; hatched: no run"
        add_title(figure, "Where training diverges", f"{subtitle}; {section.constants}")
        return save_figure(figure, path)


def _draw_cells(
    axes: Axes, cells: dict[tuple[int, int], list[Group]], shape: tuple[int, int]
) -> None:
    """Colour each cell by its share of diverged runs; hatch those that no run has reached."""
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for x in range(shape[0]):
        for y in range(shape[1]):
            groups = cells.get((x, y), [])
            judged = sum(len(group.judged) for group in groups)
            box: dict[str, Any] = {"xy": (x - 0.48, y - 0.46), "width": 0.96, "height": 0.92}
            if not judged:
                axes.add_patch(Rectangle(**box, fill=False, hatch="///", edgecolor="#c8c8c8", lw=0))
                continue
            diverged = sum(group.num_diverged for group in groups)
            share = diverged / judged
            axes.add_patch(Rectangle(**box, facecolor=SHARE_COLORS(share), edgecolor="none"))
            color = "white" if share > 0.6 else INK
            axes.text(x, y, f"{diverged} of {judged}", ha="center", va="bottom", color=color)
            spread = groups[0].spread("val/loss") if len(groups) == 1 else None
            if spread is not None:
                said = format_metric("val/loss", spread.median)
                axes.text(x, y - 0.06, said, ha="center", va="top", color=color, fontsize=8)
    axes.set_xlim(-0.55, shape[0] - 0.45)
    axes.set_ylim(-0.55, shape[1] - 0.45)


def _draw_bar(axes: Axes, group: Group, row: int, metric: str, *, bars: bool) -> None:
    spread = group.spread(metric)
    if spread is None or not math.isfinite(spread.max):
        axes.annotate(
            "no finite value", (0.01, row), xycoords=axes.get_yaxis_transform(), va="center"
        )
        return
    placement = group.values.get("layernorm")
    color, _, marker = style_of("layernorm" if placement else None, placement, 0)
    error = [[spread.median - spread.min], [spread.max - spread.median]]
    if bars:
        hatch = "////" if placement == "post" else None  # told apart in grey as well
        axes.barh(
            row, spread.median, height=0.62, color=color, alpha=0.85, hatch=hatch, edgecolor="white"
        )
    else:
        axes.plot(spread.median, row, marker=marker, color=color, ms=7)
    if spread.n > 1:
        axes.errorbar(spread.median, row, xerr=error, color=INK, capsize=3, elinewidth=1.2)
    text = f"{format_metric(metric, spread.median)}"
    axes.annotate(text, (spread.max, row), xytext=(7, 0), textcoords="offset points", va="center")


def group_bars(section: Section, metric: str, path: Path, *, bars: bool) -> Path | None:
    """One metric for every group, median with its range: bars from zero, or points."""
    groups = [group for group in section.groups if group.spread(metric)]
    if len(groups) < 2:
        return None
    with mpl.rc_context(RC):
        figure, grid = make_panels(1, 1, height=0.6 + 0.34 * len(groups))
        axes = grid.flat[0]
        for row, group in enumerate(groups):
            _draw_bar(axes, group, row, metric, bars=bars)
        axes.set_yticks(range(len(groups)), [verbatim(group.label) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.margins(x=0.18)
        if bars:
            axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(not bars)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", color=FAINT)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if bars:
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
        axes.set_xlabel(verbatim(name_metric(metric)))
        name = name_metric(metric)
        seeds = count_seeds(section)
        said = f"median of {seeds} with range" if "seeds" in seeds else "1 seed"
        title = f"{name[0].upper()}{name[1:]}, {said}"
        add_title(figure, title, f"{section.command}: {section.constants}")
        return save_figure(figure, path)


def throughput_bars(section: Section, path: Path) -> Path | None:
    """Throughput by group; None where groups hardly differ and nobody benchmarked."""
    for metric in ("perf/tflops_per_gpu", "perf/tokens_per_second"):
        medians = [spread.median for group in section.groups if (spread := group.spread(metric))]
        if len(medians) < 2 or not min(medians) > 0:
            continue
        if section.command == "benchmark" or np.ptp(medians) > (NOTABLE_SPEED_RATIO - 1) * min(
            medians
        ):
            return group_bars(section, metric, path, bars=True)
    return None
