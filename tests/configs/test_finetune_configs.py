"""Every task, recipe and kind of model of `finetune` and `evaluate` composes and is read."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydratron.commands.tasks import build_task, fill
from hydratron.launch import configuration_directory
from hydratron.settings import build
from hydratron.training.config import TrainerConfig
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.task_data import BatchConfig
from hydratron.training.tasks import TaskSettings

CONF = configuration_directory()
ZERO_SHOT = ["lambada", "wikitext103"]
TASKS = sorted({p.stem for p in (CONF / "task").glob("*.yaml")} - {*ZERO_SHOT, "run"})
RECIPES = sorted(p.stem for p in (CONF / "experiment").glob("table6_*.yaml"))


@pytest.fixture(autouse=True)
def hydra_configuration() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(command: str, *overrides: str) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(compose(command, list(overrides)), resolve=True)
    return config


def instantiate(config: dict[str, Any]) -> tuple[TaskSettings, BatchConfig, OptimizerConfig]:
    lengths = {"max_steps": 1, "val_every": 1, "checkpoint_every": 1}
    build(TrainerConfig, fill(config["trainer"], lengths), name="trainer")
    return (
        build_task(config["task"]),
        build(BatchConfig, config["data"], name="data"),
        build(OptimizerConfig, config["optimizer"], name="optimizer"),
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ["checkpoint", "huggingface"])
def test_every_task_composes_with_every_kind_of_model(task: str, model: str) -> None:
    assert instantiate(composed("finetune", f"task={task}", f"model={model}"))[0].name == task


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_of_a_task_stands_in_its_file(task: str) -> None:
    """Or Hydra refuses `task.KEY=`: what no file names cannot be set."""
    node = composed("finetune", f"task={task}")["task"]
    known = {field.name for field in fields(build_task(node))}
    # SQuAD 1.1 has no questions without an answer
    assert known - node.keys() == ({"null_threshold"} if task == "squad1" else set())


@pytest.mark.parametrize("task", ZERO_SHOT)
def test_every_zero_shot_task_composes(task: str) -> None:
    assert build_task(composed("evaluate", f"task={task}")["task"]).name == task


def test_evaluate_takes_the_task_of_the_run_by_default() -> None:
    assert set(composed("evaluate")["task"].values()) == {None}


# Shoeybi et al. 2019, table 6: epochs, batch size and learning rate of each task
TABLE_6 = {
    "table6_336m": {
        "mnli": (10, 128, 1e-5),
        "qqp": (12, 128, 5e-5),
        "squad1": (2, 64, 3e-5),
        "squad2": (2, 48, 3e-5),
        "race": (3, 32, 2e-5),
    },
    "table6_1.3b": {
        "mnli": (10, 128, 1e-5),
        "qqp": (12, 128, 3e-5),
        "squad1": (2, 48, 3e-5),
        "squad2": (2, 64, 3e-5),
        "race": (3, 16, 1e-5),
    },
    "table6_3.9b": {
        "mnli": (10, 128, 1e-5),
        "qqp": (12, 256, 4e-5),
        "squad1": (2, 48, 1e-5),
        "squad2": (2, 48, 1e-5),
        "race": (3, 32, 2e-5),
    },
}


def test_table_6_is_there_in_full() -> None:
    assert sorted(TABLE_6) == RECIPES
    for name, rows in TABLE_6.items():
        for task, expected in rows.items():
            config = composed("finetune", f"experiment={name}", f"task={task}")
            settings, batches, optimizer = instantiate(config)
            found = (settings.epochs, batches.global_batch_size, optimizer.lr)
            assert found == expected, (name, task)


def test_a_recipe_gives_way_to_what_is_asked_for() -> None:
    config = composed("finetune", "experiment=table6_336m", "task.epochs=1", "optimizer.lr=1e-3")
    settings, _, optimizer = instantiate(config)
    assert (settings.epochs, optimizer.lr) == (1, 1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_roberta_has_a_recipe_for_every_task(task: str) -> None:
    config = composed("finetune", "experiment=roberta", f"task={task}")
    _, batches, optimizer = instantiate(config)
    assert optimizer.clip is None
    assert (optimizer.beta2, optimizer.eps, optimizer.warmup_fraction) == (0.98, 1e-6, 0.06)
    assert batches.global_batch_size in (16, 32, 48)
