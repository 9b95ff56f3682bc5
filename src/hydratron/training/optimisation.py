"""AdamW, its parameter groups and the learning-rate schedules of the original recipes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hydratron.parallel.grad_norm import clip_coefficient, clip_grad_norm
from hydratron.parallel.placement import parameter_placements
from hydratron.parallel.zero import ShardedAdamW
from hydratron.settings import (
    BelowOne,
    Count,
    Natural,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    check,
    one_of,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    The learning rate rises linearly from 0 over the warmup (`warmup_steps`, else
    `warmup_fraction` of the run), then falls to `lr * min_lr_ratio` at `decay_steps` (default: the
    end of the run) and stays there. `clip` is the largest gradient norm, None for no clipping.
    `shard` splits the moments over the data-parallel group (ZeRO stage 1).

    Raises:
        ValueError: a value that cannot be, by name and rule.
    """

    lr: Positive
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    eps: PositiveShare = 1e-8
    weight_decay: NotNegative = 0.01
    clip: Positive | None = 1.0
    schedule: Annotated[str, one_of("linear", "cosine", "constant")] = "linear"
    warmup_steps: Natural | None = None
    warmup_fraction: BelowOne = 0.01
    decay_steps: Count | None = None
    min_lr_ratio: Share = 0.0
    shard: bool = False

    def __post_init__(self) -> None:
        check(self, "optimizer")


def learning_rate_factor(config: OptimizerConfig, *, max_steps: int) -> Callable[[int], float]:
    """Return the factor on `lr` for the optimizer step of index 0, 1, ...

    The first step has index 0 and factor 1 / warmup, so that no step is lost; the decay is
    (step - warmup) / (decay - warmup), Megatron-LM's form from version 2.0 on. Steps that fp16's
    loss scaling skips count too, so that the schedule is a function of the step alone.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * max_steps)
    decay = max(config.decay_steps or max_steps, warmup + 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / (decay - warmup))
        fall = (
            1 - progress
            if config.schedule == "linear"
            else 0.5 * (1 + math.cos(math.pi * progress))
        )
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * fall

    return factor


def decayed_parameters(network: nn.Module) -> set[str]:
    """Names of what weight decay acts on: matrices and embeddings, not biases or LayerNorm's gains
    (Megatron-LM).
    """
    # by the layers' kind: transformers has LayerNorm under many names, ln and attn_norm among them
    norms = tuple(
        f"{name}."
        for name, module in network.named_modules()
        if "norm" in type(module).__name__.lower() and not any(module.children())
    )
    names = (name for name, _ in network.named_parameters())
    return {name for name in names if not name.endswith("bias") and not name.startswith(norms)}


def build_optimizer(
    network: nn.Module,
    config: OptimizerConfig,
    *,
    max_steps: int,
    dp_group: ProcessGroup | None = None,
) -> tuple[AdamW, LambdaLR]:
    """Return fused AdamW over two parameter groups and its schedule.

    Fused, because it skips a step on the device when `found_inf` says so: nothing has to wait.
    Parameters of 16 bits get float32 master weights.
    """
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    decayed = decayed_parameters(network)
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    has_masters = any(parameter.dtype.itemsize < 4 for _, parameter in named)
    shard_over = dp_group if config.shard else None
    if has_masters or shard_over is not None:
        by_name = parameter_placements(network)
        placements = {parameter: by_name[name] for name, parameter in named}
        optimizer = ShardedAdamW(groups, placements=placements, dp_group=shard_over, **settings)
    else:
        optimizer = AdamW(groups, **settings)
    return optimizer, LambdaLR(optimizer, learning_rate_factor(config, max_steps=max_steps))


def restart_schedule(optimizer: torch.optim.Optimizer, schedule: LambdaLR, *, lr: float) -> None:
    """Set the learning rate of the next step from the schedule and `lr` of now.

    A checkpoint holds the rate that its own settings gave the step: 0 at the end of a run.
    """
    schedule.base_lrs = [lr for _ in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = lr, lr * factor(schedule.last_epoch)


def clip_gradients(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    squares: dict[str, torch.Tensor],
    *,
    max_norm: float | None,
) -> torch.Tensor:
    """Return the gradients' norm, 0-d, and see that the next step takes them clipped.

    An optimizer whose kernels can scale does it on the way; for others it is done in place.
    """
    if not (isinstance(optimizer, ShardedAdamW) and optimizer.scales_gradients):
        return clip_grad_norm(network, squares, max_norm=max_norm)
    norm, optimizer.gradient_factor = clip_coefficient(squares, max_norm=max_norm)
    return norm


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> torch.Tensor:
    """Make the next fused step a no-op on the device if `norm` is NaN or Inf.

    Returns the flag as a 0-d float tensor: 1 when the step will be skipped.
    """
    flag = (~norm.isfinite()).to(torch.float32)
    optimizer.found_inf = flag  # pyright: ignore[reportAttributeAccessIssue]
    return flag
