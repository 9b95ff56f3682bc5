"""Faults for jobs of a sweep, chosen by seed and removed from outside: a logger that misbehaves."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers.logger import Logger
from torch import nn


def spoil(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook that makes every LayerNorm give NaN."""
    return output * torch.nan if isinstance(module, nn.LayerNorm) else None


class Faults(Logger):
    """At the second step, does what `directory/<seed>` says: `raise`, `kill`, `nan`, or `fill`,
    which leaves no room on the disk of `directory`.
    """

    name = "faults"
    version = ""

    def __init__(self, directory: str, seed: int, rank: int = 0) -> None:
        super().__init__()
        path = Path(directory) / str(seed)
        is_here = int(os.environ.get("RANK", 0)) == rank
        self.fault = path.read_text() if path.exists() and is_here else ""
        self.directory = Path(directory)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step != 2:
            return
        if self.fault == "raise":
            raise RuntimeError("the fault of this job")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "fill":
            with contextlib.suppress(OSError), (self.directory / "filling").open("wb", 0) as file:
                while True:
                    file.write(bytes(512))
        if self.fault == "nan":
            nn.modules.module.register_module_forward_hook(spoil)
