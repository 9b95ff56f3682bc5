"""The console script as a user calls it."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hydratron import cli
from hydratron.data.text import read_text_folder
from tests.waiting import PATIENCE, wait_for

SHIPPED = Path(__file__).parents[2] / "src/hydratron/data/shipped"
SCRIPT = Path(sys.executable).with_name("hydratron")
ENDLESS = ["trainer.max_steps=100000", "hydra.run.dir=run"]
# a second or two of training on the shipped text
TINY = [
    "experiment=quickstart",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.validation_samples=32",
    "trainer.max_steps=4",
]


def merged(*arguments: str) -> list[str]:
    """Of several values of a key, which a command refuses, keep the last: a test's own."""
    return list({argument.partition("=")[0]: argument for argument in arguments}.values())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A root with a folder of novels in several files and one of passages, some of them twice."""
    root = tmp_path / "root"
    (root / "novels").mkdir(parents=True)
    (root / "race").mkdir()
    whole = "\n\n".join(text for _, text in read_text_folder(SHIPPED))
    for i in range(6):
        (root / f"novels/{i}.txt").write_text(whole[i * 60_000 : (i + 1) * 60_000])
    passages = [whole[k : k + 1500] for k in range(400_000, 460_000, 1500)]
    rows = [{"article": passage} for passage in [*passages, *passages[:5], "too short"]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "race/train.high.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return root


@pytest.fixture
def hydratron(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hydratron ARGUMENTS` in an empty directory."""

    def run(
        *arguments: str, timeout: float = PATIENCE, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *merged(*arguments)],
            cwd=tmp_path,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hydratron ARGUMENTS` in this process, which has imported everything already."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["hydratron", *merged(*arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = cli.main() or 0
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.signal(signal.SIGTERM, before)
        output, errors = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(code or 0), output, errors)

    return run


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def metrics(run_dir: Path) -> pd.DataFrame:
    return pd.read_csv(run_dir / "metrics.csv")


def heed_interrupts() -> None:
    """Undo what a shell does to background processes: they, and all they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


Spawn = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Start a command in `tmp_path`; nothing of it outlives the test.

    What it prints goes to `tmp_path/output.txt`.
    """
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: str | Path) -> subprocess.Popen[bytes]:
        with (tmp_path / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_interrupts,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for number in processes_of(tmp_path):  # what a failed test left in sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    wait_until_gone(tmp_path)


@pytest.fixture
def start(spawn: Spawn) -> Spawn:
    """Start a run without end in `tmp_path/run`."""
    begin = ("pretrain", *TINY[:-1], *ENDLESS)
    return lambda *arguments: spawn(SCRIPT, *merged(*begin, *arguments))


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until the run, made by `process`, has logged a step."""
    path = run / "metrics.csv"
    wait_for(lambda: path.exists() and len(path.read_text().split()) > step, of=process)


def processes_of(directory: Path) -> dict[int, str]:
    """Return by id the command lines of our processes in `directory` and of what names it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            where = (path / "cwd").resolve()
        except OSError:
            continue
        is_ours = where.is_relative_to(directory) and ("hydratron" in line or "loky" in line)
        if (is_ours or str(directory) in line) and int(path.name) != os.getpid():
            found[int(path.name)] = line
    return found


def wait_until_gone(directory: Path) -> None:
    """Wait until nothing runs there any more."""
    wait_for(lambda: not processes_of(directory))
