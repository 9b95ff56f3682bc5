"""The processes of a job: which were made outside, and trees that end when they should."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# the process's place in some other job: must not leak into a job's own process tree
FOREIGN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "NODE_RANK",
                     "MASTER_", "TORCHELASTIC_", "PL_GLOBAL_SEED", "STANDALONE_PORT",
                     "WANDB_SERVICE")  # fmt: skip
SECONDS_TO_STOP = 60  # for a last checkpoint after SIGTERM, before SIGKILL
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


def child_command(command: str, run_dir: Path, *, num_devices: int) -> list[str]:
    """Return the command line of a job's process tree."""
    worker = ["-m", "hydratron.launch", command, str(run_dir)]
    if num_devices == 1:
        return [sys.executable, *worker]
    elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_devices}"]
    return [sys.executable, *elastic, *worker]


def wait(process: subprocess.Popen[bytes], requested: list[int]) -> None:
    """Wait for the tree; pass a SIGTERM on once and give it time for a last checkpoint."""
    passed_on = False
    while process.poll() is None:
        if requested and not passed_on:
            os.killpg(process.pid, signal.SIGTERM)
            passed_on, deadline = True, time.monotonic() + SECONDS_TO_STOP
        if passed_on and time.monotonic() > deadline:
            return
        time.sleep(0.05)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Leave no process of the tree behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def clean_environment() -> dict[str, str]:
    """Return the environment without any trace of a surrounding distributed job.

    torchrun is to leave its workers as long to stop as `wait` does; its own limit is 30 s.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_VARIABLES)}
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_STOP)} | kept


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
