"""Sweeps: each job is a process tree of its own, whatever its size and however its siblings end.

The first six are the cases in which Lightning under `-m` gives a wrong result or none.
"""

import contextlib
import os
import signal
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hydratron.quoting import quoted
from tests.end_to_end.conftest import (
    SCRIPT,
    TINY,
    Spawn,
    metrics,
    result,
    wait_for_step,
    wait_until_gone,
)
from tests.slurm import free_ports
from tests.tasks import write_bert, write_squad
from tests.waiting import PATIENCE

# the quickstart's own sweep, held at one point
ONE = ["layernorm=pre", "optimizer.lr=3e-3", "seed=1"]
ROOT = Path(__file__).parents[2]
FAULTS = ["+logger._target_=tests.faults.Faults", "+logger.seed=${seed}"]


def results(sweep: Path) -> list[dict]:
    paths = sorted(sweep.glob("*/result.json"), key=lambda path: int(path.parent.name))
    return [result(path.parent) for path in paths]


@pytest.mark.slow
def test_one_two_and_three_devices_in_one_sweep_read_the_same_data(
    hydratron, tmp_path: Path
) -> None:
    swept = ["parallel.data_parallel_size=1,2,3", "data.global_batch_size=24", *ONE]
    done = hydratron("pretrain", "-m", *TINY, *swept, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    losses = [metrics(tmp_path / "sweep" / str(job))["train/loss"] for job in range(3)]
    assert [r["data_parallel_size"] for r in results(tmp_path / "sweep")] == [1, 2, 3]
    for loss in losses[1:]:
        assert (loss - losses[0]).abs().max() < 1e-5


@pytest.mark.slow
def test_sweep_over_world_sizes_gives_separate_correct_runs(hydratron, tmp_path: Path) -> None:
    swept = ["parallel=single,tp2", "layernorm=pre,post", "seed=1,2", "optimizer.lr=3e-3"]
    done = hydratron("pretrain", "-m", *TINY, *swept, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    runs = [result(path.parent) for path in sorted(tmp_path.glob("sweep/*/result.json"))]
    num_models = 4
    assert [run["status"] for run in runs] == ["ok"] * 2 * num_models
    loss = {(r["tensor_parallel_size"], r["layernorm"], r["seed"]): r["train/loss"] for r in runs}
    assert len(loss) == 2 * num_models
    assert len({round(value, 4) for value in loss.values()}) == num_models  # each on two grids
    for (_, layernorm, seed), value in loss.items():
        assert value == pytest.approx(loss[1, layernorm, seed], abs=1e-5)


def test_a_failing_job_leaves_its_siblings_and_is_what_resuming_runs(
    hydratron, tmp_path: Path
) -> None:
    swept = ["parallel=tp2", "model.num_heads=1,4", *ONE]
    done = hydratron("pretrain", "-m", *TINY, *swept, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    definition = (tmp_path / "sweep/multirun.yaml").read_text()
    before = results(tmp_path / "sweep")
    assert [run["status"] for run in before] == ["failed", "ok"]
    assert before[0]["error"] == "num_heads 1 is not divisible by tensor_parallel_size 2"
    written = (tmp_path / "sweep/1/result.json").stat().st_mtime_ns
    again = hydratron("pretrain", "-m", "resume=sweep", "parallel=single")
    assert again.returncode == 0, again.stderr
    after = results(tmp_path / "sweep")
    assert [run["status"] for run in after] == ["ok", "ok"]
    assert after[1] == before[1]
    assert (tmp_path / "sweep/1/result.json").stat().st_mtime_ns == written
    (tmp_path / "sweep/1/result.json").unlink()  # a killed job leaves none
    assert hydratron("pretrain", "-m", "resume=sweep", "parallel=single").returncode == 0
    assert results(tmp_path / "sweep")[0] == after[0]
    assert result(tmp_path / "sweep/1")["status"] == "ok"
    assert (tmp_path / "sweep/multirun.yaml").read_text() == definition


@pytest.mark.slow
def test_all_ranks_of_a_trial_of_optuna_train_with_the_same_values(
    hydratron, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "parallel=tp2", "seed=1"]
    drawn = ["layernorm=pre", "optimizer.lr=interval(1e-4,1e-2)", "optimizer.warmup_steps=0"]
    done = hydratron("pretrain", "-m", *TINY, *search, *drawn, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    more = hydratron("pretrain", "-m", "resume=sweep", "hydra.sweeper.n_trials=3")
    assert more.returncode == 0, more.stderr
    found = results(tmp_path / "sweep")
    assert [r["status"] for r in found] == ["ok"] * 3
    rates = [r["overrides"]["optimizer.lr"] for r in found]
    assert len(set(rates)) == 3
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(min(r["val/loss"] for r in found))
    for job, rate in enumerate(rates):
        logged = metrics(tmp_path / "sweep" / str(job))
        assert logged["train/learning_rate"].max() == pytest.approx(float(rate))
        alone = ["layernorm=pre", f"optimizer.lr={rate}", "optimizer.warmup_steps=0"]
        where = f"hydra.run.dir={tmp_path}/alone{job}"
        assert hydratron("pretrain", *TINY, *alone, where).returncode == 0
        difference = metrics(tmp_path / f"alone{job}")["train/loss"] - logged["train/loss"]
        assert difference.abs().max() < 1e-5
    enough = hydratron("pretrain", "-m", "resume=sweep", "hydra.sweeper.n_trials=3")
    assert enough.returncode == 2
    assert "has 3 trials that ended well" in enough.stderr


NAME = "a=1,b=[2]#{c} d'e größe"


def test_a_run_of_any_name_is_resumed(in_process, tmp_path: Path) -> None:
    where = f"hydra.run.dir={quoted(f'runs/{NAME}')}"
    assert in_process("pretrain", *TINY, where).returncode == 0
    for name in (f"runs/{NAME}", quoted(f"runs/{NAME}")):
        done = in_process("pretrain", f"resume={name}")
        assert (done.returncode, done.stderr) == (0, "")
        assert "has ended well" in done.stdout
    done = in_process("pretrain", f"resume=runs/{NAME}", "trainer.max_steps=5")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "runs" / NAME)["steps"] == 5
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [NAME]


@pytest.mark.slow
def test_a_sweep_of_any_name_is_resumed(hydratron, tmp_path: Path) -> None:
    where = f"hydra.sweep.dir={quoted(NAME)}"
    assert hydratron("pretrain", "-m", *TINY, "seed=1,2", *ONE[:2], where).returncode == 0
    before = results(tmp_path / NAME)
    assert [r["status"] for r in before] == ["ok", "ok"]
    (tmp_path / NAME / "1/result.json").unlink()
    done = hydratron("pretrain", "-m", f"resume={NAME}")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / NAME)[0] == before[0]
    assert [r["status"] for r in results(tmp_path / NAME)] == ["ok", "ok"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != NAME]


@pytest.mark.slow
def test_a_search_over_a_task_without_a_loss_seeks_its_metric_and_survives_its_end(
    hydratron, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    torch.manual_seed(1)
    write_bert(tmp_path / "bert")
    for name in ("train", "dev"):
        write_squad(tmp_path / f"{name}.json", 6, version="1.1")
    task = ["task=squad1", "task.train_path=train.json", "task.validation_path=dev.json"]
    small = ["task.max_seq_len=48", "data.global_batch_size=6", "task.doc_stride=8"]
    small += ["++task.max_query_len=8"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=sweep"]
    drawn = ["optimizer.lr=interval(1e-4,1e-2)", "checkpoint=bert", "task.epochs=1"]
    done = hydratron("finetune", "-m", *task, *small, *search, *drawn)
    assert done.returncode == 0, done.stderr
    scores = [r["val/f1"] for r in results(tmp_path / "sweep")]
    path = tmp_path / "sweep/optimization_results.yaml"
    assert yaml.safe_load(path.read_text())["best_value"] == pytest.approx(max(scores))
    # as where its parent was killed before it was told
    with contextlib.closing(sqlite3.connect(tmp_path / "sweep/optuna.db")) as database, database:
        database.execute("UPDATE trials SET state = 'RUNNING'")
        database.execute("DELETE FROM trial_values")
    path.unlink()
    again = hydratron("finetune", "-m", "resume=sweep")
    assert again.returncode == 0, again.stderr
    assert yaml.safe_load(path.read_text())["best_value"] == pytest.approx(max(scores))
    assert [r["val/f1"] for r in results(tmp_path / "sweep")] == scores


@pytest.mark.slow
def test_a_search_says_that_trials_failed(hydratron, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", *ONE]
    clips = {"all": "optimizer.clip=-1.0,-2.0", "some": "optimizer.clip=-1.0,1.0"}
    for name, clip in clips.items():
        drawn = ["hydra.sweeper.sampler.seed=1", clip, f"hydra.sweep.dir={name}"]
        done = hydratron("pretrain", "-m", *TINY, *search, *drawn)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        said = {"all": "all: no trial has a value to search by", "some": "1 of 3 jobs failed: 2"}
        assert said[name] in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_a_failing_rank_ends_its_job_and_no_other(hydratron, tmp_path: Path, fault: str) -> None:
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults/1").write_text(fault)
    faults = [*FAULTS, f"+logger.directory={tmp_path}/faults", "+logger.rank=1"]
    swept = ["parallel=tp2", "seed=1,2", *ONE[:2], *faults, "hydra.sweep.dir=sweep"]
    done = hydratron("pretrain", "-m", *TINY, *swept, PYTHONPATH=with_root())
    assert done.returncode == 1
    first, second = results(tmp_path / "sweep")
    assert (first["status"], second["status"]) == ("failed", "ok")
    said = {"raise": "RuntimeError: the fault of this job"}
    assert first["error"] == said.get(fault, "rank 1 of 2 was killed by SIGKILL")


def with_root() -> str:
    """Return a PYTHONPATH on which the jobs find `tests.faults`."""
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


@pytest.mark.slow
def test_joblib_runs_two_jobs_of_two_processes_at_a_time(hydratron, tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    done = hydratron("pretrain", "-m", *TINY, *launcher, "parallel=tp2", "seed=1,2", *ONE[:2])
    assert done.returncode == 0, done.stderr
    for job, seed in enumerate((1, 2)):
        alone = [*ONE[:2], f"seed={seed}", f"hydra.run.dir={tmp_path}/alone{seed}"]
        assert hydratron("pretrain", *TINY, *alone).returncode == 0
        reference = metrics(tmp_path / f"alone{seed}")["train/loss"]
        losses = metrics(tmp_path / "sweep" / str(job))["train/loss"]
        assert (losses - reference).abs().max() < 1e-5
    spans = [started_and_ended(tmp_path / "sweep" / str(job)) for job in range(2)]
    assert max(start for start, _ in spans) < min(end for _, end in spans)  # at the same time


def started_and_ended(run: Path) -> tuple[float, float]:
    start = (run / ".hydra/overrides.yaml").stat().st_mtime
    return start, (run / "result.json").stat().st_mtime


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_and_leaves_no_process(spawn: Spawn, tmp_path: Path) -> None:
    settings = [*TINY[:-1], "trainer.max_steps=100000", "parallel=tp2", "seed=1,2", *ONE[:2]]
    process = spawn(SCRIPT, "pretrain", "-m", *settings, "hydra.sweep.dir=sweep")
    run = tmp_path / "sweep/0"
    wait_for_step(run, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 130
    wait_until_gone(tmp_path)
    assert result(run)["error"] == "interrupted"
    assert not (tmp_path / "sweep/1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_jobs_of_joblib_end_with_their_sweep(
    spawn: Spawn, tmp_path: Path, number: signal.Signals
) -> None:
    settings = [*TINY[:-1], "trainer.max_steps=100000", "seed=1,2,3", *ONE[:2]]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    process = spawn(SCRIPT, "pretrain", "-m", *settings, *launcher)
    for job in range(2):
        wait_for_step(tmp_path / f"sweep/{job}", 2, process)
    os.kill(process.pid, number)
    code = process.wait(timeout=PATIENCE)
    wait_until_gone(tmp_path)
    found = {(r["status"], r["error"]) for r in results(tmp_path / "sweep")}
    assert len(results(tmp_path / "sweep")) == 2
    if number == signal.SIGINT:
        assert (code, found) == (130, {("failed", "interrupted")})
    else:  # with a checkpoint, as after a SIGTERM
        assert found == {("preempted", None)}
        assert all(checkpoints_of(tmp_path / f"sweep/{job}") for job in range(2))


def checkpoints_of(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("step-*"))


def test_a_launcher_in_an_experiment_file_is_refused_where_it_has_no_effect(
    in_process, tmp_path: Path
) -> None:
    experiment = "# @package _global_\ndefaults:\n  - override /hydra/launcher: joblib\n"
    (tmp_path / "conf/experiment").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"conf/experiment/{name}.yaml").write_text(experiment)
    where = ["--config-dir", str(tmp_path / "conf"), "-m"]
    done = in_process("pretrain", *where, "experiment=a,b", "hydra.sweep.dir=sweep")
    assert done.returncode == 2
    assert "write hydra/launcher=joblib on the command line" in done.stderr
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.slow
def test_two_nodes_of_torchrun_give_the_losses_of_one_process(
    hydratron, spawn: Spawn, tmp_path: Path
) -> None:
    grid = ["parallel=tp2_dp2", "trainer.num_nodes=2", "hydra.run.dir=two"]
    (port,) = free_ports(1)
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=tests"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    program = ["-m", "hydratron.cli", "pretrain", *TINY, *grid]
    nodes = [spawn(*command, *rendezvous, *program) for _ in range(2)]
    assert [node.wait(timeout=PATIENCE) for node in nodes] == [0, 0]
    assert hydratron("pretrain", *TINY, "hydra.run.dir=one").returncode == 0
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert (two["train/loss"] - one["train/loss"]).abs().max() < 1e-5
    assert result(tmp_path / "two")["data_parallel_size"] == 2


@pytest.mark.slow
def test_forty_jobs_of_which_four_fail_are_completed_by_resuming(hydratron, tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    for seed, fault in {5: "raise", 15: "kill", 25: "nan"}.items():
        (tmp_path / f"faults/{seed}").write_text(fault)
    text = "The quick brown fox jumps over the lazy dog near the river bank. " * 60
    for name in ("text", *(f"texts/{seed}" for seed in range(1, 41))):
        (tmp_path / name).mkdir(parents=True)
        for chapter in range(20):
            (tmp_path / name / f"{chapter}.txt").write_text(f"Chapter {chapter}.\n\n{text}")
    missing = tmp_path / "texts/35"
    missing.rename(tmp_path / "away")
    faults = [*FAULTS, f"+logger.directory={tmp_path}/faults", "trainer.max_skipped_steps=1"]
    pairs = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    small = [*TINY, "model.hidden_size=16", *ONE[:2], "data.validation_samples=8"]
    swept = ["seed=range(1,41)", f"data.path={tmp_path}/texts/${{seed}}", *pairs]
    environment = {"PYTHONPATH": with_root()}
    done = hydratron("pretrain", "-m", *small, *faults, *swept, timeout=4 * PATIENCE, **environment)
    assert done.returncode == 1
    found = {r["seed"]: r for r in results(tmp_path / "sweep")}
    assert len(found) == 40
    bad = {seed: r["error"] for seed, r in found.items() if r["status"] != "ok"}
    assert set(bad) == {5, 15, 25, 35}
    report = hydratron("report", "sweep")
    assert "36 of 40 jobs ok, 4 failed" in report.stdout
    for said in (
        "RuntimeError: the fault of this job",
        "SIGKILL",
        "was not finite",
        "no such file",
    ):
        assert said in report.stdout
    before = {seed: r["finished"] for seed, r in found.items()}
    for seed in (5, 15, 25):
        (tmp_path / f"faults/{seed}").unlink()
    (tmp_path / "away").rename(missing)
    again = hydratron("pretrain", "-m", "resume=sweep", **environment)
    assert again.returncode == 0, again.stderr
    after = {r["seed"]: r for r in results(tmp_path / "sweep")}
    assert [r["status"] for r in after.values()] == ["ok"] * 40
    changed = {seed for seed, r in after.items() if r["finished"] != before[seed]}
    assert changed == {5, 15, 25, 35}
    assert "40 of 40 jobs ok" in hydratron("report", "sweep").stdout
