"""Schedules, weight decay groups and the step that is skipped on the device."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from hydratron.training.optimisation import (
    OptimizerConfig,
    build_optimizer,
    decayed_parameters,
    learning_rate_factor,
    skip_if_not_finite,
)
from tests.parallel.twins import build, tiny_config


def factors(max_steps: int, steps: range, **settings: Any) -> list[float]:
    factor = learning_rate_factor(OptimizerConfig(lr=1.0, **settings), max_steps=max_steps)
    return [factor(step) for step in steps]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warmup_rises_linearly_and_loses_no_step(schedule: str) -> None:
    found = factors(100, range(5), schedule=schedule, warmup_steps=4)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_warmup_fraction_is_of_the_whole_run_and_steps_come_first() -> None:
    assert factors(200, range(3), warmup_fraction=0.05)[0] == pytest.approx(1 / 10)
    assert factors(200, range(3), warmup_fraction=0.05, warmup_steps=2)[0] == pytest.approx(1 / 2)
    assert factors(200, range(1), warmup_steps=0) == [1.0]


def test_linear_decay_falls_evenly_to_the_least_rate_and_stays() -> None:
    steps = range(10, 121, 10)
    found = factors(120, steps, schedule="linear", warmup_steps=10, decay_steps=110)
    assert found == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    found = factors(
        120, steps, schedule="linear", warmup_steps=10, decay_steps=110, min_lr_ratio=0.2
    )
    assert found[5] == pytest.approx(0.2 + 0.8 * 0.5)
    assert found[-2:] == pytest.approx([0.2, 0.2])


def test_cosine_decay_is_half_a_period() -> None:
    found = factors(
        100, range(101), schedule="cosine", warmup_steps=0, min_lr_ratio=0.1, decay_steps=80
    )
    for step in range(81):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 80)) / 2
        assert found[step] == pytest.approx(expected)
    assert found[40] == pytest.approx(0.55)
    assert found[80:] == pytest.approx([0.1] * 21)


def test_constant_schedule_stays_at_the_top() -> None:
    assert factors(10, range(2, 30), schedule="constant", warmup_steps=2) == [1.0] * 28


def test_decay_ends_with_the_run_unless_told() -> None:
    assert factors(50, range(49, 52), warmup_steps=10)[0] == pytest.approx(1 / 40)
    assert factors(50, range(50, 52), warmup_steps=10) == [0.0, 0.0]


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    assert factors(3, range(3), warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"optimizer\.lr 0\.0 is not positive"),
        ({"schedule": "step"}, r"optimizer\.schedule 'step' is not one of linear, cosine"),
        ({"warmup_fraction": 1.0}, r"optimizer\.warmup_fraction 1\.0 is not in \[0, 1\)"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**({"lr": 1e-3} | settings))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("layernorm", ["post", "pre"])
def test_biases_and_layernorms_are_not_decayed_and_all_else_is(family: str, layernorm: str) -> None:
    network = build(tiny_config(family=family, layernorm=layernorm))
    config = OptimizerConfig(lr=1e-3, weight_decay=0.03, beta1=0.8, beta2=0.97, eps=1e-6)
    optimizer, _ = build_optimizer(network, config, max_steps=10)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.03, 0.0)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.97), 1e-6)
    not_decayed = {
        id(parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name == "bias"
    }
    assert {id(p) for p in plain["params"]} == not_decayed
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))
    assert {id(p) for p in network.parameters()} - not_decayed == {id(p) for p in decayed["params"]}


def test_layernorms_of_any_name_are_not_decayed() -> None:
    network = nn.ModuleDict({"ln": nn.LayerNorm(2), "attn": nn.Linear(2, 2), "gate": nn.RMSNorm(2)})
    assert decayed_parameters(network) == {"attn.weight"}


def test_parameters_that_are_frozen_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    optimizer, _ = build_optimizer(layer, OptimizerConfig(lr=1e-3), max_steps=10)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]


def test_schedule_sets_the_rate_of_the_very_first_step() -> None:
    optimizer, schedule = build_optimizer(
        nn.Linear(2, 2), OptimizerConfig(lr=0.5, warmup_steps=4), max_steps=10
    )
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_norm_that_is_no_number_changes_nothing(bad: float) -> None:
    layer = nn.Linear(3, 3)
    optimizer, _ = build_optimizer(layer, OptimizerConfig(lr=0.1, warmup_steps=0), max_steps=10)
    states = []
    for norm in (1.0, bad, 1.0):
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter) * norm
        flag = skip_if_not_finite(optimizer, torch.tensor(norm))
        assert flag.item() == (0.0 if norm == 1.0 else 1.0)
        optimizer.step()
        moments = optimizer.state[layer.weight]
        states.append(
            [layer.weight.detach().clone(), *(value.clone() for value in moments.values())]
        )
    after_one, after_skip, after_two = states
    for before, now in zip(after_one, after_skip, strict=True):
        assert torch.equal(before, now)
    assert not torch.equal(after_skip[0], after_two[0])
