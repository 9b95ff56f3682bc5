"""Following a sweep until its last job has ended."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hydratron.report.groups import split_sections
from hydratron.report.runs import Collection, load_runs
from hydratron.report.tables import print_table, summary_table

REFRESH_SECONDS = 5.0


def remaining_seconds(collection: Collection, now: float) -> float | None:
    """Expected time to the end: the median duration of what is left, over the jobs running now.

    None before the first job has ended well, and where nothing is left.
    """
    durations = [
        float(run.result["duration_s"])
        for run in collection.runs
        if run.status == "ok" and run.result.get("duration_s") is not None
    ]
    running = [run for run in collection.runs if run.status == "running"]
    left = collection.counts["missing"] + len(running)
    if not durations or not left:
        return None
    typical = statistics.median(durations)
    work = typical * collection.counts["missing"]
    work += sum(max(0.0, typical - (now - run.started)) for run in running)
    return work / max(1, len(running))


def progress_line(collection: Collection, now: float) -> str:
    """`5 of 8 ended: 4 ok, 1 failed, 2 running, 1 to come; expected end 14:32 (in 3 min)`."""
    counts = collection.counts
    ended = collection.num_expected - counts["running"] - counts["missing"]
    line = (
        f"{ended} of {collection.num_expected} ended: {counts['ok']} ok, {counts['failed']} failed"
    )
    for status, count in counts.items():
        if count and status not in ("ok", "failed", "running", "missing"):
            line += f", {count} {status}"
    line += f", {counts['running']} running, {counts['missing']} to come"
    seconds = remaining_seconds(collection, now)
    if seconds is not None:
        end = time.strftime("%H:%M", time.localtime(now + seconds))
        line += f"; expected end {end} (in {seconds / 60:.0f} min)"
    return line


def _view(collection: Collection, console: Console) -> Group:
    """The progress line over the tables so far."""
    with console.capture() as capture:
        for section in split_sections(collection):
            print_table(summary_table(section), console)
    line = Text(progress_line(collection, time.time()), style="bold")
    return Group(line, Text.from_ansi(capture.get()))


def watch_runs(
    directories: Sequence[Path], console: Console, sleep: Callable[[float], None] = time.sleep
) -> Collection:
    """Show progress until every expected job has ended; returns the runs as they then are.

    On a terminal the view is refreshed in place; elsewhere a line is printed when a count changes.
    """
    collection = load_runs(directories)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while not collection.complete:
                live.update(_view(collection, console), refresh=True)
                sleep(REFRESH_SECONDS)
                collection = load_runs(directories)
        return collection
    shown: dict[str, int] = {}
    while True:
        if collection.counts != shown:
            shown = collection.counts
            print(progress_line(collection, time.time()), file=console.file, flush=True)
        if collection.complete:
            return collection
        sleep(REFRESH_SECONDS)
        collection = load_runs(directories)
