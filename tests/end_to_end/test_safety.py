"""What stops a run before it is too late, and what it says of a loss that jumps."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hydratron.checkpoint.manifest import CheckpointError
from hydratron.checkpoint.sharded import bytes_per_parameter, check_space
from hydratron.checkpoint.storage import Reader
from hydratron.result import note_failure
from hydratron.training.callbacks import LossSpikes
from hydratron.training.module import TrainingModule
from tests.end_to_end.conftest import TINY, metrics, result


def test_the_time_limit_saves_and_the_run_is_resumed(in_process, tmp_path: Path) -> None:
    limit = [*TINY[:-1], "trainer.max_steps=100000", "trainer.max_hours=1e-4"]  # 0.36 s
    limit += ["trainer.val_every=90000"]
    constant = ["optimizer.schedule=constant", "optimizer.warmup_steps=2"]
    done = in_process("pretrain", *limit, *constant, "hydra.run.dir=run")
    assert done.returncode == 143, done.stderr
    assert "stopped by the time limit; resume=" in done.stderr
    stopped = result(tmp_path / "run")
    assert (stopped["status"], stopped["stopped_by"]) == ("preempted", "the time limit")
    last = tmp_path / "run/checkpoints/last"
    assert last.resolve().name == f"step-{stopped['steps']}"
    # the schedule has no validation there, so that a resumed run is the uninterrupted one
    assert "val/loss" not in metrics(tmp_path / "run").dropna(axis="columns", how="all")
    length = f"trainer.max_steps={stopped['steps'] + 2}"
    done = in_process("pretrain", "resume=run", "trainer.max_hours=null", length)
    assert done.returncode == 0, done.stderr
    assert list(metrics(tmp_path / "run")["step"]) == list(range(1, stopped["steps"] + 3))


def test_a_run_that_fails_again_says_why_it_failed_this_time(in_process, tmp_path: Path) -> None:
    broken = ["optimizer.lr=1e30", "trainer.max_skipped_steps=1", "trainer.checkpoint_every=2"]
    done = in_process("pretrain", *TINY[:-1], *broken, "trainer.max_steps=50", "hydra.run.dir=run")
    assert done.returncode == 1, done.stderr
    assert result(tmp_path / "run")["error"].startswith("2 steps up to step ")
    done = in_process("pretrain", "resume=run", "trainer.max_skipped_steps=4")
    assert done.returncode == 1, done.stderr
    assert result(tmp_path / "run")["error"].startswith("5 steps up to step ")


def test_the_first_rank_s_failure_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    assert note_failure(tmp_path, "the cause") == "the cause"
    assert note_failure(tmp_path, "a symptom") == "the cause"
    assert [path.name for path in (tmp_path / ".hydra").iterdir()] == ["failure.json"]


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 300 KiB, or of as many as the test asks for."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = getattr(request, "param", 300)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # Hydra's log is still open


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(
    in_process, small_disk: Path
) -> None:
    done = in_process("pretrain", *TINY, f"hydra.run.dir={small_disk}/run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "need 0.4 MiB and the disk has 0." in done.stderr
    assert not (small_disk / "run/metrics.csv").exists()


def test_a_full_disk_and_a_place_that_is_no_folder_are_one_line(
    in_process, tmp_path: Path, small_disk: Path
) -> None:
    (tmp_path / "file").touch()
    (small_disk / "filling").write_bytes(bytes(300 * 1024))
    for where, reason in ((tmp_path / "file", "Not a directory"), (small_disk, "No space left")):
        for place in (["hydra.run.dir="], ["-m", "seed=1,2", "hydra.sweep.dir="]):
            done = in_process("pretrain", *place[:-1], *TINY, f"{place[-1]}{where}/new")
            assert done.returncode == 2, done.stderr
            assert done.stderr.count("\n") == 1, done.stderr
            assert "cannot be written to: " in done.stderr
            assert reason in done.stderr


@pytest.mark.parametrize("small_disk", [4000], indirect=True)
@pytest.mark.parametrize("every", [1, 0])
def test_a_disk_that_fills_up_in_training_is_named_and_the_run_goes_on_later(
    in_process, small_disk: Path, every: int
) -> None:
    (small_disk / "1").write_text("fill")
    run, length = small_disk / "run", f"trainer.max_steps={4 if every else 60}"
    fault = ["+logger._target_=tests.faults.Faults", "+logger.seed=1"]
    settings = [*TINY[:-1], length, f"trainer.checkpoint_every={every}", *fault]
    settings += [f"+logger.directory={small_disk}", f"hydra.run.dir={run}"]
    done = in_process("pretrain", *settings)
    assert done.returncode == 1, done.stderr
    found = result(run)
    assert found["status"] == "failed"
    assert str(run) in found["error"]
    assert "No space left on device" in found["error"]
    assert f"hydratron pretrain: {found['error']}" in done.stderr
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-1"] * every
    for name in ("filling", "1"):
        (small_disk / name).unlink()
    done = in_process("pretrain", f"resume={run}", fault[0])
    assert done.returncode == 0, done.stderr
    steps = list(metrics(run)["step"])
    assert steps == list(range(1, len(steps) + 1))
    assert result(run)["steps"] == len(steps)


def test_space_is_needed_for_what_is_kept_and_one_more_but_not_for_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=30 * 1000))
    check_space(tmp_path / "none", 1000, num_kept=1)
    with pytest.raises(CheckpointError, match="none"):
        check_space(tmp_path / "none", 1000, num_kept=2)
    for step in (1, 2):
        (tmp_path / f"run/step-{step}").mkdir(parents=True)
        (tmp_path / f"run/step-{step}/checkpoint.json").touch()
    check_space(tmp_path / "run", 2500, num_kept=2)
    check_space(tmp_path / "run", 30_000 // 14, num_kept=2, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError):
        check_space(tmp_path / "run", 30_000 // 14 + 1, num_kept=2, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError):
        check_space(tmp_path / "run", 2501, num_kept=2)


def spikes(losses: list[float], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that the callback prints of these losses, one a step."""
    callback, module = LossSpikes(), TrainingModule.__new__(TrainingModule)
    for step, loss in enumerate(losses, start=1):
        state = {"log_every": 1, "last_metrics": {"train/loss": loss}}
        module.__dict__.update(state)
        trainer = SimpleNamespace(global_step=step, is_global_zero=True)
        callback.on_train_batch_end(trainer, module, None, None, 0)  # pyright: ignore
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_a_checkpoint_holds_what_the_disk_is_asked_for(
    in_process, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    run = ["trainer.max_steps=1", f"trainer.precision={precision}", "hydra.run.dir=run"]
    done = in_process("pretrain", *TINY[:-1], *run)
    assert done.returncode == 0, done.stderr
    metadata = Reader(tmp_path / "run/checkpoints/step-1").read_metadata()
    stored = metadata.state_dict_metadata.values()
    tensors = [t for t in stored if isinstance(t, TensorStorageMetadata) and t.size]
    held = sum(t.size.numel() * t.properties.dtype.itemsize for t in tensors)
    assert held == bytes_per_parameter(dtype) * result(tmp_path / "run")["num_parameters"]


def test_a_loss_spike_is_noted_once_and_a_falling_or_noisy_loss_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    falling = [6.0 * 0.99**step + 0.05 * (-1) ** step for step in range(60)]
    assert spikes(falling, capsys) == []
    spiked = [*falling[:40], 9.0, *falling[40:], float("nan")]
    (line,) = spikes(spiked, capsys)
    assert line.startswith("step 41: loss spike, train/loss 9 after a median of 4.")
