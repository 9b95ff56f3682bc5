"""The norm of a gradient whose parameters are partly split over a tensor-parallel group."""

import re

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hydratron.parallel.mappings import all_reduce
from hydratron.parallel.placement import parameter_placements


def squared_gradient_norms(model: nn.Module, tp_group: ProcessGroup | None) -> dict[str, Tensor]:
    """Return each parameter's squared gradient L2 norm in float32 or above, on the device.

    The parts of a split parameter are added over the group; a replicated one counts once. The
    gradients must be whole: call `reduce_partial_gradients` first.
    """
    placements = parameter_placements(model)
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    if not named:
        return {}
    named.sort(key=lambda item: placements[item[0]].tp_dim is None)  # split parameters first
    dtype = torch.promote_types(named[0][1].dtype, torch.float32)
    norms = torch._foreach_norm([g for _, g in named], 2, dtype=dtype)
    squares = torch.stack(norms).square()
    num_split = sum(placements[name].tp_dim is not None for name, _ in named)
    if tp_group is not None and num_split:
        split, whole = squares[:num_split], squares[num_split:]
        squares = torch.cat([all_reduce(split, "sum", tp_group), whole])
    return {name: square for (name, _), square in zip(named, squares.unbind(), strict=True)}


def layer_gradient_norms(squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient norm of each Transformer layer, `layer_00` next to the embeddings, of the
    `embeddings` and of the `head`, which is all that comes after the layers.

    `squares` comes from `squared_gradient_norms`; the groups' squares add up to the whole.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, square in squares.items():
        group = "embeddings" if "embeddings." in name else "head"
        if found := re.search(r"\blayers?\.(\d+)\.", name):
            group = f"layer_{int(found[1]):02}"
        groups.setdefault(group, []).append(square)
    return {name: torch.stack(parts).sum().sqrt() for name, parts in groups.items()}


def clip_grad_norm(
    model: nn.Module, squares: dict[str, Tensor], *, max_norm: float | None
) -> Tensor:
    """Scale the gradients in place so that their global norm is at most `max_norm`.

    `squares` comes from `squared_gradient_norms`. Returns the norm before clipping, a 0-d tensor
    on the device; nothing waits for it. With a norm that is not finite, what the
    gradients hold afterwards is undefined: the step is to be skipped.
    """
    norm, coefficient = clip_coefficient(squares, max_norm=max_norm)
    if coefficient is not None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, coefficient.to(gradients[0].dtype))
    return norm


def clip_coefficient(
    squares: dict[str, Tensor], *, max_norm: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the global norm and what gradients are to be multiplied with: 0-d, on the device."""
    norm = torch.stack(list(squares.values())).sum().sqrt()
    if max_norm is None:
        return norm, None
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)
