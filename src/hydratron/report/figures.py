"""Which figures a section of a report gets: the ones its swept keys and metrics have data for."""

from pathlib import Path

from hydratron.report.comparisons import divergence_map, group_bars, throughput_bars
from hydratron.report.curves import loss_by_size, loss_curves
from hydratron.report.groups import Section
from hydratron.report.layers import gradient_norms


def draw_figures(
    section: Section, directory: Path, prefix: str = "", *, against_seed: bool = False
) -> list[Path]:
    """Draw all that apply as PNG and SVG; returns the PNGs, the section's main figure first.

    `against_seed` adds what the seed draws of pretraining: training loss of the placements, and
    its losses by size.
    """
    against_seed = against_seed and section.command == "pretrain"
    drawn = [
        loss_curves(section, directory / f"{prefix}loss_curves"),
        loss_by_size(section, directory / f"{prefix}loss_by_size", against_seed=against_seed),
        divergence_map(section, directory / f"{prefix}divergence_map"),
        throughput_bars(section, directory / f"{prefix}throughput"),
        gradient_norms(section, directory / f"{prefix}gradient_norms"),
    ]
    if against_seed and "layernorm" in section.keys:
        path = directory / f"{prefix}training_curves"  # the seed's Figure 1
        drawn.insert(1, loss_curves(section, path, "train/loss"))
    for metric in section.main_metrics:
        if not metric.startswith("perf/") and not metric.endswith("loss"):
            name = metric.replace("/", "_")
            drawn.append(group_bars(section, metric, directory / f"{prefix}{name}", bars=False))
    figures = [path for path in drawn if path is not None]
    if section.command == "benchmark":  # its loss says nothing
        figures.sort(key=lambda path: not path.stem.endswith("throughput"))
    return figures
