"""What happens around the steps: checkpoints, throughput, stopping in agreement, progress lines."""

import math
import os
import resource
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from hydratron.checkpoint.manifest import NAME_PREFIX, step_directories
from hydratron.checkpoint.runs import differences
from hydratron.checkpoint.sharded import remove_checkpoint
from hydratron.perf.flops import train_flops
from hydratron.perf.hardware import GIB
from hydratron.training.module import TrainingModule
from hydratron.training.pretraining import PretrainingModule
from hydratron.training.strategy import TensorParallelStrategy

NUM_KEPT = 2


def _strategy(trainer: Trainer) -> TensorParallelStrategy:
    assert isinstance(trainer.strategy, TensorParallelStrategy)
    return trainer.strategy


class StepCheckpoint(Checkpoint):
    """Saves `checkpoints/step-<n>` every so many steps and at the end; keeps the newest two.

    A step is saved when the next one begins, after its validation, so that a resumed run repeats
    nothing and omits nothing. `last` links to the newest.

    Args:
        directory: of the checkpoints.
        every: optimizer steps between them; 0 saves at the end alone.
        run: what each checkpoint's manifest says of the run: `settings` by dotted key, `identity`
            of its data, and `samples` and `tokens` that one step consumes.
    """

    def __init__(
        self, directory: Path, *, every: int, run: Mapping[str, Any] | None = None
    ) -> None:
        self.directory, self.every = directory, every
        self.run = dict(run or {})
        # of a resumed run: at which step which setting went from what to what
        self.changes: list[dict[str, Any]] = []
        self.last_saved = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_saved = trainer.global_step
        if trainer.is_global_zero:
            for path in self.directory.glob("*.tmp"):  # a killed save, removal or link
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
            if self.last_saved:  # killed between a checkpoint and its link
                self._link_and_prune(trainer, self.directory / f"{NAME_PREFIX}{self.last_saved}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Describe the run, with what it has consumed."""
        consumed = {k: trainer.global_step * self.run.get(k, 0) for k in ("samples", "tokens")}
        step = {"step": trainer.global_step, "changes": self.changes}
        checkpoint["run"] = self.run | consumed | step

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note which settings are not those of the checkpoint."""
        stored = checkpoint.get("run") or {}
        self.changes = list(stored.get("changes", []))
        if "settings" in stored:
            changed = differences(stored["settings"], self.run.get("settings", {}))
            values = {key: list(pair) for key, pair in changed.items()}
            if values:
                self.changes.append({"step": checkpoint["global_step"]} | values)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.publish(trainer, wait=False)
        if self.every and trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self.publish(trainer, wait=True)
        trainer.strategy.barrier()

    def save(self, trainer: Trainer) -> None:
        """Save the current step unless it is saved already; every rank must call it."""
        step = trainer.global_step
        if step == self.last_saved or step == 0:
            return
        self.publish(trainer, wait=True)  # a background save still under way
        directory = self.directory / f"{NAME_PREFIX}{step}"
        trainer.save_checkpoint(directory)
        self.last_saved = step
        if not _strategy(trainer).save_in_background:
            self._link_and_prune(trainer, directory)

    def publish(self, trainer: Trainer, *, wait: bool) -> None:
        """Let a background save that has ended (with `wait`: any) become a checkpoint."""
        directory = _strategy(trainer).finish_saving(wait=wait)
        # the best of a finetuning run is saved beside the steps and is none of them
        if directory is not None and directory.name.startswith(NAME_PREFIX):
            self._link_and_prune(trainer, directory)

    def _link_and_prune(self, trainer: Trainer, newest: Path) -> None:
        if trainer.is_global_zero:
            link = self.directory / "last.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(newest.name)
            os.replace(link, self.directory / "last")
            for old in step_directories(self.directory)[NUM_KEPT:]:
                remove_checkpoint(old)


class LoggedInterval(Callback):
    """Counts and times what lies between two logged steps, where the host has waited for the
    device; validation and saving are left out.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.started, self.count = time.perf_counter(), 0

    def counted(self, module: TrainingModule, batch: Any) -> int:
        """Return what one step adds to the count."""
        raise NotImplementedError

    def log_interval(self, trainer: Trainer, module: TrainingModule, seconds: float) -> None:
        """Record the interval that ends with this step; `self.count` is its count."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any
    ) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.count += self.counted(pl_module, batch)
        if pl_module.is_logged(trainer.global_step):
            self.log_interval(trainer, pl_module, time.perf_counter() - self.started)
            self._restart()


class Throughput(LoggedInterval):
    """Logs the tokens so far, tokens per second of the whole grid, TFLOP/s per device and peak
    memory (of a process where there is no GPU).
    """

    def __init__(self, *, seq_len: int, global_batch_size: int, num_predictions: int) -> None:
        super().__init__()
        self.seq_len, self.global_batch_size = seq_len, global_batch_size
        self.num_predictions = num_predictions

    def counted(self, module: TrainingModule, batch: Any) -> int:
        return 1

    def log_interval(self, trainer: Trainer, module: TrainingModule, seconds: float) -> None:
        assert isinstance(module, PretrainingModule)
        seconds /= self.count
        flops = self.global_batch_size * train_flops(
            module.model_config, seq_len=self.seq_len, num_predictions=self.num_predictions
        )
        metrics = {
            "train/tokens": float(trainer.global_step * self.global_batch_size * self.seq_len),
            "perf/step_ms": 1e3 * seconds,
            "perf/tokens_per_second": self.global_batch_size * self.seq_len / seconds,
            "perf/tflops_per_gpu": flops / seconds / trainer.world_size / 1e12,
        }
        if module.device.type == "cuda":
            metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        else:
            kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            metrics["perf/peak_memory_gib"] = kib / 2**20
        module.record(metrics)


# Why training ended early, the weakest reason first: SIGUSR2 asks SLURM's users to make room and be
# requeued, and may come together with SIGTERM.
REASONS = ("", "the time limit", "SIGTERM", "SIGUSR2")


class StopOnRequest(Callback):
    """Ends training after the same step on every rank when any rank got SIGTERM or SIGUSR2, or
    `max_hours` after this was made.

    The flag is agreed by a background all-reduce on the CPU, read one step later, so that no step
    waits for it. The checkpoint of the last step is then written by StepCheckpoint.
    """

    def __init__(self, *, max_hours: float | None = None) -> None:
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.requested = 0  # an index of REASONS
        self.stopped_by = ""
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # replaces Lightning's handler, which broadcasts from inside the signal handler
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._request)

    def _request(self, number: int, *_: Any) -> None:
        self.requested = max(self.requested, REASONS.index(signal.Signals(number).name))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() > self.deadline:
            self.requested = max(self.requested, REASONS.index("the time limit"))
        if trainer.world_size == 1:
            agreed = self.requested
        else:
            agreed = self._agreed()
            flag = torch.tensor(self.requested)
            work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
            assert work is not None
            self._pending = (work, flag)
        if agreed:
            self.stopped_by, trainer.should_stop = REASONS[agreed], True
            # Lightning would validate because of it, before the checkpoint, which cannot wait, and
            # a resumed run would then have validated where the uninterrupted one has not
            loop = trainer.fit_loop.epoch_loop
            loop._skip_next_val = not _is_validation_due(trainer)

    def _agreed(self) -> int:
        if self._pending is None:
            return 0
        work, flag = self._pending
        work.wait()
        return int(flag)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agreed()
        self._pending = None


def _is_validation_due(trainer: Trainer) -> bool:
    """Whether the step that ends now is one of those after which the schedule validates."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if trainer.check_val_every_n_epoch is not None:
        return loop.batch_progress.is_last_batch
    return isinstance(every, int) and (loop.total_batch_idx + 1) % every == 0


def setting_changes(trainer: Trainer) -> list[dict[str, Any]]:
    """Return at which step of the run which settings changed: {"step": n, key: [before, after]}."""
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((c.changes for c in callbacks if isinstance(c, StepCheckpoint)), [])


def stopped_by(trainer: Trainer) -> str:
    """Return what ended training before its end, a word of REASONS; empty if nothing did."""
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return "".join(c.stopped_by for c in callbacks if isinstance(c, StopOnRequest))


class LossSpikes(Callback):
    """Notes a training loss far above those logged before it, and does nothing about it.

    Far: by ten median absolute deviations (6.7 standard deviations of normal noise) of the last
    `NUM_LOSSES`, and by a tenth of their median.
    """

    NUM_LOSSES = 20

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.NUM_LOSSES)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not pl_module.is_logged(trainer.global_step) or not trainer.is_global_zero:
            return
        loss = pl_module.last_metrics["train/loss"]
        if not math.isfinite(loss):  # counted elsewhere
            return
        if len(self.losses) == self.NUM_LOSSES:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(x - median) for x in self.losses)
            if loss > median + max(10 * deviation, 0.1 * median):
                print(
                    f"step {trainer.global_step}: loss spike, train/loss {loss:.5g} after a median"
                    f" of {median:.5g} in the {self.NUM_LOSSES} logged before",
                    flush=True,
                )
        self.losses.append(loss)


class ProgressLines(Callback):
    """Plain lines where the output is no terminal: one a logged step, one a validation."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.is_logged(trainer.global_step):
            rates = ("perf/tokens_per_second", "perf/examples_per_second")
            self._print(trainer, pl_module, ("train/loss", "train/grad_norm", *rates))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if trainer.global_step:  # else nothing is trained here
            self._print(
                trainer, pl_module, [k for k in pl_module.last_metrics if k.startswith("val/")]
            )

    @staticmethod
    def _print(trainer: Trainer, module: TrainingModule, keys: Sequence[str]) -> None:
        if trainer.is_global_zero:
            values = module.last_metrics
            text = "  ".join(f"{key} {float(values[key]):.5g}" for key in keys if key in values)
            print(f"step {trainer.global_step}/{module.max_steps}  {text}", flush=True)
