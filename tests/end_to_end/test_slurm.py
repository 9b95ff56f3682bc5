"""Sweeps on a real SLURM of two nodes, which are daemons on this machine."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.conftest import SCRIPT, TINY, Spawn, metrics, result, wait_for_step
from tests.end_to_end.test_readme import commands
from tests.slurm import running_slurm
from tests.waiting import PATIENCE, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
LOSSES = ["step", "train/loss", "train/sentence_order_loss", "train/grad_norm"]
SUBMIT = ["-m", "hydra/launcher=submitit_slurm", "hydra.sweep.dir=sweep"]
POINT = ["layernorm=pre", "optimizer.lr=3e-3"]
# a schedule that does not depend on the run's length, which differs between the runs compared
SCHEDULE = ["optimizer.schedule=constant", "optimizer.warmup_steps=2"]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_slurm(tmp_path_factory.mktemp("slurm")):
        yield


def assert_same_losses(run: pd.DataFrame, reference: pd.DataFrame, *, bound: float) -> None:
    assert list(run["step"]) == list(reference["step"])
    assert (run[LOSSES] - reference[LOSSES]).abs().max().max() <= bound


def test_a_sweep_of_two_tasks_a_job_gives_the_losses_of_one_process(
    hydratron, in_process, tmp_path: Path
) -> None:
    written, _ = commands("On a cluster")
    assert written[-2:] == ["parallel=tp2", "seed=1,2"]
    done = hydratron(*written[1:], *TINY, *POINT, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    for job, seed in (("0", 1), ("1", 2)):
        found = result(tmp_path / "sweep" / job)
        assert (found["status"], found["seed"]) == ("ok", seed)
        assert found["tensor_parallel_size"] == 2
        alone = [*POINT, f"seed={seed}", f"hydra.run.dir=alone{seed}"]
        assert in_process("pretrain", *TINY, *alone).returncode == 0
        reference = metrics(tmp_path / f"alone{seed}")
        assert_same_losses(metrics(tmp_path / "sweep" / job), reference, bound=1e-5)
    logs = list(tmp_path.glob("sweep/.submitit/*/*_log.out"))
    assert sorted(path.name.split("_")[-2] for path in logs) == ["0", "0", "1", "1"]  # the tasks


def test_a_sweep_over_numbers_of_devices_is_refused_job_by_job(hydratron, tmp_path: Path) -> None:
    done = hydratron("pretrain", *SUBMIT, *TINY, "parallel=single,tp2", "seed=1", *POINT)
    assert done.returncode != 0
    assert result(tmp_path / "sweep/0")["status"] == "ok"
    assert "needs 2 processes and 1 were started" in result(tmp_path / "sweep/1")["error"]


def running_job() -> str:
    squeue = ["squeue", "--noheader", "--format=%A"]
    (job,) = subprocess.run(squeue, capture_output=True, text=True, check=True).stdout.split()
    return job


@pytest.mark.parametrize("grid", ["tp2", "single"])
def test_a_preempted_job_is_requeued_once_and_ends_as_if_it_never_was(
    hydratron, spawn: Spawn, tmp_path: Path, grid: str
) -> None:
    settings = [*TINY[:-1], *SCHEDULE, *POINT, f"parallel={grid}", "seed=1"]
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    length = 400
    command = [SCRIPT, "pretrain", *SUBMIT, *settings, *dropout, f"trainer.max_steps={length}"]
    process = spawn(*command)
    run = tmp_path / "sweep/0"
    wait_for_step(run, 3, process)
    job = running_job()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for((run / "result.json").exists, of=process)
    stopped = result(run)
    assert (stopped["status"], stopped["stopped_by"]) == ("preempted", "SIGUSR2")
    assert 3 <= stopped["steps"] < length
    assert process.wait(timeout=PATIENCE) == 0, (tmp_path / "output.txt").read_text()
    assert result(run)["status"] == "ok"
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    assert "Restarts=1 " in shown.stdout
    alone = hydratron("pretrain", *settings, *dropout, f"trainer.max_steps={length}",
                      "hydra.run.dir=alone")  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert_same_losses(metrics(run), metrics(tmp_path / "alone"), bound=0.0)


def test_srun_over_two_nodes_gives_the_losses_of_one_process(hydratron, tmp_path: Path) -> None:
    _, written = commands("On a cluster")
    assert written[0] == "srun"
    program = [str(SCRIPT) if word == "hydratron" else word for word in written[:-1]]
    done = subprocess.run(
        [*program, *TINY, "hydra.run.dir=two"],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert hydratron("pretrain", *TINY, "hydra.run.dir=one").returncode == 0
    assert result(tmp_path / "two")["data_parallel_size"] == 2
    assert_same_losses(metrics(tmp_path / "two"), metrics(tmp_path / "one"), bound=1e-5)


def test_a_preempted_step_of_two_nodes_saves_and_the_run_is_resumed_on_one_node(
    hydratron, spawn: Spawn, tmp_path: Path
) -> None:
    settings = [*TINY[:-1], *SCHEDULE, "trainer.max_steps=100000", "hydra.run.dir=run"]
    step = ["srun", "--nodes=2", "--ntasks-per-node=1"]
    grid = ["parallel=tp2", "trainer.num_nodes=2"]
    process = spawn(*step, SCRIPT, "pretrain", *settings, *grid)
    wait_for_step(tmp_path / "run", 3, process)
    subprocess.run(["scancel", "--signal=TERM", running_job()], check=True)
    assert process.wait(timeout=PATIENCE) != 0
    steps = result(tmp_path / "run")["steps"]
    length = f"trainer.max_steps={steps + 2}"
    done = hydratron("pretrain", "resume=run", "trainer.num_nodes=1", length)
    assert done.returncode == 0, done.stderr
    assert list(metrics(tmp_path / "run")["step"]) == list(range(1, steps + 3))
