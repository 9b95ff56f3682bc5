"""Draw Figure 1 and its gradients from figure1.csv, figure1_curves.csv and figure1_norms.csv.

    python experiments/01_layernorm_placement/figure1.py

A panel for each size, warmup and learning rate; sizes below each other.
"""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hydratron.report.canvas import (
    RC,
    add_legend,
    add_title,
    draw_entropies,
    entropy_entries,
    make_panels,
    save_figure,
    style_of,
)

HERE = Path(__file__).parent
RECIPE = ["size", "warmup_steps", "optimizer.lr"]
STEPS, LOSSES = (0, 600), (5.7, 9.0)  # shown
FIRST, LAST = 1, 300  # steps of the gradients shown


def panels(
    frame: pd.DataFrame, entropies: list[float]
) -> tuple[Figure, Iterator[tuple[Axes, pd.DataFrame]]]:
    """The figure, and each panel's axes with the rows of its recipe."""
    recipes = frame[RECIPE].drop_duplicates().groupby("size")
    order = {"by": ["optimizer.lr", "warmup_steps"], "ascending": [False, True]}
    rows = [group.sort_values(**order) for _, group in recipes]
    entries = {f"LayerNorm {p}": style_of("layernorm", p, 0) for p in sorted(set(frame.layernorm))}
    entries |= entropy_entries(entropies)
    figure, grid = make_panels(len(rows), max(map(len, rows)), height=2.3, labels=list(entries))
    add_legend(figure, entries)

    def filled() -> Iterator[tuple[Axes, pd.DataFrame]]:
        for axes_of_row, row in zip(grid, rows, strict=True):
            for axes in axes_of_row[len(row) :]:
                axes.set_visible(False)
            for axes, recipe in zip(axes_of_row, row.itertuples(index=False), strict=False):
                size, warmup, rate = recipe
                axes.set_title(
                    f"{size.upper()}: warmup {warmup}, learning rate {rate:.2g}", loc="left"
                )
                yield axes, frame[(frame[RECIPE] == list(recipe)).all(axis="columns")]

    return figure, filled()


def losses() -> Figure:
    """Training loss by step, the second seed faint."""
    entropies = [pd.read_csv(HERE / "figure1.csv")["val/unigram_entropy"].max()]
    figure, filled = panels(pd.read_csv(HERE / "figure1_curves.csv"), entropies)
    for axes, rows in filled:
        draw_entropies(axes, entropies)
        for (placement, seed), run in rows.groupby(["layernorm", "seed"]):
            color, dashes, marker = style_of("layernorm", placement, 0)
            look = {"color": color, "ls": dashes} | ({"alpha": 0.4, "lw": 1} if seed > 1 else {})
            axes.plot(run["step"], run["train/loss"], **look)
            axes.plot(*run[["step", "train/loss"]].iloc[-1], marker=marker, ms=5, **look)
        axes.set(xlim=STEPS, ylim=LOSSES)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("training loss (nats)")
    figure.supxlabel("optimizer step", fontsize=9)
    above = f"first {STEPS[1]} steps; what is above {LOSSES[1]:g} nats is cut off"
    add_title(figure, "Training loss by size, warmup and rate", f"seed 1, seed 2 faint; {above}")
    return figure


def gradients() -> Figure:
    """Gradient norm by layer at the first and at a late step."""
    figure, filled = panels(pd.read_csv(HERE / "figure1_norms.csv"), [])
    for axes, rows in filled:
        for (placement, step, seed), run in rows.groupby(["layernorm", "step", "seed"]):
            color, dashes, _ = style_of("layernorm", placement, 0)
            look = {"color": color, "ls": dashes, "alpha": 0.4 if seed > 1 else 1}
            if step in (FIRST, LAST):
                axes.semilogy(run["layer"], run["norm"], lw=0.8 if step == FIRST else 1.9, **look)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("gradient norm (log scale)")
    figure.supxlabel("layer, from the embeddings up", fontsize=9)
    shown = f"thin: step {FIRST}; thick: step {LAST}; seed 1, seed 2 faint"
    add_title(figure, "Gradient norm by layer, before clipping", shown)
    return figure


def draw(directory: Path) -> list[Path]:
    """Write figure1 and figure1_norms as PNG and SVG; returns the PNGs."""
    with mpl.rc_context(RC):
        return [
            save_figure(losses(), directory / "figure1"),
            save_figure(gradients(), directory / "figure1_norms"),
        ]


if __name__ == "__main__":
    draw(HERE)
