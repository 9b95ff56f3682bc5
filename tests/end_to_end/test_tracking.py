"""Weights & Biases: what its offline files hold after a run has ended, however it ended."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from pytorch_lightning.loggers import Logger

from hydratron.commands.tracking import build_loggers, run_name
from tests.end_to_end.conftest import TINY, metrics, result, wait_for_step
from tests.tasks import write_bert, write_mnli
from tests.waiting import PATIENCE
from tests.wandb_files import OfflineRun, read_offline_run, read_offline_runs

WANDB = [*TINY, "logger=wandb"]
GROUPS = ["embeddings", "layer_00", "layer_01", "head"]


def assert_tells_all(run: OfflineRun, run_dir: Path) -> None:
    """The W&B run holds what the run directory holds."""
    found, table = result(run_dir), metrics(run_dir).set_index("step")
    assert run.exit_code == 0
    assert run.project == "hydratron"
    assert run.job_type == "pretrain"
    assert run.config["model"]["hidden_size"] == 32
    assert run.config["seed"] == found["seed"]
    assert run.config["git_commit"] == found["git_commit"]
    assert run.config["num_parameters"] == found["num_parameters"]
    assert run.config["environment"]["torch"] == found["versions"]["torch"]
    for key in ("train/loss", "val/loss", "train/learning_rate", "train/grad_norm", "train/tokens",
                "perf/tflops_per_gpu", "perf/tokens_per_second", "perf/peak_memory_gib",
                *(f"train/grad_norm/{group}" for group in GROUPS)):  # fmt: skip
        expected = table[key].dropna()
        assert len(expected) > 0, key
        assert run.column(key) == pytest.approx(expected.to_dict()), key
    assert run.summary["val/loss"] == pytest.approx(found["val/loss"])
    squares = sum(table[f"train/grad_norm/{group}"] ** 2 for group in GROUPS)
    assert squares.to_numpy() == pytest.approx(table["train/grad_norm"].to_numpy() ** 2, rel=1e-5)


def test_a_run_is_in_wandb_as_it_is_on_disk(in_process, tmp_path: Path) -> None:
    done = in_process("pretrain", *WANDB, "hydra.run.dir=run", "+data.x=" + "y" * 64)
    assert done.returncode == 2  # a wrong key: nothing was run, nothing is tracked
    assert read_offline_runs(tmp_path) == []
    done = in_process("pretrain", *WANDB, "hydra.run.dir=again")
    assert done.returncode == 0, done.stderr
    (run,) = read_offline_runs(tmp_path)
    assert_tells_all(run, tmp_path / "again")
    assert run.group == ""
    assert "trainer.max_steps=4" in run.tags
    assert f"wandb sync {tmp_path}/again/wandb/offline-run-*" in done.stdout


@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_what_a_kill_took_from_wandb_is_logged_by_the_resumed_run_and_nothing_twice(
    in_process, tmp_path: Path, kept: float
) -> None:
    saving = ["trainer.checkpoint_every=2", "trainer.val_every=2", "trainer.max_steps=6"]
    run = tmp_path / "run"
    done = in_process("pretrain", *TINY[:-1], *saving, "logger=wandb", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    before = metrics(run).set_index("step")
    # as a SIGKILL leaves it: the newest checkpoint, and the end of W&B's file, are not there yet
    shutil.rmtree(run / "checkpoints/step-6")
    (run / "result.json").unlink()
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    written = len(read_offline_run(file).history)
    data = file.read_bytes()
    first, last = data.index(b"train/loss"), data.rindex(b"train/loss") + 1000
    file.write_bytes(data[: first + int(kept * (last - first))])
    left = read_offline_run(file).history
    assert 0 < len(left) < written
    assert (left[-1]["trainer/global_step"] > 4) == (kept > 0.5)  # behind the checkpoint, or ahead
    done = in_process("pretrain", "resume=run")
    assert done.returncode == 0, done.stderr
    rows = [row for one in read_offline_runs(tmp_path) for row in one.history]
    logged = [(row["trainer/global_step"], k, v) for row in rows for k, v in row.items()]
    found = {(step, key): value for step, key, value in logged if key in before}
    assert len(found) == len([key for _, key, _ in logged if key in before])  # none twice
    whole = metrics(run).set_index("step")
    assert found.keys() == {(s, k) for k in whole for s in whole[k].dropna().index}
    for (step, key), value in found.items():
        if not key.startswith("perf/"):  # how fast a step was, of those that ran twice
            assert value == pytest.approx(whole.loc[step, key]), (step, key)


def test_names_of_a_sweep_are_what_its_jobs_differ_in(tmp_path: Path) -> None:
    constant = [f"data.some_long_key_{number}=1000000" for number in range(9)]
    given = [*constant, "seed=1,2", "optimizer.lr=choice(1e-3,2e-3)", "data.path=texts/${seed}"]
    sweep = {"hydra": {"overrides": {"task": given}, "sweeper": {"params": None}}}
    (tmp_path / "sweep/3/.hydra").mkdir(parents=True)
    (tmp_path / "sweep/multirun.yaml").write_text(yaml.safe_dump(sweep))
    job = [*constant, "seed=2", "optimizer.lr=2e-3", "data.path=texts/${seed}"]
    (tmp_path / "sweep/3/.hydra/overrides.yaml").write_text(yaml.safe_dump(job))
    assert run_name(tmp_path / "sweep/3") == "seed=2 optimizer.lr=2e-3"
    (tmp_path / "sweep/multirun.yaml").unlink()
    alone = run_name(tmp_path / "sweep/3")
    assert len(alone) == 128
    assert alone.startswith("data.some_long_key_0=1000000 ")
    assert alone.endswith(" ... 3")  # what differs may have been cut off


class Listener(Logger):
    """A logger of somebody else's."""

    name, version = "listener", ""
    heard: ClassVar[list[Any]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.heard.extend(args)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass


def test_every_logger_gets_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/resolved.yaml").write_text("model: {hidden_size: 32}\nseed: 3\n")
    monkeypatch.setattr("hydratron.commands.tracking.logger_class", lambda _: Listener)
    build_loggers({"_target_": "theirs"}, tmp_path)
    assert Listener.heard[0]["model"] == {"hidden_size": 32}


def test_tensorboard_gets_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/resolved.yaml").write_text("model: {hidden_size: 32}\nseed: 3\n")
    target = "pytorch_lightning.loggers.TensorBoardLogger"
    node = {"_target_": target, "save_dir": str(tmp_path), "name": "tensorboard"}
    (logger,) = build_loggers(node, tmp_path)
    logger.save()
    (written,) = tmp_path.rglob("hparams.yaml")
    assert yaml.safe_load(written.read_text())["model"] == {"hidden_size": 32}


@pytest.mark.slow
def test_a_sweep_of_grids_holds_one_run_a_job_however_the_jobs_end(
    hydratron, tmp_path: Path
) -> None:
    swept = ["parallel=tp2,single", "model.num_heads=1,4", "layernorm=pre", "optimizer.lr=3e-3"]
    done = hydratron("pretrain", "-m", *WANDB, *swept, "seed=1", "hydra.sweep.dir=sweep")
    assert done.returncode == 1  # one head does not divide by two
    runs = read_offline_runs(tmp_path)
    assert len(runs) == len({run.id for run in runs}) == 4
    assert {run.group for run in runs} == {"sweep"}
    by_job = {
        (run.config["parallel"]["tensor_parallel_size"], run.config["model"]["num_heads"]): run
        for run in runs
    }
    assert {job: run.exit_code for job, run in by_job.items()} == {
        (2, 1): 1, (2, 4): 0, (1, 1): 0, (1, 4): 0
    }  # fmt: skip
    assert by_job[2, 1].history == []
    assert_tells_all(by_job[2, 4], tmp_path / "sweep/1")
    assert_tells_all(by_job[1, 4], tmp_path / "sweep/3")
    assert by_job[2, 4].config["environment"]["world_size"] == 2
    rows = [row for row in by_job[2, 4].history if "train/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3, 4]  # one rank's, not two
    assert "wandb sync sweep/*/wandb/offline-run-*" in done.stdout
    report = hydratron("report", "sweep", "--wandb")
    assert report.returncode == 0, report.stderr
    (closing,) = (run for run in read_offline_runs(tmp_path) if run.job_type == "report")
    assert (closing.project, closing.group, closing.exit_code) == ("hydratron", "sweep", 0)
    (artifact,) = (one for one in closing.artifacts if one.type == "report")
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"table.md", "report.html", "loss_curves.png", "loss_curves.svg"} <= names
    assert {key.partition(".")[0] for row in closing.history for key in row} >= {
        "loss_curves", "summary"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "grid", "exit_code"),
    [
        (signal.SIGTERM, "tp2", 143),
        (signal.SIGTERM, "single", 143),
        (signal.SIGINT, "single", 130),
    ],
)
def test_a_stopped_run_says_so_and_a_resumed_one_goes_on_under_its_id(
    hydratron, start, tmp_path: Path, number: signal.Signals, grid: str, exit_code: int
) -> None:
    process = start("logger=wandb", "trainer.checkpoint_every=2", f"parallel={grid}")
    wait_for_step(tmp_path / "run", 3, process)
    os.kill(process.pid, number)
    assert process.wait(timeout=PATIENCE) == exit_code, (tmp_path / "output.txt").read_text()
    (stopped,) = read_offline_runs(tmp_path)
    assert stopped.exit_code == exit_code
    steps = int((tmp_path / "run/checkpoints/last").resolve().name.removeprefix("step-"))
    done = hydratron("pretrain", "resume=run", f"trainer.max_steps={steps + 2}")
    assert done.returncode == 0, done.stderr
    _, resumed = read_offline_runs(tmp_path)
    assert resumed.id == stopped.id
    assert resumed.exit_code == 0
    before, after = (list(one.column("train/loss")) for one in (stopped, resumed))
    assert before == list(range(1, len(before) + 1))  # after Ctrl-C beyond the checkpoint
    assert after == [step for step in (steps + 1, steps + 2) if step not in before]


def rank_zero(run_dir: Path) -> int:
    """Return the process id of the job's first worker."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
            variables = path.with_name("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_worker = "hydratron.launch" in words
        if is_worker and any(str(run_dir) in word for word in words) and b"RANK=1" not in variables:
            return int(path.parent.name)
    raise AssertionError(f"no worker of {run_dir} found")


@pytest.mark.slow
def test_the_run_of_a_killed_job_is_ended_by_its_launcher(start, tmp_path: Path) -> None:
    process = start("logger=wandb", "parallel=tp2")
    wait_for_step(tmp_path / "run", 3, process)
    os.kill(rank_zero(tmp_path / "run"), signal.SIGKILL)
    assert process.wait(timeout=PATIENCE) == 1
    runs = read_offline_runs(tmp_path)
    (ended,) = (run for run in runs if run.exit_code is not None)
    assert ended.exit_code == 1
    assert ended.config["environment"]["world_size"] == 2
    assert {run.id for run in runs} <= {ended.id, ""}  # what was not yet on disk is lost


def test_a_finetuned_run_is_in_wandb_too(in_process, tmp_path: Path) -> None:
    torch.manual_seed(1)
    write_bert(tmp_path / "bert")
    write_mnli(tmp_path / "train.jsonl", 16)
    write_mnli(tmp_path / "dev.jsonl", 8)
    task = ["task=mnli", "task.train_path=train.jsonl", "task.validation_path=dev.jsonl"]
    small = ["data.global_batch_size=8", "trainer.log_every=1", "task.max_seq_len=48"]
    done = in_process("finetune", *task, *small, "task.epochs=1", "checkpoint=bert",
                      "logger=wandb", "hydra.run.dir=run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = read_offline_runs(tmp_path)
    found = result(tmp_path / "run")
    assert (run.job_type, run.exit_code) == ("finetune", 0)
    assert run.config["num_parameters"] == found["num_parameters"]
    assert run.summary["val/accuracy"] == pytest.approx(found["val/accuracy"])
    norms = {key for row in run.history for key in row if key.startswith("train/grad_norm/")}
    assert norms >= {"train/grad_norm/embeddings", "train/grad_norm/layer_00"}
