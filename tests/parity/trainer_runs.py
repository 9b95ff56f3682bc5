"""Short trainings through the real Trainer, strategy and pretraining module."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from hydratron.commands.environment import cluster_environment
from hydratron.models.config import ModelConfig
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.pretraining import PretrainingModule
from hydratron.training.trainer import build_trainer
from tests.parallel.twins import batch_for


class Recorder(Logger):
    """Keeps what is logged, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step == len(self.rows) + 1
        self.rows.append(metrics)


@dataclass(frozen=True)
class Run:
    """A training whose result must not depend on the layout."""

    model: ModelConfig
    dtype: torch.dtype
    steps: int = 10
    batch_size: int = 8
    accumulation: int = 2
    clip: float | None = 1.0
    lr: float = 3e-3

    def global_batches(self) -> list[dict[str, Tensor]]:
        """Sequences of different lengths with different numbers of masked tokens."""
        shape = {"batch_size": self.batch_size, "seq_len": self.model.max_seq_len - 1}
        return [
            batch_for(self.model, **shape, padded=True, seed=seed) for seed in range(self.steps)
        ]


def train(
    rank: int,
    run: Run,
    tensor_parallel_size: int,
    data_parallel_size: int,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, float]]:
    """Return the rows that this rank logged, one a step."""
    data_rank, local = rank // tensor_parallel_size, run.batch_size // data_parallel_size
    batches = [
        {key: x[data_rank * local : (data_rank + 1) * local] for key, x in batch.items()}
        for batch in run.global_batches()
    ]
    recorder = Recorder()
    module = PretrainingModule(
        run.model,
        OptimizerConfig(lr=run.lr, warmup_steps=2, clip=run.clip),
        max_steps=run.steps,
        seed=3,
        micro_batch_size=local // run.accumulation,
        log_every=1,
        dtype=run.dtype,
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(
            TrainerConfig(accelerator="cpu", max_steps=run.steps, log_every=1),
            ParallelConfig(tensor_parallel_size, data_parallel_size),
            run_dir=Path(directory),
            loggers=[recorder],
            environment=cluster_environment(),
            callbacks=callbacks,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return recorder.rows
