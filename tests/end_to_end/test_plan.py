"""`hydratron plan` as a user calls it."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from tests.end_to_end.conftest import result
from tests.waiting import PATIENCE

SMALL = ["size=mini", "data.global_batch_size=16", "hardware.gpus_per_node=2"]
SINGLE = [*SMALL[:2], "hardware.gpus_per_node=1"]
RECIPE = ["experiment=megatron_bert_3.9b", "hardware=a100_40gb"]


def test_a_plan_ranks_the_splits_and_leaves_its_files(in_process, tmp_path) -> None:
    done = in_process("plan", *SMALL, "parallel=tp2", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "bert mini, 2 x h200, 16 sequences a step" in done.stdout
    assert "The configuration's own split (TP 2 x DP 1, 16 a pass) fits" in done.stdout
    rows = pd.read_csv(tmp_path / "run/plan.csv")
    assert list(rows.step_ms) == sorted(rows.step_ms)
    parts = ["parameters_gib", "optimizer_gib", "gradients_gib", "activations_gib"]
    assert rows[parts].sum(axis=1).sub(rows.peak_gib).abs().max() < 1e-9
    assert rows.gpu_hours.iloc[0] == pytest.approx(rows.step_ms.iloc[0] / 3.6e6 * 1000 * 2)
    for name in ("memory", "scaling"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"run/{name}.svg").is_file()
    assert list(pd.read_csv(tmp_path / "run/scaling.csv").gpus)[-1] == 1024
    assert result(tmp_path / "run")["plan/step_ms"] == rows.step_ms.iloc[0]


def test_a_plan_starts_none_of_the_libraries_that_training_needs(tmp_path) -> None:
    """Importing them would take longer than a small plan does."""
    command = ["hydratron", "plan", *SINGLE, "hydra.run.dir=run"]
    program = f"""
import sys
from hydratron import cli
sys.argv = {command!r}
cli.main()
print({{"pytorch_lightning", "transformers", "datasets", "wandb"}} & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_a_benchmark_run_calibrates_the_cluster(in_process, tmp_path) -> None:
    """Only the share of peak is fitted, so that what was measured comes out again."""
    given = ["size=mini", "data.global_batch_size=64", "hardware.gpus_per_node=1", "rows=1"]
    assert in_process("plan", *given, "hydra.run.dir=run").returncode == 0
    predicted = result(tmp_path / "run")["plan/step_ms"]
    measured = {"command": "benchmark", "status": "ok", "perf/step_ms": 1.02 * predicted}
    (tmp_path / "run/result.json").write_text(json.dumps(measured))
    done = in_process("plan", *given, "calibration=run", "hydra.run.dir=calibrated")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "calibrated")["plan/step_ms"]
    assert found == pytest.approx(1.02 * predicted, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["hardware=b200"], "Could not find 'hardware/b200' Available options in 'hardware'"),
        ([*RECIPE, "hardware.num_nodes=3"], "by data_parallel_size 24; hardware.num_nodes=2 would"),
        (["size=mini", "parallel.tensor_parallel_size=3"], "tensor_parallel_size 3; 2 would work"),
        (["+hardware.bogus=1"], "unknown key hardware.bogus"),
        (["hardware=v100_32gb"], "v100_32gb has no bf16; 16-mixed would work"),
        (["trainer.precision=fp8"], "trainer.precision 'fp8' is not one of"),
        (["calibration=nowhere"], "calibration=nowhere: no finished run of `hydratron benchmark`"),
        (["rows=x"], "rows 'x' is not an integer"),
        (["rows=0"], "rows 0 is not positive"),
        (["rows=-1"], "rows -1 is not positive"),
        (["rows=null"], "rows null is not an integer"),
        (["calibration=5"], "calibration 5 is not a path or a name"),
        (["hardware.num_nodes=1000000"], "hardware.num_nodes=16 would work"),
        (["hardware.memory_gib=nan"], "hardware.memory_gib nan is not finite"),
        ([*SINGLE, "hardware.memory_gib=2.05"], "nothing fits 1 x h200 of 0.0 GiB: the least is"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(in_process, overrides: list[str], line: str) -> None:
    done = in_process("plan", *overrides)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert line in done.stderr


@pytest.mark.slow
def test_the_seed_s_own_split_fits_and_is_ranked(in_process, tmp_path) -> None:
    """Article, "Pretraining": 3.9b at 4-way tensor x 128-way data parallel on 512 A100 of 40 GB."""
    done = in_process("plan", *RECIPE, "hardware.num_nodes=64", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "own split (TP 4 x DP 128, 8 a pass) fits" in done.stdout
    assert ": rank " in done.stdout
    assert "TP 1: parameters, gradients and optimizer alone take" in done.stdout
