"""`hydratron finetune`: a task on any checkpoint, or on an encoder of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from hydratron.checkpoint.runs import flatten
from hydratron.commands.environment import cluster_environment
from hydratron.commands.tasks import build_task, describe_source, fill, open_source
from hydratron.commands.tracking import check_logger, note, tracked
from hydratron.settings import build
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.finetuning import FinetuneJob, finetune
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.task_data import BatchConfig, TaskData


@dataclass(frozen=True)
class PreparedJob:
    """A checked job and its loggers, which are made where the run is."""

    job: FinetuneJob
    loggers: Mapping[str, Any]


def prepare(config: Mapping[str, Any]) -> PreparedJob:
    """Check a configuration and encode its data; ValueError says what is wrong with it."""
    check_logger(config["logger"])
    task = build_task(config["task"])
    batches = build(BatchConfig, config["data"], name="data")
    optimizer = build(OptimizerConfig, config["optimizer"], name="optimizer")
    parallel = build(ParallelConfig, config["parallel"], name="parallel")
    batches.local_batch_size(parallel.data_parallel_size)
    source, tokenizer = open_source(config, task)
    limits = {"max_positions": source.max_positions, "seed": config["seed"]}
    data = TaskData(task, batches, tokenizer, groups=("train", "validation"), **limits)
    epoch = data.steps_per_epoch(parallel.data_parallel_size)
    lengths = {"max_steps": task.epochs * epoch, "val_every": epoch, "checkpoint_every": epoch}
    trainer = build(TrainerConfig, fill(config["trainer"], lengths), name="trainer")
    trainer.local_devices(parallel.world_size)
    job = FinetuneJob(trainer, parallel, optimizer, source, data, config["seed"], flatten(config))
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
