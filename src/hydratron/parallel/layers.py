"""Linear and embedding layers split over a tensor-parallel group (Shoeybi et al. 2019, section 3).

Shapes: T tokens (B x S flattened), H features, V vocabulary; `/t` split over the group.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hydratron.parallel.mappings import (
    gather_into_tensor_parallel_region,
    reduce_scatter_from_tensor_parallel_region,
)
from hydratron.parallel.placement import Placement


def local_size(size: int, group: ProcessGroup | None, *, name: str) -> int:
    """Return this rank's share of `size`.

    Raises:
        ValueError: `size` does not divide by the size of the group.
    """
    tensor_parallel_size = 1 if group is None else group.size()
    if size % tensor_parallel_size:
        raise ValueError(
            f"{name} {size} is not divisible by tensor_parallel_size {tensor_parallel_size}"
        )
    return size // tensor_parallel_size


def compute_dtype(x: Tensor) -> Tensor:
    """Cast to autocast's dtype before a collective, so that half the bytes travel."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(device))
    return x


class ColumnParallelLinear(nn.Module):
    """y = x A^T + b with the rows of A (the output features) split over `group`.

    Input [T/t, in_features], output [T, out_features/t]. With `num_stacked` > 1, that many products
    of the same input are stored as one tensor [num_stacked, out_features, in_features], each split
    alike: so that fused query, key and value are the same global tensor at every group size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: ProcessGroup | None = None,
        num_stacked: int = 1,
    ) -> None:
        super().__init__()
        self.group = group
        self.linear: Callable[..., Tensor] = F.linear
        out_local = local_size(out_features, group, name="out_features")
        stack = (num_stacked,) if num_stacked > 1 else ()
        self.weight = nn.Parameter(torch.empty(*stack, out_local, in_features))
        self.bias = nn.Parameter(torch.empty(*stack, out_local))
        self.placements = dict.fromkeys(("weight", "bias"), Placement(tp_dim=len(stack)))

    def forward(self, x: Tensor) -> Tensor:
        if self.group is not None:
            x = gather_into_tensor_parallel_region(compute_dtype(x), self.group)  # [T, in]
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """The product alone: x [T, in_features], gathered already."""
        return self.linear(x, self.weight.flatten(0, -2), self.bias.flatten())


class RowParallelLinear(nn.Module):
    """y = x A^T + b with the columns of A (the input features) split over `group`.

    Input [T, in_features/t], output [T/t, out_features]. The bias is replicated and added to this
    rank's tokens after the reduce-scatter, so its gradients are partial sums.
    """

    def __init__(
        self, in_features: int, out_features: int, *, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.group = group
        self.linear: Callable[..., Tensor] = F.linear
        in_local = local_size(in_features, group, name="in_features")
        self.weight = nn.Parameter(torch.empty(out_features, in_local))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.placements = {"weight": Placement(tp_dim=1), "bias": Placement(partial_gradient=True)}

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return self.linear(x, self.weight, self.bias)
        y = reduce_scatter_from_tensor_parallel_region(self.multiply(x), self.group)  # [T/t, out]
        return self.add_bias(y)

    def add_bias(self, y: Tensor) -> Tensor:
        """Add the bias in y's dtype, as `F.linear` does: autocast leaves additions alone."""
        return y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """The product alone: a partial sum [T, out_features], without the bias."""
        return self.linear(x, self.weight)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary split over `group`; the output weight is tied to it.

    Input ids [T] (the same on all ranks), output [T/t, embedding_dim].
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.group = group
        self.local_vocab_size = local_size(num_embeddings, group, name="vocab_size")
        self.weight = nn.Parameter(torch.empty(self.local_vocab_size, embedding_dim))
        self.placements = {"weight": Placement(tp_dim=0)}

    def forward(self, ids: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(ids, self.weight)
        local_ids = ids - self.group.rank() * self.local_vocab_size
        absent = (local_ids < 0) | (local_ids >= self.local_vocab_size)
        rows = F.embedding(local_ids.masked_fill(absent, 0), self.weight)  # [T, H]
        rows = rows.masked_fill(absent.unsqueeze(-1), 0.0)
        return reduce_scatter_from_tensor_parallel_region(rows, self.group)
