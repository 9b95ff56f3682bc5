"""`hydratron pretrain`: train BERT or GPT-2 from nothing, or go on with a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from hydratron.arguments import InputError
from hydratron.checkpoint.manifest import step_directories
from hydratron.checkpoint.runs import flatten
from hydratron.checkpoint.sharded import check_space
from hydratron.checkpoint.source import TOKENIZER
from hydratron.commands.environment import check_devices, cluster_environment
from hydratron.commands.tracking import check_logger, note, tracked
from hydratron.data.config import DataConfig
from hydratron.models.config import ModelConfig
from hydratron.settings import build
from hydratron.training.callbacks import NUM_KEPT, Throughput, setting_changes, stopped_by
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.datamodule import PretrainingData
from hydratron.training.metrics import MetricsFile
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.pretraining import PretrainingModule, num_parameters
from hydratron.training.trainer import CHECKPOINTS, build_trainer

SHORT_VALIDATION = 2**16  # samples


@dataclass(frozen=True)
class PretrainJob:
    """A checked job: everything is built that needs no process group. `settings`: by dotted key."""

    trainer: TrainerConfig
    parallel: ParallelConfig
    data: PretrainingData
    module: PretrainingModule
    loggers: Mapping[str, Any]
    settings: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint says of the run: settings, data, what a step consumes."""
        samples = self.data.config.global_batch_size
        return {
            "command": "pretrain",
            "settings": self.settings,
            "identity": self.data.identity(),
            "samples": samples,
            "tokens": samples * self.data.config.seq_len,
        }


def prepare(config: Mapping[str, Any], *, num_timed: int | None = None) -> PretrainJob:
    """Check a configuration and build its corpus; ValueError says what is wrong with it.

    `num_timed`: the steps of a benchmark, of which the last is logged and none is validated.
    """
    model = build(ModelConfig, config["model"], name="model")
    data = build(DataConfig, config["data"], name="data")
    optimizer = build(OptimizerConfig, config["optimizer"], name="optimizer")
    trainer = build(TrainerConfig, config["trainer"], name="trainer")
    parallel = build(ParallelConfig, config["parallel"], name="parallel")
    if num_timed is None:
        check_validation(data, num_steps=trainer.max_steps)
    else:
        limits = dict.fromkeys(("max_steps", "log_every", "max_skipped_steps"), num_timed)
        trainer = replace(trainer, **limits)
    check_devices(trainer, parallel.world_size)
    check_logger(config["logger"])
    model.check_tensor_parallel(parallel.tensor_parallel_size)
    if data.validation_samples < parallel.data_parallel_size:
        raise ValueError(
            f"data.validation_samples {data.validation_samples} is less than"
            f" data_parallel_size {parallel.data_parallel_size}: each replica needs one"
        )
    if optimizer.shard and trainer.precision == "16-mixed":
        raise ValueError("optimizer.shard works with every trainer.precision but 16-mixed")
    return PretrainJob(
        trainer=trainer,
        parallel=parallel,
        data=PretrainingData(data, model, seed=config["seed"], num_steps=trainer.max_steps),
        module=PretrainingModule(
            model,
            optimizer,
            max_steps=trainer.max_steps,
            seed=config["seed"],
            micro_batch_size=data.micro_batch(parallel.data_parallel_size),
            log_every=trainer.log_every,
            log_layer_norms=trainer.log_layer_norms,
            max_skipped_steps=trainer.max_skipped_steps,
            dtype=trainer.parameter_dtype,
            compile=trainer.compile,
            fp8=trainer.precision == "fp8",
            interleave=parallel.interleave,
            cuda_graphs=bool(trainer.cuda_graphs),
        ),
        loggers=config["logger"],
        settings=flatten(config),
    )


def check_validation(data: DataConfig, *, num_steps: int) -> None:
    """Raise ValueError where one validation would be longer than training, and not a short one."""
    trained = num_steps * data.global_batch_size
    if data.validation_samples > max(trained, SHORT_VALIDATION):
        raise ValueError(
            f"data.validation_samples {data.validation_samples} is more than the {trained} samples"
            f" that the run trains on; up to {SHORT_VALIDATION} are always allowed"
        )


def run(job: PretrainJob, run_dir: Path) -> dict[str, Any]:
    """Train to the end; return what `result.json` says of it."""
    return tracked(job.loggers, run_dir, lambda loggers: train(job, run_dir, loggers))


def train(job: PretrainJob, run_dir: Path, loggers: Sequence[Logger]) -> dict[str, Any]:
    """Train to the end, every metric to `metrics.csv` and to `loggers`."""
    data, module = job.data, job.module
    size, every = num_parameters(module.model_config), job.trainer.checkpoint_every
    try:
        check_space(
            run_dir / CHECKPOINTS,
            size,
            num_kept=NUM_KEPT if every else 0,
            dtype=job.trainer.parameter_dtype,
        )
        entropy = data.unigram_entropy()  # before training: it reads what training may never see
    except ValueError as error:
        raise InputError(str(error)) from error
    note(loggers, num_parameters=size)
    trainer = build_trainer(
        job.trainer,
        job.parallel,
        run_dir=run_dir,
        loggers=[MetricsFile(run_dir), *loggers],
        environment=cluster_environment(),
        run=job.describe(),
        callbacks=[
            Throughput(
                seq_len=data.config.seq_len,
                global_batch_size=data.config.global_batch_size,
                num_predictions=data.num_predictions,
            )
        ],
    )
    if trainer.is_global_zero:
        data.tokenizer.save_pretrained(run_dir / TOKENIZER)
    steps = step_directories(run_dir / CHECKPOINTS)
    trainer.fit(module, datamodule=data, ckpt_path=steps[0] if steps else None)
    reason = stopped_by(trainer)
    if not reason and module.validated_step != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    return {
        **({"status": "preempted", "stopped_by": reason} if reason else {"status": "ok"}),
        "num_parameters": size,
        "steps": trainer.global_step,
        "tokens": trainer.global_step * data.config.global_batch_size * data.config.seq_len,
        "val/unigram_entropy": entropy,
        "changes": setting_changes(trainer),
    } | {key: float(value) for key, value in module.last_metrics.items()}
