"""How each parameter lies over the tensor-parallel group, and whose gradients are partial sums.

The facts are kept on the modules, not on the parameters: `to_empty()` and dtype conversion make
new parameters and would lose them.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.distributed import ProcessGroup

from hydratron.parallel.mappings import all_reduce

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Placement:
    """`tp_dim`: the tensor dimension split over the group, None if replicated.

    `partial_gradient`: the parameter is replicated but acts on a share of the tokens, so that its
    gradients over the group are partial sums. Replicated compute has whole gradients.
    """

    tp_dim: int | None = None
    partial_gradient: bool = False


def mark_sequence_sharded(module: ModuleT) -> ModuleT:
    """Declare that `module`'s own parameters act on this rank's tokens only."""
    placement = Placement(partial_gradient=True)
    module.placements = {name: placement for name, _ in module.named_parameters(recurse=False)}  # type: ignore[assignment]
    return module


def parameter_placements(model: nn.Module) -> dict[str, Placement]:
    """Return the placement of every parameter by its name; what declares nothing is replicated."""
    placements: dict[str, Placement] = {}
    for prefix, module in model.named_modules():
        declared: dict[str, Placement] = getattr(module, "placements", {})
        for name, _ in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            placements[full_name] = declared.get(name, Placement())
    return placements


def reduce_partial_gradients(model: nn.Module, tp_group: ProcessGroup | None) -> None:
    """Add the partial gradients over the group, in place, as one all-reduce per dtype.

    To be called once per optimizer step: after the last backward pass and before anything reads
    the gradients (unscaling, norm, clipping).
    """
    if tp_group is None:
        return
    placements = parameter_placements(model)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if placements[name].partial_gradient and parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        total = all_reduce(torch.cat([g.flatten() for g in gradients]), "sum", tp_group)
        parts = total.split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)]
        )
