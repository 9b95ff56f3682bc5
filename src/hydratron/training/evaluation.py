"""Scores without training: a network over its splits once, and ensembles of scores on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule
from pytorch_lightning.plugins.environments import ClusterEnvironment

from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.finetuning import OUTPUT, score_split
from hydratron.training.module import Objective, TrainingModule
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.task_data import TaskData
from hydratron.training.tasks import Scores, load_scores, row_keys, write_outputs
from hydratron.training.trainer import build_trainer


def evaluate(
    objective: Objective,
    data: LightningDataModule,
    run_dir: Path,
    *,
    trainer: TrainerConfig,
    parallel: ParallelConfig,
    environment: ClusterEnvironment,
) -> dict[str, float]:
    """Return the metrics of an objective's network on its data."""
    lightning = build_trainer(
        trainer, parallel, run_dir=run_dir, loggers=[], environment=environment
    )
    module = TrainingModule(
        objective,
        OptimizerConfig(lr=1.0),  # never stepped
        max_steps=1,
        seed=0,
        micro_batch_size=1,
        log_every=1,
        compile=trainer.compile,
    )
    lightning.validate(module, datamodule=data, verbose=False)
    return module.last_metrics


def load_ensemble(runs: Sequence[Path], data: TaskData) -> list[list[Scores]]:
    """Return for each split the scores of all runs, each in the order of the split's rows.

    Raises:
        ValueError: a run without scores of the split, or with those of other rows.
    """
    found = []
    for split in data.evaluation_splits():
        keys = row_keys(data.task, split)
        files = [run / OUTPUT / f"{split.name}.safetensors" for run in runs]
        found.append([load_scores(file, keys) for file in files])
    return found


def score_ensemble(
    scores: Sequence[Sequence[Scores]], data: TaskData, run_dir: Path
) -> dict[str, Any]:
    """Return the metrics of the runs' mean, and write its predictions and scores."""
    metrics: dict[str, Any] = {}
    for split, runs in zip(data.evaluation_splits(), scores, strict=True):
        mean = data.task.ensemble(runs)
        metrics |= score_split(data.task, split, mean)
        write_outputs(run_dir / OUTPUT, data.task, split, mean)
    return metrics
