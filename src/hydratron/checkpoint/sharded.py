"""Sharded checkpoints: global tensors through torch.distributed.checkpoint.

Each rank writes its part. Parameters and optimizer state are stored as global tensors, so any
tensor-parallel x data-parallel layout loads any other. A directory has its final name only when it
is complete. It holds `.metadata` and `__*.distcp` (tensors), `loops.pt` (plain values) and a
`rng-<rank>.pt` of every rank.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import parameter_placements
from hydratron.parallel.zero import MOMENT_BYTES, PART_BYTES, OptimizerShard, ShardedAdamW

LOOPS = "loops.pt"
NAME_PREFIX = "step-"


class CheckpointError(ValueError):
    """No complete checkpoint, or one of another model, or one that cannot be read or written."""


@contextmanager
def _explained(action: str) -> Iterator[None]:
    """What fails in torch's saving and loading is a CheckpointError of one line, Ctrl-C is itself.

    torch wraps whatever it catches there, an interrupt too.
    """
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from error
        raise CheckpointError(f"{action} failed: {causes[0]}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{action} failed: {error}") from error


def _global(
    tensor: Tensor, tp_dim: int | None, mesh: ParallelMesh, dp_dim: int | None = None
) -> Tensor:
    """View this rank's shard as the global tensor it is a part of; shares memory."""
    if mesh.device_mesh is None:
        return tensor
    dp = Replicate() if dp_dim is None else Shard(dp_dim)
    tp = Replicate() if tp_dim is None or mesh.tp_group is None else Shard(tp_dim)
    return DTensor.from_local(tensor, mesh.device_mesh, [dp, tp], run_check=False)


def global_parameters(network: nn.Module, mesh: ParallelMesh) -> dict[str, Tensor]:
    """Return every parameter by name as a global tensor that shares memory with the shard."""
    placements = parameter_placements(network)
    return {
        name: _global(parameter.detach(), placements[name].tp_dim, mesh)
        for name, parameter in network.named_parameters()
    }


def _initialize_optimizer(optimizer: Optimizer) -> None:
    """Give AdamW the zero state it would make at its first step, for loading into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            device = parameter.device if group.get("fused") else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def global_optimizer_state(
    network: nn.Module, optimizer: Optimizer, mesh: ParallelMesh
) -> dict[str, Tensor]:
    """Return the optimizer's state as global tensors named `<parameter>/<state>`."""
    placements = parameter_placements(network)
    shards = optimizer.shards if isinstance(optimizer, ShardedAdamW) else {}
    state: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        shard = shards.get(parameter, OptimizerShard(parameter, parameter, None))
        entries = dict(optimizer.state[shard.part])
        if shard.part.dtype != parameter.dtype:
            entries["master"] = shard.part.detach()
        for key, value in entries.items():
            if value.dim():
                value = _global(value, placements[name].tp_dim, mesh, shard.dp_dim)
            state[f"{name}/{key}"] = value
    return state


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the schedule changes: the next step must find the learning rate it would have had."""
    return [{k: g[k] for k in ("lr", "initial_lr") if k in g} for g in optimizer.param_groups]


def _own_generators(network: nn.Module) -> dict[str, torch.Generator]:
    """Streams that modules keep for themselves, as replicated dropout does."""
    found = ((name, getattr(module, "generator", None)) for name, module in network.named_modules())
    return {name: value for name, value in found if isinstance(value, torch.Generator)}


def _rng_state(network: nn.Module) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {name: g.get_state() for name, g in _own_generators(network).items()}


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass(frozen=True)
class BackgroundSaving:
    """Save in a thread; `process_group` is a gloo group of its own, None for a single process."""

    process_group: dist.ProcessGroup | None


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that a thread is writing; it gets its name from `finish`."""

    temporary: Path
    directory: Path
    future: Future[Any]

    def is_done(self) -> bool:
        """Whether `finish` would not wait."""
        return self.future.done()

    def finish(self) -> None:
        """Wait for the thread; on rank 0, give the checkpoint its name.

        Rank 0's thread ends last: it writes the metadata when all ranks have written their parts.

        Raises:
            CheckpointError: the save failed, with the reason.
        """
        with _explained(f"saving {self.directory}"):
            self.future.result()
        if _rank_and_world_size()[0] == 0:
            _publish(self.temporary, self.directory)


def bytes_per_parameter(dtype: torch.dtype) -> int:
    """Return what a checkpoint holds of each parameter of a network in `dtype`: the weight, two
    float32 moments, and of a weight of 16 bits its float32 master.
    """
    return dtype.itemsize + MOMENT_BYTES + (PART_BYTES if dtype.itemsize < PART_BYTES else 0)


def check_space(
    directory: Path, num_parameters: int, *, num_kept: int, dtype: torch.dtype = torch.float32
) -> None:
    """Check that the disk of `directory` can hold `num_kept` checkpoints beside a new one.

    Those that are there already are among the ones kept.

    Raises:
        CheckpointError: it cannot; with both sizes.
    """
    size = bytes_per_parameter(dtype) * num_parameters
    num_there = sum(1 for _ in directory.glob(f"{NAME_PREFIX}*/{LOOPS}"))
    needed = max(1, num_kept + 1 - num_there) * size
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        one, all_of_them, left = (f"{x / 2**20:,.1f} MiB" for x in (size, needed, free))
        raise CheckpointError(
            f"{directory}: checkpoints of {one} need {all_of_them} and the disk has {left} free"
        )


def save_checkpoint(
    directory: Path,
    *,
    network: nn.Module,
    optimizers: Sequence[Optimizer],
    mesh: ParallelMesh,
    loop_state: dict[str, Any],
    background: BackgroundSaving | None = None,
) -> PendingSave | None:
    """Write a complete checkpoint under `directory`, or nothing; every rank must call it.

    With `background`, the tensors are copied to the CPU and written by a thread while training goes
    on; the checkpoint gets its name when the returned save is finished.

    Raises:
        CheckpointError: the tensors could not be written, with the reason.
    """
    rank, world_size = _rank_and_world_size()
    temporary = directory.with_name(directory.name + ".tmp")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if world_size > 1:
        dist.barrier()
    tensors: dict[str, Any] = {"model": global_parameters(network, mesh)}
    for index, optimizer in enumerate(optimizers):
        tensors[f"optimizer_{index}"] = global_optimizer_state(network, optimizer, mesh)
    torch.save(_rng_state(network), temporary / f"rng-{rank}.pt")
    if rank == 0:
        layout = {"tensor_parallel_size": mesh.tensor_parallel_size, "world_size": world_size}
        hyperparameters = [_hyperparameters(optimizer) for optimizer in optimizers]
        state = loop_state | {"layout": layout, "hyperparameters": hyperparameters}
        torch.save(state, temporary / LOOPS)
    if background is not None:
        future = dcp.async_save(
            tensors, checkpoint_id=temporary, process_group=background.process_group
        )
        assert isinstance(future, Future)
        return PendingSave(temporary, directory, future)
    with _explained(f"saving {directory}"):
        dcp.save(tensors, checkpoint_id=temporary)
    if world_size > 1:
        dist.barrier()  # every rank has written its random state
    if rank == 0:
        _publish(temporary, directory)
    if world_size > 1:
        dist.barrier()
    return None


def _publish(temporary: Path, directory: Path) -> None:
    if directory.exists():
        remove_checkpoint(directory)
    os.replace(temporary, directory)


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint, or leave it whole: it loses its name first."""
    doomed = directory.with_name(directory.name + ".removed.tmp")
    os.replace(directory, doomed)
    shutil.rmtree(doomed)


def load_checkpoint(
    directory: Path, *, network: nn.Module, optimizers: Sequence[Optimizer], mesh: ParallelMesh
) -> dict[str, Any]:
    """Fill network and optimizers in place, whatever layout wrote them; return the loops' state.

    The random streams are restored when the layout is the one that saved them.

    Raises:
        CheckpointError: no complete checkpoint there, or one of another model.
    """
    rank, world_size = _rank_and_world_size()
    loop_state = load_loop_state(directory)
    load_model(directory, network, mesh)
    for index, optimizer in enumerate(optimizers):
        _initialize_optimizer(optimizer)
        state = global_optimizer_state(network, optimizer, mesh)
        _load({f"optimizer_{index}": state}, directory)
        stored = loop_state["hyperparameters"][index]
        for group, values in zip(optimizer.param_groups, stored, strict=True):
            group.update(values)
        if isinstance(optimizer, ShardedAdamW):
            optimizer.reload_parts()
    layout = {"tensor_parallel_size": mesh.tensor_parallel_size, "world_size": world_size}
    if optimizers and loop_state["layout"] == layout:
        rng = torch.load(directory / f"rng-{rank}.pt", weights_only=True)
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
        for name, generator in _own_generators(network).items():
            generator.set_state(rng[name])
    return loop_state


def load_loop_state(directory: Path) -> dict[str, Any]:
    """Return what a checkpoint holds besides tensors: steps, schedules, loss scale, layout."""
    if not (directory / LOOPS).is_file():
        raise CheckpointError(f"{directory} is not a complete checkpoint: it has no {LOOPS}")
    return torch.load(directory / LOOPS, weights_only=True, map_location="cpu")


def load_model(directory: Path, network: nn.Module, mesh: ParallelMesh) -> None:
    """Fill the parameters of `network` in place.

    Raises:
        CheckpointError: names or global shapes differ; the first one is named.
    """
    parameters = global_parameters(network, mesh)
    stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    for name, parameter in parameters.items():
        entry = stored.get(f"model.{name}")
        shape = list(getattr(entry, "size", []))
        if shape != list(parameter.shape):
            found = shape if entry is not None else "nothing"
            raise CheckpointError(
                f"checkpoint {directory} is of another model: {name} needs"
                f" {list(parameter.shape)} and it holds {found}"
            )
    _load({"model": parameters}, directory)


def _load(tensors: dict[str, Any], directory: Path) -> None:
    with _explained(f"loading {directory}"):
        dcp.load(tensors, checkpoint_id=directory)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the complete `step-<n>` of the largest n below `directory`, if there is one."""
    found = [
        path
        for path in directory.glob(f"{NAME_PREFIX}*")
        if path.name.removeprefix(NAME_PREFIX).isdigit() and (path / LOOPS).is_file()
    ]
    return max(found, key=lambda path: int(path.name.removeprefix(NAME_PREFIX)), default=None)
