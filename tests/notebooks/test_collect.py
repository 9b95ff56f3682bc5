"""What is kept of an experiment's runs."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

from tests.waiting import PATIENCE

COLLECT = Path(__file__).parents[2] / "experiments" / "collect.py"
HEADER = "step,train/loss,perf/step_ms,val/loss,train/grad_norm/layer_00,train/grad_norm/layer_01\n"


def write_run(path: Path, seed: int, **result: object) -> None:
    path.mkdir(parents=True)
    overrides = {"seed": str(seed), "optimizer.lr": "0.001", "resume": "somewhere"}
    full = {"command": "pretrain", "status": "ok", "overrides": overrides, "steps": 20, **result}
    (path / "result.json").write_text(json.dumps(full))
    rows = f"10,3,100,3.5,1,2\n{11 * seed},,,3.4,,\n20,2,50,2.5,3,4\n"
    (path / "metrics.csv").write_text(HEADER + rows)


def collect(tmp_path: Path, *options: str) -> None:
    given = [sys.executable, COLLECT, tmp_path / "runs", tmp_path, "--hardware", "a laptop"]
    subprocess.run([*given, "--commit", "1a2b3c4", *options], check=True, timeout=PATIENCE)


def test_results_have_a_row_a_run_with_what_repeats_it(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/1", 2, **{"val/loss": 2.5})
    write_run(tmp_path / "runs/0", 1, status="failed", error="lost")
    collect(tmp_path)
    frame = pd.read_csv(tmp_path / "results.csv")
    assert list(frame["seed"]) == [1, 2]
    assert list(frame["status"]) == ["failed", "ok"]
    assert list(frame["val/loss"]) == [2.5, 2.5]  # the failed run's is the last it logged
    # the validations at 11 and 22 are where one run was stopped
    assert [name for name in frame if "@" in name] == ["val/loss@10", "val/loss@20"]
    assert list(frame["training_s"]) == [1.5, 1.5]
    assert frame["command"][0] == "hydratron pretrain seed=1 optimizer.lr=0.001"
    assert set(frame["commit"]) == {"1a2b3c4"}


def test_a_run_that_failed_early_leaves_the_others_their_losses_along_the_way(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "runs/0", 1, **{"val/loss": 2.5})
    write_run(tmp_path / "runs/1", 2, **{"val/loss": 2.5})
    for path in (tmp_path / "runs/0", tmp_path / "runs/1"):
        (path / "metrics.csv").write_text(HEADER + "10,3,100,3.5,1,2\n20,2,50,2.5,3,4\n")
    write_run(tmp_path / "runs/2", 3, status="failed", error="optimizer.lr -1", steps=None)
    (tmp_path / "runs/2/metrics.csv").unlink()  # failed before its first step
    write_run(tmp_path / "runs/3", 4, status="failed", error="lost", steps=None)
    (tmp_path / "runs/3/metrics.csv").write_text(HEADER + "10,3,100,3.75,1,2\n")
    write_run(tmp_path / "runs/4", 5)
    (tmp_path / "runs/4/result.json").write_text("[]")
    collect(tmp_path)
    frame = pd.read_csv(tmp_path / "results.csv")
    assert list(frame["seed"]) == [1, 2, 3, 4]
    assert list(frame["val/loss@10"].fillna(0)) == [3.5, 3.5, 0, 3.75]
    assert list(frame["val/loss@20"].fillna(0)) == [2.5, 2.5, 0, 0]


def test_layer_norms_have_a_row_a_layer_and_step(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/0", 1)
    collect(tmp_path, "--layer-steps", "10", "20")
    frame = pd.read_csv(tmp_path / "gradient_norms.csv")
    assert frame[["step", "layer", "norm"]].to_numpy().tolist() == [
        [10, 0, 1], [10, 1, 2], [20, 0, 3], [20, 1, 4]
    ]  # fmt: skip


def test_curves_have_a_row_a_logged_step(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/0", 1, size="336m")
    write_run(tmp_path / "runs/1", 1, size="752m")
    collect(tmp_path, "--curves")
    frame = pd.read_csv(tmp_path / "curves.csv")
    assert list(frame["size"]) == ["336m"] * 3 + ["752m"] * 3
    assert list(frame["step"]) == [10, 11, 20] * 2
    assert list(frame["train/loss"].dropna()) == [3, 2] * 2
    assert list(frame["val/loss"]) == [3.5, 3.4, 2.5] * 2


def test_runs_are_added_to_those_kept_and_replace_their_like(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/0", 1, **{"val/accuracy": 0.5})
    collect(tmp_path, "--name", "kept.csv")
    (tmp_path / "runs").rename(tmp_path / "before")
    write_run(tmp_path / "runs/0", 1, **{"val/accuracy": 0.75})
    write_run(tmp_path / "runs/1", 2, **{"val/accuracy": 0.25})
    collect(tmp_path, "--name", "kept.csv", "--add", "--replace", "lr=0.001", "lr=1e-3")
    frame = pd.read_csv(tmp_path / "kept.csv")
    assert list(frame["seed"]) == [1, 2]
    assert list(frame["val/accuracy"]) == [0.75, 0.25]
    assert frame["command"][1] == "hydratron pretrain seed=2 optimizer.lr=1e-3"
    assert not (tmp_path / "results.csv").exists()


def test_rows_of_another_size_are_kept(tmp_path: Path) -> None:
    for number, size in enumerate(("336m", "752m")):
        write_run(tmp_path / f"runs/{number}", 1, size=size)
    collect(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "before")
    write_run(tmp_path / "runs/0", 1, size="1.3b")
    collect(tmp_path, "--add")
    assert list(pd.read_csv(tmp_path / "results.csv")["size"]) == ["1.3b", "336m", "752m"]


def test_runs_that_differ_in_their_warmup_alone_are_both_kept(tmp_path: Path) -> None:
    common = {"seed": "1", "optimizer.warmup_fraction": "0.1", "trainer.max_steps": "300"}
    write_run(tmp_path / "runs/0", 1, overrides=common)
    write_run(tmp_path / "runs/1", 1, overrides=common | {"trainer.max_steps": "1000"})
    collect(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "before")
    write_run(tmp_path / "runs/0", 1, overrides=common | {"optimizer.warmup_steps": "300"})
    collect(tmp_path, "--add")
    assert list(pd.read_csv(tmp_path / "results.csv")["warmup_steps"]) == [30, 100, 300]
