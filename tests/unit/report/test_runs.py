import math
from pathlib import Path

import pytest

from hydratron.report.runs import (
    find_swept_keys,
    load_run,
    load_runs,
    load_sweep,
    parse_overrides,
    read_metrics,
    sweep_choices,
)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("1,2", [1, 2]),
        ("pre,post", ["pre", "post"]),
        ("1e-3,0.003", [0.001, 0.003]),
        ("choice(a,b,c)", ["a", "b", "c"]),
        ("range(2,6,2)", [2, 4]),
        ("range(3)", [0, 1, 2]),
        ("range(1,4)", [1, 2, 3]),
        ("range(start=1,stop=4)", [1, 2, 3]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("'a,b',c", ["a,b", "c"]),
        ("quickstart", ["quickstart"]),
        ("glob(*)", None),
    ],
)
def test_choices_are_read_as_hydra_sweeps_them(text, choices):
    assert sweep_choices(text) == choices


def test_overrides_keep_no_plus_and_no_deletion():
    assert parse_overrides(["+a=1", "++b=1e-3", "~c", "d=null"]) == {"a": 1, "b": 0.001, "d": None}


def test_swept_keys_are_found_without_the_seed_and_the_constants(ablation):
    runs = load_runs([ablation.root]).runs
    assert len(runs) == 8
    assert find_swept_keys(runs) == ["layernorm", "optimizer.lr"]


def test_a_key_only_some_runs_override_is_compared_with_their_configuration(writer):
    writer.run("a", {"optimizer.lr": "1e-3", "parallel": "tp2"}, result={})
    path = writer.run("b", {}, result={})
    (path / ".hydra" / "config.yaml").write_text("optimizer: {lr: 0.001}\nparallel: {tensor: 1}\n")
    (path / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {parallel: single}}}\n")
    runs = load_runs([writer.root]).runs
    assert find_swept_keys(runs) == ["parallel"]
    assert {run.value("parallel") for run in runs} == {"tp2", "single"}


def test_a_fact_of_the_result_is_a_key_only_where_no_override_tells_runs_apart(writer):
    writer.run("a", {"experiment": "x"}, result={"layernorm": "pre"})
    writer.run("b", {"experiment": "y"}, result={"layernorm": "post"})
    assert find_swept_keys(load_runs([writer.root]).runs) == ["experiment"]
    writer.run("c", {"experiment": "y"}, result={"layernorm": "pre"})
    assert find_swept_keys(load_runs([writer.root]).runs) == ["layernorm", "experiment"]


def test_how_a_loss_was_computed_is_a_key_only_where_nothing_else_differs(writer):
    sizes = [("336m", "64", "pre"), ("752m", "32", "pre"), ("752m", "32", "post")]
    for index, (size, micro, placement) in enumerate(sizes):
        swept = {"size": size, "data.micro_batch_size": micro, "layernorm": placement}
        writer.run(str(index), swept, result={})
    assert find_swept_keys(load_runs([writer.root]).runs) == ["size", "layernorm"]
    writer.run("3", swept | {"data.micro_batch_size": "16"}, result={})
    keys = ["size", "layernorm", "data.micro_batch_size"]
    assert find_swept_keys(load_runs([writer.root]).runs) == keys


def test_a_benchmark_s_micro_batch_is_a_key_beside_its_size(writer):
    for size, micro in (("336m", "64"), ("752m", "32")):
        swept = {"size": size, "data.micro_batch_size": micro}
        writer.run(size, swept, result={"command": "benchmark"})
    keys = ["size", "data.micro_batch_size"]
    assert find_swept_keys(load_runs([writer.root]).runs) == keys


def test_a_partial_sweep_names_its_missing_jobs(ablation):
    sweep = ablation.root / "sweep"
    for job in ("1", "6"):  # one never started, one was killed
        (sweep / job / "result.json").unlink()
    for path in (sweep / "1" / ".hydra").iterdir():
        path.unlink()
    collection = load_runs([ablation.root])
    assert collection.counts == {"ok": 6, "failed": 0, "preempted": 0, "running": 1, "missing": 1}
    assert collection.missing == [{"layernorm": "post", "optimizer.lr": 0.003, "seed": 1}]
    assert collection.describe().startswith(
        "partial: 6 of 8 jobs ok, 1 running or killed, 1 missing"
    )
    assert not collection.complete


def test_command_line_overrides_win_over_the_sweep_of_an_experiment(writer):
    writer.multirun("s", ["seed=1,2,3"], {"seed": "1,2", "layernorm": "pre,post"})
    sweep = load_sweep(writer.root / "s")
    assert sweep is not None
    assert sweep.expected == 6


def test_a_sweep_that_cannot_be_counted_expects_what_is_there(writer):
    writer.multirun("s", ["data=glob(*)"])
    writer.run("s/0", {"data": "a"}, result={})
    assert load_runs([writer.root]).num_expected == 1


def test_a_sweep_that_resumes_another_is_none_of_its_own(writer):
    writer.multirun("s", ["resume=elsewhere"])
    assert load_runs([writer.root]).sweeps == []


def test_a_search_expects_its_trials(writer):
    (writer.root / "multirun.yaml").write_text("hydra: {sweeper: {n_trials: 5}}\n")
    writer.run("0", {"optimizer.lr": 0.01}, result={})
    assert load_runs([writer.root]).counts["missing"] == 4


def test_directories_given_twice_are_read_once(ablation):
    assert len(load_runs([ablation.root, ablation.root / "sweep", ablation.root]).runs) == 8


def test_a_broken_result_is_an_unreadable_run(writer):
    path = writer.run("a", {"seed": 1})
    (path / "result.json").write_text('{"status": "ok"')
    run = load_run(path)
    assert run.status == "unreadable"
    assert "result.json is not JSON" in run.error


def test_a_missing_directory_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a directory"):
        load_runs([tmp_path / "nowhere"])


def test_metrics_tell_a_nan_from_a_gap_and_drop_an_unfinished_row(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,val/loss\n1,4.0,\n2,nan,3.5\n2,,3.4\n3,2.9,\n4,2.")
    metrics = read_metrics(path)
    assert list(metrics.index) == [1, 2, 3]
    assert metrics.loc[2, "train/loss"] == math.inf
    assert metrics.loc[2, "val/loss"] == 3.4  # the later row, written after a resume
    assert math.isnan(metrics.loc[1, "val/loss"])


@pytest.mark.parametrize("text", ["", "step,train/loss\n"])
def test_metrics_without_rows_are_empty(tmp_path: Path, text: str):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    assert read_metrics(path).empty
    assert read_metrics(tmp_path / "absent.csv").empty
