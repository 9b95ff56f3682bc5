"""A composed configuration as the training step that the accounting knows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydratron.checkpoint.runs import read_run_config
from hydratron.data.config import DataConfig
from hydratron.models.config import ModelConfig
from hydratron.perf.step import StepConfig
from hydratron.result import read_result
from hydratron.settings import build
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.optimisation import OptimizerConfig


def read_step(config: Mapping[str, Any]) -> StepConfig:
    """Return the optimizer step that `hydratron pretrain` would take with this configuration.

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """
    model = build(ModelConfig, config["model"], name="model")
    data = build(DataConfig, config["data"], name="data")
    optimizer = build(OptimizerConfig, config["optimizer"], name="optimizer")
    trainer = build(TrainerConfig, config["trainer"], name="trainer")
    parallel = build(ParallelConfig, config["parallel"], name="parallel")
    _check_tensor_parallel(model, parallel.tensor_parallel_size)
    micro_batch_size = data.micro_batch(parallel.data_parallel_size)
    share = data.global_batch_size // parallel.data_parallel_size
    return StepConfig(
        model,
        seq_len=data.seq_len,
        num_predictions=data.num_predictions(model.family),
        micro_batch_size=micro_batch_size,
        num_micro_batches=share // micro_batch_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        data_parallel_size=parallel.data_parallel_size,
        precision=trainer.precision,
        shard_optimizer=optimizer.shard,
        clip=optimizer.clip is not None,
        compiled=trainer.compile,
    )


def _check_tensor_parallel(model: ModelConfig, tensor_parallel_size: int) -> None:
    try:
        model.check_tensor_parallel(tensor_parallel_size)
    except ValueError as error:
        for distance in range(1, tensor_parallel_size):
            smaller = tensor_parallel_size - distance
            sizes = (model.num_heads, model.feedforward_size, model.vocab_size)
            if all(size % smaller == 0 for size in sizes):
                raise ValueError(f"{error}; {smaller} would work") from error
        raise


def read_measured_step(run_dir: str) -> tuple[StepConfig, float]:
    """Return the step of a `hydratron benchmark` run and the seconds that it took.

    Raises:
        ValueError: no finished benchmark there.
    """
    result = read_result(Path(run_dir))
    if result.get("command") != "benchmark" or "perf/step_ms" not in result:
        raise ValueError(f"calibration={run_dir}: no finished run of `hydratron benchmark`")
    return read_step(read_run_config(Path(run_dir))), result["perf/step_ms"] / 1e3
