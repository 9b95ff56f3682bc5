"""`hydratron protocol`: grid, then seeds at its best, their median and their ensemble.

The arguments are those of `hydratron finetune`; what has several values is the grid, `seed=` are
the seeds. A protocol that was interrupted goes on when the same command is given again.
"""

import datetime
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydratron import launch
from hydratron.training.protocol import Protocol

SEEDS = "1,2,3,4,5"


def main(arguments: list[str]) -> None:
    """Run the protocol; write `protocol.json` and print where everything is."""
    wrong = [a for a in arguments if "=" not in a]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not KEY=VALUE: give what hydratron finetune takes")
    given = dict(argument.split("=", 1) for argument in arguments)
    now = datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    output = Path(given.pop("output", f"outputs/protocol/{now}"))
    seeds = given.pop("seed", SEEDS)
    protocol = Protocol(output, hydratron)
    chosen = protocol.choose(given, seeds.partition(",")[0])
    if chosen:
        print("best of the grid:", *(f"{k}={v}" for k, v in chosen.items()), flush=True)
    summary: dict[str, Any] = {"chosen": chosen} | protocol.score(given | chosen, seeds)
    (output / "protocol.json").write_text(json.dumps(summary, indent=2) + "\n")
    metric, scores = summary["selection_metric"], summary["scores"]
    spread = f"{min(scores):.4f} to {max(scores):.4f}"
    print(f"median of {len(scores)} seeds: {metric} {summary[metric]:.4f} ({spread})")
    print(output / "protocol.json")


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
        raise launch.JobFailed(f"hydratron {arguments[0]} ended with {status}", status=status)
