"""`hydratron pretrain`: grids, sweeps, resuming, signals, and what a run leaves behind."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import (
    TINY,
    metrics,
    processes_of,
    result,
    wait_for_step,
    wait_until_gone,
)
from tests.waiting import PATIENCE


@pytest.mark.parametrize("grid", ["tp2", pytest.param("tp2_dp2", marks=pytest.mark.slow)])
def test_every_grid_prints_the_same_losses(in_process, tmp_path: Path, grid: str) -> None:
    settings = ["experiment=quickstart", "trainer.max_steps=10", "data.validation_samples=32"]
    for parallel in ("single", grid):
        run = [f"parallel={parallel}", f"hydra.run.dir={tmp_path / parallel}"]
        done = in_process("pretrain", *settings, *run)
        assert done.returncode == 0, done.stderr
    reference = metrics(tmp_path / "single")["train/loss"]
    assert len(reference) == 10
    assert (metrics(tmp_path / grid)["train/loss"] - reference).abs().max() < 1e-5


def test_a_run_directory_keeps_its_contract(in_process, tmp_path: Path) -> None:
    assert in_process("pretrain", *TINY, "hydra.run.dir=run").returncode == 0
    run = tmp_path / "run"
    found = result(run)
    expected = {
        "command": "pretrain",
        "status": "ok",
        "error": None,
        "seed": 1,
        "layernorm": "pre",
        "model": "bert",
        "size": "quickstart",
        "steps": 4,
        "tokens": 4 * 32 * 16,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["overrides"]["trainer.max_steps"] == "4"
    assert found["num_parameters"] > 0
    assert 2.0 < found["val/unigram_entropy"] < 3.5
    assert (run / ".hydra/config.yaml").is_file()
    assert list(metrics(run)["step"]) == [1, 2, 3, 4]
    assert (run / "checkpoints/last").resolve().name == "step-4"
    assert not list(run.rglob("*.tmp"))


def test_the_last_step_is_logged_and_the_lines_say_what_is_known(
    in_process, tmp_path: Path
) -> None:
    sparse = [*TINY, "trainer.log_every=3", "trainer.val_every=2", "hydra.run.dir=run"]
    done = in_process("pretrain", *sparse)
    assert done.returncode == 0, done.stderr
    found, rows = result(tmp_path / "run"), metrics(tmp_path / "run").set_index("step")
    losses = rows["train/loss"].dropna()
    assert list(losses.index) == [3, 4]
    assert found["train/loss"] == losses[4]
    *steps, end = done.stdout.splitlines()
    said = [(line.split()[1], "train/loss" in line, "val/loss" in line) for line in steps]
    assert said == [
        ("2/4", False, True),
        ("3/4", True, False),
        ("4/4", True, False),
        ("4/4", False, True),
    ]
    assert end == f"{tmp_path / 'run'}: val/loss {found['val/loss']:.5g}"
    done = in_process("pretrain", "resume=run")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "run has ended well; a larger trainer.max_steps= goes on" in done.stdout
    assert result(tmp_path / "run") == found
    assert in_process("pretrain", "resume=run", "trainer.max_steps=5").returncode == 0
    assert result(tmp_path / "run")["steps"] == 5


@pytest.mark.parametrize("layernorm", ["pre", "post"])
def test_gpt2_trains_with_either_placement(in_process, tmp_path: Path, layernorm: str) -> None:
    run = ["hydra.run.dir=run", "model=gpt2", f"layernorm={layernorm}"]
    done = in_process("pretrain", *TINY, *run)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["model"] == "gpt2"


@pytest.mark.parametrize("grid", ["single", pytest.param("tp2", marks=pytest.mark.slow)])
def test_sigterm_saves_exits_143_and_resumes_bit_for_bit(
    in_process, start, tmp_path: Path, grid: str
) -> None:
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    # a schedule that does not depend on the run's length, which differs between the two runs
    schedule = ["optimizer.schedule=constant", "optimizer.warmup_steps=2"]
    settings = [f"parallel={grid}", *dropout, *schedule]
    process = start(*settings)
    wait_for_step(tmp_path / "run", 3, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 143, (tmp_path / "output.txt").read_text()
    found = result(tmp_path / "run")
    assert found["status"] == "preempted"
    assert (tmp_path / "run/checkpoints/last").resolve().name == f"step-{found['steps']}"
    wait_until_gone(tmp_path)

    length = f"trainer.max_steps={found['steps'] + 4}"
    again = in_process("pretrain", "resume=run", length)
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "run")["status"] == "ok"
    whole = in_process("pretrain", *TINY, *settings, length, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    keys = ["step", "train/loss", "train/sentence_order_loss", "train/grad_norm"]
    assert metrics(tmp_path / "run")[keys].equals(metrics(tmp_path / "whole")[keys])


def test_interrupt_leaves_no_process_behind(start, tmp_path: Path) -> None:
    process = start("parallel=tp2")
    wait_for_step(tmp_path / "run", 2, process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=PATIENCE)
    assert process.returncode not in (0, None)
    wait_until_gone(tmp_path)
    assert result(tmp_path / "run")["status"] == "failed"


def listening_everywhere(process: int) -> list[str]:
    """Return what of a process can be reached from other machines, as `ss` tells it."""
    table = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    mine = [line.split() for line in table.splitlines() if f"pid={process}," in line]
    return [line[3] for line in mine if not line[3].startswith(("127.", "[::1]"))]


def test_ranks_listen_to_this_machine_and_a_killed_one_is_named(start, tmp_path: Path) -> None:
    process = start("parallel=tp2")
    wait_for_step(tmp_path / "run", 2, process)
    numbers = list(processes_of(tmp_path))
    assert len(numbers) == 3
    if shutil.which("ss"):
        assert [listening_everywhere(number) for number in numbers] == [[], [], []]
    variables = {n: Path(f"/proc/{n}/environ").read_bytes().split(b"\0") for n in numbers}
    (second,) = (number for number in numbers if b"RANK=1" in variables[number])
    os.kill(second, signal.SIGKILL)
    assert process.wait(timeout=PATIENCE) == 1
    ended = result(tmp_path / "run")
    assert (ended["status"], ended["error"]) == ("failed", "rank 1 of 2 was killed by SIGKILL")
    assert "rank 1 of 2 was killed by SIGKILL" in (tmp_path / "output.txt").read_text()
    wait_until_gone(tmp_path)
