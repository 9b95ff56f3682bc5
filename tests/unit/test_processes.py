"""The processes of a job: one that fails ends the others, and what killed it is said."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from hydratron import processes

Start = Callable[..., list[subprocess.Popen[bytes]]]
FOR_EVER = "import time; time.sleep(3600)"
KILLED = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python process for each program."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*programs: str) -> list[subprocess.Popen[bytes]]:
        started.extend(
            subprocess.Popen([sys.executable, "-S", "-c", program], start_new_session=True)
            for program in programs
        )
        return started

    yield run
    processes.end_ranks(started)


def test_a_killed_rank_is_named_and_ends_its_peers(start: Start) -> None:
    ranks = start(FOR_EVER, KILLED, FOR_EVER)
    assert processes.wait(ranks, []) == "rank 1 of 3 was killed by SIGKILL"
    codes = [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM]
    assert [rank.returncode for rank in ranks] == codes


def test_a_process_alone_has_no_number(start: Start) -> None:
    assert processes.wait(start(KILLED), []) == "the job's process was killed by SIGKILL"


def test_a_rank_that_fails_ends_its_peers_and_was_not_killed(start: Start) -> None:
    ranks = start("raise SystemExit(1)", FOR_EVER)
    assert processes.wait(ranks, []) is None
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGTERM]


def test_what_is_asked_to_end_was_not_killed(start: Start) -> None:
    ranks = start(FOR_EVER, FOR_EVER)
    assert processes.wait(ranks, [signal.SIGTERM]) is None
    assert [rank.returncode for rank in ranks] == [-signal.SIGTERM] * 2


def test_a_rank_that_ends_early_for_a_good_reason_leaves_its_peers_time(start: Start) -> None:
    ranks = start("raise SystemExit(143)", "import time; time.sleep(0.3)")
    assert processes.wait(ranks, []) is None
    assert [rank.returncode for rank in ranks] == [processes.TERMINATED, 0]


def test_who_does_not_stop_in_time_is_left_to_be_killed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SECONDS_TO_STOP", 0.1)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(3600)"
    ranks = start(deaf)
    assert processes.wait(ranks, [signal.SIGTERM]) is None
    processes.end_ranks(ranks)
    assert not os.path.exists(f"/proc/{ranks[0].pid}")
