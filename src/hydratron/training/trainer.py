"""From a few plain settings to a Lightning Trainer on the tensor-parallel strategy."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import ClusterEnvironment

from hydratron.training.callbacks import LossSpikes, ProgressLines, StepCheckpoint, StopOnRequest
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.strategy import TensorParallelStrategy

CHECKPOINTS = "checkpoints"


def build_trainer(
    config: TrainerConfig,
    parallel: ParallelConfig,
    *,
    run_dir: Path,
    loggers: Sequence[Logger],
    environment: ClusterEnvironment,
    callbacks: Sequence[Callback] = (),
    run: Mapping[str, Any] | None = None,
    steps_only: bool = False,
) -> Trainer:
    """Return a Trainer whose processes exist already (`environment` knows them).

    `run` describes the run in its checkpoints. With `steps_only` it neither validates nor saves.
    """
    is_terminal = sys.stdout.isatty()
    saving = [StepCheckpoint(run_dir / CHECKPOINTS, every=config.checkpoint_every, run=run)]
    return Trainer(
        accelerator=config.accelerator,
        devices=config.local_devices(parallel.world_size),
        num_nodes=config.num_nodes,
        strategy=TensorParallelStrategy(
            tensor_parallel_size=parallel.tensor_parallel_size,
            data_parallel_size=parallel.data_parallel_size,
            save_in_background=config.async_checkpoints,
        ),
        precision=config.autocast_precision,
        plugins=[environment],
        logger=list(loggers),
        callbacks=[
            *callbacks,
            RichProgressBar() if is_terminal else ProgressLines(),
            LossSpikes(),
            StopOnRequest(max_hours=config.max_hours),
            *([] if steps_only else saving),
        ],
        max_steps=config.max_steps,
        max_epochs=-1,
        val_check_interval=config.val_every or None,
        check_val_every_n_epoch=None if config.val_every else 1,
        num_sanity_val_steps=0,
        limit_val_batches=0 if steps_only else None,
        use_distributed_sampler=False,
        enable_checkpointing=True,
        enable_progress_bar=is_terminal,
        enable_model_summary=False,
        log_every_n_steps=1,  # the module logs by itself
        default_root_dir=run_dir,
    )
