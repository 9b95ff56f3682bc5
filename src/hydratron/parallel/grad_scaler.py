"""Dynamic loss scaling whose overflow decision is agreed over all ranks."""

from typing import Any

import torch
import torch.distributed as dist


class SharedGradScaler(torch.amp.GradScaler):
    """A GradScaler that skips a step on every rank when one rank's gradients overflow.

    torch's own asks no peer, so tensor-parallel ranks would fall out of step; its FSDP twin
    (ShardedGradScaler) gives fused optimizers a flag of a shape they refuse (torch 2.13).
    """

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(*args, **kwargs)
        for flag in found.values():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return found
