"""AdamW with its state split over the data-parallel group (ZeRO 1, Rajbhandari et al. 2020)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import AdamW

from hydratron.parallel.mappings import all_gather
from hydratron.parallel.placement import Placement


@dataclass(frozen=True)
class OptimizerShard:
    """What the optimizer holds of one parameter: all of it, or this rank's part along `dp_dim`."""

    parameter: nn.Parameter
    part: nn.Parameter
    dp_dim: int | None


def data_parallel_dim(shape: torch.Size, tp_dim: int | None, group_size: int) -> int | None:
    """Return the first dimension that tensor parallelism leaves whole and the group divides."""
    for dim, size in enumerate(shape):
        if dim != tp_dim and size % group_size == 0:
            return dim
    return None


class ShardedAdamW(AdamW):
    """AdamW that keeps moments and updates for 1/dp of every parameter, then gathers the rest.

    A parameter that has no dimension to split (a vector that tensor parallelism splits already,
    say) is updated in full on every rank. The gradients must be averaged over the group before
    `step`. Results are those of AdamW, bit for bit: the update is elementwise.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        placements: dict[nn.Parameter, Placement],
        dp_group: ProcessGroup,
        **settings: Any,
    ) -> None:
        self.dp_group = dp_group
        self.shards: dict[nn.Parameter, OptimizerShard] = {}
        for group in groups:
            for parameter in group["params"]:
                self.shards[parameter] = self._shard(parameter, placements[parameter].tp_dim)
        own = [g | {"params": [self.shards[p].part for p in g["params"]]} for g in groups]
        super().__init__(own, **settings)

    def _shard(self, parameter: nn.Parameter, tp_dim: int | None) -> OptimizerShard:
        dim = data_parallel_dim(parameter.shape, tp_dim, self.dp_group.size())
        if dim is None:
            return OptimizerShard(parameter, parameter, None)
        part = self._own_part(parameter.detach(), dim).clone(memory_format=torch.contiguous_format)
        return OptimizerShard(parameter, nn.Parameter(part), dim)

    def _own_part(self, tensor: Tensor, dim: int) -> Tensor:
        size = tensor.size(dim) // self.dp_group.size()
        return tensor.narrow(dim, self.dp_group.rank() * size, size)

    @torch.no_grad()
    def reload_parts(self) -> None:
        """Take the parts from the parameters again, after something else has written those."""
        for shard in self.shards.values():
            if shard.dp_dim is not None:
                shard.part.copy_(self._own_part(shard.parameter, shard.dp_dim))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update this rank's parts and gather every parameter."""
        split = [shard for shard in self.shards.values() if shard.dp_dim is not None]
        for shard in split:
            assert shard.parameter.grad is not None
            assert shard.dp_dim is not None
            part = self._own_part(shard.parameter.grad, shard.dp_dim)
            shard.part.grad = part.contiguous()
        loss = super().step(closure)
        for shard in split:
            assert shard.dp_dim is not None
            gathered = all_gather(shard.part.detach().unsqueeze(0), self.dp_group)  # [dp, ...]
            shard.parameter.copy_(torch.cat(gathered.unbind(0), dim=shard.dp_dim))
            shard.part.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters themselves."""
        for parameter in self.shards:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
