"""The keys that a command's configuration has, and what those may be that stand in no group."""

# pyright: reportOperatorIssue=false

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf

from hydratron.models.config import Recompute
from hydratron.settings import (
    BatchSize,
    BelowOne,
    Count,
    GroupSize,
    Seed,
    build,
    convert,
    one_of,
    written,
)


def _is_path(value: Any) -> str | None:
    return written(value) if isinstance(value, str) else "is not a path or a name"


Name = Annotated[Any, _is_path] | None
Devices = GroupSize | None
# also the sizes that count the processes of a job, before its command checks it
KEYS: dict[str, Any] = {
    "seed": Seed,
    "rows": Count,
    "runs": tuple[Annotated[Any, _is_path], ...] | None,
    "split": Annotated[str, one_of("validation", "test")],
    "to": Annotated[str, one_of("huggingface", "hydratron")],
    "parallel.tensor_parallel_size": GroupSize,
    "parallel.data_parallel_size": GroupSize,
    "trainer.num_nodes": GroupSize,
    "trainer.devices": Devices,
    "data.evaluation_batch_size": BatchSize,
} | dict.fromkeys(("checkpoint", "tokenizer", "output", "calibration", "resume"), Name)


@dataclass(frozen=True)
class NetworkChoice:
    """The group `model` of finetune and evaluate: what a run chooses anew of a pretrained network,
    None as it was, or the `path` of a network of transformers.
    """

    family: Annotated[str, one_of("huggingface")] | None = None
    path: Name = None
    hidden_dropout: BelowOne | None = None
    attention_dropout: BelowOne | None = None
    recompute: Recompute | None = None


# of pretrain and benchmark: where the settings of a group are declared, none of which needs
# Lightning or transformers, which take seconds to import
GROUPS = {
    "model": ("hydratron.models.config", "ModelConfig"),
    "data": ("hydratron.data.config", "DataConfig"),
    "optimizer": ("hydratron.training.optimisation", "OptimizerConfig"),
    "trainer": ("hydratron.training.config", "TrainerConfig"),
    "parallel": ("hydratron.training.config", "ParallelConfig"),
}


def check_groups(command: str, config: Mapping[str, Any]) -> None:
    """Check the settings of pretrain and benchmark before what carries them out is imported.

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """
    for group, (module, name) in GROUPS.items():
        if command in ("pretrain", "benchmark"):
            build(getattr(importlib.import_module(module), name), config[group], name=group)


def check_keys(config: dict[str, Any], root: Path) -> None:
    """Check a resolved configuration before anything is read, written or counted by it; values
    take the declared type.

    `root` is the file in `conf/` of the command.

    Raises:
        ValueError: a group or a key of the command is not there, or a value cannot be.
    """
    wanted: Any = OmegaConf.to_container(OmegaConf.load(root))
    chosen = [entry for entry in wanted.get("defaults", []) if isinstance(entry, dict)]
    groups = [group for entry in chosen for group in entry]
    for key in (*groups, *wanted):
        if key not in (*config, "defaults", "hydra", "experiment"):
            raise ValueError(f"{key}= is missing: hydratron {root.stem} needs it")
    for name, kind in KEYS.items():
        group, _, key = name.rpartition(".")
        node = config.get(group) if group else config
        if isinstance(node, dict) and key in node:
            node[key] = convert(node[key], kind, name)
