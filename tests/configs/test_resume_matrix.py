"""Every setting, changed when a run is resumed, is in effect and recorded, or refused.

The keys are those that the commands compose and those of every settings dataclass that training
builds; a new one is tested without a word here.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydratron.arguments import InputError
from hydratron.checkpoint.manifest import write_manifest
from hydratron.checkpoint.runs import CONTINUED, FREE, flatten, is_among
from hydratron.continuation import CONTINUES, standing
from hydratron.data.config import DataConfig
from hydratron.launch import configuration_directory
from hydratron.models.config import ModelConfig
from hydratron.result import Job
from hydratron.training.callbacks import StepCheckpoint
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.task_data import BatchConfig
from hydratron.training.tasks import ClassificationTask, RaceTask, SquadTask

STEP = 100
GROUPS: dict[str, dict[str, tuple[type, ...]]] = {
    "pretrain": {
        "model": (ModelConfig,),
        "data": (DataConfig,),
        "optimizer": (OptimizerConfig,),
        "trainer": (TrainerConfig,),
        "parallel": (ParallelConfig,),
    },
    "finetune": {
        "data": (BatchConfig,),
        "optimizer": (OptimizerConfig,),
        "trainer": (TrainerConfig,),
        "parallel": (ParallelConfig,),
        "task": (ClassificationTask, RaceTask, SquadTask),
    },
}
# what a run computes does not hang on these: where, how often, in what pieces
EXPECTED_FREE = {
    "parallel.tensor_parallel_size",
    "parallel.data_parallel_size",
    "parallel.interleave",
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
    "data.path",
    "data.root",
    "data.validation_samples",
    "model.recompute",
    "optimizer.shard",
    "task.test_path",
    "task.train_path",
    "task.validation_path",
    "logger",
}


def composed(command: str) -> dict[str, Any]:
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        config = compose(command)
    return OmegaConf.to_container(config, resolve=True)  # pyright: ignore


def keys(command: str) -> list[str]:
    """The dotted name of every setting of a command, composed or declared by a dataclass."""
    declared = {
        f"{group}.{field.name}"
        for group, classes in GROUPS[command].items()
        for cls in classes
        for field in dataclasses.fields(cls)
    }
    names = declared | set(flatten(composed(command)))
    # a dictionary that is a field is changed in one of its own keys
    return sorted(name for name in names if not any(n.startswith(f"{name}.") for n in names))


def other(value: Any) -> Any:
    """Return another value of about the kind."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "another"


def run_at_step(run_dir: Path, command: str) -> dict[str, Any]:
    """Write what a killed run of the composed settings leaves; return the settings."""
    config = composed(command)
    directory = run_dir / f"checkpoints/step-{STEP}"
    directory.mkdir(parents=True)
    run = {"command": command, "settings": flatten(config), "step": STEP}
    write_manifest(directory, {"run": run, "files": {}, "tensors": {}})
    return config


def changed(config: dict[str, Any], name: str) -> dict[str, Any]:
    tree = OmegaConf.create(config)
    value = other(OmegaConf.select(tree, name))
    OmegaConf.update(tree, name, value, force_add=True)
    return OmegaConf.to_container(tree)  # pyright: ignore


MATRIX = [
    (command, name) for command in GROUPS for name in keys(command) if name not in ("resume",)
]


@pytest.mark.parametrize("command", list(GROUPS))
def test_the_matrix_has_every_key(command: str) -> None:
    found = set(keys(command))
    for group, classes in GROUPS[command].items():
        for cls in classes:
            for field in dataclasses.fields(cls):
                name = f"{group}.{field.name}"
                assert name in found or any(n.startswith(f"{name}.") for n in found), name


@pytest.mark.parametrize(("command", "name"), MATRIX)
def test_a_setting_changed_on_resume_is_recorded_or_refused(
    tmp_path: Path, command: str, name: str
) -> None:
    config = run_at_step(tmp_path, command)
    job = Job(command, tmp_path, changed(config, name), {})
    before, now = flatten(config).get(name), flatten(job.config)[name]
    assert before != now
    if name in EXPECTED_FREE or name in CONTINUED:
        assert standing(job, resumed=True) == CONTINUES
        # and the training that goes on with it notes it, for checkpoints and the result to say
        callback = StepCheckpoint(tmp_path, every=0, run={"settings": flatten(job.config)})
        stored = {"run": {"settings": flatten(config)}, "global_step": STEP}
        trainer: Any = SimpleNamespace(global_step=STEP)
        callback.on_load_checkpoint(trainer, None, stored)  # pyright: ignore
        assert callback.changes == [{"step": STEP, name: [before, now]}]
        saved: dict[str, Any] = {}
        callback.on_save_checkpoint(trainer, None, saved)  # pyright: ignore
        assert saved["run"]["changes"] == callback.changes
    else:
        with pytest.raises(InputError) as caught:
            standing(job, resumed=True)
        assert f"{name} {before!r}, which cannot become {now!r}" in str(caught.value)


def test_what_may_change_is_what_is_meant_to() -> None:
    names = {name for _, name in MATRIX}
    assert {name for name in names if is_among(name, FREE)} == EXPECTED_FREE
    assert set(CONTINUED) == {"trainer.max_steps", "optimizer.lr"}
