"""Sharded checkpoints: global tensors through torch.distributed.checkpoint.

Each rank writes its part. Parameters and optimizer state are stored as global tensors, so any
tensor-parallel x data-parallel layout loads any other. A directory has its final name only when it
is complete. It holds `model-<rank>.safetensors` and `optimizer_0-<rank>.safetensors`, `loops.pt`
(plain values), a `rng-<rank>.pt` of every rank, and `checkpoint.json`, which lists and hashes them.
"""

import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
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

from hydratron.checkpoint.manifest import (
    LOOPS,
    CheckpointError,
    DamagedCheckpointError,
    is_complete,
    read_manifest,
    step_directories,
    verify,
)
from hydratron.checkpoint.storage import Writer, reader
from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import parameter_placements
from hydratron.parallel.zero import MOMENT_BYTES, PART_BYTES, OptimizerShard, ShardedAdamW

MODEL_FILES = ("model-", LOOPS)  # what a network is read from


@contextmanager
def _explained(action: str) -> Iterator[None]:
    """Turn what torch raises while it saves or loads into a CheckpointError of one line.

    torch wraps whatever it catches there, an interrupt too, which is raised as itself.
    """
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from error
        damage = [cause for cause in causes if isinstance(cause, DamagedCheckpointError)]
        if damage:
            raise DamagedCheckpointError(str(damage[0])) from error
        raise CheckpointError(f"{action} failed: {causes[0]}") from error
    except CheckpointError:
        raise
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
    num_there = sum(map(is_complete, step_directories(directory)))
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
    run: Mapping[str, Any] | None = None,
    background: BackgroundSaving | None = None,
) -> PendingSave | None:
    """Write a complete checkpoint under `directory`, or nothing; every rank must call it.

    `run` says in plain values which run this is; it stands in the manifest.
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
        torch.save(loop_state | {"layout": layout}, temporary / LOOPS)
    writer = Writer(temporary, run=run or {})
    if background is not None:
        future = dcp.async_save(
            tensors, storage_writer=writer, process_group=background.process_group
        )
        assert isinstance(future, Future)
        return PendingSave(temporary, directory, future)
    with _explained(f"saving {directory}"):
        dcp.save(tensors, storage_writer=writer)
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


def _verify_together(directory: Path) -> None:
    """Check all files, each on one rank; every rank raises if one of them found damage."""
    rank, world_size = _rank_and_world_size()
    found: list[str | None] = [None] * world_size
    mine = None
    try:
        verify(directory, part=rank, num_parts=world_size)
    except DamagedCheckpointError as error:
        mine = str(error)
    if world_size > 1:
        dist.all_gather_object(found, mine)
    else:
        found = [mine]
    for message in filter(None, found):
        raise DamagedCheckpointError(message)


def load_checkpoint(
    directory: Path, *, network: nn.Module, optimizers: Sequence[Optimizer], mesh: ParallelMesh
) -> dict[str, Any]:
    """Fill network and optimizers in place, whatever layout wrote them; return the loops' state.

    Every rank must call it. The random streams are restored when the layout is the one that saved
    them. The state has the manifest's `run` too. Learning rates are the schedule's to set.

    Raises:
        DamagedCheckpointError: not all there, or not as it was written; on every rank.
        CheckpointError: one of another model.
    """
    _verify_together(directory)
    rank, world_size = _rank_and_world_size()
    loop_state = load_loop_state(directory)
    load_model(directory, network, mesh)
    for index, optimizer in enumerate(optimizers):
        _initialize_optimizer(optimizer)
        state = global_optimizer_state(network, optimizer, mesh)
        _load({f"optimizer_{index}": state}, directory)
        if isinstance(optimizer, ShardedAdamW):
            optimizer.reload_parts()
    layout = {"tensor_parallel_size": mesh.tensor_parallel_size, "world_size": world_size}
    if optimizers and loop_state["layout"] == layout:
        rng = _read_values(directory / f"rng-{rank}.pt")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
        for name, generator in _own_generators(network).items():
            generator.set_state(rng[name])
    return loop_state | {"run": read_manifest(directory).get("run", {})}


def load_loop_state(directory: Path) -> dict[str, Any]:
    """Return what a checkpoint holds besides tensors: steps, schedules, loss scale, layout.

    Raises:
        DamagedCheckpointError: the checkpoint is not complete, or cannot be read.
    """
    read_manifest(directory)
    state = _read_values(directory / LOOPS)
    if not isinstance(state.get("global_step"), int):
        raise DamagedCheckpointError(f"{directory / LOOPS} is damaged: it has no global_step")
    return state


def _read_values(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values, without running what a pickle may say."""
    try:
        values = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedCheckpointError(f"{path} is damaged: {reason}") from error
    if not isinstance(values, dict):
        raise DamagedCheckpointError(f"{path} is damaged: it holds no names")
    return values


def load_model(directory: Path, network: nn.Module, mesh: ParallelMesh) -> None:
    """Fill the parameters of `network` in place.

    Raises:
        CheckpointError: names or global shapes differ; the first one is named.
    """
    parameters = global_parameters(network, mesh)
    stored = reader(directory).read_metadata().state_dict_metadata
    for name, parameter in parameters.items():
        entry = stored.get(f"model.{name}")
        shape = list(getattr(entry, "size", []))
        if shape != list(parameter.shape):
            found = shape if entry is not None else "nothing"
            raise CheckpointError(
                f"checkpoint {directory} is of another model: {name} needs"
                f" {list(parameter.shape)} and it holds {found}"
            )
    load_parameters(directory, parameters)


def load_parameters(
    directory: Path, parameters: dict[str, Tensor], *, no_dist: bool = False
) -> None:
    """Fill the named global tensors in place; with `no_dist`, on this rank alone."""
    _load({"model": parameters}, directory, no_dist=no_dist)


def _load(tensors: dict[str, Any], directory: Path, *, no_dist: bool = False) -> None:
    with _explained(f"loading {directory}"):
        dcp.load(tensors, storage_reader=reader(directory), no_dist=no_dist)
