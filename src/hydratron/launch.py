"""From a composed Hydra job to processes, and from processes to a `result.json`.

A single run on one device happens in this process. In a sweep every job is its own process tree
with its frozen configuration and a clean environment, so that nothing a job does can end its
siblings; a job of several devices runs under torch.distributed.run. Where torchrun or srun made the
processes, those are used.
"""

import contextlib
import ctypes
import datetime
import importlib
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

FROZEN_CONFIG = ".hydra/resolved.yaml"
FAILURE = ".hydra/failure.json"
OUTPUT = "output.log"
RESULT = "result.json"
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
    job = HydraConfig.get()
    run_dir = Path(job.runtime.output_dir)
    frozen = freeze(config, run_dir)
    overrides = override_dictionary(list(job.overrides.task))
    if job.mode == RunMode.MULTIRUN and config.resume and is_done(run_dir):
        return objective(run_dir)
    if is_external_launch():
        execute(command, frozen, run_dir, overrides)
    elif job.mode == RunMode.MULTIRUN:
        run_children(command, frozen, run_dir, overrides, log=run_dir / OUTPUT)
    elif num_local_devices(frozen) > 1:
        check(command, frozen, run_dir, overrides)
        run_children(command, frozen, run_dir, overrides, log=None)
    else:
        execute(command, frozen, run_dir, overrides)
    return objective(run_dir)


def is_done(run_dir: Path) -> bool:
    """Whether a job of an earlier sweep ended well in `run_dir`."""
    path = run_dir / RESULT
    return path.exists() and json.loads(path.read_text())["status"] == "ok"


def objective(run_dir: Path) -> float | None:
    """Return what a sweeper minimises, as a finished job's result has it."""
    path = run_dir / RESULT  # only rank 0 writes it
    return json.loads(path.read_text()).get("val/loss") if path.exists() else None


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Turn `resume=DIR` into the arguments that made DIR, with those given now laid over them.

    Raises:
        InputError: DIR is no run directory (with -m: no sweep directory).
    """
    given = {a.partition("=")[0]: a for a in arguments if "=" in a}
    directory = Path(given["resume"].partition("=")[2])
    is_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    source = directory / ("multirun.yaml" if is_sweep else ".hydra/overrides.yaml")
    if not source.is_file():
        kind = "sweep" if is_sweep else "run"
        raise InputError(f"resume={directory}: no {kind} directory, it has no {source.name}")
    stored = OmegaConf.load(source)
    if is_sweep:
        stored = [*stored.hydra.overrides.task, *stored.hydra.overrides.hydra]
    where = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    before = {text.partition("=")[0]: text for text in stored}
    flags = [a for a in arguments if "=" not in a]
    return [*flags, *(before | given | {where: f"{where}={directory}"}).values()]


@contextlib.contextmanager
def sweep_definition_kept(arguments: list[str]) -> Iterator[None]:
    """Keep `multirun.yaml`, which says what the sweep is, as it was while it is resumed."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    path = Path(given.get("hydra.sweep.dir", "")) / "multirun.yaml"
    definition = path.read_text() if "resume" in given and path.is_file() else None
    try:
        yield
    finally:
        if definition is not None:
            path.write_text(definition)


def freeze(config: DictConfig, run_dir: Path) -> DictConfig:
    """Resolve every interpolation once and leave the result where worker processes read it."""
    OmegaConf.resolve(config)
    path = run_dir / FROZEN_CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, path)
    return config


def override_dictionary(overrides: list[str]) -> dict[str, str]:
    """Turn `key=value` overrides into a dictionary."""
    return {k.lstrip("+~"): v for k, _, v in (text.partition("=") for text in overrides)}


def is_external_launch() -> bool:
    """Whether torchrun or srun already made one process per device."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ


def num_local_devices(config: DictConfig) -> int:
    """Return the processes of this node: `trainer.devices`, else what the parallel layout needs."""
    if config.trainer.devices:
        return int(config.trainer.devices)
    parallel = config.parallel
    total = int(parallel.tensor_parallel_size) * int(parallel.data_parallel_size)
    return max(1, total // int(config.trainer.num_nodes))


def check(command: str, config: DictConfig, run_dir: Path, overrides: dict[str, str]) -> None:
    """Raise InputError for wrong input before any worker exists."""
    try:
        importlib.import_module(f"hydratron.commands.{command}").prepare(config)
    except ValueError as error:
        write_result(command, config, run_dir, overrides, status="failed", error=str(error))
        raise InputError(str(error)) from error


def execute(command: str, config: DictConfig, run_dir: Path, overrides: dict[str, str]) -> None:
    """Run the job in this process and, on rank 0, write its `result.json`, also on failure."""
    started = time.monotonic()
    outcome: dict[str, Any] = {"status": "failed"}
    signal.signal(signal.SIGTERM, stop_at_once)  # until training begins and can checkpoint
    try:
        module = importlib.import_module(f"hydratron.commands.{command}")
        quiet_libraries()  # after the import: Lightning sets its own level
        try:
            prepared = module.prepare(config)
        except ValueError as error:
            raise InputError(str(error)) from error
        outcome = {"status": "ok"} | module.run(prepared, run_dir)
        if outcome["status"] == "preempted":
            raise JobFailed("stopped on request; resume=" + str(run_dir), status=TERMINATED)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            outcome["status"] = "preempted"
        if outcome["status"] != "preempted":
            outcome["error"] = note_failure(run_dir, error)
        raise
    finally:
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
            outcome["duration_s"] = round(time.monotonic() - started, 3)
            write_result(command, config, run_dir, overrides, **outcome)


def stop_at_once(*_: Any) -> None:
    """End the process by way of its `finally` clauses."""
    raise SystemExit(TERMINATED)


def quiet_libraries() -> None:
    """Leave the terminal to the run, without advertisements and notes on torch's transitions."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # the sampler starts at the consumed samples; Lightning cannot know
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")


def note_failure(run_dir: Path, error: BaseException) -> str:
    """Keep the first failure of the job's ranks: peers that it takes down know only a symptom."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, InputError):
        text = str(error)
    path = run_dir / FAILURE
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        json.dump({"error": text, "trace": traceback.format_exc()}, file)
    with contextlib.suppress(json.JSONDecodeError):
        text = json.loads(path.read_text())["error"]
    return text


def write_result(
    command: str, config: DictConfig, run_dir: Path, overrides: dict[str, str], **outcome: Any
) -> None:
    """Write `result.json` atomically."""
    result = {
        "command": command,
        "error": None,
        "overrides": overrides,
        "seed": config.get("seed"),
        "git_commit": git_commit(),
        "versions": {n: package_version(n) for n in ("torch", "pytorch-lightning", "transformers")},
        "tensor_parallel_size": OmegaConf.select(config, "parallel.tensor_parallel_size"),
        "data_parallel_size": OmegaConf.select(config, "parallel.data_parallel_size"),
        "layernorm": config.get("layernorm"),
        "model": OmegaConf.select(config, "model.family"),
        "size": config.get("size"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    } | outcome
    temporary = run_dir / f"{RESULT}.tmp"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, run_dir / RESULT)


def package_version(name: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def run_children(
    command: str, config: DictConfig, run_dir: Path, overrides: dict[str, str], log: Path | None
) -> None:
    """Run the job as a process tree of its own and wait; raise JobFailed unless it ended `ok`."""
    (run_dir / RESULT).unlink(missing_ok=True)
    (run_dir / FAILURE).unlink(missing_ok=True)
    started = time.monotonic()
    requested: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: requested.append(number))
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        process = subprocess.Popen(
            child_command(command, run_dir, num_devices=num_local_devices(config)),
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
            result = completed_result(
                command, config, run_dir, overrides, process.returncode, started
            )
    if log:
        print(job_line(run_dir, result), flush=True)
    if requested:
        raise SystemExit(TERMINATED)
    if result["status"] != "ok":
        status = {"preempted": TERMINATED}.get(result["status"], 1)
        raise JobFailed(f"{run_dir}: {result['error'] or result['status']}", status=status)


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


def completed_result(
    command: str,
    config: DictConfig,
    run_dir: Path,
    overrides: dict[str, str],
    returncode: int,
    started: float,
) -> dict[str, Any]:
    """Read the job's result; write one in its name if it could not."""
    path = run_dir / RESULT
    if not path.exists():
        ended_by = signal.Signals(-returncode).name if returncode < 0 else f"status {returncode}"
        error = f"the job's process ended by {ended_by} without a result"
        if (run_dir / FAILURE).exists():
            error = json.loads((run_dir / FAILURE).read_text())["error"]
        duration = round(time.monotonic() - started, 3)
        outcome = {"status": "failed", "error": error, "duration_s": duration}
        write_result(command, config, run_dir, overrides, **outcome)
    return json.loads(path.read_text())


def job_line(run_dir: Path, result: dict[str, Any]) -> str:
    """Return one line about a finished job of a sweep."""
    settings = " ".join(f"{key}={value}" for key, value in result["overrides"].items())
    found = f"val/loss {result['val/loss']:.4f}" if "val/loss" in result else result["error"] or ""
    return (
        f"job {run_dir.name}: {result['status']}  {settings}  {found}  {result['duration_s']:.0f} s"
    )


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
    config = OmegaConf.load(run_dir / FROZEN_CONFIG)
    assert isinstance(config, DictConfig)
    overrides = override_dictionary(list(OmegaConf.load(run_dir / ".hydra/overrides.yaml")))
    try:
        execute(command, config, run_dir, overrides)
    except InputError as error:
        print(f"hydratron {command}: {error}", file=sys.stderr)
        return 2
    except JobFailed as error:
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], Path(sys.argv[2])))
