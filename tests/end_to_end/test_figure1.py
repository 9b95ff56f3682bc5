"""Rows of the Figure 1 experiment run as printed beside them, shortened, on the CPU."""

from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.conftest import metrics, result

RESULTS = Path(__file__).parents[2] / "experiments/01_layernorm_placement/results.csv"
SHORT = ["trainer.max_steps=2", "trainer.log_every=1", "data.validation_samples=128"]


@pytest.mark.parametrize("layernorm", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_a_row_s_command_runs_on_the_cpu(hydratron, tmp_path: Path, layernorm: str) -> None:
    runs = pd.read_csv(RESULTS)
    row = runs[(runs["layernorm"] == layernorm) & (runs["model.num_layers"] == 12)].iloc[0]
    program, *arguments = row["command"].split()
    assert program == "hydratron"
    small = ["trainer=cpu", "size=tiny", "model.num_layers=2", "trainer.log_layer_norms=true"]
    done = hydratron(*arguments, *small, *SHORT, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert (found["layernorm"], found["seed"]) == (layernorm, row["seed"])
    # text, tokenizer and held-out documents are the experiment's own
    assert found["val/unigram_entropy"] == pytest.approx(row["val/unigram_entropy"], abs=1e-5)
    norms = metrics(tmp_path / "run").filter(regex="train/grad_norm/layer_")
    assert list(norms) == ["train/grad_norm/layer_00", "train/grad_norm/layer_01"]
    assert (norms > 0).all(axis=None)
