"""Which figures a section of a report gets: the ones its swept keys and metrics have data for."""

from pathlib import Path

from hydratron.report.comparisons import divergence_map, group_bars, throughput_bars
from hydratron.report.curves import loss_by_size, loss_curves
from hydratron.report.groups import Section
from hydratron.report.layers import gradient_norms


def draw_figures(section: Section, directory: Path, prefix: str = "") -> list[Path]:
    """Draw all that apply as PNG and SVG; returns the PNGs, the section's main figure first."""
    drawn = [
        loss_curves(section, directory / f"{prefix}loss_curves"),
        loss_by_size(section, directory / f"{prefix}loss_by_size"),
        divergence_map(section, directory / f"{prefix}divergence_map"),
        throughput_bars(section, directory / f"{prefix}throughput"),
        gradient_norms(section, directory / f"{prefix}gradient_norms"),
    ]
    for metric in section.main_metrics:
        if not metric.startswith("perf/") and not metric.endswith("loss"):
            name = metric.replace("/", "_")
            drawn.append(group_bars(section, metric, directory / f"{prefix}{name}", bars=False))
    figures = [path for path in drawn if path is not None]
    if section.command == "benchmark":  # its loss says nothing
        figures.sort(key=lambda path: not path.stem.endswith("throughput"))
    return figures
