"""The published A100 and V100 rows, predicted from their one-GPU row alone."""

import importlib
from pathlib import Path

import pytest

EXPERIMENT = Path(__file__).parents[3] / "experiments" / "03_scale"


@pytest.mark.slow
@pytest.mark.parametrize("table", ["A100", "V100", "V100 paper"])
def test_published_rows_follow_from_the_one_gpu_row(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 10 % of an iteration's time, or 5 points of a scaling."""
    monkeypatch.syspath_prepend(EXPERIMENT)
    published = importlib.import_module("published")
    rows = published.predicted(*published.tables()[table])
    best = published.hardware_flops(rows[0][0].config) / rows[0][1].total
    for row, time in rows:
        if table == "V100 paper":
            share = 100 * published.hardware_flops(row.config) / time.total / best
            assert row.published is None or abs(share - row.published) < 5, row
        else:
            assert time.total * 1e3 == pytest.approx(row.published, rel=0.10), row


def test_the_formula_gives_the_published_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """TFLOP/s of a GPU that Megatron-LM prints beside the milliseconds (September 2020)."""
    monkeypatch.syspath_prepend(EXPERIMENT)
    published = importlib.import_module("published")
    printed = {"1.2b": 149.8, "2b": 136.8, "4.2b": 124.7, "8.7b": 109.3}
    for row in published.tables()["A100"][2][:4]:
        rate = published.hardware_flops(row.config) / (row.published / 1e3) / 1e12
        assert rate == pytest.approx(printed[row.size], abs=0.1)
