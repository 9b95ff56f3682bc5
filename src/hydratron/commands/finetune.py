"""`hydratron finetune`: a task on any checkpoint, or on an encoder of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from hydratron.commands.configuration import build, check_devices
from hydratron.commands.environment import cluster_environment
from hydratron.commands.tasks import (
    FINETUNED,
    build_task,
    describe_source,
    fill,
    open_source,
)
from hydratron.commands.tracking import check_installed, note, tracked
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.finetuning import FinetuneJob, finetune
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.task_data import BatchConfig, TaskData
from hydratron.training.tasks import Task

# of the trainer, what the number of training rows decides where it is null
LENGTHS = ("max_steps", "val_every", "checkpoint_every")


@dataclass(frozen=True)
class Settings:
    """What a configuration says before any file is opened."""

    task: Task
    batches: BatchConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    seed: int


@dataclass(frozen=True)
class PreparedJob:
    """A checked job and its loggers, which are made where the run is."""

    job: FinetuneJob
    loggers: Mapping[str, Any]


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Check a configuration without opening a file; ValueError says what is wrong with it."""
    check_installed(config["logger"])
    task = build_task(config.get("task"), FINETUNED)
    batches = build(BatchConfig, config["data"], name="data")
    optimizer = build(OptimizerConfig, config["optimizer"], name="optimizer")
    parallel = build(ParallelConfig, config["parallel"], name="parallel")
    batches.local_batch_size(parallel.data_parallel_size)
    trainer = fill(config["trainer"], dict.fromkeys(LENGTHS, 1))
    check_devices(build(TrainerConfig, trainer, name="trainer"), parallel.world_size)
    return Settings(task, batches, optimizer, parallel, config["seed"])


def prepare(config: Mapping[str, Any]) -> PreparedJob:
    """Check a configuration and encode its data; ValueError says what is wrong with it."""
    settings = read_settings(config)
    task, parallel, seed = settings.task, settings.parallel, settings.seed
    source, tokenizer = open_source(config, task)
    limits = {"max_positions": source.max_positions, "seed": seed}
    data = TaskData(task, settings.batches, tokenizer, groups=("train", "validation"), **limits)
    data.check_rows(parallel.data_parallel_size)
    epoch = data.steps_per_epoch(parallel.data_parallel_size)
    lengths = dict.fromkeys(LENGTHS, epoch) | {"max_steps": task.epochs * epoch}
    trainer = build(TrainerConfig, fill(config["trainer"], lengths), name="trainer")
    job = FinetuneJob(trainer, parallel, settings.optimizer, source, data, seed)
    return PreparedJob(job, config["logger"])


def run(prepared: PreparedJob, run_dir: Path) -> dict[str, Any]:
    """Train to the end; return what `result.json` says of it."""
    job = prepared.job
    described = describe_source(job.source, job.data, run_dir)

    def train(loggers: list[Logger]) -> dict[str, Any]:
        note(loggers, num_parameters=described["num_parameters"])
        outcome = finetune(job, run_dir, loggers=loggers, environment=cluster_environment())
        return described | outcome

    return tracked(prepared.loggers, run_dir, train)
