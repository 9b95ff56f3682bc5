"""A report as one HTML file that needs nothing else: styles and figures are inside."""

import base64
import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from hydratron.report.files import plain
from hydratron.report.groups import Section, format_number
from hydratron.report.runs import Collection, Run
from hydratron.report.tables import Table, format_metric, name_key, name_metric

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff;
       max-width: 70rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
.status { display: inline-block; padding: .2rem .7rem; border-radius: 1rem; font-weight: 600; }
.whole { background: #dff1ea; color: #00563f; }
.partial { background: #fbe6d8; color: #8a3c00; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e3e3e3; text-align: left;
         white-space: nowrap; }
th { border-bottom: 2px solid #999; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.best { font-weight: 700; background: #e8f2fa; }
.note { color: #555; font-size: .88rem; margin: .2rem 0; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; }
ul.problems li { font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace;
                 overflow-wrap: anywhere; }
a { color: #0b5cad; }
footer { margin-top: 3rem; color: #666; font-size: .85rem; }
"""


def _class(text: str, *, best: bool = False) -> str:
    """The class attribute of a cell: numbers stand flush right."""
    classes = ["number"] * (text[:1] in "0123456789–-") + ["best"] * best
    return f' class="{" ".join(classes)}"' if classes else ""


def _cell(text: str, *, best: bool = False) -> str:
    return f"<td{_class(text, best=best)}>{escape(text)}</td>"


def render_table(table: Table) -> str:
    """A Table as HTML, its notes as paragraphs."""
    head = "".join(
        f"<th{_class(table.rows[0][j])}>{escape(column)}</th>" if table.rows else ""
        for j, column in enumerate(table.columns)
    )
    rows = [
        "".join(_cell(cell, best=(i, j) in table.best) for j, cell in enumerate(row))
        for i, row in enumerate(table.rows)
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    notes = "\n".join(
        f'<p class="note">{escape(note.replace("* best", "Shaded: best"))}</p>'
        for note in table.notes
    )
    return (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n{notes}"
    )


def render_figure(png: Path) -> str:
    """A figure inlined from its SVG, sharp at any zoom; as data, so that no ids of two figures
    clash.
    """
    data = base64.b64encode(png.with_suffix(".svg").read_bytes()).decode()
    alt = escape(png.stem.replace("_", " "))
    return f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{data}"></figure>'


def _run_row(run: Run, section: Section, output: Path) -> str:
    link = quote(os.path.relpath(run.path, output).encode(errors="surrogateescape"))
    values = [format_number(run.value(key)) for key in section.keys]
    finals = [format_metric(metric, run.final(metric)) for metric in section.main_metrics]
    seconds = run.result.get("duration_s")
    duration = f"{seconds:,.0f}" if isinstance(seconds, int | float) else "–"
    commit = str(run.result.get("git_commit") or "–")[:10]
    cells = [*values, str(run.seed), run.status, *finals, duration]
    row = "".join(_cell(cell) for cell in cells)
    name = f'<td><a href="{link}">{escape(run.name)}</a></td>'
    return f"<tr>{name}{row}<td>{escape(commit)}</td></tr>"


def render_runs(section: Section, output: Path) -> str:
    """Every run of a section with a link to its directory, relative to where the report lies."""
    columns = ["run", *map(name_key, section.keys), "seed", "status"]
    columns += [*map(name_metric, section.main_metrics), "seconds", "commit"]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(_run_row(run, section, output) for run in section.runs)
    return (
        f'<div class="scroll"><table><caption>Runs</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def render_page(
    collection: Collection,
    parts: list[tuple[Section, list[Table], list[Path]]],
    problems: list[str],
    output: Path,
) -> str:
    """The whole page; `parts` holds each section with its tables and its figures' PNG paths."""
    status = collection.describe()
    kind = "partial" if status.startswith("partial") else "whole"
    body = [f"<h1>hydratron report</h1>\n<p class='status {kind}'>{escape(status)}</p>"]
    if problems:
        items = "\n".join(f"<li>{escape(line)}</li>" for line in problems)
        body.append(f"<h2>Jobs that are not ok</h2>\n<ul class='problems'>\n{items}\n</ul>")
    for section, tables, figures in parts:
        body.append(f"<h2>{escape(section.command)}</h2>")
        body += [*map(render_table, tables[:1]), *map(render_figure, figures)]
        body += [*map(render_table, tables[1:]), render_runs(section, output)]
    versions = {
        plain(f"{name} {version}")
        for run in collection.readable
        for name, version in (run.result.get("versions") or {}).items()
    }
    footer = (
        f"Made by hydratron report from {len(collection.runs)} runs. {', '.join(sorted(versions))}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>hydratron report: {escape(status)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<footer>{escape(footer)}</footer>\n</body></html>\n"
    )
