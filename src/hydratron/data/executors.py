"""Where the stages of a preparation run: in processes of this machine, or as SLURM jobs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from multiprocess.process import parent_process
from multiprocess.util import register_after_fork

from hydratron.settings import Interval, Text, check, one_of

_POLL_SECONDS = 2.0
Stages = Mapping[str, tuple[list[PipelineStep], int]]  # by name: its steps, the number of its tasks


@dataclass(frozen=True)
class ExecutorConfig:
    """Where the stages run.

    `kind`: local or slurm. `workers`: tasks at a time, None for a task a core. The rest is for
    SLURM's sbatch. ValueError for values that cannot be.
    """

    kind: Annotated[str, one_of("local", "slurm")] = "local"
    workers: Annotated[int, Interval(1, 10_000)] | None = None
    partition: Text | None = None
    time: Text = "24:00:00"
    memory_gb: Annotated[int, Interval(1, 2**16)] = 4
    qos: str = ""

    def __post_init__(self) -> None:
        check(self, "executor")
        if self.kind == "slurm" and self.partition is None:
            raise ValueError("executor.kind slurm needs executor.partition")

    @property
    def num_workers(self) -> int:
        """Tasks at a time on this machine."""
        return self.workers or len(os.sched_getaffinity(0))


def run_stages(
    stages: Stages, config: ExecutorConfig, *, logs: Path, say: Callable[[str], None]
) -> None:
    """Run what is left of each stage; `say` gets a line a stage, `logs` datatrove's records.

    OSError where a SLURM job fails, and whatever a step raises.
    """
    if config.kind == "slurm":
        return _run_on_slurm(stages, logs, config, say)
    for stage, (steps, tasks) in stages.items():
        _run_here(stage, steps, tasks, workers=config.num_workers, logs=logs, say=say)
    return None


class _Executor(LocalPipelineExecutor):
    """datatrove's, whose processes die with this one: none goes on writing to the folder."""

    def run(self) -> Any:
        register_after_fork(self, _watch_parent)  # for the manager, a fork of this process
        return super().run()

    def _launch_run_for_rank(self, *arguments: Any, **more: Any) -> Any:
        if parent_process() is not None:  # a worker, which the fork server made
            _watch_parent()
        return super()._launch_run_for_rank(*arguments, **more)


@cache
def _watch_parent(_: object = None) -> None:
    """Have this process killed when the one that asked for it dies.

    Linux could do it for the manager alone: the parent of a worker is the fork server, which waits
    for its workers.
    """
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _run_here(
    stage: str,
    steps: list[PipelineStep],
    tasks: int,
    *,
    workers: int,
    logs: Path,
    say: Callable[[str], None],
) -> None:
    started = time.monotonic()
    executor = _Executor(
        steps,
        tasks=tasks,
        workers=min(workers, tasks),
        logging_dir=str(logs / stage),
    )
    completions = logs / stage / "completions"
    with _progress(stage, completions, tasks):
        executor.run()
    say(f"{stage}: {tasks} shard{'s' * (tasks > 1)}, {time.monotonic() - started:.1f} s")


@contextmanager
def _progress(stage: str, completions: Path, tasks: int) -> Iterator[None]:
    """On a terminal, a line that counts the shards."""
    ended = Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            done = len(list(completions.glob("*")))
            print(f"\r{stage}: {done}/{tasks} shards", end="", file=sys.stderr, flush=True)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    thread = Thread(target=watch, daemon=True)
    if sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def _run_on_slurm(
    stages: Stages, logs: Path, config: ExecutorConfig, say: Callable[[str], None]
) -> None:
    """Submit the stages as a chain of job arrays and wait; OSError where one of them fails."""
    executor = None
    for stage, (steps, tasks) in stages.items():
        executor = SlurmPipelineExecutor(
            steps,
            tasks=tasks,
            time=config.time,
            partition=str(config.partition),
            mem_per_cpu_gb=config.memory_gb,
            workers=config.workers or -1,
            job_name=f"hydratron-{stage}",
            qos=config.qos,
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
            sbatch_args={"kill-on-invalid-dep": "yes"},
            logging_dir=str(logs.resolve() / stage),
            depends=executor,
            requeue=False,
            mail_type="NONE",
        )
        executor.launch_job()
        say(f"{stage}: {tasks} tasks, SLURM job {executor.job_id}")
    assert executor is not None
    while executor.get_incomplete_ranks():
        states = subprocess.run(
            ["squeue", "-h", "-o", "%T", "-j", str(executor.job_id)], capture_output=True, text=True
        )
        if not states.stdout.strip() and executor.get_incomplete_ranks():
            where = f"{logs.resolve()}/*/slurm_logs"
            raise OSError(f"a SLURM job failed; its output is in {where}")
        time.sleep(_POLL_SECONDS)
