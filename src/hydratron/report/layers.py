"""Gradient norms by layer, at the first and at the last step that logged them."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.ticker import MaxNLocator

from hydratron.report.canvas import RC, add_legend, add_title, make_panels, save_figure
from hydratron.report.curves import Layout, assign_keys
from hydratron.report.groups import Group, Section

LAYER_NORM = r"^train/grad_norm/layer_(\d{1,6})$"


def layer_profiles(group: Group) -> dict[int, pd.Series]:
    """The median gradient norm over the runs by layer, at the first and last logged step."""
    frames = [run.metrics.filter(regex=LAYER_NORM).dropna() for run in group.runs]
    frames = [frame for frame in frames if not frame.empty]
    if not frames:
        return {}
    medians = pd.concat(frames).groupby("step").median()
    medians.columns = medians.columns.str.extract(LAYER_NORM)[0].astype(int)
    ends = (medians.index[0], medians.index[-1])
    return {int(step): medians.loc[step].sort_index() for step in ends}


def _row_title(layout: Layout, panel: int, step: int) -> str:
    said = f"step {step}, at initialisation" if step == 1 else f"step {step}"
    return ": ".join(part for part in (said, layout.title(panel)) if part)


def gradient_norms(section: Section, path: Path) -> Path | None:
    """Norm of each layer's gradient before clipping: the first step above, the last below.

    None unless runs were made with `trainer.log_layer_norms`.
    """
    layout = assign_keys(section)
    profiles = {id(group): layer_profiles(group) for group in section.groups}
    if not any(profiles.values()):
        return None
    with mpl.rc_context(RC):
        names = list(layout.styles) if layout.lines else []
        figure, grid = make_panels(2, len(layout.panels), height=2.4, labels=names)
        for group in section.groups:
            panel = layout.panel_of(group)
            color, dashes, _ = layout.styles[layout.label(group)]
            for row, (step, norms) in enumerate(profiles[id(group)].items()):
                axes = grid[row, panel]
                axes.plot(norms.index, norms, color=color, linestyle=dashes)
                axes.set_title(_row_title(layout, panel, step), loc="left")
        for axes in grid.flat:
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes in grid[:, 0]:
            axes.set_ylabel("gradient norm (log scale)")
        if names:
            add_legend(figure, layout.styles)
        figure.supxlabel("layer, from the embeddings up", fontsize=9)
        add_title(figure, "Gradient norm by layer, before clipping", section.constants)
        return save_figure(figure, path)
