import io

import pandas as pd
import pytest
from rich.console import Console

from hydratron.report.groups import split_sections
from hydratron.report.published import seed_table
from hydratron.report.runs import load_runs
from hydratron.report.tables import (
    print_table,
    problem_lines,
    render_markdown,
    summary_table,
    write_csv,
)


@pytest.fixture
def section(ablation):
    (section,) = split_sections(load_runs([ablation.root]))
    return section


def test_summary_rows_say_median_range_n_and_diverged(section):
    table = summary_table(section)
    assert table.columns == [
        "LayerNorm",
        "learning rate",
        "held-out loss (nats)",
        "range",
        "n",
        "diverged",
    ]
    assert table.rows[1] == ["post", "0.003", "2.960", "2.950 to 2.970", "2", "2 of 2"]
    assert table.best == {(3, 2)}
    assert table.notes[0].startswith("unigram entropy of the held-out text: 2.91 nats. A model at")


def test_markdown_has_the_best_in_bold(section):
    text = render_markdown(summary_table(section))
    assert "| pre | 0.003 | **2.430** | 2.410 to 2.450 | 2 | 0 of 2 |" in text
    assert text.count("**2.") == 1


def test_the_terminal_marks_the_best_without_colour(section):
    console = Console(file=io.StringIO(), width=160)
    print_table(summary_table(section), console)
    assert "2.430 *" in console.file.getvalue()


def test_csv_round_trips_unrounded(section, tmp_path):
    write_csv([section], tmp_path / "table.csv")
    frame = pd.read_csv(tmp_path / "table.csv").set_index(["layernorm", "optimizer.lr"])
    row = frame.loc[("post", 0.003)]
    assert row["val/loss median"] == section.groups[1].spread("val/loss").median
    assert (row["val/loss n"], row["diverged"], row["runs"]) == (2, 2, 2)
    assert "perf/tokens_per_second median" in frame


def test_three_metrics_become_rows(writer):
    result = {"command": "finetune", "val/accuracy": 0.8, "val/f1": 0.7, "val/exact_match": 0.6}
    writer.run("a", {"task": "x"}, result=result)
    writer.run("b", {"task": "y"}, result={"command": "finetune", "val/accuracy": 0.9})
    (section,) = split_sections(load_runs([writer.root]))
    table = summary_table(section)
    assert table.columns == ["task", "metric", "median", "range", "n"]
    assert [row[1] for row in table.rows] == ["accuracy", "exact match", "F1", "accuracy"]


def test_every_job_that_is_not_ok_has_one_line(ablation):
    error = "disk [full]\nTraceback"
    ablation.run("x", {"layernorm": "pre", "seed": 3}, result={"status": "failed", "error": error})
    ablation.run("y", {"layernorm": "pre", "seed": 4}, result={"status": "preempted"})
    ablation.run("z", {"layernorm": "pre", "seed": 5})
    collection = load_runs([ablation.root])
    lines = problem_lines(collection, split_sections(collection))
    assert sorted(lines) == [
        "failed: x (layernorm=pre seed=3): disk [full]",
        "preempted: y (layernorm=pre seed=4)",
        "running or killed: z (layernorm=pre seed=5)",
    ]


def test_pretraining_stands_beside_table_1(section):
    table = seed_table(section)
    assert [row[-1] for row in table.rows[:3]] == ["1.58", "1.30", "1.16"]
    assert table.rows[3][:2] == ["ours: LayerNorm post, learning rate 0.001", "616k"]
    assert table.rows[3][-1] == "2.56"
    assert "Megatron on the NVIDIA A100 GPU" in table.notes[-1]


def test_finetuning_stands_beside_tables_2_and_3(writer):
    for seed, value in enumerate((80.0, 84.0, 82.0)):
        result = {"command": "finetune", "val/f1": value, "val/exact_match": value - 10}
        writer.run(f"a{seed}", {"task": "squad1", "seed": seed}, result=result)
    writer.run("b", {"task": "qqp"}, result={"command": "finetune", "val/accuracy": 0.915})
    (section,) = split_sections(load_runs([writer.root]))
    table = seed_table(section)
    assert len(table.rows) == 6 + 2 + 1
    assert table.rows[5][1:3] == ["91.4 / 91.4", "92.7"]
    assert table.rows[-1] == ["ours: median", "–", "91.5", "82.0 / 72.0", "–", "–"]
