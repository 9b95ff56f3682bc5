"""`hydratron pretrain`: grids, sweeps, resuming, signals, and what a run leaves behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import SCRIPT, TINY, metrics, result

ENDLESS = ["trainer.max_steps=100000", "hydra.run.dir=run"]
# the quickstart's own sweep, held at one point
ONE = ["layernorm=pre", "optimizer.lr=3e-3", "seed=1"]


@pytest.mark.parametrize("grid", ["tp2", pytest.param("tp2_dp2", marks=pytest.mark.slow)])
def test_every_grid_prints_the_same_losses(hydratron, tmp_path: Path, grid: str) -> None:
    settings = ["experiment=quickstart", "trainer.max_steps=20", "data.validation_samples=32"]
    for parallel in ("single", grid):
        run = [f"parallel={parallel}", f"hydra.run.dir={tmp_path / parallel}"]
        done = hydratron("pretrain", *settings, *run)
        assert done.returncode == 0, done.stderr
    reference = metrics(tmp_path / "single")["train/loss"]
    assert len(reference) == 20
    assert (metrics(tmp_path / grid)["train/loss"] - reference).abs().max() < 1e-5


def test_a_run_directory_keeps_its_contract(hydratron, tmp_path: Path) -> None:
    assert hydratron("pretrain", *TINY, "hydra.run.dir=run").returncode == 0
    run = tmp_path / "run"
    found = result(run)
    expected = {
        "command": "pretrain",
        "status": "ok",
        "error": None,
        "seed": 1,
        "layernorm": "pre",
        "model": "bert",
        "size": "quickstart",
        "steps": 4,
        "tokens": 4 * 32 * 16,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["overrides"]["trainer.max_steps"] == "4"
    assert found["num_parameters"] > 0
    assert 2.0 < found["val/unigram_entropy"] < 3.5
    assert (run / ".hydra/config.yaml").is_file()
    assert list(metrics(run)["step"]) == [1, 2, 3, 4]
    assert (run / "checkpoints/last").resolve().name == "step-4"
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("layernorm", ["pre", "post"])
def test_gpt2_trains_with_either_placement(hydratron, tmp_path: Path, layernorm: str) -> None:
    run = ["hydra.run.dir=run", "model=gpt2", f"layernorm={layernorm}"]
    done = hydratron("pretrain", *TINY, *run)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["model"] == "gpt2"


@pytest.mark.parametrize("seeds", ["1", pytest.param("1,2", marks=pytest.mark.slow)])
def test_sweep_over_world_sizes_gives_separate_correct_runs(
    hydratron, tmp_path: Path, seeds: str
) -> None:
    swept = ["parallel=single,tp2", "layernorm=pre,post", f"seed={seeds}", "optimizer.lr=3e-3"]
    done = hydratron("pretrain", "-m", *TINY, *swept, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    runs = [result(path.parent) for path in sorted(tmp_path.glob("sweep/*/result.json"))]
    num_models = 2 * len(seeds.split(","))
    assert [run["status"] for run in runs] == ["ok"] * 2 * num_models
    loss = {(r["tensor_parallel_size"], r["layernorm"], r["seed"]): r["train/loss"] for r in runs}
    assert len(loss) == 2 * num_models
    assert len({round(value, 4) for value in loss.values()}) == num_models  # each on two grids
    for (_, layernorm, seed), value in loss.items():
        assert value == pytest.approx(loss[1, layernorm, seed], abs=1e-5)


def test_a_failing_job_leaves_its_siblings_and_the_status_says_so(
    hydratron, tmp_path: Path
) -> None:
    swept = ["parallel=tp2", "model.num_heads=1,4", *ONE]
    done = hydratron("pretrain", "-m", *TINY, *swept, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    runs = [result(path.parent) for path in sorted(tmp_path.glob("sweep/*/result.json"))]
    assert [run["status"] for run in runs] == ["failed", "ok"]
    assert runs[0]["error"] == "num_heads 1 is not divisible by tensor_parallel_size 2"


def test_resuming_a_sweep_runs_only_what_is_missing(hydratron, tmp_path: Path) -> None:
    swept = ["pretrain", "-m", *TINY, *ONE[:2], "seed=1,2", "hydra.sweep.dir=sweep"]
    assert hydratron(*swept).returncode == 0
    before = (tmp_path / "sweep/0/result.json").stat().st_mtime_ns
    (tmp_path / "sweep/1/result.json").unlink()
    definition = (tmp_path / "sweep/multirun.yaml").read_text()
    assert hydratron("pretrain", "-m", "resume=sweep").returncode == 0
    assert (tmp_path / "sweep/0/result.json").stat().st_mtime_ns == before
    assert result(tmp_path / "sweep/1")["status"] == "ok"
    assert (tmp_path / "sweep/multirun.yaml").read_text() == definition


def heed_interrupts() -> None:
    """Undo what a shell does to background processes: they, and all they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a run without end in `tmp_path/run`; what it prints goes to `tmp_path/output.txt`."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [SCRIPT, "pretrain", *TINY[:-1], *ENDLESS, *arguments],
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_interrupts,
            )
        started.append(process)
        return process

    yield run
    for process in started:  # what a failed test left
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().split()) > step:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{run} did not reach step {step}")


def processes_of(run_dir: Path) -> list[str]:
    """Return the command lines of what still runs for a run, by its directory or its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            directory = (path / "cwd").resolve()
        except OSError:
            continue
        if str(run_dir) in words or (directory == run_dir.parent and "pretrain" in words):
            found.append(" ".join(words))
    return found


def wait_until_gone(run_dir: Path) -> list[str]:
    deadline = time.monotonic() + 5
    while (left := processes_of(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.parametrize("grid", [pytest.param("single", marks=pytest.mark.slow), "tp2"])
def test_sigterm_saves_exits_143_and_resumes_bit_for_bit(
    hydratron, start, tmp_path: Path, grid: str
) -> None:
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    # a schedule that does not depend on the run's length, which differs between the two runs
    schedule = ["optimizer.schedule=constant", "optimizer.warmup_steps=2"]
    settings = [f"parallel={grid}", *dropout, *schedule]
    process = start(*settings)
    wait_for_step(tmp_path / "run", 3)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143, (tmp_path / "output.txt").read_text()
    found = result(tmp_path / "run")
    assert found["status"] == "preempted"
    assert (tmp_path / "run/checkpoints/last").resolve().name == f"step-{found['steps']}"
    assert wait_until_gone(tmp_path / "run") == []

    length = f"trainer.max_steps={found['steps'] + 4}"
    again = hydratron("pretrain", "resume=run", length)
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "run")["status"] == "ok"
    whole = hydratron("pretrain", *TINY, *settings, length, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    keys = ["step", "train/loss", "train/sentence_order_loss", "train/grad_norm"]
    assert metrics(tmp_path / "run")[keys].equals(metrics(tmp_path / "whole")[keys])


def test_interrupt_leaves_no_process_behind(start, tmp_path: Path) -> None:
    process = start("parallel=tp2")
    wait_for_step(tmp_path / "run", 2)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode not in (0, None)
    assert wait_until_gone(tmp_path / "run") == []
    assert result(tmp_path / "run")["status"] == "failed"


def test_a_killed_rank_ends_its_job_within_seconds(start, tmp_path: Path) -> None:
    process = start("parallel=tp2")
    wait_for_step(tmp_path / "run", 2)
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
            words = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if b"RANK=1" in variables and str(tmp_path).encode() in words:
            os.kill(int(path.parent.name), signal.SIGKILL)
            break
    else:
        raise AssertionError("rank 1 not found")
    started = time.monotonic()
    process.wait(timeout=60)
    assert time.monotonic() - started < 20
    assert process.returncode == 1
    assert result(tmp_path / "run")["status"] == "failed"
    assert wait_until_gone(tmp_path / "run") == []
