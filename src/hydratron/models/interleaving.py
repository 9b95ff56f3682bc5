"""Two halves of a micro-batch in turn, so that one computes while the other communicates.

The idea of DeepSpeed-Domino (Wang et al. 2024) for sequence parallelism: each half waits for its
own collective only after the other half's matrix products have been queued. The backward pass
mirrors the order. Letters: B batch, S sequence, T tokens, H hidden; `/t` split over the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hydratron.parallel.layers import compute_dtype
from hydratron.parallel.mappings import (
    Pending,
    finish_gather,
    finish_reduce_scatter,
    start_gather,
    start_reduce_scatter,
)
from hydratron.parallel.mesh import ProcessGroup

# To save memory Inductor would begin a backward collective only when its result is needed.
COMPILE_OPTIONS = {"reorder_for_peak_memory": False}


@dataclass(frozen=True)
class Sublayer:
    """Attention or MLP, cut where its collectives are.

    `first` takes the gathered [T, H] to what `second` turns into a partial sum [T, H].
    """

    layer: Any
    layernorm: nn.Module
    first: Callable[[Tensor, Tensor | None], Tensor]
    second: Any


@dataclass
class Half:
    """One half of the tokens: the residual stream [T/2t, H] and the collective under way."""

    x: Tensor
    key_mask: Tensor | None
    gathering: Pending
    scattering: tuple[Pending, Sublayer] | None = None


def sublayers(layers: Sequence[Any], shape: tuple[int, int]) -> list[Sublayer]:
    """Return attention and MLP of every layer in order, for half-batches of `shape`."""
    found = []
    for layer in layers:

        def attend(x: Tensor, key_mask: Tensor | None, layer: Any = layer) -> Tensor:
            return layer.attention.attend(layer.attention.qkv.multiply(x), shape, key_mask)

        def activate(x: Tensor, _: Tensor | None, layer: Any = layer) -> Tensor:
            return layer.mlp.activate(layer.mlp.input.multiply(x))

        found.append(Sublayer(layer, layer.attention_layernorm, attend, layer.attention.output))
        found.append(Sublayer(layer, layer.mlp_layernorm, activate, layer.mlp.output))
    return found


def run_interleaved(
    layers: Any,
    x: Tensor,
    shape: tuple[int, int],
    key_mask: Tensor | None,
    group: ProcessGroup,
) -> Tensor:
    """Run the layers over x [T/t, H] of `shape` (B, S); B must divide by 2t.

    The first half of each rank's tokens are whole sequences, and so is what they gather to: no
    token changes its place. `key_mask` is [B, 1, 1, S] or None.
    """
    batch_size, seq_len = shape
    parts = sublayers(layers, (batch_size // 2, seq_len))
    masks: list[Tensor | None] = [None, None]
    if key_mask is not None:
        # [B, 1, 1, S] -> [t, 2, B/2t, 1, 1, S]: a rank's sequences, its halves
        by_half = key_mask.unflatten(0, (group.size(), 2, -1))
        masks = [mask.flatten(0, 1) for mask in by_half.unbind(1)]

    def begin(x: Tensor, part: Sublayer) -> Pending:
        return start_gather(compute_dtype(part.layer.enter(x, part.layernorm)), group)

    def close(half: Half, following: Sublayer | None) -> None:
        """Take in what the last sublayer gave, and begin the next."""
        if half.scattering is None:
            return
        pending, part = half.scattering
        y = part.second.add_bias(finish_reduce_scatter(pending, group))
        half.x, half.scattering = part.layer.leave(half.x, y, part.layernorm), None
        if following is not None:
            half.gathering = begin(half.x, following)

    halves = [
        Half(x_half, mask, begin(x_half, parts[0]))
        for x_half, mask in zip(x.chunk(2), masks, strict=True)
    ]
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        for half, other, others_next in ((*halves, part), (*halves[::-1], following)):
            inner = part.first(finish_gather(half.gathering, group), half.key_mask)
            close(other, others_next)  # its collective ran beside `first`, its next beside `second`
            half.scattering = start_reduce_scatter(part.second.multiply(inner), group), part
    close(halves[1], None)
    return torch.cat([half.x for half in halves])
