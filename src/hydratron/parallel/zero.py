"""AdamW on float32 parts of the parameters: masters of 16-bit weights (Micikevicius et al. 2018),
shares of the data-parallel group (ZeRO 1, Rajbhandari et al. 2020), or both.
"""

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
    """AdamW that updates its own parts, in float32 or above, and writes the parameters from them.

    With a `dp_group` a part is 1/dp of its parameter and the rest is gathered; a parameter that has
    no dimension to split (a vector that tensor parallelism splits already, say) is updated in full
    on every rank. The gradients must be averaged over the group before `step`. For float32
    parameters results are those of AdamW, bit for bit: the update is elementwise. The part of a
    parameter in fewer bits is its master weight, kept in the state as `master`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        placements: dict[nn.Parameter, Placement],
        dp_group: ProcessGroup | None,
        **settings: Any,
    ) -> None:
        self.dp_group = dp_group
        self.shards: dict[nn.Parameter, OptimizerShard] = {}
        for group in groups:
            for parameter in group["params"]:
                self.shards[parameter] = self._shard(parameter, placements[parameter].tp_dim)
        own = [g | {"params": [self.shards[p].part for p in g["params"]]} for g in groups]
        super().__init__(own, **settings)
        self._apart = [s for s in self.shards.values() if s.part is not s.parameter]

    def _shard(self, parameter: nn.Parameter, tp_dim: int | None) -> OptimizerShard:
        group_size = 1 if self.dp_group is None else self.dp_group.size()
        dim = data_parallel_dim(parameter.shape, tp_dim, group_size) if group_size > 1 else None
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if dim is None and dtype == parameter.dtype:
            return OptimizerShard(parameter, parameter, None)
        own = self._own_part(parameter.detach(), dim)
        part = own.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return OptimizerShard(parameter, nn.Parameter(part), dim)

    def _own_part(self, tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None or self.dp_group is None:
            return tensor
        size = tensor.size(dim) // self.dp_group.size()
        return tensor.narrow(dim, self.dp_group.rank() * size, size)

    @torch.no_grad()
    def reload_parts(self) -> None:
        """Take the parts from the parameters again, after something else has written those.

        Master weights know more than their parameters and are left alone.
        """
        for shard in self._apart:
            if shard.part.dtype == shard.parameter.dtype:
                shard.part.copy_(self._own_part(shard.parameter, shard.dp_dim))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update this rank's parts and gather every parameter."""
        for shard in self._apart:
            assert shard.parameter.grad is not None
            own = self._own_part(shard.parameter.grad, shard.dp_dim)
            shard.part.grad = own.contiguous().to(shard.part.dtype)  # fused kernels need it dense
        loss = super().step(closure)
        whole = [shard for shard in self._apart if shard.dp_dim is None]
        if whole:
            torch._foreach_copy_([s.parameter for s in whole], [s.part for s in whole])
        for shard in self._apart:
            shard.part.grad = None
            if shard.dp_dim is not None and self.dp_group is not None:
                own = shard.part.detach().to(shard.parameter.dtype).unsqueeze(0)
                gathered = all_gather(own, self.dp_group)  # [dp, ...]
                shard.parameter.copy_(torch.cat(gathered.unbind(0), dim=shard.dp_dim))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters themselves."""
        for parameter in self.shards:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
