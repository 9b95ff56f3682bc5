"""Ten optimizer steps give the same losses on every grid of processes.

Two micro-batches a step, gradients clipped, sequences of different lengths. With the same seed
the grids start from the same weights, so this covers initialisation, gradients over both axes,
norm, clipping, AdamW and the schedule together.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.twins import tiny_config
from tests.parity.trainer_runs import Run, train

GRIDS = {"tp1": (1, 1), "tp2": (2, 1), "tp4": (4, 1), "tp2_dp2": (2, 2)}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-6}  # the bounds of design section 3
RUNS = {
    (name, dtype): Run(
        tiny_config(family=family, layernorm=layernorm, init_std=0.1, vocab_size=32),
        dtype,
        clip=clip,  # about the median of the ten norms
    )
    for name, family, layernorm, clip in (
        ("bert-post", "bert", "post", 1.65),
        ("bert-pre", "bert", "pre", 2.06),
        ("gpt2", "gpt2", "pre", 1.15),
    )
    for dtype in TOLERANCES
}
# Trained by the default tests, each model and each type once; the others are slow.
QUICK = [
    ("bert-post", torch.float64),
    ("bert-pre", torch.float64),
    ("gpt2", torch.float64),
    ("gpt2", torch.float32),
]
Rows = list[dict[str, float]]
Key = tuple[str, torch.dtype]
Results = Callable[[str, Key], list[Rows]]


def case(grid: str, key: Key) -> Any:
    """A test of a run on a grid."""
    is_quick = key in QUICK and grid != "tp4"
    marks = [] if is_quick else [pytest.mark.slow]
    return pytest.param(grid, key, marks=marks, id=f"{grid}-{key[0]}-{key[1]}")


CASES = [case(grid, key) for grid in GRIDS for key in RUNS]


def train_all(
    rank: int, world_size: int, grid: tuple[int, int], keys: list[Key]
) -> dict[Key, Rows]:
    return {key: train(rank, RUNS[key], *grid) for key in keys}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Give what each rank of a grid logged in a run; a grid starts once for all quick runs."""
    path: Path = tmp_path_factory.mktemp("steps")
    found: dict[tuple[str, bool], list[dict[Key, Rows]]] = {}

    def of(name: str, key: Key) -> list[Rows]:
        group = (name, key in QUICK)
        if group not in found:
            keys = [other for other in RUNS if (other in QUICK) == (key in QUICK)]
            grid = GRIDS[name]
            found[group] = run_distributed(train_all, grid[0] * grid[1], path, grid, keys)
        return [rows[key] for rows in found[group]]

    return of


@pytest.mark.parametrize(("grid", "key"), [c for c in CASES if c.values[0] != "tp1"])
def test_ten_clipped_steps_give_the_losses_of_one_process(
    grid: str, key: Key, results: Results
) -> None:
    (expected,) = results("tp1", key)
    assert len(expected) == 10
    for rank, rows in enumerate(results(grid, key)):
        for step, (row, expected_row) in enumerate(zip(rows, expected, strict=True)):
            assert row.keys() == expected_row.keys()
            for name in row:
                if name.endswith("loss"):
                    difference = abs(row[name] - expected_row[name])
                    assert difference <= TOLERANCES[key[1]], (name, step, rank)


@pytest.mark.parametrize(("grid", "key"), CASES)
def test_clipping_acts_in_some_steps_by_the_norm_of_one_process(
    grid: str, key: Key, results: Results
) -> None:
    expected = [row["train/grad_norm"] for row in results("tp1", key)[0]]
    clip = RUNS[key].clip
    assert clip is not None
    coefficients = [clip / (norm + 1e-6) for norm in expected]
    assert 3 <= sum(c < 1 for c in coefficients) <= 7, expected
    # float32: the norm sums squares of about 7000 elements after ten steps of rounding
    tolerance = 1e-9 if key[1] == torch.float64 else 1e-4
    for rows in results(grid, key):
        assert [row["train/grad_norm"] for row in rows] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("grid", "key"), [c for c in CASES if c.values[0] == "tp1"])
def test_the_steps_change_the_model_enough_to_tell(grid: str, key: Key, results: Results) -> None:
    losses = [row["train/loss"] for row in results(grid, key)[0]]
    assert max(losses) - min(losses) > 0.05, losses
    assert len(set(losses)) == 10
