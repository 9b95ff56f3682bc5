"""Networks and clusters for the tests of the accounting."""

from pathlib import Path
from typing import Any

import yaml

from hydratron.models.config import ModelConfig
from hydratron.perf.estimates import Estimator
from hydratron.perf.hardware import Hardware
from hydratron.perf.step import StepConfig

CONF = Path(__file__).parents[3] / "conf"


def read(group: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())


def hardware(name: str, **changes: Any) -> Hardware:
    return Hardware(**(read("hardware", name) | changes))


def model(family: str, size: str, **changes: Any) -> ModelConfig:
    values = read("model", family)["model"] | read("size", size)["model"]
    values |= {"layernorm": "pre", "init": "scaled", "layernorm_eps": 1e-5}
    return ModelConfig(**(values | changes))


def small(family: str = "gpt2", **changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "vocab_size": 256}
    values = {"family": family, "max_seq_len": 32} | sizes
    return ModelConfig(**(values | changes))


def step(network: ModelConfig, micro_batch_size: int = 2, **changes: Any) -> StepConfig:
    sizes = {"seq_len": network.max_seq_len, "num_predictions": network.max_seq_len}
    if network.family == "bert":
        sizes["num_predictions"] = -(-15 * (network.max_seq_len - 3) // 100)
    return StepConfig(network, micro_batch_size=micro_batch_size, **(sizes | changes))


ESTIMATOR = Estimator()  # its traces are shared between tests
