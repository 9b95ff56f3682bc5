"""From a composed Hydra job to processes, and from processes to a `result.json`.

A single run on one device happens in this process. In a sweep every job is its own process tree
with its frozen configuration and a clean environment, so that nothing a job does can end its
siblings; a job of several devices is a process for each. Where torchrun or srun made the processes,
those are used.
"""

import contextlib
import importlib
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydratron.arguments import InputError, override_dictionary
from hydratron.checkpoint.runs import FROZEN_CONFIG, write_settings
from hydratron.commands.configuration import check_groups, check_keys
from hydratron.continuation import (
    CONTINUES,
    FINISHED,
    check_identity,
    job_directory,
    newest_run,
    settings_of,
    sole_writer,
    standing,
    unused_directory,
)
from hydratron.processes import (
    INTERRUPTED,
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
    OFFLINE_RUNS,
    Job,
    JobFailed,
    JobPreempted,
    completed_result,
    describe_outcome,
    exit_status,
    forget_outcome,
    full_disks_named,
    job_line,
    note_failure,
    read_result,
    result_status,
    sync_command,
    write_result,
)
from hydratron.sweeps import check_choices, check_ended_well, check_launcher, objective

OUTPUT = "output.log"


# here and not in `main`: the processes of a parallel launcher import this module alone
OmegaConf.register_new_resolver("slurm", slurm_resource, replace=True)
OmegaConf.register_new_resolver("job_directory", job_directory, replace=True)
OmegaConf.register_new_resolver("unused", unused_directory, replace=True, use_cache=True)


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
        if "joblib" in hydra_config.launcher._target_ and os.getpid() != owner:
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

    # what SLURM's launcher of conf/ leaves out is to come from the plugin's of the same name
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated")
    tree = configuration_directory()
    check_choices(sys.argv[1:], tree)
    with tempfile.TemporaryDirectory(prefix="hydratron-") as begun:
        try:
            hydra.main(version_base="1.3", config_path=str(tree), config_name=command)(task)()
        except KeyboardInterrupt:
            note_interrupted(command, jobs_in(begun))
            raise
        except ValueError as error:
            if isinstance(error, InputError) or not jobs_in(begun):
                raise
            where = jobs_in(begun)[0].parent
            raise JobFailed(f"{where}: no trial has a value to search by") from error
        check_ended_well(jobs_in(begun))
    for error in failures:
        raise error


def jobs_in(begun: str) -> list[Path]:
    """Return the directories of the jobs that a sweep has begun."""
    return [Path(path.read_text()) for path in sorted(Path(begun).iterdir())]


def note_interrupted(command: str, run_dirs: Sequence[Path]) -> None:
    """Write the results of jobs that could not: joblib kills its workers, and they with them."""
    for run_dir in run_dirs:
        if (run_dir / FROZEN_CONFIG).exists() and not read_result(run_dir):
            job = read_job(command, run_dir)
            duration = round(time.time() - (run_dir / FROZEN_CONFIG).stat().st_mtime, 3)
            write_result(job, status="failed", error="interrupted", duration_s=duration)
            end_tracking(job, status=INTERRUPTED)


def launch(command: str, config: DictConfig) -> float | None:
    """Run one Hydra job; return its objective (`val/loss`) for a sweeper."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    if is_sweep:
        check_launcher(hydra_config)
    composed = OmegaConf.to_yaml(config)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise InputError(str(error)) from error
    plain = cast(dict[str, Any], OmegaConf.to_container(config))
    job = Job(command, run_dir, plain, override_dictionary(list(hydra_config.overrides.task)))
    try:
        check_keys(plain, configuration_directory() / f"{command}.yaml")
        if not is_sweep:
            check_groups(command, plain)
    except ValueError as error:
        raise refusal(job, error) from error
    with sole_writer(run_dir) if is_first_rank() else contextlib.nullcontext():
        found = standing(job, resumed=bool(config.get("resume")))
        if found == FINISHED:
            if is_first_rank():
                done = f"{job_line(job, read_result(run_dir))}  (done before)"
                alone = f"{run_dir} has ended well; a larger trainer.max_steps= goes on"
                print(done if is_sweep else alone, flush=True)
            return objective(run_dir)
        is_local = not is_sweep and not is_external_launch() and num_local_devices(plain) == 1
        # what an earlier run wrote is changed only when the job is known to be right
        prepared = check(job, has_run=True) if found == CONTINUES else None
        if is_first_rank():
            freeze(job, composed, hydra_config)
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
        elif is_local:
            forget_outcome(job)
            execute(job, prepared)
        else:
            prepared = prepared or check(job)
            run_children(job, log=None)
        return objective(run_dir)


def freeze(job: Job, composed: str, hydra_config: Any) -> None:
    """Write what the job is, where Hydra would have written it before anything was checked, and
    the resolved configuration for worker processes.
    """
    directory = job.run_dir / ".hydra"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(composed)
        OmegaConf.save(OmegaConf.create(dict(job.config)), job.run_dir / FROZEN_CONFIG)
        OmegaConf.save(OmegaConf.create({"hydra": hydra_config}), directory / "hydra.yaml")
        OmegaConf.save(hydra_config.overrides.task, directory / "overrides.yaml")
        write_settings(job.run_dir, settings_of(job))
    except OSError as error:
        raise InputError(f"{directory}: cannot be written to: {error.strerror}") from error


def check(job: Job, *, has_run: bool = False) -> Any:
    """Return the command's checked job, made before any worker exists.

    Raises:
        InputError: wrong input, or (`has_run`) other data than the directory's run was trained on.
    """
    try:
        prepared = importlib.import_module(f"hydratron.commands.{job.command}").prepare(job.config)
    except ValueError as error:
        raise refusal(job, error) from error
    if has_run:
        check_identity(job.run_dir, prepared.describe()["identity"])
    return prepared


def refusal(job: Job, error: ValueError) -> InputError:
    """Return what ends a wrong command; a directory that holds no run yet gets a failed result."""
    if is_first_rank() and not read_result(job.run_dir) and newest_run(job.run_dir) is None:
        write_result(job, status="failed", error=str(error), duration_s=0.0)
    return InputError(str(error))


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


def execute(job: Job, prepared: Any = None) -> None:
    """Run the job in this process and, on rank 0, write its `result.json`, also on failure.

    `prepared` is what `check` returned, where it was called already.
    """
    started = time.monotonic()
    outcome: dict[str, Any] = {"status": "failed"}
    signal.signal(signal.SIGTERM, stop_at_once)  # until training begins and can checkpoint
    try:
        module = importlib.import_module(f"hydratron.commands.{job.command}")
        quiet_libraries()  # after the import: Lightning sets its own level
        try:
            prepared = prepared or module.prepare(job.config)
        except ValueError as error:
            raise InputError(str(error)) from error
        with full_disks_named(job.run_dir):
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
