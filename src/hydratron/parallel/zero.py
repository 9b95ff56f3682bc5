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
from hydratron.parallel.masters import MasterWeight, adamw_factors, update_masters
from hydratron.parallel.placement import Placement

MOMENT_BYTES = 8  # AdamW's two moments in float32
PART_BYTES = 4  # what `ShardedAdamW` updates: a share of the weights, a master weight, or both


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
        self._shard_of = {shard.part: shard for shard in self.shards.values()}
        self._apart = [s for s in self.shards.values() if s.part is not s.parameter]
        # masters on a GPU, updated by kernels of our own, which can clip at no cost
        self.scales_gradients = all(
            p.is_cuda and p.dtype.itemsize < s.part.dtype.itemsize for p, s in self.shards.items()
        )
        self.gradient_factor: Tensor | None = None  # of the next step alone

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
        own_weights = self._update_masters() if self.scales_gradients else {}
        others = [shard for shard in self._apart if shard.parameter not in own_weights]
        for shard in others:
            assert shard.parameter.grad is not None
            own = self._own_part(shard.parameter.grad, shard.dp_dim)
            shard.part.grad = own.contiguous().to(shard.part.dtype)  # fused kernels need it dense
        loss = super().step(closure)
        if whole := [shard for shard in others if shard.dp_dim is None]:
            torch._foreach_copy_([s.parameter for s in whole], [s.part for s in whole])
        for shard in others:
            shard.part.grad = None
        for shard in self._apart:
            if shard.dp_dim is not None and self.dp_group is not None:
                own = own_weights.get(shard.parameter)
                own = shard.part.detach().to(shard.parameter.dtype) if own is None else own
                gathered = all_gather(own.unsqueeze(0), self.dp_group)  # [dp, ...]
                shard.parameter.copy_(torch.cat(gathered.unbind(0), dim=shard.dp_dim))
        return loss

    def _update_masters(self) -> dict[nn.Parameter, Tensor]:
        """Update every master in one pass; return the 16-bit weights of this rank's parts."""
        skip = getattr(self, "found_inf", None)
        factor, self.gradient_factor = self.gradient_factor, None
        updated: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            states = [self._started(part) for part in group["params"]]
            steps = [state["step"] for state in states]
            # as many tensors as steps: with one alone the host would wait for its value
            taken = torch.ones_like(steps[0]) if skip is None else 1.0 - skip
            torch._foreach_add_(steps, [taken] * len(steps))
            parts = []
            for part, state in zip(group["params"], states, strict=True):
                parameter, dim = self._shard_of[part].parameter, self._shard_of[part].dp_dim
                assert parameter.grad is not None
                whole = dim is None
                weight = parameter if whole else torch.empty_like(part, dtype=parameter.dtype)
                updated[parameter] = weight
                gradient = self._own_part(parameter.grad, dim).contiguous()
                parts.append(
                    MasterWeight(weight, gradient, part, state["exp_avg"], state["exp_avg_sq"])
                )
            update_masters(parts, adamw_factors(group, steps[0], factor, skip), group)
        return updated

    def _started(self, part: nn.Parameter) -> dict[str, Any]:
        """Return the state of a part, made as AdamW makes it."""
        state = self.state[part]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(part), torch.zeros_like(part)
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters themselves."""
        for parameter in self.shards:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
