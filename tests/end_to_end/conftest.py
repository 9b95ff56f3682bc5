"""The console script as a user calls it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

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


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def metrics(run_dir: Path) -> pd.DataFrame:
    return pd.read_csv(run_dir / "metrics.csv")
