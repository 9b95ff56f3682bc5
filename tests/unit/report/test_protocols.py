"""Finished protocols beside the published rows: medians, ensembles, RACE's test set."""

import json

from hydratron.report.groups import split_sections
from hydratron.report.published import seed_table
from hydratron.report.runs import load_runs

SQUAD = {"val/f1": 0.9, "val/exact_match": 0.4}  # in percent: a model that has learnt nothing
RACE = {f"test/accuracy{name}": 0.5 for name in ("", "_middle", "_high")}


def write_protocol(writer, name, task, scores, **summary):
    """Grid and seeds of a protocol; the runs' own scores are none of the table's."""
    for folder in ("grid/0", "seeds/0", "seeds/1"):
        overrides = {"task": task, "checkpoint": "outputs/big", "seed": folder[-1]}
        result = {"command": "finetune", "task": task, "val/accuracy": 0.1, "val/f1": 1.0}
        writer.run(f"{name}/{folder}", overrides, result=result)
    file = writer.root / name / "protocol.json"
    file.write_text(json.dumps({"scores": [0.1, 0.2], **scores, **summary}))


def ours(*directories):
    (section,) = split_sections(load_runs(directories))
    return {row[0]: row[1:] for row in seed_table(section).rows if row[0].startswith("ours")}


def test_medians_and_ensembles_of_protocols_stand_in_rows_of_their_model(writer):
    write_protocol(writer, "a", "squad1", SQUAD, ensemble={"val/f1": 1.5, "val/exact_match": 1.0})
    dev = {"val/accuracy": 0.4}
    best = {"test/accuracy": 0.6, "test/accuracy_middle": 0.7, "test/accuracy_high": 0.55}
    write_protocol(writer, "b", "race", dev | RACE, ensemble=dev, test_ensemble=best)
    expected = {
        "ours: big, median of 2": ["–", "–", "0.9 / 0.4", "–", "50.0 (50.0 / 50.0)"],
        "ours: big, ensemble of 2": ["–", "–", "1.5 / 1.0", "–", "60.0 (70.0 / 55.0)"],
    }
    assert ours(writer.root) == expected
    assert ours(writer.root / "a/seeds", writer.root / "b/seeds") == expected


def test_a_run_that_grid_and_seeds_share_counts_once(writer):
    scores = {"val/accuracy": 0.4}
    write_protocol(writer, "a", "race", scores, ensemble=scores)
    other = {"task": "race", "checkpoint": "outputs/big", "seed": "0", "optimizer.lr": "1e-5"}
    writer.run("a/grid/1", other, result={"command": "finetune", "val/accuracy": 0.1})
    (section,) = split_sections(load_runs([writer.root]))
    paths = [str(run.path.relative_to(writer.root)) for run in section.runs]
    assert sorted(paths) == ["a/grid/1", "a/seeds/0", "a/seeds/1"]


def test_two_protocols_of_one_model_and_task_are_told_apart(writer):
    for name, score in (("a", 0.4), ("b", 0.5)):
        scores = {"val/accuracy": score}
        write_protocol(writer, name, "race", scores, ensemble=scores)
    assert ours(writer.root) == {
        f"ours: big, {name}, {what} of 2": ["–"] * 4 + [f"{score} dev"]
        for name, score in (("a", "40.0"), ("b", "50.0"))
        for what in ("median", "ensemble")
    }
