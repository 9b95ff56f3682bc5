"""A preparation that is killed leaves no process, and no lock."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydratron.data.prepare import _locked

# two workers and the manager, none of which would end by itself
SCRIPT = """
from pathlib import Path
from hydratron.data.executors import ExecutorConfig, run_stages
from hydratron.data.prepare import _locked

def work(data, rank, world_size):
    import pathlib, time
    pathlib.Path(str(rank)).touch()
    time.sleep(3600)

with _locked(Path("work/lock")):
    run_stages({"s": ([work], 2)}, ExecutorConfig(workers=2), logs=Path("logs"), say=print)
"""


def running(group: int) -> list[int]:
    """The processes of a group that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_preparation_leaves_neither_process_nor_lock(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=tmp_path, start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or {"0", "1"} <= set(os.listdir(tmp_path)))
        assert len(running(process.pid)) >= 4  # this one, the manager, two workers
        with (
            pytest.raises(ValueError, match="another preparation writes to it"),
            _locked(tmp_path / "work/lock"),
        ):
            pass
        process.kill()
        process.wait()
        wait_for(lambda: not running(process.pid))
        with _locked(tmp_path / "work/lock"):
            pass
    finally:
        for left in running(process.pid):
            os.kill(left, signal.SIGKILL)
        process.wait()
