"""Rows of the Figure 1 experiments run as printed beside them, shortened, on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.conftest import metrics, result

RESULTS = Path(__file__).parents[2] / "experiments/01_layernorm_placement/results.csv"
SHORT = ["trainer.max_steps=2", "trainer.log_every=1", "data.validation_samples=128"]


@pytest.mark.parametrize("layernorm", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_a_row_s_command_runs_on_the_cpu(
    hydratron: Callable, tmp_path: Path, layernorm: str
) -> None:
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


CUT = ["data.global_batch_size=4", "data.micro_batch_size=2", "data.num_workers=0"]


def test_the_article_s_figure_runs_on_the_cpu(
    in_process: Callable, tmp_path: Path, texts: Path
) -> None:
    quick = ["data.tokenizer=character", "executor.workers=1"]
    done = in_process("prepare", "data=novels", "size=336m", f"data.root={texts}", *quick)
    assert done.returncode == 0, done.stderr
    row = ["pretrain", "experiment=figure1", "layernorm=post", "trainer=cpu", "size=tiny"]
    done = in_process(*row, *CUT, *SHORT[:2], "data.validation_samples=4", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert (found["layernorm"], found["size"]) == ("post", "tiny")
    # the corpus is the experiment's whatever the size: 30,592 rows of embeddings, not tiny's 4,096
    assert found["num_parameters"] > 30_592 * 128
    assert list(metrics(tmp_path / "run")["step"]) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "swept", "values"),
    [
        ("figure1", "layernorm", ["post", "pre"]),
        ("figure1_sizes", "model.hidden_size", ["1024", "512", "256", "128"]),
    ],
)
def test_the_sweeps_run_on_the_cpu(
    hydratron: Callable, tmp_path: Path, texts: Path, experiment: str, swept: str, values: list[str]
) -> None:
    done = hydratron("prepare", "data=novels", "size=336m", f"data.root={texts}")
    assert done.returncode == 0, done.stderr
    small = ["trainer=cpu", "model.num_layers=1", *CUT, *SHORT[:2], "data.validation_samples=4"]
    sweep = [f"experiment={experiment}", "hydra.sweep.dir=sweep"]
    if experiment == "figure1":
        small.append("size=tiny")
    done = hydratron("pretrain", "-m", *sweep, *small)
    assert done.returncode == 0, done.stderr
    found = [result(tmp_path / f"sweep/{job}") for job in range(len(values))]
    assert [run["status"] for run in found] == ["ok"] * len(values)
    assert [run["overrides"][swept] for run in found] == values
