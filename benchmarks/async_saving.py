"""What saving in the background costs: step times with and without a save under way.

python benchmarks/async_saving.py experiment=megatron_bert_336m trainer=gpu ...

takes the overrides of `hydratron pretrain`. Steps are timed by events in the GPU's queue. The first
steps compile; then come --steps without a save, and as many while a checkpoint is being written
(a new save begins when one has ended).
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pytorch_lightning import Callback

from hydratron.commands import pretrain
from hydratron.commands.environment import cluster_environment
from hydratron.launch import configuration_directory
from hydratron.training.benchmark import Stopwatch
from hydratron.training.callbacks import StepCheckpoint
from hydratron.training.trainer import build_trainer

WARMUP = 10


class SaveOften(Callback):
    """Saves again and again in the second half, and notes which steps ran beside a save."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.quiet: list[float] = []
        self.saving: list[float] = []
        self.calls: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        checkpoint = next(c for c in trainer.callbacks if isinstance(c, StepCheckpoint))
        if batch_idx >= WARMUP + self.steps and trainer.strategy._pending is None:
            watch = Stopwatch(module.device)
            watch.mark()
            checkpoint.save(trainer)
            watch.mark()
            self.calls += watch.milliseconds()
        self.beside = trainer.strategy._pending is not None
        self.watch = Stopwatch(module.device)
        self.watch.mark()

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        self.watch.mark()
        if trainer.global_step > WARMUP:
            (self.saving if self.beside else self.quiet).extend(self.watch.milliseconds())
        if len(self.saving) >= self.steps:
            trainer.should_stop = True


def main() -> None:
    """Train, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    options, overrides = parser.parse_known_args()
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("pretrain", overrides), resolve=True)
    most = WARMUP + 4 * options.steps
    config["trainer"] |= {"async_checkpoints": True, "max_steps": most, "log_every": most + 1}
    job, timer = pretrain.prepare(config), SaveOften(options.steps)
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(
            job.trainer,
            job.parallel,
            run_dir=Path(directory),
            loggers=[],
            environment=cluster_environment(),
            callbacks=[timer],
        )
        trainer.limit_val_batches = 0
        trainer.fit(job.module, datamodule=job.data)
        size = sum(f.stat().st_size for f in Path(directory).glob("checkpoints/last/*"))
    quiet, saving = statistics.median(timer.quiet), statistics.median(timer.saving)
    print(f"step without a save      {quiet:8.2f} ms  (median of {len(timer.quiet)})")
    print(f"step beside a save       {saving:8.2f} ms  (median of {len(timer.saving)})")
    print(f"ratio                    {saving / quiet:8.3f}")
    print(
        f"the call that starts one {statistics.median(timer.calls):8.0f} ms  ({len(timer.calls)})"
    )
    print(f"a checkpoint             {size / 2**30:8.2f} GiB")


if __name__ == "__main__":
    main()
