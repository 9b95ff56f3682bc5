"""One report: what is printed on the terminal, and the files it leaves behind."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hydratron.report.figures import draw_figures
from hydratron.report.groups import Section, split_sections
from hydratron.report.html import render_page
from hydratron.report.published import seed_table
from hydratron.report.runs import Collection
from hydratron.report.speed import speed_tables, write_rows
from hydratron.report.tables import (
    Table,
    markdown,
    print_table,
    problem_lines,
    render_markdown,
    runs_frame,
    save_csv,
    summary_table,
    write_csv,
)


@dataclass(frozen=True)
class Written:
    """The files of a report; `figures` are PNGs (an SVG lies beside each), the main one first."""

    files: list[Path]
    figures: list[Path]


def section_tables(section: Section) -> list[Table]:
    """The tables of a section: of a benchmark its rows, of everything else the summary."""
    if section.command == "benchmark" and (tables := speed_tables(section)):
        return tables
    return [summary_table(section)]


def print_summary(collection: Collection, console: Console, *, against_seed: bool = False) -> None:
    """Tables, then the status of the jobs with a line for each that is not ok."""
    sections = split_sections(collection)
    for section in sections:
        for table in section_tables(section):
            print_table(table, console)
        if against_seed and (table := seed_table(section)):
            console.print()
            print_table(table, console)
        console.print()
    console.print(Text(collection.describe(), style="bold"))
    for line in problem_lines(collection, sections):
        console.print(Text(line), soft_wrap=True)


def write_report(collection: Collection, output: Path, *, against_seed: bool = False) -> Written:
    """Write table.md, table.csv, runs.csv, report.html and the figures into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    sections = split_sections(collection)
    parts, figures = [], []
    for section in sections:
        tables = section_tables(section)
        if section.command == "benchmark":
            write_rows(section, output / "speed.csv")
        if against_seed and (table := seed_table(section)):
            tables.append(table)
        prefix = f"{section.command}_" if len(sections) > 1 else ""
        drawn = draw_figures(section, output, prefix, against_seed=against_seed)
        figures += drawn
        parts.append((section, tables, drawn))
    problems = problem_lines(collection, sections)
    listed = "".join(f"\n* {markdown(line)}" for line in problems)
    tabled = [render_markdown(table) for _, tables, _ in parts for table in tables]
    texts = {
        "table.md": "\n".join([*tabled, f"{collection.describe()}\n{listed}".strip() + "\n"]),
        "report.html": render_page(collection, parts, problems, output),
    }
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    write_csv(sections, output / "table.csv")
    save_csv(runs_frame(collection), output / "runs.csv")
    files = [output / name for name in ("table.md", "table.csv", "runs.csv", "report.html")]
    return Written([*files, *figures, *(path.with_suffix(".svg") for path in figures)], figures)
