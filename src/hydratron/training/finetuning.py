"""Finetuning as an objective: a head on a pretrained encoder, and scores in which every example
counts once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from hydratron.checkpoint.manifest import step_directories
from hydratron.checkpoint.source import Checkpoint
from hydratron.models.bert import BertEncoder
from hydratron.models.config import ModelConfig
from hydratron.models.heads import seed_dropout
from hydratron.models.initialisation import initialize_parameters
from hydratron.parallel.mesh import ParallelMesh
from hydratron.training.callbacks import LoggedInterval, setting_changes, stopped_by
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.metrics import MetricsFile
from hydratron.training.module import TrainingModule
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.strategy import TensorParallelStrategy
from hydratron.training.task_data import TaskData
from hydratron.training.tasks import (
    GROUPS,
    ClassificationTask,
    Scores,
    Split,
    Task,
    write_outputs,
)
from hydratron.training.trainer import CHECKPOINTS, build_trainer

BEST = "best"
OUTPUT = "predictions"  # of a run directory
HEADS = ("head.", "answerability_head.")


@dataclasses.dataclass(frozen=True)
class PretrainedBert:
    """A BERT of ours to put a head on: a checkpoint of any kind, with settings of this run.

    Raises:
        ValueError: the checkpoint is no BERT, or its head is that of another task.
    """

    checkpoint: Checkpoint
    model: ModelConfig
    task: Task
    needs_head: bool = False

    def __post_init__(self) -> None:
        if self.model.family != "bert":
            raise ValueError(
                f"checkpoint {self.checkpoint.path} is a {self.model.family}: tasks need a bert"
            )
        stored = self.checkpoint.tensors
        with torch.device("meta"):
            network = self._network(None)
        for name, parameter in network.named_parameters():
            if not name.startswith(HEADS):
                continue
            if self.needs_head and name not in stored:
                raise ValueError(
                    f"checkpoint {self.checkpoint.path} has no {name}: it is not finetuned on"
                    f" {self.task.name}"
                )
            needed = tuple(parameter.shape)
            if not self.task.new_head and name in stored and stored[name].shape != needed:
                raise ValueError(
                    f"task {self.task.name} needs a head of {needed[0]} outputs, and {name} of"
                    f" checkpoint {self.checkpoint.path} has {stored[name].shape[0]};"
                    " task.new_head=true starts a new one"
                )
        if not self.task.new_head and any(name.startswith(HEADS) for name in stored):
            self._check_head()

    def _check_head(self) -> None:
        """Refuse the head of another task whose shape is that of this one's."""
        head, task = self.checkpoint.head, self.task
        if head is None:
            return
        needed = task.spec.labels if isinstance(task, ClassificationTask) else ()
        # LABEL_0, LABEL_1: what transformers writes where nobody named them
        is_named = not all(label.startswith("LABEL_") for label in head.labels)
        kinds, labels = (head.kind, task.kind), (tuple(head.labels), tuple(needed))
        if kinds[0] != kinds[1]:
            has, needs = (f"a head for {kind.replace('_', ' ')}" for kind in kinds)
        elif needed and is_named and labels[0] != labels[1]:
            has, needs = (f"a head of the classes {', '.join(names)}" for names in labels)
        else:
            return
        raise ValueError(
            f"task {task.name} needs {needs}, and checkpoint {self.checkpoint.path} has {has};"
            " task.new_head=true starts a new one"
        )

    def _network(self, tp_group: Any) -> nn.Module:
        return self.task.build_network(BertEncoder(self.model, tp_group), self.model.hidden_size)

    @property
    def max_positions(self) -> int:
        """The longest sequence it takes."""
        return self.model.max_seq_len

    @property
    def num_parameters(self) -> int:
        """Parameters of encoder and head."""
        with torch.device("meta"):
            network = self._network(None)
        return sum(parameter.numel() for parameter in network.parameters())

    def build(
        self, mesh: ParallelMesh, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """Return this rank's shards; what the checkpoint lacks is drawn from `seed`."""
        with torch.device("meta"):
            network = self._network(mesh.tp_group)
        initialize_parameters(
            network, self.model, seed=seed, tp_group=mesh.tp_group, device=device, dtype=dtype
        )
        checkpoint = self.checkpoint
        if self.task.new_head:
            kept = {n: t for n, t in checkpoint.tensors.items() if not n.startswith(HEADS)}
            checkpoint = dataclasses.replace(checkpoint, tensors=kept)
        checkpoint.load(network, mesh)
        return network


class Finetuning:
    """A task on a pretrained network, scored on its splits after every validation.

    Args:
        source: builds the network: encoder and head.
        data: the splits.
        output: where predictions and scores of the splits are written; None writes nothing.
    """

    def __init__(self, source: Any, data: TaskData, *, output: Path | None) -> None:
        self.source, self.data, self.output = source, data, output
        self.best_score, self.best_step = float("-inf"), -1
        self.best_metrics: dict[str, float] = {}
        self.rows: list[dict[int, dict[str, Any]]] = []

    def build_network(
        self, mesh: ParallelMesh, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """Return encoder and head; the head's dropout has its own stream."""
        network = self.source.build(mesh, seed=seed, device=device, dtype=dtype)
        seed_dropout(network, seed=seed, dp_rank=mesh.dp_rank, device=device)
        return network

    def start_validation(self, network: Any, device: torch.device) -> None:
        self.rows = [{} for _ in self.data.evaluation_splits()]

    def validate_batch(self, network: Any, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        """Keep what the network says of each example, by the example's index."""
        found = {key: value.float().cpu() for key, value in network.predict(batch).items()}
        mask = batch["attention_mask"].cpu()
        for row, index in enumerate(batch["index"].tolist()):
            self.rows[dataloader_idx][index] = {
                # a row of tokens loses its padding, on whichever side it is
                key: (values[row][mask[row]] if key in ("start", "end") else values[row]).numpy()
                for key, values in found.items()
            }

    def finish_validation(self, strategy: TensorParallelStrategy, step: int) -> dict[str, float]:
        """Score every split, each example counted once; write predictions on the first rank."""
        gathered = [gather_rows(rows, strategy.mesh) for rows in self.rows]
        metrics: dict[str, float] = {}
        if strategy.is_global_zero:
            for split, rows in zip(self.data.evaluation_splits(), gathered, strict=True):
                metrics |= score_split(self.data.task, split, in_order(rows, split))
        metrics = strategy.broadcast(metrics)
        score = main_score(self.data.task, metrics)
        # without labels there is no score, and the first is the only one
        is_first = self.best_step < 0
        if is_first or score > self.best_score or self.data.task.patience is None:
            self.best_score, self.best_step, self.best_metrics = score, step, metrics
            if self.output is not None and strategy.is_global_zero:
                for split, rows in zip(self.data.evaluation_splits(), gathered, strict=True):
                    write_outputs(self.output, self.data.task, split, in_order(rows, split))
        return metrics


def gather_rows(rows: dict[int, Any], mesh: ParallelMesh) -> dict[int, Any]:
    """Return the rows of all data-parallel ranks; every rank must call it."""
    if mesh.dp_group is None:
        return rows
    parts: list[Any] = [None] * mesh.data_parallel_size
    dist.all_gather_object(parts, rows, group=mesh.dp_group)
    assert sum(map(len, parts)) == len(set().union(*parts)), "an example was counted twice"
    return {index: row for part in parts for index, row in part.items()}


def in_order(rows: dict[int, dict[str, Any]], split: Split) -> Scores:
    """Return the rows as columns in the order of the examples."""
    assert len(rows) == len(split.encodings), f"{len(rows)} rows of {len(split.encodings)}"
    return {key: [rows[i][key] for i in range(len(rows))] for key in rows[0]}


def score_split(task: Task, split: Split, scores: Scores) -> dict[str, float]:
    """Return the metrics of one split under their logged names, `val/accuracy` and the like."""
    prefix = GROUPS[split.name.partition("_")[0]]
    # the loss of MNLI's first split stands for both
    return {
        f"{prefix}/{name}": value
        for name, value in task.metrics(split, scores).items()
        if name != "loss" or "_mis" not in split.name
    }


def main_score(task: Task, metrics: dict[str, float]) -> float:
    """Return the metric that decides, by the exact name or the first that begins with it."""
    return metrics[main_metric(task, metrics)] if metrics else float("-inf")


def main_metric(task: Task, metrics: dict[str, float]) -> str:
    """Return the logged name of the metric that decides."""
    names = [n for n in metrics if n.partition("/")[2].startswith(task.main_metric)]
    assert names, f"{task.main_metric} is not among {', '.join(metrics)}"
    return names[0]


class StopWhenWorse(Callback):
    """Keeps the checkpoint of the best validation and stops after `patience` without a better one.

    All ranks see the same score, so all stop together.
    """

    def __init__(self, objective: Finetuning, *, patience: int, directory: Path) -> None:
        self.objective, self.patience, self.directory = objective, patience, directory
        self.num_worse = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.objective.best_step == trainer.global_step:
            self.num_worse = 0
            trainer.save_checkpoint(self.directory / BEST)
        else:
            self.num_worse += 1
        if self.num_worse >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        objective = self.objective
        best = {"score": objective.best_score, "step": objective.best_step}
        return {"num_worse": self.num_worse, "metrics": objective.best_metrics} | best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_worse = state_dict["num_worse"]
        self.objective.best_metrics = state_dict["metrics"]
        self.objective.best_score = state_dict["score"]
        self.objective.best_step = state_dict["step"]


class ExampleRate(LoggedInterval):
    """Logs training examples per second of the whole grid. The first interval, in which kernels are
    compiled, is left out of `mean`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total_rows = self.intervals = 0
        self.total_seconds = 0.0

    @property
    def mean(self) -> float | None:
        """Examples per second over the run so far."""
        return self.total_rows / self.total_seconds if self.total_seconds else None

    def counted(self, module: TrainingModule, batch: Any) -> int:
        return len(batch["index"]) * module.mesh.data_parallel_size

    def log_interval(self, trainer: Trainer, module: TrainingModule, seconds: float) -> None:
        module.record({"perf/examples_per_second": self.count / seconds})
        self.intervals += 1
        if self.intervals > 1:
            self.total_rows += self.count
            self.total_seconds += seconds


@dataclasses.dataclass(frozen=True)
class FinetuneJob:
    """A checked job: everything is read that needs no process group.

    Raises:
        ValueError: `trainer.precision` is one of pretraining alone, or does not go with
            `optimizer.shard`.
    """

    trainer: TrainerConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    source: Any
    data: TaskData
    seed: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint says of the run: settings, data, what a step consumes."""
        return {
            "command": "finetune",
            "settings": self.settings,
            "identity": self.data.identity(),
            "samples": self.data.config.global_batch_size,
        }

    def __post_init__(self) -> None:
        self.trainer.check_float32_weights("finetune")
        # Lightning's scaler does not know that the parts of a sharded optimizer hold the gradients
        if self.optimizer.shard and self.trainer.precision == "16-mixed":
            raise ValueError("optimizer.shard works with every trainer.precision but 16-mixed")


def finetune(
    job: FinetuneJob, run_dir: Path, *, loggers: Sequence[Logger], environment: ClusterEnvironment
) -> dict[str, Any]:
    """Train to the end or go on with `run_dir`; return the metrics and how it ended."""
    task, directory = job.data.task, run_dir / CHECKPOINTS
    objective = Finetuning(job.source, job.data, output=run_dir / OUTPUT)
    rate = ExampleRate()
    callbacks: list[Callback] = [rate]
    if task.patience is not None:
        callbacks.append(StopWhenWorse(objective, patience=task.patience, directory=directory))
    trainer = build_trainer(
        job.trainer,
        job.parallel,
        run_dir=run_dir,
        loggers=[MetricsFile(run_dir), *loggers],
        run=job.describe(),
        environment=environment,
        callbacks=callbacks,
    )
    local_batch_size = job.data.config.local_batch_size(job.parallel.data_parallel_size)
    module = TrainingModule(
        objective,
        job.optimizer,
        max_steps=job.trainer.max_steps,
        seed=job.seed,
        micro_batch_size=job.data.config.micro_batch_size or local_batch_size,
        log_every=job.trainer.log_every,
        log_layer_norms=job.trainer.log_layer_norms,
        max_skipped_steps=job.trainer.max_skipped_steps,
        compile=job.trainer.compile,
        # a model of transformers may wait for the device anywhere; replaying a task's many shapes
        # of batch has been tried on one GPU
        cuda_graphs=bool(job.trainer.cuda_graphs)
        and isinstance(job.source, PretrainedBert)
        and job.parallel.world_size == 1,
    )
    steps = step_directories(directory)
    trainer.fit(module, datamodule=job.data, ckpt_path=steps[0] if steps else None)
    if reason := stopped_by(trainer):
        stopped = {"status": "preempted", "stopped_by": reason, "steps": trainer.global_step}
        return stopped | module.last_metrics
    if module.validated_step != trainer.global_step:
        trainer.validate(module, datamodule=job.data, verbose=False)
    metrics = module.last_metrics | objective.best_metrics
    return (
        {
            "steps": trainer.global_step,
            "best_step": objective.best_step,
            "selection_metric": main_metric(task, metrics),
            "changes": setting_changes(trainer),
        }
        | metrics
        | ({"perf/examples_per_second": rate.mean} if rate.mean else {})
    )
