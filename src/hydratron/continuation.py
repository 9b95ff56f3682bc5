"""May a command write into this directory? A run's record must be of what ran in it.

A directory holds at most one run, which one process at a time writes. A command may begin a run
there, go on with the one it finds, or find it finished; anything else is refused before a byte
changes.
"""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hydratron.arguments import TRAININGS, InputError
from hydratron.checkpoint.manifest import (
    DamagedCheckpointError,
    read_manifest,
    step_directories,
)
from hydratron.checkpoint.runs import (
    CONTINUED,
    FREE,
    differences,
    flatten,
    is_among,
    read_settings,
    write_settings,
)
from hydratron.processes import is_external_launch
from hydratron.result import Job, read_result

CHECKPOINTS = "checkpoints"
LOCK = ".hydra/lock"
NEW, CONTINUES, FINISHED = "new", "continues", "finished"


@contextlib.contextmanager
def sole_writer(run_dir: Path) -> Iterator[None]:
    """Hold the directory until the block ends, or the process does.

    Raises:
        InputError: another process holds it; says which, on what host and since when.
    """
    path = run_dir / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    # a record lock: unlike flock's, the children of a killed process do not inherit it
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read() or "another process"
            raise InputError(f"{run_dir} is being written by {holder}") from error
        now = datetime.datetime.now().isoformat(" ", "seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {now}"
        with contextlib.suppress(OSError):  # a full disk: the lock holds, who holds it is not said
            # through this descriptor: closing any other one of the file would give the lock up
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), holder.encode(), 0)
        yield


def settings_of(job: Job) -> dict[str, Any]:
    """Return the job's command and resolved settings by their dotted names."""
    return flatten(job.config) | {"command": job.command}


def newest_run(run_dir: Path) -> dict[str, Any] | None:
    """Return what the newest readable checkpoint says of its run; None where there is none."""
    for path in step_directories(run_dir / CHECKPOINTS):
        with contextlib.suppress(DamagedCheckpointError):
            return read_manifest(path).get("run") or {}
    return None


def standing(job: Job, *, resumed: bool) -> str:
    """Return whether the job is NEW to its directory, CONTINUES what is there or finds it FINISHED.

    Args:
        job: what is asked for.
        resumed: the user names the directory as one to go on with.

    Raises:
        InputError: the directory holds another command's run, or one that has settings which the
            rest of a run cannot change, or one that is finished or failed and is not resumed.
    """
    run_dir, result, run = job.run_dir, read_result(job.run_dir), newest_run(job.run_dir)
    status, now = result.get("status"), settings_of(job)
    before = (run or {}).get("settings") or read_settings(run_dir)
    if not result and run is None and before is None:
        return NEW
    names = (found.get("command") for found in (result, run or {}, before or {}))
    owner = next(filter(None, names), job.command)
    if owner != job.command:
        raise InputError(f"{run_dir} holds a run of hydratron {owner}, not of {job.command}")
    if status == "ok" and not resumed:
        raise InputError(f"{run_dir} holds a finished run already")
    if job.command not in TRAININGS:
        return FINISHED if status == "ok" else NEW
    if status == "failed" and not resumed:
        raise InputError(f"{run_dir} holds a run already; resume={run_dir} goes on with it")
    changed = differences({"command": job.command} | (before or now), now)
    if run is None:
        if status in ("ok", "preempted"):
            raise InputError(
                f"{run_dir} was trained for {result.get('steps', 'some')} steps and has no"
                " checkpoint to go on from"
            )
        return NEW
    _refuse(changed, (*FREE, *CONTINUED), run_dir)
    return _finished_or_longer(run_dir, run, changed, now, status)


def _finished_or_longer(
    run_dir: Path,
    run: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    now: Mapping[str, Any],
    status: str | None,
) -> str:
    steps, step = now.get("trainer.max_steps"), run.get("step", 0)
    if isinstance(steps, int) and steps < step:
        raise InputError(f"trainer.max_steps {steps} is below step {step}, which {run_dir} reached")
    if status != "ok":
        return CONTINUES
    old_steps, new_steps = changed.get("trainer.max_steps", (0, 0))
    if isinstance(new_steps, int) and new_steps > (old_steps or step):
        return CONTINUES
    _refuse(changed, FREE, run_dir, " (it has ended; a larger trainer.max_steps= goes on)")
    return FINISHED


def _refuse(
    changed: Mapping[str, tuple[Any, Any]], allowed: Iterable[str], run_dir: Path, why: str = ""
) -> None:
    """Raise InputError for the first setting that may not change, with both values."""
    refused = [key for key in changed if not is_among(key, allowed)]
    for key in refused:
        old, new = (f"{value!r}" for value in changed[key])
        more = f", and {len(refused) - 1} more settings differ" if len(refused) > 1 else ""
        raise InputError(f"{run_dir} has {key} {old}, which cannot become {new}{more}{why}")


def check_identity(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Raise InputError where a run's data is not what its newest checkpoint was trained on."""
    stored = (newest_run(run_dir) or {}).get("identity") or {}
    for name in sorted(stored.keys() | identity.keys()) if stored else ():
        old, new = (side.get(name) or ["", "none"] for side in (stored, identity))
        if old[0] != new[0]:
            raise InputError(f"{run_dir}: its {name} was {old[1]} and is {new[1]} now")


def job_directory(ignored: Iterable[str] = (), *, _root_: DictConfig) -> str:
    """Resolve `hydra.sweep.subdir`: the number of the job that has these settings, else a new one.

    A sweep that is resumed with more values numbers its jobs otherwise than before. A search may
    draw the same values twice: those are two jobs.
    """
    is_search = OmegaConf.select(_root_.hydra.sweeper, "n_trials") is not None
    sweep, ignored = Path(_root_.hydra.sweep.dir), (*ignored, "logger.")
    groups = [str(key) for key in _root_ if key not in ("hydra", "logger")]
    tasks = OmegaConf.masked_copy(_root_, groups)
    settings = flatten(OmegaConf.to_container(tasks, resolve=True))  # pyright: ignore
    settings["command"] = _root_.hydra.job.name
    numbers = sorted(int(path.name) for path in sweep.glob("*") if path.name.isdecimal())
    for number in numbers:
        found = read_settings(sweep / str(number))
        if found is None or (is_search and read_result(sweep / str(number))):
            continue
        found = {"command": settings["command"]} | found
        if not differences(found, settings, ignored):
            return str(number)
    number = int(_root_.hydra.job.num)
    while True:
        try:
            (sweep / str(number)).mkdir(parents=True)
        except FileExistsError:
            number = max(number, *numbers, -1) + 1
        else:
            write_settings(sweep / str(number), settings)
            return str(number)


def unused_directory(path: str) -> str:
    """Resolve a default directory: make `path`, or the first new one of `path`-2, `path`-3, ...

    Runs that start in the same second get directories of their own. Processes that torchrun or
    SLURM made for one run must agree on it, and take it as it is.
    """
    if is_external_launch():
        return path
    number = 1
    while True:
        found = path if number == 1 else f"{path}-{number}"
        try:
            Path(found).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return found
