"""The published A100 and V100 rows, predicted from their one-GPU row alone."""

import importlib
from pathlib import Path

import pytest

EXPERIMENT = Path(__file__).parents[3] / "experiments" / "03_scale"


def test_measured_steps_are_put_beside_their_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENT)
    compare = importlib.import_module("compare")
    predictions = compare.read(EXPERIMENT / "predictions.csv")
    guess = predictions[0]
    measured = {key: guess[key] for key in compare.KEYS} | {
        "implementation": "hydratron",
        "precision": "bf16-mixed",
        "interleave": "False",
        "step_ms": str(float(guess["predicted_step_ms"]) / 1.1),
        "peak_memory_gib": guess["predicted_peak_memory_gib"],
        "commit": "1a2b3c4",
        "command": "hydratron benchmark",
    }
    peer = measured | {"implementation": "transformers"}
    other = measured | {"batch": "7"}
    interleaved = measured | {"interleave": "True"}
    not_predicted = [peer, other, interleaved, measured | {"precision": "fp8"}]
    (row,) = compare.join(predictions, [measured, *not_predicted])
    assert row["step_ms_error_percent"] == "+10.0"
    assert row["peak_memory_gib_error_percent"] == "+0.0"


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
