"""`result.json`: what a job was and how it ended, written whatever happened to it."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydratron.processes import INTERRUPTED, TERMINATED

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk that was good so far
RESULT = "result.json"
FAILURE = ".hydra/failure.json"
RESERVED_BYTES = 32768  # for the result of a run that ends because its disk is full
TRACKED = ".hydra/wandb.json"  # the job's W&B id and the exit status it ended with there
OFFLINE_RUNS = "wandb/offline-run-*"
# what a benchmark is read for
TIMINGS = (
    "perf/step_ms",
    "perf/tokens_per_second",
    "perf/tflops_per_gpu",
    "perf/mfu",
    "perf/peak_memory_gib",
    "peer/step_ms",
    "perf/ratio_to_peer",
)
NOT_FINITE = (float("inf"), float("-inf"))
PACKAGES = ("torch", "pytorch-lightning", "transformers")


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


@dataclass(frozen=True)
class Job:
    """One job: its command, where it writes, its resolved configuration and its overrides."""

    command: str
    run_dir: Path
    config: Mapping[str, Any]
    overrides: dict[str, str]


def write_result(job: Job, **outcome: Any) -> dict[str, Any]:
    """Write `result.json` atomically and return it; `outcome` has at least `status`."""
    parallel, model = (job.config.get(group) or {} for group in ("parallel", "model"))
    result = {
        "command": job.command,
        "error": None,
        "overrides": job.overrides,
        "seed": job.config.get("seed"),
        "git_commit": git_commit(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "tensor_parallel_size": parallel.get("tensor_parallel_size"),
        "data_parallel_size": parallel.get("data_parallel_size"),
        "layernorm": job.config.get("layernorm"),
        "model": model.get("family"),
        "size": job.config.get("size"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    } | outcome
    # JSON has no NaN
    result = {k: None if v in NOT_FINITE or v != v else v for k, v in result.items()}
    temporary = job.run_dir / f"{RESULT}.tmp"
    with temporary.open("r+" if temporary.exists() else "w") as file:
        file.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
        file.truncate()
    os.replace(temporary, job.run_dir / RESULT)
    return result


def forget_outcome(job: Job) -> None:
    """Remove what an earlier try of the job left, so that it is not taken for this one's, and keep
    room on the disk for what this one will say.
    """
    for name in (RESULT, FAILURE):
        (job.run_dir / name).unlink(missing_ok=True)
    with (job.run_dir / f"{RESULT}.tmp").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, RESERVED_BYTES)


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return what `result.json` says, an empty dictionary where there is none.

    A file that is damaged says that its status is `unreadable`.
    """
    path = run_dir / RESULT
    try:
        result = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError):
        result = None
    return result if isinstance(result, dict) else {"status": "unreadable"}


def note_failure(run_dir: Path, text: str) -> str:
    """Return the first failure of the job's ranks, and keep it where there is room: peers that it
    takes down know only a symptom.
    """
    path = run_dir / FAILURE
    mine = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        mine.write_text(json.dumps({"error": text, "trace": traceback.format_exc()}))
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)  # whole or not at all, and never over another's
    except OSError as error:
        if error.errno not in FULL:
            raise
    mine.unlink(missing_ok=True)
    return json.loads(path.read_text())["error"] if path.exists() else text


def completed_result(
    job: Job, *, killed: str | None, codes: Sequence[int], duration: float
) -> dict[str, Any]:
    """Read the result of a job's processes after they ended, or write what they could not.

    Args:
        killed: which process a signal ended that nobody asked for: what its peers wrote of
            themselves is a symptom.
        codes: how all of them ended, as Popen.returncode.
        duration: seconds.
    """
    result = read_result(job.run_dir)
    if result and (result["status"] == "ok" or not killed):
        return result
    ended = ", ".join(
        signal.Signals(-code).name if code < 0 else f"status {code}" for code in codes
    )
    error = killed or f"the job ended by {ended} without a result"
    failure = job.run_dir / FAILURE
    if not killed and failure.exists():
        error = json.loads(failure.read_text())["error"]
    found = {"duration_s": round(duration, 3)} | result
    return write_result(job, **found | {"status": "failed", "error": error})


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


@contextlib.contextmanager
def full_disks_named(run_dir: Path) -> Iterator[None]:
    """Raise JobFailed where a file cannot be written any more: what fails tells no name of it, and
    torch's own files not even why.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_full = shutil.disk_usage(run_dir).free < RESERVED_BYTES
        number = errno.ENOSPC if is_full else getattr(error, "errno", None)
        if number not in FULL or isinstance(error, JobFailed):
            raise
        place = getattr(error, "filename", None) or run_dir
        for unfinished in run_dir.glob("checkpoints/*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise JobFailed(f"{place}: cannot be written to: {os.strerror(number)}") from error


def describe_outcome(result: dict[str, Any]) -> str:
    """Return in words what a job is judged by, or why it failed: empty where it is neither."""
    if result["error"]:
        return str(result["error"])
    if result["command"] == "benchmark":
        keys: Iterable[str] = TIMINGS
    elif result["command"] == "evaluate":
        keys = [key for key in result if key.startswith(("val/", "test/"))]
    else:
        keys = [result.get("selection_metric", "val/loss")]
    found = {key: result[key] for key in keys if isinstance(result.get(key), int | float)}
    return "  ".join(
        f"{key} {value:,.0f}" if abs(value) >= 1e5 else f"{key} {value:.5g}"
        for key, value in found.items()
    )


def job_line(job: Job, result: dict[str, Any]) -> str:
    """Return one line about a finished job of a sweep."""
    settings = " ".join(f"{key}={value}" for key, value in job.overrides.items())
    seconds = f"{result.get('duration_s') or 0:.0f} s"
    found = describe_outcome(result)
    return f"job {job.run_dir.name}: {result.get('status')}  {settings}  {found}  {seconds}"


def sync_command(directory: Path) -> str:
    """Return the line that tells how to upload the offline W&B runs of a run, or of several."""
    return f"W&B is offline; upload later: wandb sync {directory}/{OFFLINE_RUNS}"


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
