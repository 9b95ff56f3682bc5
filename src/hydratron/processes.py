"""The processes of a job: which were made outside, and trees that end when they should."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# the process's place in some other job: must not leak into a job's own process tree
FOREIGN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "NODE_RANK",
                     "MASTER_", "TORCHELASTIC_", "PL_GLOBAL_SEED", "STANDALONE_PORT",
                     "WANDB_SERVICE", "HYDRATRON_RENDEZVOUS")  # fmt: skip
RENDEZVOUS = "HYDRATRON_RENDEZVOUS"  # the file in which the ranks that `start_ranks` made meet
SECONDS_TO_STOP = 60  # for a last checkpoint after SIGTERM, before SIGKILL
# exit statuses, as a shell gives them
TERMINATED = 128 + signal.SIGTERM  # saved and ended early
INTERRUPTED = 128 + signal.SIGINT
PR_SET_PDEATHSIG = 1


def num_started() -> int:
    """Return how many processes torchrun or srun made for the job."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # the step's tasks, not the job's: a batch script has several and is one process
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def is_external_launch() -> bool:
    """Whether torchrun or srun already made one process per device."""
    return "TORCHELASTIC_RUN_ID" in os.environ or num_started() > 1


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def world_size(config: Mapping[str, Any]) -> int:
    """Return the processes that the parallel layout needs."""
    if "hardware" in config:
        return 1  # a plan speaks of a cluster and runs on none of it
    parallel = config.get("parallel") or {}
    return parallel.get("tensor_parallel_size", 1) * parallel.get("data_parallel_size", 1)


def num_nodes(config: Mapping[str, Any]) -> int:
    """Return `trainer.num_nodes`, 1 for a command that has no trainer."""
    if "hardware" in config:
        return 1
    return (config.get("trainer") or {}).get("num_nodes", 1)


def num_local_devices(config: Mapping[str, Any]) -> int:
    """Return the processes of this node: `trainer.devices`, else what the parallel layout needs."""
    trainer = config.get("trainer") or {}
    if trainer.get("devices") and "hardware" not in config:
        return int(trainer["devices"])
    return max(1, world_size(config) // num_nodes(config))


def slurm_resource(name: str, _root_: Any) -> int | None:
    """Resolve `${slurm:...}` of `conf/hydra/launcher`: one task a device, one GPU a task."""
    config: Mapping[str, Any] = _root_
    is_gpu = (config.get("trainer") or {}).get("accelerator") == "gpu"
    return {
        "nodes": num_nodes(config),
        "tasks_per_node": num_local_devices(config),
        "gpus_per_node": num_local_devices(config) if is_gpu else None,
    }[name]


def start_ranks(
    command: str, run_dir: Path, *, num_ranks: int, meeting: str, output: IO[str] | None
) -> list[subprocess.Popen[bytes]]:
    """Start a job's processes on this machine, one a rank, each in a session of its own.

    torchrun would listen on all interfaces and say of a killed rank only that something failed.

    Args:
        meeting: an empty folder on this machine, where the ranks find each other.
        output: where they print; None is where this process does.
    """
    environment = clean_environment()
    if num_ranks > 1:
        environment |= {"WORLD_SIZE": str(num_ranks), RENDEZVOUS: f"{meeting}/ranks"}
        local = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        environment = local | environment
    return [
        subprocess.Popen(
            [sys.executable, "-m", "hydratron.launch", command, str(run_dir)],
            env=environment
            | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}),
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        for rank in range(num_ranks)
    ]


def wait(ranks: Sequence[subprocess.Popen[bytes]], requested: Sequence[int]) -> str | None:
    """Wait for all ranks. When a SIGTERM is `requested`, or a rank has failed, the others get a
    SIGTERM and time for a last checkpoint.

    Returns which rank died of which signal, None if none did of its own.
    """
    killed, deadline = None, None
    while any([rank.poll() is None for rank in ranks]):  # a list, to poll every one
        failed = [rank for rank in ranks if rank.returncode not in (None, 0, TERMINATED)]
        if deadline is None and (requested or failed):
            deadline = time.monotonic() + SECONDS_TO_STOP
            killed = None if requested else describe_death(ranks)
            for rank in ranks:
                rank.terminate()  # not what it started, a logger's or a loader's processes
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return describe_death(ranks) if deadline is None else killed


def describe_death(ranks: Sequence[subprocess.Popen[bytes]]) -> str | None:
    """Return which of the ranks that have ended died of which signal, None if none did."""
    for number, rank in enumerate(ranks):
        if rank.returncode is not None and rank.returncode < 0:
            who = f"rank {number} of {len(ranks)}" if len(ranks) > 1 else "the job's process"
            return f"{who} was killed by {signal.Signals(-rank.returncode).name}"
    return None


def end_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Leave no process of the job behind."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def clean_environment() -> dict[str, str]:
    """Return the environment without any trace of a surrounding distributed job."""
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_VARIABLES)}


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux for a signal to this process when its parent dies.

    To Linux the parent is the thread that started this process, so that must live as long.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
