"""The (dp, tp) process mesh: data-parallel replicas outside, tensor-parallel peers innermost.

Consecutive ranks are tensor-parallel peers, so that their traffic stays inside a node.
"""

from dataclasses import dataclass

from torch.distributed import (
    DeviceMesh,
    ProcessGroup,
    get_world_size,
    init_device_mesh,
    is_initialized,
)


@dataclass(frozen=True)
class ParallelMesh:
    """Sizes, ranks and groups of one process; a group of size 1 is None: nothing travels."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    tp_rank: int = 0
    dp_rank: int = 0
    tp_group: ProcessGroup | None = None
    dp_group: ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None


def check_world_size(
    world_size: int, *, tensor_parallel_size: int, data_parallel_size: int
) -> None:
    """Raise ValueError unless `world_size` is `tensor_parallel_size * data_parallel_size`."""
    if world_size != tensor_parallel_size * data_parallel_size:
        raise ValueError(
            f"world size {world_size} is not data_parallel_size {data_parallel_size}"
            f" x tensor_parallel_size {tensor_parallel_size}"
        )


def build_mesh(
    device_type: str, *, tensor_parallel_size: int, data_parallel_size: int
) -> ParallelMesh:
    """Build the mesh over the default process group; one process needs no group at all.

    Raises:
        ValueError: the world size is not data_parallel_size x tensor_parallel_size.
    """
    world_size = get_world_size() if is_initialized() else 1
    check_world_size(
        world_size,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
    )
    if world_size == 1:
        return ParallelMesh()
    mesh = init_device_mesh(
        device_type, (data_parallel_size, tensor_parallel_size), mesh_dim_names=("dp", "tp")
    )
    return ParallelMesh(
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        tp_rank=mesh.get_local_rank("tp"),
        dp_rank=mesh.get_local_rank("dp"),
        tp_group=mesh.get_group("tp") if tensor_parallel_size > 1 else None,
        dp_group=mesh.get_group("dp") if data_parallel_size > 1 else None,
        device_mesh=mesh,
    )
