"""Global tensors of a checkpoint that are read a slice at a time, and filling a network with them.

So a rank reads its own share, and a tensor is in memory once, however large the model is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hydratron.models.bert import BertEncoder, BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import parameter_placements

BODY = ("transformer.", "encoder.transformer.")
NETWORKS = {"bert": BertForPretraining, "gpt2": Gpt2ForPretraining}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NUM_NAMED = 3  # of the tensors that are wrong, in a message


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

    Raises:
        ValueError: as `check_shapes`.
    """
    needed = {}
    placements = parameter_placements(network)
    for name, parameter in network.named_parameters():
        shape = list(parameter.shape)
        dim = placements[name].tp_dim
        if dim is not None:
            shape[dim] *= mesh.tensor_parallel_size
        needed[name] = {name: shape}
    return check_shapes(needed, shapes, path=path)


def check_shapes(
    needed: Mapping[str, Mapping[str, Sequence[int]]],
    held: Mapping[str, Sequence[int]],
    *,
    path: Path,
) -> list[str]:
    """Return the parameters of which a checkpoint holds nothing.

    A head or the pooler may be absent as a whole; embeddings and layers may not.

    Args:
        needed: for each of our parameters, the checkpoint's tensors that make it up, by shape.
        held: the shapes of the checkpoint's tensors.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: a tensor is absent or of another shape; the first ones are named.
    """
    present = {_module(ours) for ours, parts in needed.items() if parts.keys() & held.keys()}
    missing = [
        name for name in needed if not name.startswith(BODY) and _module(name) not in present
    ]
    wrong = [
        f"{name} needs {list(shape)} and it holds {list(held[name]) if name in held else 'nothing'}"
        for ours, parts in needed.items()
        if ours not in missing
        for name, shape in parts.items()
        if name not in held or list(held[name]) != list(shape)
    ]
    if wrong:
        raise ValueError(f"checkpoint {path} is of another model: {_first(wrong)}")
    return missing


def check_num_layers(model: ModelConfig, num_tensors: int, *, path: Path) -> None:
    """Raise ValueError, before any layer is built, where a checkpoint has fewer tensors."""
    if model.num_layers > num_tensors:
        raise ValueError(
            f"checkpoint {path} is incomplete: {num_tensors} tensors cannot be the"
            f" {model.num_layers} layers that it says it has"
        )


def _module(name: str) -> str:
    """Return the part of a network that a checkpoint may lack, or has whole."""
    first, second = name.split(".")[:2]
    return f"{first}.{second}" if first == "encoder" else first


def check_tensors(
    needed: Mapping[str, Mapping[str, Sequence[int]]],
    held: Mapping[str, StoredTensor],
    *,
    path: Path,
    family: str,
) -> None:
    """Check that a checkpoint holds the parameters of a network and nothing else.

    Raises:
        ValueError: as `check_shapes`; a parameter is no floating-point number, or a tensor belongs
            to no parameter.
    """
    shapes = {name: stored.shape for name, stored in held.items()}
    for name in check_shapes(needed, shapes, path=path):
        if name.startswith("head."):  # what the network was finetuned for
            raise ValueError(f"checkpoint {path} is incomplete: it has no {min(needed[name])}")
    known = {name for parts in needed.values() for name in parts}
    unknown = [name for name in held if name not in known]
    if unknown:
        raise ValueError(f"{path} holds {_first(unknown)}, which no {family} of ours has")
    for name, stored in held.items():
        if stored.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is no weight of 16, 32 or 64 bits, floating point")


def _first(texts: list[str]) -> str:
    more = f" and {len(texts) - NUM_NAMED} more" if len(texts) > NUM_NAMED else ""
    return ", ".join(texts[:NUM_NAMED]) + more


def build_network(
    model: ModelConfig, head: str | None, shapes: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Return, on the meta device, the network for pretraining, or an encoder and its `head`.

    `head`: what a finetuned one does, None for any other. `shapes` of the checkpoint's tensors, by
    our names, say how many outputs heads have.
    """
    with torch.device("meta"):
        if head is None and "head.weight" not in shapes:
            return NETWORKS[model.family](model)
        network = nn.Module()
        network.encoder = BertEncoder(model)
        for name in ("head", "answerability_head"):
            if name == "head" or f"{name}.weight" in shapes:
                num_outputs = (*shapes.get(f"{name}.weight", ()), 1)[0]
                setattr(network, name, nn.Linear(model.hidden_size, num_outputs))
    return network
