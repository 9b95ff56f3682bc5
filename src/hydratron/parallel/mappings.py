"""Autograd pairs of collectives at the borders of tensor-parallel regions.

Outside the regions the flattened tokens of a micro-batch are split over the group ("sequence
parallel", Korthikanti et al. 2022, section 4.2.2); inside, every rank sees all tokens and a share
of the heads, of the intermediate width or of the vocabulary. The collectives are functional, so
that torch.compile traces them. Shapes: T tokens, H features, `/t` split over the group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# The operators themselves: what `_functional_collectives` makes of them waits at once when traced,
# so that nothing could run beside a collective in a compiled graph.
_c10d = torch.ops._c10d_functional

# A collective under way: its result, not waited for, and its input.
Pending = tuple[Tensor, Tensor]
# Starts a collective over a group; the result is to be waited for.
Begin = Callable[[Tensor, ProcessGroup], Tensor]


def _begin_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    return _c10d.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)


def _begin_reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    return _c10d.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)


def all_reduce(x: Tensor, operation: str, group: ProcessGroup) -> Tensor:
    """All-reduce `x` with `operation` ("sum" or "max") over `group`; outside autograd."""
    return _c10d.wait_tensor(_c10d.all_reduce(x, operation, group.group_name))


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate the ranks' `x` [T/t, ...] along dimension 0 into [T, ...]; outside autograd."""
    return _c10d.wait_tensor(_begin_gather(x, group))


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum `x` [T, ...] over the group and keep this rank's rows [T/t, ...]; outside autograd."""
    return _c10d.wait_tensor(_begin_reduce_scatter(x, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradients[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradients[0], ctx.group), None


class _Start(torch.autograd.Function):
    """Two outputs: the collective's result, not waited for, and `x`, which carries the gradient.

    Between the two functions of a pair lies what the collective runs beside; in the backward pass
    likewise, in reverse: the second function begins its collective, the first waits for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, begin: Begin, group: ProcessGroup) -> Pending:
        under_way = begin(x, group)
        ctx.mark_non_differentiable(under_way)
        return under_way, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _c10d.wait_tensor(gradients[1]), None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, under_way: Tensor, x: Tensor, begin_backward: Begin, group: ProcessGroup
    ) -> Tensor:
        ctx.begin_backward, ctx.group = begin_backward, group
        return _c10d.wait_tensor(under_way)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.begin_backward(gradients[0], ctx.group), None, None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank, ctx.num_local_tokens = group.rank(), x.size(0)
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start = ctx.rank * ctx.num_local_tokens
        return gradients[0].narrow(0, start, ctx.num_local_tokens).contiguous(), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradients[0].contiguous(), "sum", ctx.group), None


def gather_into_tensor_parallel_region(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Enter a region whose ranks each do a part of the work: [T/t, H] to [T, H].

    The backward pass sums the ranks' partial gradients and scatters them.
    """
    return x if group is None else _Gather.apply(x, group)  # type: ignore[return-value]


def start_gather(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin `gather_into_tensor_parallel_region`; `finish_gather` gives its result."""
    return _Start.apply(x, _begin_gather, group)  # type: ignore[return-value]


def finish_gather(pending: Pending, group: ProcessGroup) -> Tensor:
    """Wait for what `start_gather` began: [T, H]."""
    return _Finish.apply(*pending, _begin_reduce_scatter, group)  # type: ignore[return-value]


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin `reduce_scatter_from_tensor_parallel_region`; `finish_reduce_scatter` ends it."""
    return _Start.apply(x, _begin_reduce_scatter, group)  # type: ignore[return-value]


def finish_reduce_scatter(pending: Pending, group: ProcessGroup) -> Tensor:
    """Wait for what `start_reduce_scatter` began: [T/t, H]."""
    return _Finish.apply(*pending, _begin_gather, group)  # type: ignore[return-value]


def reduce_scatter_from_tensor_parallel_region(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Leave a region: partial sums [T, H] become this rank's finished tokens [T/t, H]."""
    return x if group is None else _ReduceScatter.apply(x, group)  # type: ignore[return-value]


def gather_into_replicated_region(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Enter compute that every rank repeats in full: [T/t, H] to [T, H].

    Each rank's gradient is whole already, so the backward pass is a slice, never a sum.
    """
    return x if group is None else _GatherReplicated.apply(x, group)  # type: ignore[return-value]


def copy_to_tensor_parallel_region(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Pass a replicated tensor into a region: identity forward, all-reduce backward.

    The operator f of Shoeybi et al. 2019, figure 3.
    """
    return x if group is None else _Copy.apply(x, group)  # type: ignore[return-value]


def local_tokens(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return this rank's rows of a constant tensor [T, ...] (ids, positions): [T/t, ...]."""
    if group is None:
        return x
    num_local_tokens = x.size(0) // group.size()  # T/t
    return x.narrow(0, group.rank() * num_local_tokens, num_local_tokens)
