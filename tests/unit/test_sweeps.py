"""What a search seeks of its jobs, and what becomes of the trials that nobody told it of."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydratron.result import JobFailed
from hydratron.sweeps import check_ended_well, sought, tell_lost_trials


def write_result(run_dir: Path, **result: object) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def test_a_search_seeks_the_loss_or_what_the_task_is_judged_by() -> None:
    squad = {"selection_metric": "val/f1", "val/f1": 80.0}
    mnli = {"selection_metric": "val/accuracy", "val/accuracy": 0.8, "val/loss": 0.5}
    assert sought(squad, maximize=True) == sought(squad, maximize=False) == 80.0
    assert (sought(mnli, maximize=False), sought(mnli, maximize=True)) == (0.5, 0.8)
    assert sought({"val/loss": 3.0}, maximize=False) == 3.0
    assert sought({"val/loss": 3.0}, maximize=True) is None
    assert sought({}, maximize=False) is None


def test_jobs_that_did_not_end_well_are_named(tmp_path: Path) -> None:
    good = write_result(tmp_path / "0", status="ok")
    check_ended_well([good])
    check_ended_well([])
    bad = [write_result(tmp_path / "1", status="failed"), tmp_path / "2"]
    with pytest.raises(JobFailed, match="^2 of 3 jobs failed: 1, 2$"):
        check_ended_well([good, *bad])


def test_trials_of_a_killed_search_get_their_values(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")
    sweeper = SimpleNamespace(study_name="search", storage=f"sqlite:///{tmp_path}/optuna.db")
    tell_lost_trials(tmp_path, sweeper)  # a new search has none
    study = optuna.create_study(study_name="search", storage=sweeper.storage)
    rates = []
    for number in range(3):
        trial = study.ask()
        rates.append(trial.suggest_uniform("optimizer.lr", 1e-4, 1e-2))
        trial.suggest_categorical("layernorm", ["pre"])
        given = {"optimizer.lr": f"{rates[-1]}", "layernorm": "pre", "seed": "1"}
        if number != 2:  # the third had no time to begin
            outcome = {"status": ("ok", "failed")[number], "val/loss": 2.0 + number}
            write_result(tmp_path / str(number), overrides=given, **outcome)
    tell_lost_trials(tmp_path, sweeper)
    found = optuna.load_study(study_name="search", storage=sweeper.storage)
    assert [trial.state.name for trial in found.trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert (found.best_value, found.best_params["optimizer.lr"]) == (2.0, rates[0])
