"""A checkpoint of any layout goes on in any other, like a run that was never interrupted."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from hydratron.checkpoint.manifest import CheckpointError, newest_checkpoint
from hydratron.checkpoint.sharded import load_loop_state
from hydratron.checkpoint.storage import Reader, Writer
from hydratron.parallel.zero import ShardedAdamW
from hydratron.training.callbacks import StepCheckpoint
from hydratron.training.strategy import TensorParallelStrategy
from tests.distributed import run_distributed
from tests.pretraining import Job
from tests.waiting import PATIENCE

STEPS, SAVED = 10, 4
BOUND = {torch.float64: 1e-9, torch.float32: 5e-6}  # sums in another order over ten steps


def job(run_dir: Path, tp: int, dp: int, dtype: torch.dtype, shard: bool, every: int = 0) -> Job:
    return Job(
        run_dir,
        tp=tp,
        dp=dp,
        max_steps=STEPS,
        dtype=dtype,
        optimizer={"clip": 0.5, "shard": shard},
        trainer={"checkpoint_every": every},
    )


def train(rank: int, world_size: int, run_dir: Path, *settings: Any) -> dict[str, Any]:
    """Train, from the newest checkpoint of `run_dir` if there is one, and return the losses."""
    trainer, module, data, metrics = job(run_dir, *settings).build()
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    optimizer = trainer.optimizers[0]
    held = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    return {
        "losses": metrics.column("train/loss"),
        "rates": metrics.column("train/learning_rate"),
        "is_sharded": isinstance(optimizer, ShardedAdamW),
        "held": held,
    }


DTYPES = [
    pytest.param(torch.float64, id="float64"),
    pytest.param(torch.float32, id="float32", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=DTYPES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs at TP 2 x DP 2 with checkpoints, without and with ZeRO: {shard: (directory, losses)}."""
    dtype, runs = request.param, {}
    for shard in (False, True):
        path = tmp_path_factory.mktemp("saved")
        results = run_distributed(train, 4, path, path, 2, 2, dtype, shard, SAVED)
        runs[shard] = (path, results)
    return dtype, runs


def copy_of_step(source: Path, target: Path, step: int) -> None:
    (target / "checkpoints").mkdir(parents=True)
    (target / f"checkpoints/step-{step}").symlink_to(source / f"checkpoints/step-{step}")


@pytest.mark.parametrize(
    ("was_sharded", "tp", "dp"),
    [
        (False, 1, 1),
        (False, 1, 4),
        (True, 1, 1),
        (True, 4, 1),
        (True, 2, 2),
        pytest.param(False, 4, 1, marks=pytest.mark.slow),
        pytest.param(False, 2, 2, marks=pytest.mark.slow),
        pytest.param(True, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_any_layout_goes_on_from_any_other(
    saved: Any, tmp_path: Path, was_sharded: bool, tp: int, dp: int
) -> None:
    dtype, runs = saved
    source, results = runs[was_sharded]
    copy_of_step(source, tmp_path / "run", 2 * SAVED)
    is_sharded = not was_sharded  # the other kind of optimizer reads it too
    arguments = (tmp_path / "run", tp, dp, dtype, is_sharded)
    if tp * dp == 1:
        again = train(0, 1, *arguments)
    else:
        again = run_distributed(train, tp * dp, tmp_path, *arguments)[0]
    expected = results[0]["losses"][2 * SAVED :]
    assert len(expected) == STEPS - 2 * SAVED
    assert again["losses"] == pytest.approx(expected, abs=BOUND[dtype])
    assert again["rates"] == results[0]["rates"][2 * SAVED :]
    assert again["is_sharded"] == (is_sharded and dp > 1)


def test_sharding_the_optimizer_changes_memory_and_not_one_bit(saved: Any) -> None:
    _, runs = saved
    whole, sharded = runs[False][1][0], runs[True][1][0]
    assert sharded["is_sharded"]
    assert sharded["losses"] == whole["losses"]
    assert sharded["held"] < 0.51 * whole["held"]


def test_a_checkpoint_is_as_large_as_what_it_holds(tmp_path: Path) -> None:
    large = {"hidden_size": 512, "num_heads": 8}
    trainer, module, data, _ = Job(tmp_path, model=large, max_steps=1).build()
    trainer.fit(module, datamodule=data)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints/step-1").iterdir())
    num_values = sum(p.numel() for p in module.network.parameters())
    assert size == pytest.approx(3 * 4 * num_values, rel=0.02)  # weights and two moments, float32


def test_only_complete_checkpoints_count(saved: Any, tmp_path: Path) -> None:
    source = saved[1][False][0]
    copy_of_step(source, tmp_path, 2 * SAVED)
    (tmp_path / "checkpoints/step-99.tmp").mkdir()
    (tmp_path / "checkpoints/step-77").mkdir()
    found = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == f"step-{2 * SAVED}"
    assert load_loop_state(found)["global_step"] == 2 * SAVED
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_loop_state(tmp_path / "checkpoints/step-77")


def test_the_newest_two_are_kept_and_last_links_to_the_newest(saved: Any) -> None:
    directory = saved[1][False][0] / "checkpoints"
    assert sorted(p.name for p in directory.iterdir()) == ["last", "step-10", "step-8"]
    assert os.readlink(directory / "last") == "step-10"


def test_a_checkpoint_holds_no_pickled_code(saved: Any) -> None:
    source, _ = saved[1][False]
    directory = source / "checkpoints/last"
    state: dict[str, Tensor] = torch.load(directory / "rng-0.pt", weights_only=True)
    assert "cpu" in state
    assert load_loop_state(directory)["layout"] == {"tensor_parallel_size": 2, "world_size": 4}


class SlowSaves(Callback):
    """Holds every background save back until training has gone on for two steps."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.saved_at = 0
        self.steps_meanwhile = 0

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        self.saved_at = trainer.global_step
        if self.saved_at < STEPS:  # nothing comes after the last one
            self.released.clear()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        pending = trainer.strategy._pending
        if pending is not None and not pending.is_done():
            self.steps_meanwhile += 1
        if trainer.global_step >= self.saved_at + 2:
            self.released.set()


def background_job(run_dir: Path, tp: int) -> Job:
    settings = {"checkpoint_every": 4, "async_checkpoints": True}
    return Job(run_dir, tp=tp, max_steps=STEPS, trainer=settings, optimizer={"clip": 0.5})


def test_training_goes_on_while_a_save_is_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowSaves()
    write = Writer.write_data

    def held_back(self: Any, *arguments: Any) -> Any:
        assert slow.released.wait(timeout=PATIENCE)
        return write(self, *arguments)

    monkeypatch.setattr(Writer, "write_data", held_back)
    trainer, module, data, metrics = background_job(tmp_path, 1).build([slow])
    slow.released.set()
    trainer.fit(module, datamodule=data)
    assert slow.steps_meanwhile >= 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "last",
        "step-10",
        "step-8",
    ]


def test_the_best_of_a_finetuning_run_is_not_its_last(tmp_path: Path) -> None:
    saved = iter((tmp_path / "step-6", tmp_path / "best"))
    strategy = object.__new__(TensorParallelStrategy)
    strategy.finish_saving = lambda *, wait: next(saved)
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=True)
    callback = StepCheckpoint(tmp_path, every=1)
    for _ in range(2):
        callback.publish(trainer, wait=False)
    assert (tmp_path / "last").readlink() == Path("step-6")


def train_in_background(rank: int, world_size: int, run_dir: Path) -> list[float]:
    trainer, module, data, metrics = background_job(run_dir, 2).build()
    trainer.fit(module, datamodule=data)
    return metrics.column("train/loss")


def test_a_background_save_holds_the_step_it_was_taken_at(tmp_path: Path) -> None:
    losses = run_distributed(train_in_background, 2, tmp_path, tmp_path / "run")[0]
    copy_of_step(tmp_path / "run", tmp_path / "again", 2 * SAVED)
    again = train(0, 1, tmp_path / "again", 1, 1, torch.float32, False)
    assert again["losses"] == pytest.approx(losses[2 * SAVED :], abs=BOUND[torch.float32])


def test_a_failed_background_save_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(Writer, "write_data", fail)
    trainer, module, data, _ = background_job(tmp_path, 1).build()
    with pytest.raises(CheckpointError, match=r"saving .*step-4 failed"):
        trainer.fit(module, datamodule=data)
    assert newest_checkpoint(tmp_path / "checkpoints") is None


INTERRUPTED_OR_FAILED = [
    (KeyboardInterrupt(), SystemExit),  # Lightning makes an exit of an interrupt
    (OSError("the disk is gone"), CheckpointError),
]


def fit_fails_as(seen: type, said: str, run_dir: Path, **resumed: Any) -> None:
    trainer, module, data, _ = job(run_dir, 1, 1, torch.float32, False, SAVED).build()
    with pytest.raises(seen) as caught:
        trainer.fit(module, datamodule=data, **resumed)
    if seen is CheckpointError:
        assert str(caught.value) == f"{said} failed: the disk is gone"
    else:
        assert isinstance(caught.value.__context__, KeyboardInterrupt)


@pytest.mark.parametrize(("raised", "seen"), INTERRUPTED_OR_FAILED)
def test_a_save_that_is_interrupted_or_fails_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, seen: type
) -> None:
    def fail(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(Writer, "write_data", fail)
    fit_fails_as(seen, f"saving {tmp_path / 'checkpoints/step-4'}", tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(("raised", "seen"), INTERRUPTED_OR_FAILED)
def test_a_load_that_is_interrupted_or_fails_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, seen: type
) -> None:
    def fail(*_: Any) -> Any:
        raise raised

    train(0, 1, tmp_path, 1, 1, torch.float32, False, SAVED)
    monkeypatch.setattr(Reader, "read_data", fail)
    newest = newest_checkpoint(tmp_path / "checkpoints")
    fit_fails_as(seen, f"loading {newest}", tmp_path, ckpt_path=newest)
