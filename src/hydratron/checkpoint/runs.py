"""What a run directory says of the run that made it, and whether another command may go on with it.

Nothing here needs torch: a sweep looks into many run directories before it starts a job.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

FROZEN_CONFIG = Path(".hydra/resolved.yaml")
SETTINGS = Path(".hydra/settings.json")
# How a run is carried out. These may change when it is resumed; every other key stays as it was.
FREE = (
    "logger.",
    "parallel.",
    "trainer.accelerator",
    "trainer.async_checkpoints",
    "trainer.checkpoint_every",
    "trainer.compile",
    "trainer.cuda_graphs",
    "trainer.devices",
    "trainer.log_every",
    "trainer.log_layer_norms",
    "trainer.max_hours",
    "trainer.max_skipped_steps",
    "trainer.num_nodes",
    "trainer.val_every",
    "data.cache_dir",
    "data.evaluation_batch_size",
    "data.micro_batch_size",
    "data.num_workers",
    "data.path",  # what the files hold is compared instead
    "data.root",
    "data.validation_samples",
    "model.recompute",
    "optimizer.shard",
    "task.test_path",
    "task.train_path",  # what it holds is compared, as with data.path
    "task.validation_path",
)
# What the rest of a run may do otherwise than its beginning, when the user says so.
CONTINUED = ("trainer.max_steps", "optimizer.lr")
UNRECORDED = ("resume",)


def read_run_config(directory: Path) -> dict[str, Any]:
    """Return the frozen configuration of a run, empty where there is none.

    Raises:
        ValueError: the file holds no configuration; names it.
    """
    path = directory / FROZEN_CONFIG
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no configuration")
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested configuration by their dotted names."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            values |= flatten(value, f"{name}.")
        elif name not in UNRECORDED:
            values[name] = value
    return values


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return both values of every key that differs; a key that one side lacks is None there.

    `ignored` are keys, or groups of keys that end with a dot.
    """
    keys = sorted(before.keys() | now.keys())
    return {
        key: (before.get(key), now.get(key))
        for key in keys
        if before.get(key) != now.get(key) and not is_among(key, ignored)
    }


def is_among(key: str, names: Iterable[str]) -> bool:
    """Whether `key` is one of `names`, or one of the groups that end with a dot, or in one."""
    return any(f"{key}.".startswith(name) if name.endswith(".") else key == name for name in names)


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Keep the flat settings where sweeps and resumed runs compare them."""
    path = directory / SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def read_settings(directory: Path) -> dict[str, Any] | None:
    """Return the flat settings of a run, also of one from before they were kept; else None."""
    path = directory / SETTINGS
    try:
        found = json.loads(path.read_bytes()) if path.exists() else flatten(_config(directory))
    except ValueError:
        found = flatten(_config(directory))
    return found if isinstance(found, dict) and found else None


def _config(directory: Path) -> dict[str, Any]:
    try:
        return read_run_config(directory)
    except ValueError:  # damaged: as if it were not there
        return {}
