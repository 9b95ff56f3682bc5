"""The console script as a user calls it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hydratron import cli

SCRIPT = Path(sys.executable).with_name("hydratron")
# a second or two of training on the shipped text
TINY = [
    "experiment=quickstart",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.validation_samples=32",
    "trainer.max_steps=4",
]


@pytest.fixture
def hydratron(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hydratron ARGUMENTS` in an empty directory."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *arguments],
            cwd=tmp_path,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hydratron ARGUMENTS` in this process, which has imported everything already."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["hydratron", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = cli.main() or 0
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.signal(signal.SIGTERM, before)
        output, errors = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(code or 0), output, errors)

    return run


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def metrics(run_dir: Path) -> pd.DataFrame:
    return pd.read_csv(run_dir / "metrics.csv")
