"""A tiny pretraining job for the tests: the real module, data, strategy and Trainer."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from hydratron.data.config import DataConfig
from hydratron.models.config import ModelConfig
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.datamodule import PretrainingData
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.pretraining import PretrainingModule
from hydratron.training.trainer import build_trainer


class MetricsList(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name = "list"
    version = ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": float(step or 0), **metrics})

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]


@dataclass
class Job:
    """Settings of a tiny job; `build` makes its parts in the process that calls it."""

    run_dir: Path
    tp: int = 1
    dp: int = 1
    max_steps: int = 4
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 1
    dtype: torch.dtype | None = None  # None: what the precision asks for

    def build(
        self, callbacks: list[Callback] | None = None
    ) -> tuple[Trainer, PretrainingModule, PretrainingData, MetricsList]:
        shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
        dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        model = ModelConfig(
            **{"family": "bert", "max_seq_len": 16, "init_std": 0.1} | shape | dropout | self.model
        )
        data = DataConfig(
            **{
                "source": "text",
                "path": None,
                "tokenizer": "character",
                "cache_dir": os.environ["HYDRATRON_CACHE"],
                "seq_len": 16,
                "global_batch_size": 8,
                "validation_samples": 22,
            }
            | self.data
        )
        parallel = ParallelConfig(tensor_parallel_size=self.tp, data_parallel_size=self.dp)
        settings = {"accelerator": "cpu", "max_steps": self.max_steps, "log_every": 1}
        trainer_config = TrainerConfig(**settings | self.trainer)
        metrics = MetricsList()
        trainer = build_trainer(
            trainer_config,
            parallel,
            run_dir=self.run_dir,
            loggers=[metrics],
            environment=TorchElasticEnvironment()
            if "RANK" in os.environ
            else LightningEnvironment(),
            callbacks=callbacks or [],
        )
        module = PretrainingModule(
            model,
            OptimizerConfig(**{"lr": 1e-3} | self.optimizer),
            max_steps=self.max_steps,
            seed=self.seed,
            micro_batch_size=data.micro_batch(self.dp),
            log_every=trainer_config.log_every,
            dtype=self.dtype or trainer_config.parameter_dtype,
            compile=trainer_config.compile,
            fp8=trainer_config.precision == "fp8",
            cuda_graphs=trainer_config.cuda_graphs,
        )
        samples = PretrainingData(data, model, seed=self.seed, num_steps=self.max_steps)
        return trainer, module, samples, metrics
