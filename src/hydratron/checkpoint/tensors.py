"""Global tensors of a checkpoint that are read a slice at a time, and filling a network with them.

So a rank reads its own share, and a tensor is in memory once, however large the model is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import parameter_placements

BODY = ("transformer.", "encoder.transformer.")


@dataclass(frozen=True)
class StoredTensor:
    """`read(dim, start, stop)` gives that slice along `dim`; dim None is the whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int | None, int, int], Tensor]

    def whole(self) -> Tensor:
        """Read all of it."""
        return self.read(None, 0, 0)


def sliced(tensor: Tensor, dim: int | None, start: int, stop: int) -> Tensor:
    """Return a view of the slice that `StoredTensor.read` asks for."""
    return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def transposed(stored: StoredTensor) -> StoredTensor:
    """[I, O] as [O, I]; a vector as it is."""
    if len(stored.shape) < 2:
        return stored

    def read(dim: int | None, start: int, stop: int) -> Tensor:
        return stored.read(None if dim is None else 1 - dim, start, stop).T

    return StoredTensor(stored.shape[::-1], stored.dtype, read)


def stacked(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Tensors of one shape [O, ...] as [num, O, ...]."""

    def read(dim: int | None, start: int, stop: int) -> Tensor:
        assert dim != 0
        inner = None if dim is None else dim - 1
        return torch.stack([part.read(inner, start, stop) for part in parts])

    return StoredTensor((len(parts), *parts[0].shape), parts[0].dtype, read)


def split(stored: StoredTensor, num: int) -> list[StoredTensor]:
    """Return the `num` tensors [O, ...] that lie one below the other in [num * O, ...]."""
    size = stored.shape[0] // num

    def part(index: int) -> StoredTensor:
        def read(dim: int | None, start: int, stop: int) -> Tensor:
            low, high = (start, stop) if dim == 0 else (0, size)
            rows = stored.read(0, index * size + low, index * size + high)
            return rows if dim in (None, 0) else sliced(rows, dim, start, stop)

        return StoredTensor((size, *stored.shape[1:]), stored.dtype, read)

    return [part(index) for index in range(num)]


def concatenated(parts: Sequence[StoredTensor], dim: int) -> StoredTensor:
    """Shards of one shape, joined along `dim`; a slice along `dim` touches only what it needs."""
    size = parts[0].shape[dim]
    shape = list(parts[0].shape)
    shape[dim] = size * len(parts)

    def read(along: int | None, start: int, stop: int) -> Tensor:
        if along != dim:
            return torch.cat([part.read(along, start, stop) for part in parts], dim)
        touched = range(start // size, -(-stop // size))
        return torch.cat(
            [
                parts[i].read(dim, max(start - i * size, 0), min(stop - i * size, size))
                for i in touched
            ],
            dim,
        )

    return StoredTensor(tuple(shape), parts[0].dtype, read)


@torch.no_grad()
def fill_parameters(
    network: nn.Module, mesh: ParallelMesh, stored: Mapping[str, StoredTensor], *, path: Path
) -> list[str]:
    """Copy this rank's share of every stored tensor into `network`; return the names not stored.

    Raises:
        ValueError: as `check_parameters`.
    """
    missing = check_parameters(network, mesh, {n: s.shape for n, s in stored.items()}, path=path)
    placements = parameter_placements(network)
    for name, parameter in network.named_parameters():
        if name in missing:
            continue
        dim = placements[name].tp_dim
        size = 0 if dim is None else parameter.size(dim)
        rank = mesh.tp_rank
        parameter.copy_(stored[name].read(dim, rank * size, (rank + 1) * size))
    return missing


def check_parameters(
    network: nn.Module,
    mesh: ParallelMesh,
    shapes: Mapping[str, Sequence[int]],
    *,
    path: Path,
) -> list[str]:
    """Return the parameters that a checkpoint with these global shapes does not hold.

    Heads and the pooler may be absent; embeddings and layers may not.

    Raises:
        ValueError: a shape differs, or a part of the Transformer is absent; the first one is named.
    """
    missing = []
    placements = parameter_placements(network)
    for name, parameter in network.named_parameters():
        needed = list(parameter.shape)
        dim = placements[name].tp_dim
        if dim is not None:
            needed[dim] *= mesh.tensor_parallel_size
        found = list(shapes[name]) if name in shapes else None
        if found is None and not name.startswith(BODY):
            missing.append(name)
        elif found != needed:
            raise ValueError(
                f"checkpoint {path} is of another model: {name} needs {needed}"
                f" and it holds {found or 'nothing'}"
            )
    return missing
