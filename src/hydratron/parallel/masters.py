"""AdamW of 16-bit weights and their float32 masters in one pass over memory, for GPUs.

torch's fused AdamW needs the gradient in float32 and leaves the weight to be written from its
master: two more passes over both. Here a value's 12 bytes of state, its gradient and its weight are
each read and written once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNED = 128  # known to divide a size, it lets a kernel load 16 bytes at a time


class MasterWeight(NamedTuple):
    """A weight in 16 bits, its gradient, and what the optimizer keeps of it in float32."""

    weight: Tensor
    gradient: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adamw_factors(
    group: dict[str, Any], step: Tensor, gradient_factor: Tensor | None, skip: Tensor | None
) -> Tensor:
    """Return what a step multiplies with, on the device: [5] float32.

    Args:
        group: `lr`, `betas` and `weight_decay` of the parameters.
        step: 0-d, this step's number, from 1.
        gradient_factor: 0-d, for clipping; 1 by default.
        skip: 0-d, 1 where nothing shall change; 0 by default.
    """
    beta1, beta2 = group["betas"]
    count = step.double()  # 1 - 0.999**1 has three digits left of float32's seven
    ones = torch.ones_like(count)
    factors = [
        ones if gradient_factor is None else gradient_factor.double(),
        ones * (1 - group["lr"] * group["weight_decay"]),
        group["lr"] / (1 - beta1**count),
        (1 - beta2**count).rsqrt(),
        torch.zeros_like(count) if skip is None else skip.double(),
    ]
    return torch.stack(factors).float()


def update_master(
    part: MasterWeight, factors: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """Change weight, master and moments in place; all of one shape."""
    gradient_factor, decay, rate, debias, skip = factors.unbind()
    gradient = part.gradient.float() * gradient_factor
    exp_avg = torch.lerp(part.exp_avg, gradient, 1 - beta1)
    exp_avg_sq = part.exp_avg_sq * beta2 + gradient * gradient * (1 - beta2)
    master = part.master * decay - rate * exp_avg / (exp_avg_sq.sqrt() * debias + eps)
    stays = skip != 0
    for old, new in (
        (part.exp_avg, exp_avg),
        (part.exp_avg_sq, exp_avg_sq),
        (part.master, master),
    ):
        old.copy_(torch.where(stays, old, new))
    part.weight.copy_(part.master)


_update_any = torch.compile(update_master, dynamic=True)


@torch.compile  # code of its own: torch.compile would take one function for both
def _update_aligned(
    part: MasterWeight, factors: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    update_master(part, factors, beta1, beta2, eps)


@torch.no_grad()
def update_masters(parts: list[MasterWeight], factors: Tensor, group: dict[str, Any]) -> None:
    """Take an AdamW step of `group`'s `betas` and `eps` on every part; nothing waits.

    `factors` comes from `adamw_factors`. All tensors of a part are contiguous and of one size.
    """
    beta1, beta2 = group["betas"]
    for part in parts:
        is_aligned = part.weight.numel() % _ALIGNED == 0
        update = _update_aligned if is_aligned else _update_any
        shape = (-1, _ALIGNED) if is_aligned else (-1,)
        rows = MasterWeight(*(tensor.detach().view(shape) for tensor in part))
        update(rows, factors, beta1, beta2, group["eps"])
