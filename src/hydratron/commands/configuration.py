"""Where OmegaConf stops: composed configurations become frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hydratron.processes import is_external_launch
from hydratron.training.config import TrainerConfig

ConfigT = TypeVar("ConfigT")


def build(cls: type[ConfigT], node: Mapping[str, Any], *, name: str) -> ConfigT:
    """Turn the group `name` into the dataclass `cls`, which validates itself.

    Raises:
        ValueError: an unknown key, a missing value or one of the wrong type, by its full name.
    """
    assert is_dataclass(cls)
    known = [field.name for field in fields(cls)]
    for key in node:
        if key not in known:
            raise ValueError(f"unknown key {name}.{key}; known: {', '.join(known)}")
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    for field in fields(cls):
        if is_dataclass(field.type):
            schema[field.name] = OmegaConf.structured(field.type, flags={"readonly": False})
    try:
        values: Any = OmegaConf.to_object(OmegaConf.merge(schema, dict(node)))
    except MissingMandatoryValue as error:
        raise ValueError(f"{name}.{error.full_key}= is missing") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}.{getattr(error, 'full_key', '')}: {reason}") from error
    return values


def check_devices(trainer: TrainerConfig, world_size: int) -> None:
    """Raise ValueError where this machine has fewer GPUs than a node of the job needs.

    Under srun or torchrun the launcher has given each process its own.
    """
    needed = trainer.local_devices(world_size)
    if trainer.accelerator == "gpu" and not is_external_launch():
        found = torch.cuda.device_count()
        if found < needed:
            raise ValueError(f"the job needs {needed} GPUs a node and this machine has {found}")
