"""SIGKILL at random moments, saves included, and the run still ends as if never killed."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hydratron.checkpoint.manifest import is_complete, newest_checkpoint
from tests.end_to_end.conftest import TINY, metrics, result, wait_until_gone
from tests.waiting import wait_for

# a checkpoint at every step: about half of the time is spent in saving
SETTINGS = [
    "trainer.checkpoint_every=1",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=2",
]


def kill_at_random(run: Path, process: subprocess.Popen[bytes], generator: random.Random) -> None:
    """Wait until the run got somewhere new, then a random moment more, and kill it."""
    before = newest_checkpoint(run / "checkpoints")
    wait_for(lambda: newest_checkpoint(run / "checkpoints") != before, of=process)
    time.sleep(generator.uniform(0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(run.parent)


@pytest.mark.parametrize(
    ("grid", "num_kills"),
    [
        ("single", 1),
        pytest.param("single", 20, marks=pytest.mark.slow),
        pytest.param("tp2", 5, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_bitwise_equal_to_one_never_killed(
    in_process, start, tmp_path: Path, grid: str, num_kills: int
) -> None:
    generator, run = random.Random(num_kills), tmp_path / "run"
    settings = [*SETTINGS, f"parallel={grid}"]
    for kill in range(num_kills):
        extra = ["resume=run"] if kill else []
        kill_at_random(run, start(*settings, *extra), generator)
        for path in (run / "checkpoints").glob("step-*"):
            assert path.suffix == ".tmp" or is_complete(path)
    reached = newest_checkpoint(run / "checkpoints")
    assert reached is not None
    length = f"trainer.max_steps={int(reached.name.removeprefix('step-')) + 3}"
    done = in_process("pretrain", "resume=run", length)
    assert done.returncode == 0, done.stderr
    assert result(run)["status"] == "ok"
    done = in_process("pretrain", *TINY, *settings, length, "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr
    keys = ["step", "train/loss", "train/sentence_order_loss", "train/grad_norm"]
    assert metrics(run)[keys].equals(metrics(tmp_path / "whole")[keys])
