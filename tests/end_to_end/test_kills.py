"""SIGKILL at random moments, saves and validations included: the run ends as if never killed."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hydratron.checkpoint.manifest import is_complete, newest_checkpoint, read_manifest
from tests.end_to_end.conftest import SCRIPT, TINY, merged, metrics, result, wait_until_gone
from tests.tasks import write_mnli

# a checkpoint at every step: about half of the time is spent in saving
PRETRAINING = [
    "trainer.checkpoint_every=1",
    "trainer.val_every=3",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
]
PATIENCE = 600  # seconds that a slow, busy machine may need for a few steps
TIMES = ("duration_s", "finished", "perf/", "changes")


def kill_at_random(run: Path, process: subprocess.Popen[bytes], generator: random.Random) -> None:
    """Wait until the run got somewhere new, then a random moment more, and kill it."""
    before = newest_checkpoint(run / "checkpoints")
    deadline = time.monotonic() + PATIENCE
    while newest_checkpoint(run / "checkpoints") == before and process.poll() is None:
        assert time.monotonic() < deadline, (run.parent / "output.txt").read_text()
        time.sleep(0.01)
    time.sleep(generator.uniform(0, 0.3))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_until_gone(run)
    for path in (run / "checkpoints").glob("step-*"):
        assert path.suffix == ".tmp" or is_complete(path)


def written(run: Path) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """Return all that a run says, less what depends on the clock: its metrics, its result, and
    its checkpoints with the hash of every file of theirs that holds tensors.
    """
    rows = metrics(run)
    rows = rows[sorted(column for column in rows.columns if not column.startswith("perf/"))]
    told = {k: v for k, v in result(run).items() if not k.startswith(TIMES)}
    told.pop("overrides")  # `resume=` is among them
    held: dict[str, Any] = {}
    for path in (run / "checkpoints").iterdir():
        if path.is_symlink():
            held[path.name] = os.readlink(path)
            continue
        files = read_manifest(path)["files"].items()
        held[path.name] = {name: file for name, file in files if name.endswith(".safetensors")}
    return rows, told, held


def check_equal(run: Path, whole: Path) -> None:
    """Assert that two runs say the same to the last bit."""
    (rows, told, held), (rows_whole, told_whole, held_whole) = written(run), written(whole)
    pd.testing.assert_frame_equal(rows, rows_whole, check_exact=True)
    assert told == told_whole
    assert held == held_whole


def kill_and_resume(spawn, run: Path, command: str, arguments: list[str], num_kills: int) -> None:
    """Run a command to its end through up to `num_kills` kills; a run may end before the last."""
    generator = random.Random(num_kills)
    for kill in range(num_kills):
        given = [f"resume={run.name}"] if kill else [*arguments, f"hydra.run.dir={run.name}"]
        kill_at_random(run, spawn(SCRIPT, command, *given), generator)
    last = spawn(SCRIPT, command, f"resume={run.name}")
    assert last.wait(PATIENCE) == 0, (run.parent / "output.txt").read_text()


@pytest.mark.parametrize(
    ("grid", "num_kills", "steps"),
    [
        ("single", 1, 7),
        pytest.param("single", 15, 35, marks=pytest.mark.slow),
        pytest.param("tp2", 5, 14, marks=pytest.mark.slow),
    ],
)
def test_a_killed_pretraining_ends_bitwise_equal_to_one_never_killed(
    in_process, spawn, tmp_path: Path, grid: str, num_kills: int, steps: int
) -> None:
    settings = [*PRETRAINING, f"parallel={grid}", f"trainer.max_steps={steps}"]
    arguments = merged(*TINY[:-1], *settings)
    kill_and_resume(spawn, tmp_path / "run", "pretrain", arguments, num_kills)
    done = in_process("pretrain", *arguments, "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr
    check_equal(tmp_path / "run", tmp_path / "whole")
    validated = metrics(tmp_path / "run").dropna(subset="val/loss")["step"]
    assert list(validated) == sorted({*range(3, steps + 1, 3), steps})


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "num_kills"), [("single", 7), ("tp2", 3)])
def test_a_killed_finetuning_stops_with_patience_where_the_uninterrupted_does(
    in_process, spawn, tmp_path: Path, grid: str, num_kills: int
) -> None:
    train, held_out = (
        write_mnli(tmp_path / "train.jsonl", 32),
        write_mnli(tmp_path / "dev.jsonl", 16),
    )
    base = ["size=tiny", "model.num_layers=1", "model.hidden_size=32", "data.seq_len=64"]
    base += ["data.global_batch_size=8", "data.validation_samples=16", "trainer.max_steps=2"]
    assert in_process("pretrain", *base, "hydra.run.dir=base").returncode == 0
    arguments = [
        "task=mnli",
        f"task.train_path={train}",
        f"task.validation_path={held_out}",
        "checkpoint=base",
        "trainer=cpu",
        f"parallel={grid}",
        "data.global_batch_size=8",
        "optimizer.lr=1e-2",
        "task.epochs=12",
        "task.patience=3",
        "trainer.checkpoint_every=2",
        "trainer.log_every=1",
    ]
    kill_and_resume(spawn, tmp_path / "run", "finetune", arguments, num_kills)
    done = in_process("finetune", *arguments, "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr
    check_equal(tmp_path / "run", tmp_path / "whole")
    predictions = [
        {path.name: path.read_bytes() for path in sorted((tmp_path / run).glob("predictions/*"))}
        for run in ("run", "whole")
    ]
    assert predictions[0] == predictions[1]
    assert predictions[0]
