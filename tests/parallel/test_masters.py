"""The one-pass update of master weights against torch's AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from hydratron.parallel.masters import MasterWeight, adamw_factors, update_master, update_masters
from hydratron.parallel.placement import Placement
from hydratron.parallel.zero import ShardedAdamW
from tests.distributed import run_distributed
from tests.parallel.test_zero import SETTINGS, parameters, reference, train

GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def start(shape: tuple[int, ...]) -> MasterWeight:
    master = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight = master.bfloat16()
    moments = torch.zeros_like(master), torch.zeros_like(master)
    return MasterWeight(weight, torch.zeros_like(weight), master, *moments)


def gradients(shape: tuple[int, ...], num_steps: int) -> Tensor:
    drawn = torch.randn(num_steps, *shape, generator=torch.Generator().manual_seed(2))
    return drawn.bfloat16()


def test_five_steps_are_adamw_s_with_scaled_gradients() -> None:
    part, shape = start((7, 3)), (7, 3)
    wanted = nn.Parameter(part.master.clone())
    adamw = AdamW([wanted], **GROUP)
    for number, gradient in enumerate(gradients(shape, 5), start=1):
        part.gradient.copy_(gradient)
        factors = adamw_factors(GROUP, torch.tensor(float(number)), torch.tensor(0.25), None)
        update_master(part, factors, *GROUP["betas"], GROUP["eps"])
        wanted.grad = gradient.float() / 4
        adamw.step()
    torch.testing.assert_close(part.master, wanted.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(part.exp_avg_sq, adamw.state[wanted]["exp_avg_sq"])
    assert torch.equal(part.weight, part.master.bfloat16())


def test_a_step_to_be_skipped_changes_nothing_whatever_the_gradient() -> None:
    part = start((4, 4))
    before = [tensor.clone() for tensor in part]
    part.gradient.fill_(torch.nan)
    factors = adamw_factors(GROUP, torch.tensor(0.0), torch.tensor(torch.nan), torch.tensor(1.0))
    update_master(part, factors, *GROUP["betas"], GROUP["eps"])
    for name, tensor, old in zip(MasterWeight._fields, part, before, strict=True):
        assert name == "gradient" or torch.equal(tensor, old), name


@pytest.mark.slow  # compiles for the CPU
def test_compiled_updates_of_any_size_are_the_plain_ones() -> None:
    factors = adamw_factors(GROUP, torch.tensor(1.0), None, None)
    for shape in ((2,), (7, 3), (128,), (256, 3), (4, 128)):
        fast, plain = start(shape), start(shape)
        for part in (fast, plain):
            part.gradient.copy_(gradients(shape, 1)[0])
        update_masters([fast], factors, GROUP)
        update_master(plain, factors, *GROUP["betas"], GROUP["eps"])
        for one, other in zip(fast, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def one_pass_over_shares(rank: int, world_size: int) -> list[tuple[Tensor, Tensor, int]]:
    weights = parameters(torch.bfloat16)
    placements = {w: Placement() for w in weights}
    groups = [{"params": weights[:2]}, {"params": weights[2:]}]
    optimizer = ShardedAdamW(groups, placements=placements, dp_group=dist.group.WORLD, **SETTINGS)
    optimizer.scales_gradients = True  # what a GPU's masters do
    optimizer.gradient_factor = torch.tensor(1.0)
    train(optimizer, weights)
    assert optimizer.gradient_factor is None, "of one step alone"
    shards = [optimizer.shards[w] for w in weights]
    return [
        (w.detach(), s.part.detach(), s.dp_dim or 0) for w, s in zip(weights, shards, strict=True)
    ]


@pytest.mark.slow  # compiles for the CPU
def test_shares_of_the_data_axis_are_updated_and_gathered(tmp_path: Path) -> None:
    for rank, found in enumerate(run_distributed(one_pass_over_shares, 2, tmp_path)):
        for (weight, master, dim), wanted in zip(found, reference(), strict=True):
            own = wanted.chunk(2, dim)[rank]
            torch.testing.assert_close(master, own, rtol=1e-5, atol=1e-6)
            assert torch.equal(weight.chunk(2, dim)[rank], master.bfloat16())
            torch.testing.assert_close(weight.float(), wanted, rtol=0.01, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_masters_move_as_float32_weights_do_on_a_cpu() -> None:
    weights = [nn.Parameter(p.cuda()) for p in parameters(torch.bfloat16)]
    optimizer = ShardedAdamW(
        [{"params": weights}],
        placements={w: Placement() for w in weights},
        dp_group=None,
        fused=True,
        **SETTINGS,
    )
    assert optimizer.scales_gradients
    train(optimizer, weights)
    for weight, wanted in zip(weights, reference(), strict=True):
        master = optimizer.shards[weight].part.detach()
        torch.testing.assert_close(master.cpu(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight.detach(), master.bfloat16())
