"""Summary tables of runs, said three ways: on the terminal, as Markdown, and as CSV with unrounded
numbers.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hydratron.report.files import parse_value, plain
from hydratron.report.groups import Group, Section, Spread, format_number, name_key
from hydratron.report.protocols import read_protocols
from hydratron.report.runs import UNREADABLE, Collection, Run

METRIC_NAMES = {
    "val/loss": "held-out loss (nats)",
    "train/loss": "training loss (nats)",
    "val/f1": "F1",
    "perf/tflops_per_gpu": "TFLOP/s per GPU",
    "perf/tokens_per_second": "tokens/s",
}
DIVERGED_NOTE = (
    "Diverged: the final loss is not finite (it then counts as infinite in the median), "
    "or at or above the unigram entropy"
)


@dataclass(frozen=True)
class Table:
    """Text cells under a title; `best` holds the (row, column) positions to be marked; notes follow
    the table.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def name_metric(metric: str) -> str:
    """A logged metric name in words, with its unit."""
    return METRIC_NAMES.get(metric, metric.removeprefix("val/").replace("_", " "))


def format_metric(metric: str, value: float | None) -> str:
    """A metric with as many digits as its differences deserve; an en dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "inf"
    if metric.startswith("perf/"):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def _spread_cells(metric: str, spread: Spread | None) -> list[str]:
    if spread is None:
        return ["–", "–"]
    low, high = format_metric(metric, spread.min), format_metric(metric, spread.max)
    return [format_metric(metric, spread.median), low if spread.n == 1 else f"{low} to {high}"]


def _notes(section: Section, shows_diverged: bool) -> list[str]:
    notes = []
    if entropies := section.unigram_entropies:
        said = " to ".join(f"{value:.2f}" for value in dict.fromkeys((entropies[0], entropies[-1])))
        notes.append(
            f"unigram entropy of the held-out text: {said} nats. "
            "A model at or above this has learnt nothing but how frequent each token is"
        )
    of_one_seed = any(map(section.has_one_seed, section.main_metrics))
    if any(map(section.best, section.main_metrics)):
        note = "* best median"
        if close := [m for m in section.main_metrics if section.is_close(m)]:
            note += f"; ranges overlap in {', '.join(map(name_metric, close))}: no clear winner"
        notes.append(note + "; one seed has no range" * of_one_seed)
    elif of_one_seed:
        notes.append("no best is marked: one seed has no range")
    if shows_diverged:
        notes.append(DIVERGED_NOTE)
    return notes


def summary_table(section: Section) -> Table:
    """A row for each group: swept values, median and range of the main metrics, seeds, diverged.

    With three metrics or more (finetuning tasks have their own) each metric is a row instead.
    """
    shows_diverged = section.command == "pretrain" or any(g.num_diverged for g in section.groups)
    keys = [name_key(key) for key in section.keys] or ["runs"]
    is_long = len(section.main_metrics) > 2
    constants = f" ({section.constants})" if section.constants else ""
    title = f"{section.command}: median over seeds{constants}"
    metrics = ["metric", "median", "range"] if is_long else []
    for metric in [] if is_long else section.main_metrics:
        metrics += [name_metric(metric), "range"]
    columns = [*keys, *metrics, "n", *(["diverged"] * shows_diverged)]
    rows, best = [], set()
    for index, group in enumerate(section.groups):
        start = [format_number(value) for value in group.values.values()] or ["all"]
        share = f"{group.num_diverged} of {len(group.judged)}" if group.judged else "–"
        end = [share] * shows_diverged
        shown = [metric for metric in section.main_metrics if group.spread(metric) or not is_long]
        marked = [metric for metric in shown if index in section.best(metric)]
        if is_long:
            best |= {(len(rows) + i, len(keys) + 1) for i, m in enumerate(shown) if m in marked}
            for metric in shown:
                spread = group.spread(metric)
                cells = [name_metric(metric), *_spread_cells(metric, spread)]
                rows.append([*start, *cells, str(spread.n if spread else 0), *end])
        else:
            best |= {(len(rows), len(keys) + 2 * i) for i, m in enumerate(shown) if m in marked}
            cells = [c for metric in shown for c in _spread_cells(metric, group.spread(metric))]
            rows.append([*start, *cells, str(len(group.judged)), *end])
    return Table(title, columns, rows, best, _notes(section, shows_diverged))


def summary_frame(section: Section) -> pd.DataFrame:
    """The summary as data, a row per group: every metric's median, min, max, n, unrounded."""
    ordered = section.main_metrics + [m for m in section.metrics if m not in section.main_metrics]
    return pd.DataFrame([_frame_row(section, group, ordered) for group in section.groups])


def _frame_row(section: Section, group: Group, metrics: list[str]) -> dict[str, object]:
    row: dict[str, object] = {"command": section.command, **group.values}
    row |= {"runs": len(group.runs), "judged": len(group.judged), "diverged": group.num_diverged}
    for metric in metrics:
        spread = group.spread(metric)
        if spread is not None:
            row |= {
                f"{metric} {name}": getattr(spread, name) for name in ("median", "min", "max", "n")
            }
    return row


def runs_frame(collection: Collection) -> pd.DataFrame:
    """A row for each run: its directory and the whole of its result.json, overrides as one
    `key=value` text.
    """
    rows = []
    for run in collection.runs:
        overrides = " ".join(f"{key}={value}" for key, value in run.overrides.items())
        rows.append(
            {
                "path": plain(str(run.path)),
                "status": run.status,
                **run.result,
                "overrides": overrides,
            }
        )
    return pd.DataFrame(rows)


def describe_run(run: Run, keys: list[str]) -> str:
    """A run's swept values and seed, `layernorm=post seed=2`."""
    pairs = {key: run.value(key) for key in keys} | {"seed": run.seed}
    return " ".join(
        f"{key}={format_number(value)}" for key, value in pairs.items() if value is not None
    )


def problem_lines(collection: Collection, sections: list[Section]) -> list[str]:
    """A line for each job that is not ok: failed with its error, preempted, running or killed,
    missing, and for what cannot be read.
    """
    unreadable = [(run.name, run.error) for run in collection.runs if run.status == UNREADABLE]
    unreadable += [(plain(s.path.name), s.problem) for s in collection.sweeps if s.problem]
    unreadable += read_protocols(collection.readable)[1]
    lines = [f"unreadable: {name}: {problem}" for name, problem in unreadable]
    for section in sections:
        for run in section.runs:
            where = f"{run.name} ({describe_run(run, section.keys)})"
            if run.status == "failed":
                lines.append(f"failed: {where}: {run.error}")
            elif run.status != "ok":
                status = "running or killed" if run.status == "running" else run.status
                lines.append(f"{status}: {where}")
    for wanted in collection.missing:
        lines.append("missing: " + " ".join(f"{k}={format_number(v)}" for k, v in wanted.items()))
    return lines


def markdown(text: str) -> str:
    """`text` as Markdown that says it: no cell, link, image or HTML begins in it."""
    return re.sub(r"[\\`<|\[]", r"\\\g<0>", text)


def render_markdown(table: Table) -> str:
    """The table as GitHub Markdown, its best cells bold, its notes below."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rows = [
        [
            f"**{cell}**" if (i, j) in table.best else cell
            for j, cell in enumerate(map(markdown, row))
        ]
        for i, row in enumerate(table.rows)
    ]
    columns = line([markdown(column) for column in table.columns])
    head = [f"**{markdown(table.title)}**", "", columns, "|" + " --- |" * len(table.columns)]
    notes = [
        note.replace("* best", "Bold: best") if note.startswith("*") else markdown(note)
        for note in table.notes
    ]
    return "\n".join([*head, *map(line, rows), *(f"\n{note}" for note in notes)]) + "\n"


def print_table(table: Table, console: Console) -> None:
    """The table on a terminal; best cells are bold and carry a star, which a log file keeps."""
    rich = RichTable(title=Text(table.title), title_justify="left", title_style="bold")
    for j, column in enumerate(table.columns):
        numeric = all(row[j][:1] in "0123456789-–i" for row in table.rows)
        rich.add_column(Text(column), justify="right" if numeric else "left")
    for i, row in enumerate(table.rows):
        marked = [(i, j) in table.best for j in range(len(row))]
        cells = zip(row, marked, strict=True)
        rich.add_row(*(Text(f"{c} *", style="bold") if best else Text(c) for c, best in cells))
    console.print(rich)
    for note in table.notes:
        console.print(Text(note))


def write_csv(sections: list[Section], path: Path) -> None:
    """All sections' summaries in one file, unrounded."""
    frames = [pd.DataFrame(), *map(summary_frame, sections)]
    save_csv(pd.concat(frames, ignore_index=True), path)


def save_csv(frame: pd.DataFrame, path: Path, **options: Any) -> None:
    """Write a CSV of which a spreadsheet runs no cell: a text that it would take for a formula
    begins with an apostrophe.
    """
    inert = frame.map(_inert).rename(columns=_inert)
    inert.to_csv(path, index=False, encoding="utf-8", **options)


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = plain(cell)
    is_formula = text[:1] in ("=", "+", "-", "@") and isinstance(parse_value(text), str)
    return f"'{text}" if is_formula else text
