"""Loss curves by step, and final loss against model size."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from hydratron.report.canvas import (
    FAINT,
    INK,
    RC,
    STYLES,
    add_legend,
    add_title,
    count_seeds,
    draw_entropies,
    entropy_entries,
    make_panels,
    save_figure,
    style_of,
    verbatim,
)
from hydratron.report.groups import Group, Section, order_values
from hydratron.report.published import BERT_LOSSES, count_parameters
from hydratron.report.scaling import PowerLaw
from hydratron.report.tables import name_metric

SIZE_KEYS = ("size", "model.num_layers", "model.hidden_size", "model")
MAX_PANELS_IN_ROW = 4
MAX_ROWS = 6
# A line of so many sizes gets its power law, where published losses are beside it.
LEAST_FITTED = 3
FIT_DASHES = (0, (1.5, 1))
SEED_LAW = PowerLaw.fit(*zip(*BERT_LOSSES, strict=True))
SEED_STYLE = (STYLES[4][0], FIT_DASHES, "*")
# Stands for infinity where matplotlib needs a number: far outside any loss axis.
FAR = 1e9
Style = tuple[str, Any, str]


@dataclass(frozen=True)
class Layout:
    """Which swept keys are told apart by panel columns, by panel rows, and by line."""

    section: Section
    column: str | None
    row: str | None
    lines: list[str]

    @cached_property
    def panels(self) -> list[tuple[Any, Any]]:
        """The (row, column) values of the panels, row by row.

        Where every column was run with one value of the row's key, these are one row.
        """
        rows, columns = (
            order_values(self.section.runs, key) if key else [None]
            for key in (self.row, self.column)
        )
        found = {self._place(group) for group in self.section.groups}
        if len(found) == len(columns):
            return sorted(found, key=lambda place: columns.index(place[1]))
        return [(row, column) for row in rows for column in columns]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid; a long single row of panels is folded."""
        panels = self.panels
        columns = len({column for _, column in panels})
        if columns == len(panels):
            columns = min(columns, MAX_PANELS_IN_ROW)
        return math.ceil(len(panels) / columns), columns

    def _place(self, group: Group) -> tuple[Any, Any]:
        row, column = (group.values[key] if key else None for key in (self.row, self.column))
        return row, column

    def panel_of(self, group: Group) -> int:
        return self.panels.index(self._place(group))

    def label(self, group: Group) -> str:
        """The group's name within its panel."""
        return verbatim(", ".join(self.section.name(k, group.values[k]) for k in self.lines))

    @cached_property
    def styles(self) -> dict[str, Style]:
        """Colour, dashes and marker of each line label."""
        styles: dict[str, Style] = {}
        for group in self.section.groups:
            key = self.lines[0] if len(self.lines) == 1 else None
            value = group.values[key] if key else None
            styles.setdefault(self.label(group), style_of(key, value, len(styles)))
        return styles

    def title(self, panel: int) -> str:
        pairs = zip((self.row, self.column), self.panels[panel], strict=True)
        return verbatim(", ".join(self.section.name(key, value) for key, value in pairs if key))


def assign_keys(section: Section, without: Sequence[str] = ()) -> Layout:
    """Placement as lines, learning rate as columns, one more key as rows; the rest as lines."""
    keys = [key for key in section.keys if key not in without]
    line = "layernorm" if "layernorm" in keys else (keys[-1] if keys else None)
    rest = [key for key in keys if key != line]
    column = "optimizer.lr" if "optimizer.lr" in rest else (rest[0] if rest else None)
    rest = [key for key in rest if key != column]
    fits = [key for key in rest if len(order_values(section.runs, key)) <= MAX_ROWS]
    wide = column and len(order_values(section.runs, column)) > MAX_ROWS
    row = fits[0] if fits and not wide else None
    return Layout(section, column, row, [k for k in (line, *rest) if k and k != row])


def draw_grid(
    layout: Layout,
    draw: Callable[[Axes, list[Group]], None],
    *,
    height: float,
    entropies: Sequence[float],
    entries: dict[str, Style] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Panels with their titles and a legend, of lines and other `entries`; `draw` fills each from
    its groups.
    """
    named = (layout.styles if layout.lines else {}) | entropy_entries(entropies) | (entries or {})
    figure, grid = make_panels(*layout.shape, height=height, labels=list(named))
    count = len(layout.panels)
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < count)
        if index < count:
            axes.set_title(layout.title(index), loc="left")
            groups = [g for g in layout.section.groups if layout.panel_of(g) == index]
            draw(axes, groups)
            if index >= count - layout.shape[1]:  # nothing below it, also where a row is not full
                axes.tick_params(labelbottom=True)
            if not groups:
                axes.text(0.5, 0.5, "no run", transform=axes.transAxes, ha="center", color=FAINT)
    if named:
        add_legend(figure, named)
    return figure, list(grid.flat[:count])


def curve_range(group: Group, metric: str) -> pd.DataFrame:
    """Median, min and max over the group's runs by step: columns `median`, `min`, `max`.

    A run that ended early because it diverged stays in as infinite; leaving it out would let the
    median of the survivors look better than the group was.
    """
    runs = group.judged or group.runs
    columns = {str(run.path): run.series(metric) for run in runs}
    frame = pd.DataFrame({name: series for name, series in columns.items() if not series.empty})
    if frame.empty:
        return pd.DataFrame(columns=["median", "min", "max"])
    for run in group.judged:
        name = str(run.path)
        if run.status == "failed" and name in frame:
            frame.loc[frame.index > frame[name].last_valid_index(), name] = math.inf
    # A step that only some seeds logged would make the median jump for no reason of the model.
    whole = frame.dropna() if not frame.dropna().empty else frame
    return pd.DataFrame({name: whole.agg(name, axis=1) for name in ("median", "min", "max")})


def _curve_metric(section: Section) -> str | None:
    """Held-out loss where it was logged along the way (3 steps or more), else the training loss."""
    for metric, least in (("val/loss", 3), ("train/loss", 2), ("val/loss", 1)):
        if any(len(run.series(metric)) >= least for run in section.runs):
            return metric
    return None


def _finite(values: Iterable[float]) -> Iterator[float]:
    return (float(value) for value in values if math.isfinite(value))


def _loss_limits(curves: Sequence[pd.DataFrame], entropies: Sequence[float]) -> tuple[float, float]:
    """Bottom and top of the loss axis: curves that blow up leave it."""
    starts = [value for curve in curves for value in _finite(curve["median"].iloc[:1])] or [1.0]
    ends = [value for curve in curves for value in _finite(curve["median"].iloc[-1:])]
    low = min([*(value for curve in curves for value in _finite(curve["min"])), *starts])
    top = max([*starts, *entropies, *(min(end, 1.5 * max(starts)) for end in ends)])
    return low - 0.05 * (top - low), top + 0.04 * (top - low)


def _draw_curve(axes: Axes, curve: pd.DataFrame, style: Style) -> None:
    color, dashes, marker = style
    finite = curve.replace([math.inf, -math.inf], np.nan)
    above = 3 if dashes == "-" else 3.1  # what lies beneath shows through the gaps
    axes.plot(finite.index, finite["median"], color=color, linestyle=dashes, zorder=above)
    low = finite["min"].to_numpy(dtype=float)
    high = curve["max"].replace(math.inf, FAR).to_numpy(dtype=float)
    axes.fill_between(curve.index, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)
    ends = finite["median"].dropna()
    if len(ends):
        broke = len(ends) < len(curve)  # the median became infinite here
        look = {"marker": "x", "ms": 8, "mew": 2.2} if broke else {"marker": marker, "ms": 5}
        axes.plot(ends.index[-1], ends.iloc[-1], color=color, zorder=4, clip_on=False, **look)


def _seeds_said(section: Section, how: str) -> str:
    seeds = count_seeds(section)
    return f"median of {seeds} ({how})" if seeds.endswith("seeds") else seeds


def loss_curves(section: Section, path: Path, metric: str | None = None) -> Path | None:
    """Loss by step: a line per group, panels by learning rate and one more swept key.

    `metric`: val/loss or train/loss, by default what there is enough of.
    """
    metric = metric or _curve_metric(section)
    if metric is None or not any(len(run.series(metric)) > 1 for run in section.runs):
        return None
    layout = assign_keys(section)
    curves = {id(group): curve_range(group, metric) for group in section.groups}
    drawn = [curve for curve in curves.values() if len(curve)]
    entropies = section.unigram_entropies if metric == "val/loss" else []

    def draw(axes: Axes, groups: list[Group]) -> None:
        for group in groups:
            if len(curves[id(group)]):
                _draw_curve(axes, curves[id(group)], layout.styles[layout.label(group)])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    with mpl.rc_context(RC):
        height = 2.9 if layout.shape[0] == 1 else 2.2
        figure, panels = draw_grid(layout, draw, height=height, entropies=entropies)
        panels[0].set_ylim(*_loss_limits(drawn, entropies))
        for index, axes in enumerate(panels):
            draw_entropies(axes, entropies)
            if index % layout.shape[1] == 0:
                axes.set_ylabel(name_metric(metric))
        figure.supxlabel("optimizer step", fontsize=9)
        what = "Held-out loss" if metric == "val/loss" else "Training loss"
        broke = any(math.isinf(value) for curve in drawn for value in curve["max"])
        note = "; shaded to the top or ×: no longer finite" if broke else ""
        subtitle = f"{section.command}: {section.constants}{note}"
        add_title(figure, f"{what}, {_seeds_said(section, 'range shaded')}", subtitle)
        return save_figure(figure, path)


def _size_of(group: Group) -> float | None:
    """The one number of parameters of a group's runs."""
    counts = (run.result.get("num_parameters") for run in group.runs)
    sizes = {float(count) for count in counts if count is not None}
    return sizes.pop() if len(sizes) == 1 else None


def _draw_sizes(axes: Axes, line: list[Group], style: Style) -> list[float]:
    """One setting's losses by size with range bars; returns the finite medians."""
    color, dashes, marker = style
    points = [(size, s) for g in line if (size := _size_of(g)) and (s := g.spread("val/loss"))]
    lost = [size for size, spread in points if not math.isfinite(spread.median)]
    top = axes.get_xaxis_transform()
    axes.plot(
        lost, [0.95] * len(lost), marker="$\\infty$", ls="", color=color, ms=11, transform=top
    )
    points.sort(key=lambda point: point[0])
    points = [point for point in points if math.isfinite(point[1].median)]
    x, y = [size for size, _ in points], [spread.median for _, spread in points]
    highs = [spread.max if math.isfinite(spread.max) else FAR for _, spread in points]
    errors = [[s.median - s.min for _, s in points], [h - m for h, m in zip(highs, y, strict=True)]]
    axes.plot(x, y, color=color, linestyle=dashes, marker=marker, ms=6, zorder=3)
    axes.errorbar(x, y, yerr=errors, color=color, linestyle="none", capsize=3, elinewidth=1.3)
    return y


def _fits(section: Section, layout: Layout) -> dict[str, PowerLaw]:
    """The power law of each line that falls over enough sizes."""
    points: dict[str, list[tuple[float, float]]] = {}
    for group in section.groups:
        if (size := _size_of(group)) and (spread := group.spread("val/loss")):
            points.setdefault(layout.label(group), []).append((size, spread.median))
    fits = {
        label: PowerLaw.fit(*zip(*line, strict=True))
        for label, line in points.items()
        if LEAST_FITTED <= len(line) == len({size for size, _ in line})  # of one panel
        and all(math.isfinite(loss) for _, loss in line)
    }
    return {label: fit for label, fit in fits.items() if fit.exponent > 0}


def _draw_published(axes: Axes, fits: Iterable[PowerLaw]) -> None:
    """The seed's losses, and each fit over the sizes that it is of."""
    color, dashes, marker = SEED_STYLE
    axes.plot(*zip(*BERT_LOSSES, strict=True), marker=marker, ms=9, ls="", color=color, zorder=3)
    for fit in (*fits, SEED_LAW):
        sizes = np.geomspace(fit.smallest, fit.largest)
        axes.plot(sizes, fit(sizes), color=color, linestyle=dashes, linewidth=1.2, zorder=3.5)


def _fit_entries(fits: Mapping[str, PowerLaw]) -> dict[str, Style]:
    """Legend entries that say each exponent."""
    entries: dict[str, Style] = {
        f"seed, its own corpus: parameters^-{SEED_LAW.exponent:.3f}": SEED_STYLE
    }
    for label, fit in fits.items():
        named = f"fit, {label}" if label else "our fit"
        entries[f"{named}: parameters^-{fit.exponent:.3f}"] = (SEED_STYLE[0], FIT_DASHES, "")
    return entries


def loss_by_size(section: Section, path: Path, *, against_seed: bool = False) -> Path | None:
    """Final held-out loss against the number of parameters; None where sizes do not differ.

    `against_seed` adds power laws and the seed's three losses.
    """
    layout = assign_keys(section, without=SIZE_KEYS)
    sizes = {size for g in section.groups if g.spread("val/loss") and (size := _size_of(g))}
    if len(sizes) < 2:
        return None
    fits = _fits(section, layout) if against_seed else {}
    ticks = sorted(sizes | {size for size, _ in BERT_LOSSES}) if against_seed else sorted(sizes)
    medians: list[float] = [loss for _, loss in BERT_LOSSES] if against_seed else []

    def draw(axes: Axes, groups: list[Group]) -> None:
        for label in dict.fromkeys(map(layout.label, groups)):
            line = [group for group in groups if layout.label(group) == label]
            medians.extend(_draw_sizes(axes, line, layout.styles[label]))
        _size_ticks(axes, ticks)
        if against_seed:
            _draw_published(axes, fits.values())

    with mpl.rc_context(RC):
        entropies, entries = section.unigram_entropies, _fit_entries(fits) if against_seed else {}
        figure, panels = draw_grid(layout, draw, height=3.1, entropies=entropies, entries=entries)
        inside = [*medians, *entropies]
        span = (max(inside) - min(inside)) or 1.0
        panels[0].set_ylim(min(inside) - 0.1 * span, max(inside) + 0.1 * span)
        for index, axes in enumerate(panels):
            draw_entropies(axes, entropies)
            if index % layout.shape[1] == 0:
                axes.set_ylabel(name_metric("val/loss"))
        figure.supxlabel("parameters (log scale)", fontsize=9)
        title = f"Final loss by size, {_seeds_said(section, 'bars: range')}"
        add_title(figure, title, f"{section.command}: {section.constants}")
        return save_figure(figure, path)


def _size_ticks(axes: Axes, sizes: Sequence[float]) -> None:
    """A tick at every size that was run, and no others."""
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    axes.set_xticks(sizes, minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_parameters(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.tick_params(axis="x", color=INK)
    axes.grid(visible=False, axis="x")
