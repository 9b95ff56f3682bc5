"""Run a function on several real processes joined by gloo, on the CPU."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from tests.waiting import PATIENCE

# Ranks are forked from a server process that has imported these once, so that they start in
# milliseconds instead of the seconds that importing takes in every one of them: the libraries, and
# what of ours imports the rest of them (transformers' tokenizers, datasets).
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "pytorch_lightning",
    "hydratron.training.evaluation",
    "hydratron.training.finetuning",
    "hydratron.training.pretraining",
    "hydratron.training.zeroshot",
]


def run_distributed(
    fn: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any, timeout: float = PATIENCE
) -> list[Any]:
    """Return `[fn(rank, world_size, *args) for rank in range(world_size)]`, one process each.

    `fn` must be a module-level function, its arguments and result picklable; tensors travel
    through files under `tmp_path`. Each rank has a default process group, one torch thread and
    the parent's environment with RANK, LOCAL_RANK and WORLD_SIZE added. The exception of the rank
    that failed first is raised here with that rank's traceback as a note, the other ranks are
    ended; ranks that outlive `timeout` seconds, counted from when all have joined, are ended with a
    TimeoutError.
    """
    directory = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = start_processes(
        _run_rank,
        (fn, world_size, directory, dict(os.environ), args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + PATIENCE
    have_joined = False
    try:
        while not context.join(timeout=0.1, grace_period=1.0):
            if not have_joined and len(list(directory.glob("joined-*"))) == world_size:
                have_joined, deadline = True, time.monotonic() + timeout
            if time.monotonic() >= deadline:
                alive = [
                    rank for rank, process in enumerate(context.processes) if process.is_alive()
                ]
                raise TimeoutError(f"ranks {alive} of {world_size} still ran after {timeout} s")
    except (ProcessRaisedException, ProcessExitedException):
        _raise_first_error(directory, [process.exitcode for process in context.processes])
        raise
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    results = [directory / f"result-{rank}.pt" for rank in range(world_size)]
    return [torch.load(path, weights_only=False) for path in results]


def _run_rank(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    directory: Path,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    # as in a real rank: a data loader's worker is a fork, not a new process that imports all again
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=PATIENCE),
        )
        (directory / f"joined-{rank}").touch()
        torch.save(fn(rank, world_size, *args), directory / f"result-{rank}.pt")
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, SystemExit) as error:
        _save_error(directory / f"error-{rank}.pickle", rank, error)
        raise


def _save_error(path: Path, rank: int, error: BaseException) -> None:
    """Save when and what; an exception that cannot be pickled is saved as a RuntimeError."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    path.write_bytes(pickle.dumps((time.time(), rank, text, error)))


def _raise_first_error(directory: Path, exit_codes: list[int | None]) -> None:
    """The first in time is the cause: its peers fail later, on the connection it dropped."""
    errors = [pickle.loads(path.read_bytes()) for path in directory.glob("error-*.pickle")]
    if errors:
        _, rank, text, error = min(errors, key=lambda saved: saved[0])
        error.add_note(f"raised on rank {rank}; exit codes of all ranks: {exit_codes}\n{text}")
        raise error
