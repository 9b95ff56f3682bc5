"""Every point of the configuration groups composes, and every key is read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from hydratron.data.config import DataConfig
from hydratron.launch import configuration_directory
from hydratron.models.config import ModelConfig
from hydratron.perf.hardware import Hardware
from hydratron.settings import build
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.pretraining import NETWORKS

CONF = configuration_directory()
CLASSES = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "parallel": ParallelConfig,
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra_configuration() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def instantiate(config: DictConfig) -> dict[str, object]:
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    return {name: build(cls, resolved[name], name=name) for name, cls in CLASSES.items()}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("size", choices("size"))
def test_every_size_composes_with_every_family(family: str, size: str) -> None:
    config = compose("pretrain", [f"model={family}", f"size={size}"])
    assert config.size == size
    assert instantiate(config)["model"].family == family


@pytest.mark.parametrize(
    "override", [f"{g}={c}" for g in ("parallel", "trainer", "optimizer") for c in choices(g)]
)
def test_every_choice_composes(override: str) -> None:
    instantiate(compose("pretrain", [override]))


def test_every_logger_composes() -> None:
    for name in choices("logger"):
        config = compose("pretrain", [f"logger={name}"])
        assert ("_target_" in config.logger) == (name != "csv")


def test_indexed_data_needs_a_prefix_and_a_tokenizer() -> None:
    config = compose("pretrain", ["data=indexed"])
    with pytest.raises(ValueError, match="data.path= is missing"):
        instantiate(config)
    given = compose("pretrain", ["data=indexed", "data.path=corpus", "data.tokenizer=folder"])
    assert instantiate(given)["data"].source == "indexed"


FINETUNING = ("table6_", "roberta")  # tested in test_finetune_configs.py


@pytest.mark.parametrize("name", [e for e in choices("experiment") if not e.startswith(FINETUNING)])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_experiment_composes_with_every_family(name: str, family: str) -> None:
    config = compose("pretrain", [f"experiment={name}", f"model={family}"])
    made = instantiate(config)
    assert made["model"].family == family
    world_size = made["parallel"].world_size
    assert made["trainer"].local_devices(world_size) * config.trainer.num_nodes == world_size


@pytest.mark.parametrize(
    ("arguments", "family", "gpus"),
    [
        (["experiment=table4"], "gpt2", 1),
        (["experiment=figure2"], "bert", 4),
        (["experiment=figure2", "model=gpt2", "size=8.3b"], "gpt2", 8),
    ],
)
def test_what_the_benchmark_s_experiments_time(
    arguments: list[str], family: str, gpus: int
) -> None:
    made = instantiate(compose("benchmark", arguments))
    assert made["model"].family == family
    assert made["parallel"].world_size == gpus


@pytest.mark.parametrize(
    ("name", "tensor", "gpus", "batch", "lr", "warmup", "steps", "parameters"),
    [
        ("megatron_bert_336m", 1, 128, 1024, 1e-4, 10_000, 2_000_000, 336_297_858),
        ("megatron_bert_1.3b", 1, 256, 1024, 1e-4, 10_000, 2_000_000, 1_280_739_202),
        ("megatron_bert_3.9b", 4, 512, 1024, 1e-4, 10_000, 2_000_000, 3_869_260_674),
        ("megatron_gpt2_8.3b", 8, 512, 512, 1.5e-4, 3_000, 300_000, 8_317_040_640),
    ],
)
def test_the_recipes_of_the_article_are_there_in_full(
    name: str, tensor: int, gpus: int, batch: int, lr: float, warmup: int, steps: int,
    parameters: int,
) -> None:  # fmt: skip
    config = compose("pretrain", [f"experiment={name}"])
    made = instantiate(config)
    assert made["parallel"].tensor_parallel_size == tensor
    assert made["parallel"].world_size == gpus
    assert made["data"].global_batch_size == batch
    made["data"].micro_batch(made["parallel"].data_parallel_size)
    assert made["optimizer"].lr == lr
    assert made["optimizer"].warmup_steps == warmup
    assert made["optimizer"].weight_decay == 0.01
    assert made["trainer"].max_steps == steps
    model = made["model"]
    model.check_tensor_parallel(tensor)
    with torch.device("meta"):
        network = NETWORKS[model.family](model)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_an_unknown_key_is_refused_by_its_full_name() -> None:
    config = compose("pretrain", ["+optimizer.momentum=0.9"])
    with pytest.raises(ValueError, match="unknown key optimizer.momentum"):
        instantiate(config)


def test_a_value_of_the_wrong_type_is_refused_by_its_full_name() -> None:
    config = compose("pretrain", ["model.num_layers=many"])
    with pytest.raises(ValueError, match="model.num_layers"):
        instantiate(config)


@pytest.mark.parametrize("name", choices("hardware"))
def test_every_cluster_composes_with_the_planner(name: str) -> None:
    config = compose("plan", [f"hardware={name}", "experiment=megatron_bert_3.9b"])
    made = OmegaConf.to_container(config.hardware, resolve=True)
    assert build(Hardware, made, name="hardware").name == name
    instantiate(config)
    read = {*CLASSES, "hardware", "seed", "layernorm", "init", "size", "calibration", "rows"}
    assert set(config) == read


def test_no_group_is_without_a_reader() -> None:
    config = compose("pretrain")
    read = {*CLASSES, "logger", "seed", "layernorm", "init", "size", "resume"}
    assert set(OmegaConf.to_container(config)) == read


def test_the_installed_tree_is_the_checkout_s() -> None:
    assert (CONF / "pretrain.yaml").is_file()
    assert Path(__file__).parents[2] / "conf" == CONF or CONF.parent.name == "hydratron"
