"""The distribution that parameters are drawn from, and what a draw depends on."""

import math

import pytest
import torch
from torch import Tensor

from hydratron.models.config import ModelConfig
from hydratron.models.initialisation import initialize_parameters
from tests.parallel.twins import build, tiny_config

RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.output.weight")


def drawn(config: ModelConfig, *, seed: int = 1) -> dict[str, Tensor]:
    network = build(config).float()
    initialize_parameters(network, config, seed=seed)
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("init", ["scaled", "plain"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_standard_deviations_are_those_of_the_recipe(family: str, init: str) -> None:
    config = tiny_config(
        family=family, hidden_size=128, num_layers=3, vocab_size=512, max_seq_len=256, init=init
    )
    measured = 0
    for name, values in drawn(config).items():
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif "layernorm" in name:
            assert (values == 1).all(), name
        else:
            expected = 0.02
            if init == "scaled" and name.endswith(RESIDUAL_OUTPUTS):
                expected /= math.sqrt(2 * 3)
            # the measured deviation of n draws is off by 1 / sqrt(2 n), the mean by 1 / sqrt(n)
            num_draws = values.numel()
            assert values.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * num_draws))
            assert abs(values.mean().item()) < 5 * expected / math.sqrt(num_draws), name
            measured += 1
    assert measured == 4 * 3 + (6 if family == "bert" else 2)


def test_standard_deviation_is_the_configured_one() -> None:
    values = drawn(tiny_config(hidden_size=128, init_std=0.12, init="plain"))
    weight = values["encoder.transformer.layers.0.mlp.output.weight"]
    assert weight.std().item() == pytest.approx(0.12, rel=0.02)  # 65536 draws: 7 sigma


def test_a_draw_depends_on_the_seed_and_the_name_alone() -> None:
    pre, post = drawn(tiny_config()), drawn(tiny_config(layernorm="post", num_layers=2))
    deeper, other_seed = (
        drawn(tiny_config(num_layers=3, init="plain")),
        drawn(tiny_config(), seed=2),
    )
    name = "encoder.transformer.layers.1.attention.qkv.weight"
    assert torch.equal(pre[name], post[name])
    assert torch.equal(pre[name], deeper[name])
    assert not torch.equal(pre[name], other_seed[name])
    assert not torch.equal(pre[name], pre[name.replace("layers.1", "layers.0")])


def test_one_weight_is_the_one_it_always_was() -> None:
    """A change here means that a seed no longer names the same model."""
    weight = drawn(tiny_config(), seed=1)["encoder.pooler.weight"]
    # vector instructions of different processors may round the last digit of float32 differently
    expected = [-0.036551543, 0.014350806, -0.007017926]
    assert weight.flatten()[:3].tolist() == pytest.approx(expected, rel=1e-5)


def test_parameters_are_made_in_the_dtype_and_drawn_in_float32() -> None:
    config = tiny_config(family="gpt2")
    with torch.device("meta"):
        network = build(config)
    initialize_parameters(network, config, seed=1, dtype=torch.float64)
    for name, values in drawn(config).items():
        parameter = network.get_parameter(name)
        assert parameter.dtype == torch.float64
        assert parameter.requires_grad
        assert torch.equal(parameter.detach(), values.double()), name
