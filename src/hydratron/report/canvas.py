"""What all figures share: colours and styles, a title block, panels, and files.

Colours are Okabe and Ito's, told apart by the colour-blind; line style and marker repeat what
colour says, so that a grey print loses nothing.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from hydratron.report.groups import Section

INK, FAINT = "#222222", "#8a8a8a"
# Colour, dashes, marker: dark and light alternate, so that neighbours differ in grey too.
STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", (0, (5, 2)), "s"),
    ("#009E73", (0, (6, 2, 1, 2)), "^"),
    ("#CC79A7", (0, (2, 1.5)), "D"),
    ("#000000", (0, (8, 2, 1, 2, 1, 2)), "v"),
    ("#E69F00", (0, (10, 3)), "P"),
    ("#56B4E9", (0, (4, 1, 1, 1)), "X"),
    ("#6E6E6E", (0, (14, 2)), "<"),
)
# Dotted, and nothing else is.
ENTROPY_DASHES = (0, (1, 2))
# The two placements look the same in every figure of every report.
FIXED_STYLES = {("layernorm", "pre"): STYLES[0], ("layernorm", "post"): STYLES[1]}
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.9,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "svg.hashsalt": "hydratron",  # the same runs give the same file, byte for byte
}


def verbatim(text: str) -> str:
    """`text` as matplotlib shows it letter by letter: a pair of dollars would be a formula."""
    return text.replace("$", r"\$")


def style_of(key: str | None, value: Any, index: int) -> tuple[str, Any, str]:
    """Colour, dashes and marker for the `index`-th value of a key, no two alike."""
    if (key or "", value) in FIXED_STYLES:
        return FIXED_STYLES[key or "", value]
    index += sum(fixed == key for fixed, _ in FIXED_STYLES)
    turn, place = divmod(index, len(STYLES))
    color, dashes, marker = zip(*(STYLES * 3), strict=True)
    turn %= len(STYLES)
    return color[place], dashes[place + turn], marker[place + 2 * turn]


def add_title(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle flush left on top; in inches, so that no figure height moves them."""
    width, height = figure.get_size_inches()
    subtitle = textwrap.shorten(subtitle, int(14.5 * width), placeholder=" …")
    figure.text(
        0.08 / width, 1 - 0.1 / height, verbatim(title), fontsize=12, fontweight="bold", va="top"
    )
    figure.text(0.08 / width, 1 - 0.36 / height, verbatim(subtitle), color="#555555", va="top")


def add_legend(figure: Figure, entries: Mapping[str, tuple[str, Any, str]]) -> None:
    """Labels with their styles, in as many columns as fit, between title and panels."""
    width, height = figure.get_size_inches()
    handles = [
        Line2D([], [], color=color, linestyle=dashes, marker=marker, ms=5)
        for color, dashes, marker in entries.values()
    ]
    figure.legend(
        handles,
        list(entries),
        loc="upper left",
        bbox_to_anchor=(0.02 / width, 1 - 0.55 / height),
        ncols=_legend_columns(list(entries), width),
        handlelength=3.6,
        columnspacing=1.8,
        borderpad=0.3,
    )


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many labels stand side by side in `width` inches."""
    return max(1, min(len(labels), int(13.5 * width / (max(map(len, labels)) + 9))))


def make_panels(
    rows: int, columns: int, *, height: float = 2.9, labels: Sequence[str] = ()
) -> tuple[Figure, np.ndarray]:
    """Panels with shared axes, below room for title, subtitle and a legend of `labels`."""
    width = max(6.4, 1.0 + 3.1 * columns)
    legend_rows = math.ceil(len(labels) / _legend_columns(labels, width)) if labels else 0
    head = 0.62 + bool(labels) * 0.12 + 0.2 * legend_rows
    total = head + height * rows
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / total), w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(width, total), layout=engine)
    return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write `path`.png and `path`.svg; returns the PNG."""
    figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
    png = path.with_name(f"{path.name}.png")  # a name may have a dot in it, `bert_3.9b`
    figure.savefig(png)
    return png


def count_seeds(section: Section) -> str:
    """`2 seeds` or `1 to 3 seeds`: how many judged runs a group has."""
    counts = sorted({len(group.judged) or len(group.runs) for group in section.groups})
    said = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{said} seed" + "s" * (counts[-1] > 1)


def entropy_entries(entropies: Sequence[float]) -> dict[str, tuple[str, Any, str]]:
    """Legend entries for the lines that `draw_entropies` draws."""
    return {f"unigram entropy {value:.2f}": (INK, ENTROPY_DASHES, "") for value in entropies[:1]}


def draw_entropies(axes: Axes, entropies: Sequence[float]) -> None:
    """The losses of models that know token frequencies only, as dotted lines."""
    for entropy in entropies:
        axes.axhline(entropy, color=INK, linestyle=ENTROPY_DASHES, linewidth=1.2, zorder=2.5)
