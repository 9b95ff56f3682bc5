"""`hydratron finetune`: a task on any checkpoint, or on an encoder of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from hydratron.checkpoint.runs import flatten
from hydratron.commands.environment import check_devices, cluster_environment
from hydratron.commands.tasks import (
    FINETUNED,
    build_task,
    describe_source,
    fill,
    open_source,
)
from hydratron.commands.tracking import check_logger, note, tracked
from hydratron.settings import build
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.finetuning import FinetuneJob, finetune
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.task_data import BatchConfig, TaskData
from hydratron.training.tasks import Task


@dataclass(frozen=True)
class PreparedJob:
    """A checked job and its loggers, which are made where the run is."""

    job: FinetuneJob
    loggers: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint says of the run."""
        return self.job.describe()


def read_settings(
    config: Mapping[str, Any],
) -> tuple[Task, BatchConfig, OptimizerConfig, ParallelConfig]:
    """Check a configuration without opening a file; ValueError says what is wrong with it."""
    check_logger(config["logger"])
    task = build_task(config.get("task"), FINETUNED)
    batches = build(BatchConfig, config["data"], name="data")
    optimizer = build(OptimizerConfig, config["optimizer"], name="optimizer")
    parallel = build(ParallelConfig, config["parallel"], name="parallel")
    check_devices(build_settings(config["trainer"], epochs=1, epoch=1), parallel.world_size)
    batches.local_batch_size(parallel.data_parallel_size)
    return task, batches, optimizer, parallel


def prepare(config: Mapping[str, Any]) -> PreparedJob:
    """Check a configuration and encode its data; ValueError says what is wrong with it."""
    task, batches, optimizer, parallel = read_settings(config)
    source, tokenizer = open_source(config, task)
    limits = {"max_positions": source.max_positions, "seed": config["seed"]}
    data = TaskData(task, batches, tokenizer, groups=("train", "validation"), **limits)
    data.check_rows(parallel.data_parallel_size)
    epoch = data.steps_per_epoch(parallel.data_parallel_size)
    trainer = build_settings(config["trainer"], epochs=task.epochs, epoch=epoch)
    job = FinetuneJob(trainer, parallel, optimizer, source, data, config["seed"], flatten(config))
    return PreparedJob(job, config["logger"])


def build_settings(node: Mapping[str, Any], *, epochs: int, epoch: int) -> TrainerConfig:
    """Return the settings of `trainer`; null lengths are those of `epoch` steps each."""
    lengths = {"max_steps": epochs * epoch, "val_every": epoch, "checkpoint_every": epoch}
    is_gpu = node.get("accelerator") == "gpu"
    return build(TrainerConfig, fill(node, lengths | {"cuda_graphs": is_gpu}), name="trainer")


def run(prepared: PreparedJob, run_dir: Path) -> dict[str, Any]:
    """Train to the end; return what `result.json` says of it."""
    job = prepared.job
    described = describe_source(job.source, job.data, run_dir)

    def train(loggers: list[Logger]) -> dict[str, Any]:
        note(loggers, num_parameters=described["num_parameters"])
        outcome = finetune(job, run_dir, loggers=loggers, environment=cluster_environment())
        return described | outcome

    return tracked(prepared.loggers, run_dir, train)
