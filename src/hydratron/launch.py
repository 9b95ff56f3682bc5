"""From a composed Hydra job to processes, and from processes to a `result.json`.

A single run on one device happens in this process. In a sweep every job is its own process tree
with its frozen configuration and a clean environment, so that nothing a job does can end its
siblings; a job of several devices is a process for each. Where torchrun or srun made the processes,
those are used.
"""

import contextlib
import errno
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hydratron.arguments import InputError, override_dictionary
from hydratron.checkpoint.runs import FROZEN_CONFIG
from hydratron.processes import (
    TERMINATED,
    end_ranks,
    end_with_parent,
    is_external_launch,
    is_first_rank,
    num_local_devices,
    num_started,
    slurm_resource,
    start_ranks,
    wait,
    world_size,
)
from hydratron.result import (
    FULL,
    OFFLINE_RUNS,
    RESERVED_BYTES,
    Job,
    completed_result,
    describe_outcome,
    forget_outcome,
    job_line,
    note_failure,
    read_result,
    sync_command,
    write_result,
)

OUTPUT = "output.log"
INTERRUPTED = 128 + signal.SIGINT


class JobFailed(RuntimeError):
    """A job did not end well; `status` is the exit status that says how."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class JobPreempted(JobFailed):
    """A job saved its state and ended early; `stopped_by` says why."""

    def __init__(self, message: str, *, stopped_by: str) -> None:
        super().__init__(message, status=TERMINATED)
        self.stopped_by = stopped_by

    def __reduce__(self) -> Any:
        return JobFailed, (str(self),), {"status": self.status}


def configuration_directory() -> Path:
    """Return the configuration tree: inside an installed package, else the checkout's `conf/`."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "conf"


def main(command: str) -> None:
    """Run `command` as a Hydra application on sys.argv."""

    failures: list[Exception] = []
    owner = os.getpid()

    def task(config: DictConfig) -> float | None:
        hydra_config = HydraConfig.get()
        is_sweep = hydra_config.mode == RunMode.MULTIRUN
        if is_sweep and os.path.isdir(begun):  # not on a cluster's nodes
            Path(begun, str(hydra_config.job.num)).write_text(hydra_config.runtime.output_dir)
        if "joblib" in hydra_config.launcher._target_:
            end_with_parent(signal.SIGTERM)  # its job then ends as with any SIGTERM
            if os.getppid() != owner:
                raise SystemExit(TERMINATED)
        try:
            return launch(command, config)
        except (InputError, JobFailed) as error:
            if is_sweep:
                raise  # Hydra lets the siblings run and raises at the end
            failures.append(error)  # Hydra would print its own lines around a single run's
            return None

    OmegaConf.register_new_resolver("slurm", slurm_resource, replace=True)
    OmegaConf.register_new_resolver("plus", lambda a, b: a + b, replace=True)
    check_choices(sys.argv[1:])
    # what SLURM's launcher of conf/ leaves out is to come from the plugin's of the same name
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated")
    tree = str(configuration_directory())
    with tempfile.TemporaryDirectory(prefix="hydratron-") as begun:
        try:
            hydra.main(version_base="1.3", config_path=tree, config_name=command)(task)()
        except KeyboardInterrupt:
            note_interrupted(command, [Path(file.read_text()) for file in Path(begun).iterdir()])
            raise
    for error in failures:
        raise error


def note_interrupted(command: str, run_dirs: Sequence[Path]) -> None:
    """Write the results of jobs that could not: joblib kills its workers, and they with them."""
    for run_dir in run_dirs:
        if (run_dir / FROZEN_CONFIG).exists() and not read_result(run_dir):
            job = read_job(command, run_dir)
            duration = round(time.time() - (run_dir / FROZEN_CONFIG).stat().st_mtime, 3)
            write_result(job, status="failed", error="interrupted", duration_s=duration)
            end_tracking(job, status=INTERRUPTED)


def check_choices(arguments: Sequence[str]) -> None:
    """Raise InputError where a configuration group is given what is no name of one of its files."""
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    for override in OverridesParser.create().parse_overrides(overrides):
        group = configuration_directory() / override.key_or_group
        given: Any = override.value()
        names = given.list if isinstance(given, ChoiceSweep) else [given]
        is_group = group.is_dir() or override.key_or_group.startswith("hydra/")
        if is_group and not all(isinstance(n, str | QuotedString | list) for n in names):
            known = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
            raise InputError(f"{override.input_line}: a name is needed, one of {known}")


class SweepDefinition(Callback):
    """Writes `multirun.yaml` for sweepers that leave that to the basic one."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, directory / "multirun.yaml")


def launch(command: str, config: DictConfig) -> float | None:
    """Run one Hydra job; return its objective (`val/loss`) for a sweeper."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    if is_sweep:
        check_launcher(hydra_config)
    if is_sweep and config.get("resume") and read_result(run_dir).get("status") == "ok":
        return objective(run_dir)
    job = Job(
        command,
        run_dir,
        freeze(config, run_dir),
        override_dictionary(list(hydra_config.overrides.task)),
    )
    if "submitit" in hydra_config.launcher._target_:
        # inherited from where the sweep was started, it would be the port of all jobs on a node
        os.environ.pop("MASTER_PORT", None)
        execute_as_one_of_many(job)
    elif is_external_launch():
        execute_as_one_of_many(job)
    elif is_sweep:
        try:
            run_children(job, log=run_dir / OUTPUT)
        finally:
            if hydra_config.job.num == 0 and any(run_dir.glob(OFFLINE_RUNS)):
                print(sync_command(Path(hydra_config.sweep.dir) / "*"), flush=True)
    elif num_local_devices(job.config) > 1:
        check(job)
        run_children(job, log=None)
    else:
        forget_outcome(job)
        execute(job)
    return objective(run_dir)


def check_launcher(hydra_config: Any) -> None:
    """Raise InputError where an experiment that is swept over names another launcher than is used.

    Hydra chooses the launcher before the jobs, and so their experiments, are composed.
    """
    definition = Path(hydra_config.sweep.dir) / "multirun.yaml"
    used: Any = OmegaConf.load(definition).hydra.launcher if definition.exists() else None
    wanted = hydra_config.runtime.choices["hydra/launcher"]
    if used is not None and used._target_ != hydra_config.launcher._target_:
        raise InputError(
            f"hydra/launcher: {wanted} in an experiment file is ignored in a sweep over"
            f" experiments: write hydra/launcher={wanted} on the command line"
        )


def objective(run_dir: Path) -> float | None:
    """Return what a sweeper minimises; None on ranks other than 0, which write no result."""
    return read_result(run_dir).get("val/loss")


def freeze(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Resolve every interpolation once and leave the result where worker processes read it."""
    OmegaConf.resolve(config)
    path = run_dir / FROZEN_CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, path)
    return cast(dict[str, Any], OmegaConf.to_container(config))


def check(job: Job) -> None:
    """Raise InputError for wrong input before any worker exists."""
    try:
        importlib.import_module(f"hydratron.commands.{job.command}").prepare(job.config)
    except ValueError as error:
        write_result(job, status="failed", error=str(error), duration_s=0.0)
        raise InputError(str(error)) from error


def execute_as_one_of_many(job: Job) -> None:
    """Run the job as one of the processes that torchrun or SLURM made for it.

    SIGUSR2 tells that SLURM will take the nodes back. Training saves; then, and only then, the
    handler runs that submitit had installed for it, which requeues the job. Nothing else does.

    Raises:
        InputError: there are not as many processes as the job needs.
    """
    needed = world_size(job.config)
    if is_first_rank():
        forget_outcome(job)
    if num_started() != needed:
        error = (
            f"parallel= needs {needed} processes and {num_started()} were started: torchrun and"
            " SLURM start one a device, so that a sweep over their number is a sweep for each"
        )
        if is_first_rank():
            write_result(job, status="failed", error=error, duration_s=0.0)
        raise InputError(error)
    requeue = signal.getsignal(signal.SIGUSR2)
    try:
        execute(job)
    except JobPreempted as error:
        if error.stopped_by == "SIGUSR2" and callable(requeue):
            requeue(signal.SIGUSR2, None)
            raise SystemExit(TERMINATED) from error
        raise


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
        with full_disks_named(job):
            outcome = {"status": "ok"} | module.run(prepared, job.run_dir)
        if outcome["status"] == "preempted":
            reason = outcome["stopped_by"]
            raise JobPreempted(f"stopped by {reason}; resume={job.run_dir}", stopped_by=reason)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or it would end this before its result
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            outcome["status"] = "preempted"
        if outcome["status"] != "preempted":
            is_ours = isinstance(error, (InputError, JobFailed))
            text = str(error) if is_ours else f"{type(error).__name__}: {error}"
            if exit_status(error) == INTERRUPTED:
                text = "interrupted"
            outcome |= {"status": "failed", "error": note_failure(job.run_dir, text)}
        if exit_status(error) == INTERRUPTED:
            raise KeyboardInterrupt from error
        raise
    finally:
        if is_first_rank():
            duration = round(time.monotonic() - started, 3)
            found = describe_outcome(write_result(job, **outcome, duration_s=duration))
            if outcome["status"] == "ok" and found:
                print(f"{job.run_dir}: {found}", flush=True)


@contextlib.contextmanager
def full_disks_named(job: Job) -> Iterator[None]:
    """Raise JobFailed where a file cannot be written any more: what fails tells no name of it, and
    torch's own files not even why.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_full = shutil.disk_usage(job.run_dir).free < RESERVED_BYTES
        number = errno.ENOSPC if is_full else getattr(error, "errno", None)
        if number not in FULL or isinstance(error, JobFailed):
            raise
        place = getattr(error, "filename", None) or job.run_dir
        for unfinished in job.run_dir.glob("checkpoints/*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise JobFailed(f"{place}: cannot be written to: {os.strerror(number)}") from error


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
    forget_outcome(job)
    started = time.monotonic()
    requested: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: requested.append(number))
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        meeting = stack.enter_context(tempfile.TemporaryDirectory(prefix="hydratron-"))
        number, killed = num_local_devices(job.config), None
        ranks = start_ranks(
            job.command, job.run_dir, num_ranks=number, meeting=meeting, output=output
        )
        try:
            killed = wait(ranks, requested)
        except KeyboardInterrupt:
            note_failure(job.run_dir, "interrupted")
            raise
        finally:
            end_ranks(ranks)
            signal.signal(signal.SIGTERM, previous)
            duration = time.monotonic() - started
            codes = [rank.returncode for rank in ranks]
            result = completed_result(job, killed=killed, codes=codes, duration=duration)
            end_tracking(job, status=result_status(result))
    if log:
        print(job_line(job, result), flush=True)
    if requested:
        raise SystemExit(TERMINATED)
    if result["status"] != "ok":
        message = result["error"] or result["status"]
        raise JobFailed(f"{job.run_dir}: {message}", status=result_status(result))


def result_status(result: Mapping[str, Any]) -> int:
    """Return the exit status that says what a result says."""
    if result["error"] == "interrupted":
        return INTERRUPTED
    return {"ok": 0, "preempted": TERMINATED}.get(result["status"], 1)


def exit_status(error: BaseException) -> int:
    """Return the exit status that says how a job ended."""
    # Lightning makes an exit(1) of an interrupt
    if any(isinstance(e, KeyboardInterrupt) for e in (error, error.__context__)):
        return INTERRUPTED
    if isinstance(error, JobFailed):
        return error.status
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


def end_tracking(job: Job, *, status: int) -> None:
    """End what a killed process tree could not end."""
    if "_target_" in (job.config.get("logger") or {}):
        tracking = importlib.import_module("hydratron.commands.tracking")
        tracking.complete(job.config["logger"], job.run_dir, status=status)


def read_job(command: str, run_dir: Path) -> Job:
    """Return the job that was frozen in `run_dir`."""
    config = OmegaConf.to_container(OmegaConf.load(run_dir / FROZEN_CONFIG))
    given: Any = OmegaConf.load(run_dir / ".hydra/overrides.yaml")
    return Job(command, run_dir, cast(dict[str, Any], config), override_dictionary(list(given)))


def worker(command: str, run_dir: Path) -> int:
    """Run a frozen job as one of its processes; return the exit status."""
    try:
        execute(read_job(command, run_dir))
    except InputError as error:
        print(f"hydratron {command}: {error}", file=sys.stderr)
        return 2
    except JobFailed as error:
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], Path(sys.argv[2])))
