"""From a composed Hydra job to processes, and from processes to a `result.json`.

A single run on one device happens in this process. In a sweep every job is its own process tree
with its frozen configuration and a clean environment, so that nothing a job does can end its
siblings; a job of several devices runs under torch.distributed.run. Where torchrun or srun made the
processes, those are used.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hydratron.result import (
    FAILURE,
    RESULT,
    Job,
    completed_result,
    job_line,
    note_failure,
    read_result,
    write_result,
)

FROZEN_CONFIG = ".hydra/resolved.yaml"
OUTPUT = "output.log"
# the process's place in some other job: must not leak into a job's own process tree
FOREIGN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "NODE_RANK", "MASTER_",
                     "TORCHELASTIC_", "PL_GLOBAL_SEED", "STANDALONE_PORT")  # fmt: skip
SECONDS_TO_STOP = 60  # for a last checkpoint after SIGTERM, before SIGKILL
PR_SET_PDEATHSIG = 1
TERMINATED = 128 + signal.SIGTERM


class InputError(ValueError):
    """The user asked for something that cannot be; nothing was run."""


class JobFailed(RuntimeError):
    """A job did not end well; `status` is the exit status that says how."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def configuration_directory() -> Path:
    """Return the configuration tree: inside an installed package, else the checkout's `conf/`."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "conf"


def main(command: str) -> None:
    """Run `command` as a Hydra application on sys.argv."""

    failures: list[Exception] = []

    def task(config: DictConfig) -> float | None:
        try:
            return launch(command, config)
        except (InputError, JobFailed) as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra lets the siblings run and raises at the end
            failures.append(error)  # Hydra would print its own lines around a single run's
            return None

    tree = str(configuration_directory())
    hydra.main(version_base="1.3", config_path=tree, config_name=command)(task)()
    for error in failures:
        raise error


def launch(command: str, config: DictConfig) -> float | None:
    """Run one Hydra job; return its objective (`val/loss`) for a sweeper."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    if is_sweep and config.get("resume") and read_result(run_dir).get("status") == "ok":
        return objective(run_dir)
    job = Job(
        command,
        run_dir,
        freeze(config, run_dir),
        override_dictionary(list(hydra_config.overrides.task)),
    )
    if is_external_launch():
        execute(job)
    elif is_sweep:
        run_children(job, log=run_dir / OUTPUT)
    elif num_local_devices(job.config) > 1:
        check(job)
        run_children(job, log=None)
    else:
        execute(job)
    return objective(run_dir)


def objective(run_dir: Path) -> float | None:
    """Return what a sweeper minimises; None on ranks other than 0, which write no result."""
    return read_result(run_dir).get("val/loss")


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Turn `resume=DIR` into the arguments that made DIR, with those given now laid over them.

    Raises:
        InputError: DIR is no run directory (with -m: no sweep directory).
    """
    given = {a.partition("=")[0]: a for a in arguments if "=" in a}
    directory = Path(override_dictionary(arguments)["resume"])
    is_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    source = directory / ("multirun.yaml" if is_sweep else ".hydra/overrides.yaml")
    if not source.is_file():
        kind = "sweep" if is_sweep else "run"
        raise InputError(f"resume={directory}: no {kind} directory, it has no {source.name}")
    stored: Any = OmegaConf.load(source)
    if is_sweep:
        stored = [*stored.hydra.overrides.task, *stored.hydra.overrides.hydra]
    where = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    before = {text.partition("=")[0]: text for text in stored}
    flags = [a for a in arguments if "=" not in a]
    return [*flags, *(before | given | {where: f"{where}={directory}"}).values()]


@contextlib.contextmanager
def sweep_definition_kept(arguments: list[str]) -> Iterator[None]:
    """Keep `multirun.yaml`, which says what the sweep is, as it was while it is resumed."""
    given = override_dictionary(arguments)
    path = Path(given.get("hydra.sweep.dir", "")) / "multirun.yaml"
    definition = path.read_text() if "resume" in given and path.is_file() else None
    try:
        yield
    finally:
        if definition is not None:
            path.write_text(definition)


def refuse_overwriting(arguments: list[str]) -> None:
    """Raise InputError where a new run or sweep would write over an old one.

    A preempted run is the exception: the same command goes on with it.
    """
    given = override_dictionary(arguments)
    if "resume" in given:
        return
    run_dir, sweep_dir = given.get("hydra.run.dir"), given.get("hydra.sweep.dir")
    if {"-m", "--multirun"}.isdisjoint(arguments):
        if run_dir and read_result(Path(run_dir)).get("status") in ("ok", "failed"):
            raise InputError(f"{run_dir} holds a run already; resume={run_dir} goes on with it")
    elif sweep_dir and (Path(sweep_dir) / "multirun.yaml").exists():
        raise InputError(f"{sweep_dir} holds a sweep already; -m resume={sweep_dir} completes it")


def freeze(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Resolve every interpolation once and leave the result where worker processes read it."""
    OmegaConf.resolve(config)
    path = run_dir / FROZEN_CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, path)
    return cast(dict[str, Any], OmegaConf.to_container(config))


def override_dictionary(overrides: list[str]) -> dict[str, str]:
    """Turn `key=value` overrides into a dictionary."""
    return {k.lstrip("+~"): v for k, _, v in (text.partition("=") for text in overrides)}


def is_external_launch() -> bool:
    """Whether torchrun or srun already made one process per device."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ


def num_local_devices(config: Mapping[str, Any]) -> int:
    """Return the processes of this node: `trainer.devices`, else what the parallel layout needs."""
    trainer, parallel = config.get("trainer") or {}, config.get("parallel") or {}
    if trainer.get("devices"):
        return int(trainer["devices"])
    world_size = parallel.get("tensor_parallel_size", 1) * parallel.get("data_parallel_size", 1)
    return max(1, world_size // trainer.get("num_nodes", 1))


def check(job: Job) -> None:
    """Raise InputError for wrong input before any worker exists."""
    try:
        importlib.import_module(f"hydratron.commands.{job.command}").prepare(job.config)
    except ValueError as error:
        write_result(job, status="failed", error=str(error), duration_s=0.0)
        raise InputError(str(error)) from error


def execute(job: Job) -> None:
    """Run the job in this process and, on rank 0, write its `result.json`, also on failure."""
    started = time.monotonic()
    outcome: dict[str, Any] = {"status": "failed"}
    signal.signal(signal.SIGTERM, stop_at_once)  # until training begins and can checkpoint
    try:
        module = importlib.import_module(f"hydratron.commands.{job.command}")
        quiet_libraries()  # after the import: Lightning sets its own level
        try:
            prepared = module.prepare(job.config)
        except ValueError as error:
            raise InputError(str(error)) from error
        outcome = {"status": "ok"} | module.run(prepared, job.run_dir)
        if outcome["status"] == "preempted":
            raise JobFailed(f"stopped on request; resume={job.run_dir}", status=TERMINATED)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            outcome["status"] = "preempted"
        if outcome["status"] != "preempted":
            is_ours = isinstance(error, (InputError, JobFailed))
            name = "" if is_ours else f"{type(error).__name__}: "
            outcome |= {"status": "failed", "error": note_failure(job.run_dir, f"{name}{error}")}
        raise
    finally:
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
            write_result(job, **outcome, duration_s=round(time.monotonic() - started, 3))


def stop_at_once(*_: Any) -> None:
    """End the process by way of its `finally` clauses."""
    raise SystemExit(TERMINATED)


def quiet_libraries() -> None:
    """Leave the terminal to the run, without advertisements and notes on torch's transitions."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system")
    # the sampler starts at the consumed samples; Lightning cannot know
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")


def run_children(job: Job, *, log: Path | None) -> None:
    """Run the job as a process tree of its own and wait; raise JobFailed unless it ended `ok`."""
    for name in (RESULT, FAILURE):
        (job.run_dir / name).unlink(missing_ok=True)
    started = time.monotonic()
    requested: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: requested.append(number))
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        process = subprocess.Popen(
            child_command(job.command, job.run_dir, num_devices=num_local_devices(job.config)),
            env=clean_environment(),
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            wait(process, requested)
        finally:
            end_tree(process)
            signal.signal(signal.SIGTERM, previous)
            duration = time.monotonic() - started
            result = completed_result(job, returncode=process.returncode, duration=duration)
    if log:
        print(job_line(job, result), flush=True)
    if requested:
        raise SystemExit(TERMINATED)
    if result["status"] != "ok":
        status = TERMINATED if result["status"] == "preempted" else 1
        message = result["error"] or result["status"]
        raise JobFailed(f"{job.run_dir}: {message}", status=status)


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


def child_command(command: str, run_dir: Path, *, num_devices: int) -> list[str]:
    """Return the command line of a job's process tree."""
    worker = ["-m", "hydratron.launch", command, str(run_dir)]
    if num_devices == 1:
        return [sys.executable, *worker]
    elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_devices}"]
    return [sys.executable, *elastic, *worker]


def clean_environment() -> dict[str, str]:
    """Return the environment without any trace of a surrounding distributed job."""
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_VARIABLES)}


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def worker(command: str, run_dir: Path) -> int:
    """Run a frozen job as one of its processes; return the exit status."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    config = OmegaConf.to_container(OmegaConf.load(run_dir / FROZEN_CONFIG))
    given: Any = OmegaConf.load(run_dir / ".hydra/overrides.yaml")
    overrides = override_dictionary(list(given))
    try:
        execute(Job(command, run_dir, cast(dict[str, Any], config), overrides))
    except InputError as error:
        print(f"hydratron {command}: {error}", file=sys.stderr)
        return 2
    except JobFailed as error:
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], Path(sys.argv[2])))
