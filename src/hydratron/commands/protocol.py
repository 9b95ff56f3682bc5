"""`hydratron protocol`: grid, then seeds at its best, their median and their ensemble.

The arguments are those of `hydratron finetune`; what has several values is the grid, `seed=` are
the seeds. A protocol that was interrupted goes on when the same command is given again; what it is
stands in its `settings.json`.
"""

import datetime
import importlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer

from hydratron import launch
from hydratron.settings import Seed, convert
from hydratron.training.protocol import Protocol

SEEDS = "1,2,3,4,5"
SETTINGS = "settings.json"
# of finetune, what is the protocol's own
NOT_GIVEN = ("resume", "hydra.run.dir", "hydra.sweep.dir")


def main(arguments: list[str]) -> None:
    """Run the protocol; write `protocol.json` and print where everything is."""
    given = read_arguments(arguments)
    now = datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    output = Path(given.pop("output", f"outputs/protocol/{now}")).expanduser()
    texts = [f"{key}={value}" for key, value in ({"seed": SEEDS} | given).items()]
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(texts)}
    seeds = [convert(value, Seed, "seed") for value in values(parsed.pop("seed"))]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed={given['seed']} names a seed twice")
    check_place(output)
    # it imports what training needs: seconds that a mistyped argument is not to cost
    settings = importlib.import_module("hydratron.commands.protocol_settings")
    settings.claim(output / SETTINGS, {"seed": seeds} | settings.check(parsed, seeds[0]))
    given.pop("seed", None)
    grid = [key for key, override in parsed.items() if override.is_sweep_override()]
    protocol = Protocol(output, hydratron)
    chosen = protocol.choose(given, grid, str(seeds[0]))
    if chosen:
        print("best of the grid:", *(f"{k}={v}" for k, v in chosen.items()), flush=True)
    found = protocol.score(given | chosen, ",".join(map(str, seeds)))
    summary: dict[str, Any] = {"chosen": chosen} | found
    settings.write(output / "protocol.json", summary)
    metric, scores = summary["selection_metric"], summary["scores"]
    spread = f"{min(scores):.4f} to {max(scores):.4f}"
    print(f"median of {len(scores)} seeds: {metric} {summary[metric]:.4f} ({spread})")
    print(output / "protocol.json")


def read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """Return the arguments by key.

    Raises:
        ValueError: one is not KEY=VALUE, given twice, or the protocol's own affair.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, is_pair, value = argument.partition("=")
        if not key or not is_pair:
            raise ValueError(f"{argument!r} is not KEY=VALUE: give what hydratron finetune takes")
        if key in given:
            raise ValueError(f"{key}= is given twice: {given[key]} and {value}")
        if key.lstrip("+") in NOT_GIVEN:
            raise ValueError(f"{key}= is not for a protocol: output= is where it runs and goes on")
        given[key] = value
    return given


def values(override: Override) -> Iterator[Any]:
    """Return the values that an override sweeps over, or its one value."""
    if override.is_sweep_override():
        return iter(override.sweep_iterator(transformer=Transformer.identity))
    return iter([override.value()])


def check_place(output: Path) -> None:
    """Raise ValueError where a protocol cannot be written, or something else lies."""
    existing = next(path for path in (output, *output.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"output={output}: cannot be written to: {error.strerror}") from error
    if existing == output and any(output.iterdir()) and not (output / SETTINGS).is_file():
        raise ValueError(f"output={output} is not empty and holds no protocol's {SETTINGS}")


def hydratron(*arguments: str) -> None:
    """Run a command as a process of its own; SIGTERM is passed on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hydratron.cli", *arguments], preexec_fn=launch.end_with_parent
    )
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if status:
        raise launch.JobFailed(
            f"hydratron {arguments[0]} ended with {status}; the same command goes on from here",
            status=status,
        )
