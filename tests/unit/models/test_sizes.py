"""Every named size, read from the configuration tree, has the shape and count it is named for."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.training.pretraining import num_parameters

CONF = Path(__file__).parents[3] / "conf"

# family, size: layers, hidden, heads and the exact parameter count.
# BERT from the paper's table 1 (336m, 1.3b, 3.9b) and figure 7 (752m), vocabulary 30592;
# GPT-2 from the A100 table (1.2b, 2b, 4.2b, 8.7b) and Shoeybi et al. 2019, vocabulary 51200.
SIZES = {
    ("bert", "336m"): (24, 1024, 16, 336_297_858),
    ("bert", "752m"): (36, 1280, 20, 751_521_154),
    ("bert", "1.3b"): (24, 2048, 32, 1_280_739_202),
    ("bert", "3.9b"): (48, 2560, 40, 3_869_260_674),
    ("gpt2", "355m"): (24, 1024, 16, 355_788_800),
    ("gpt2", "1.2b"): (24, 1920, 15, 1_162_556_160),
    ("gpt2", "2b"): (30, 2304, 18, 2_032_257_024),
    ("gpt2", "4.2b"): (36, 3072, 24, 4_238_739_456),
    ("gpt2", "8.7b"): (42, 4096, 32, 8_671_870_976),
    ("gpt2", "2.5b"): (54, 1920, 20, 2_490_408_960),
    ("gpt2", "8.3b"): (72, 3072, 32, 8_317_040_640),
}
# What the papers' tables print, for those sizes that they print with enough digits.
ROUNDED = {
    ("gpt2", "1.2b"): 1.1626e9,
    ("gpt2", "8.7b"): 8.6719e9,
    ("gpt2", "8.3b"): 8.3170e9,
    ("gpt2", "2b"): 2.03e9,
    ("gpt2", "4.2b"): 4.24e9,
}
IDS = ["-".join(key) for key in SIZES]


def load(group: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())


def compose(family: str, size: str, layernorm: str) -> ModelConfig:
    values = load("model", family)["model"] | load("size", size)["model"]
    values |= {"layernorm": layernorm, "init": "scaled"}  # the tree's interpolations
    values["layernorm_eps"] = float(values["layernorm_eps"])  # YAML 1.1 reads 1e-5 as text
    return ModelConfig(**values)


def formula(family: str, *, layers: int, hidden: int, vocab: int, positions: int) -> int:
    """Weights and biases counted by hand.

    A layer has 4 products of attention and 8 of the MLP (12 h^2), their biases 3 + 1 + 4 + 1 (9 h)
    and two LayerNorms (4 h); one more LayerNorm is before or after the layers.
    """
    count = layers * (12 * hidden**2 + 13 * hidden) + (vocab + positions) * hidden + 2 * hidden
    if family == "gpt2":
        return count
    token_types, pooler_and_transform = 2 * hidden, 2 * (hidden**2 + hidden)
    transform_layernorm, sentence_order = 2 * hidden, 2 * hidden + 2
    return count + token_types + pooler_and_transform + transform_layernorm + vocab + sentence_order


@pytest.mark.parametrize("layernorm", ["post", "pre"])
@pytest.mark.parametrize("key", SIZES, ids=IDS)
def test_parameter_count_of_every_size_in_both_placements(
    key: tuple[str, str], layernorm: str
) -> None:
    family, size = key
    layers, hidden, _, expected = SIZES[key]
    vocab, positions = {"bert": (30592, 512), "gpt2": (51200, 1024)}[family]
    counted = formula(family, layers=layers, hidden=hidden, vocab=vocab, positions=positions)
    assert num_parameters(compose(family, size, layernorm)) == expected == counted


@pytest.mark.parametrize("key", SIZES, ids=IDS)
def test_layers_hidden_and_heads_of_every_size(key: tuple[str, str]) -> None:
    config = compose(*key, "pre")
    layers, hidden, heads, _ = SIZES[key]
    assert (config.num_layers, config.hidden_size, config.num_heads) == (layers, hidden, heads)
    assert config.head_dim * heads == hidden
    assert config.feedforward_size == 4 * hidden


@pytest.mark.parametrize("key", ROUNDED, ids="-".join)
def test_counts_round_to_those_that_were_published(key: tuple[str, str]) -> None:
    digits = 4 if key[1] in ("1.2b", "8.7b", "8.3b") else 2
    assert round(SIZES[key][3] / 1e9, digits) == round(ROUNDED[key] / 1e9, digits)


def test_every_size_file_is_pinned_here() -> None:
    names = {path.stem for path in (CONF / "size").glob("*.yaml")}
    assert names - {"tiny", "mini"} == {size for _, size in SIZES}
    for name in names:
        assert load("size", name)["size"] == name


@pytest.mark.parametrize("size", ["tiny", "mini"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_laptop_sizes_fit_both_families(family: str, size: str) -> None:
    config = compose(family, size, "pre")
    assert num_parameters(config) < 2e7
    config.check_tensor_parallel(4)


def test_the_trained_8_3b_has_24_heads() -> None:
    """As of Shoeybi et al. 2019, table 2; the scaling study's 32 is the size file's."""
    network = Gpt2ForPretraining
    values = load("model", "gpt2")["model"] | load("size", "8.3b")["model"] | {"num_heads": 24}
    values |= {"layernorm": "pre", "init": "scaled", "layernorm_eps": 1e-5}
    config = ModelConfig(**values)
    assert config.head_dim == 128
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in network(config).parameters())
    assert count == SIZES["gpt2", "8.3b"][3]


def test_the_vocabularies_divide_by_every_tensor_parallel_size_of_the_tables() -> None:
    for family, model in (("bert", BertForPretraining), ("gpt2", Gpt2ForPretraining)):
        vocab_size = load("model", family)["model"]["vocab_size"]
        assert all(vocab_size % size == 0 for size in (1, 2, 4, 8)), model
