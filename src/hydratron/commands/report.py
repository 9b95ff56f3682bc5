"""`hydratron report DIR...`: tables and figures from run directories. Needs no configuration, so no
Hydra.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from hydratron.report.document import print_summary, write_report
from hydratron.report.files import plain
from hydratron.report.runs import load_runs
from hydratron.report.watch import watch_runs
from hydratron.result import OFFLINE_RUNS, sync_command

# Where nobody can widen a window, a table is not folded to 80 columns.
FILE_WIDTH = 160


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with status 2 on what it does not know."""
    parser = argparse.ArgumentParser(
        prog="hydratron report", description="Tables and figures from runs and sweeps."
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="runs or sweeps")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: report/ in the first DIR"
    )
    parser.add_argument("--against", choices=["seed"], help="put published numbers beside ours")
    parser.add_argument("--wandb", action="store_true", help="keep the report in W&B")
    parser.add_argument("--watch", action="store_true", help="follow the jobs until all have ended")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _named(output: Path) -> Iterator[None]:
    """Turn what cannot be written there into one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output {output}: {error.filename}: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, write the files, name the main figure last. ValueError where DIR holds no
    run.
    """
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    output = (options.output or options.directories[0] / "report").resolve()
    collection = load_runs(options.directories)
    if not collection.runs and not options.watch:
        listed = ", ".join(map(str, options.directories))
        raise ValueError(f"no runs found in {listed}: no result.json and no .hydra/overrides.yaml")
    against_seed = options.against == "seed"
    with _named(output):  # before anybody waits for the jobs
        output.mkdir(parents=True, exist_ok=True)
    if options.watch:
        collection = watch_runs(options.directories, console)
    print_summary(collection, console, against_seed=against_seed)
    with _named(output):
        written = write_report(collection, output, against_seed=against_seed)
    offline = [d for d in options.directories if any(d.glob(f"*/{OFFLINE_RUNS}"))]
    for directory in offline:
        print(sync_command(directory / "*"))
    if options.wandb:
        # Lightning takes seconds to import, which a report needs for nothing else
        tracked = importlib.import_module("hydratron.commands.tracked_report")
        tracked.track_report([r.path for r in collection.readable], options.directories[0], output)
    for path in written.files:
        print(plain(str(path)))
    if written.figures:
        print(plain(f"figure: {written.figures[0]}"))
