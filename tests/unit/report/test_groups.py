import math
from itertools import product

import pytest

from hydratron.report.groups import Spread, has_diverged, split_sections
from hydratron.report.runs import load_run, load_runs
from hydratron.report.tables import summary_table


def section_of(writer):
    (section,) = split_sections(load_runs([writer.root]))
    return section


def test_median_range_and_n_over_seeds(ablation):
    section = section_of(ablation)
    assert section.keys == ["layernorm", "optimizer.lr"]
    spreads = {tuple(g.values.values()): g.spread("val/loss") for g in section.groups}
    assert spreads["pre", 0.003].median == pytest.approx(2.43)
    assert (spreads["pre", 0.003].min, spreads["pre", 0.003].max) == (2.41, pytest.approx(2.45))
    assert {spread.n for spread in spreads.values()} == {2}


def test_diverged_share_counts_losses_above_the_unigram_entropy(ablation):
    section = section_of(ablation)
    diverged = {tuple(g.values.values()): g.num_diverged for g in section.groups}
    assert diverged == {
        ("post", 0.001): 0,
        ("post", 0.003): 2,
        ("pre", 0.001): 0,
        ("pre", 0.003): 0,
    }
    assert section.unigram_entropies == [2.91]


def test_the_median_is_the_middle_of_three_and_the_best_is_the_lowest(writer):
    for placement, losses in {"pre": (2.0, 2.5, 2.1), "post": (2.6, 1.9, 2.7)}.items():
        for seed, loss in enumerate(losses):
            overrides = {"layernorm": placement, "seed": seed}
            writer.run(f"{placement}{seed}", overrides, result={"val/loss": loss})
    section = section_of(writer)
    assert [g.spread("val/loss").median for g in section.groups] == [2.6, 2.1]
    assert section.best("val/loss") == {1}
    assert section.is_close("val/loss")


def test_scores_are_better_when_higher_and_compared_within_a_task(writer):
    values = {("mnli", 1): 0.8, ("mnli", 2): 0.7, ("qqp", 1): 0.9, ("qqp", 2): 0.91}
    for ((task, epochs), value), seed in product(values.items(), (1, 2)):
        overrides = {"task": task, "task.epochs": epochs, "seed": seed}
        result = {"command": "finetune", "val/accuracy": value}
        writer.run(f"{task}{epochs}{seed}", overrides, result=result)
    section = section_of(writer)
    assert section.main_metrics == ["val/accuracy"]
    assert {tuple(section.groups[i].values.values()) for i in section.best("val/accuracy")} == {
        ("mnli", 1),
        ("qqp", 2),
    }


def test_one_seed_has_no_winner(writer):
    for placement, loss in {"pre": 2.5, "post": 2.6}.items():
        writer.run(placement, {"layernorm": placement, "seed": 1}, result={"val/loss": loss})
    section = section_of(writer)
    assert section.best("val/loss") == set()
    assert summary_table(section).notes[0] == "no best is marked: one seed has no range"
    writer.run("pre2", {"layernorm": "pre", "seed": 2}, result={"val/loss": 2.4})
    section = section_of(writer)
    assert section.best("val/loss") == {1}
    assert summary_table(section).notes[0] == "* best median; one seed has no range"


def test_where_a_task_s_files_lie_tells_no_runs_apart_that_the_task_does(writer):
    for task, placement in product(("mnli", "qqp"), ("pre", "post")):
        overrides = {"task": task, "task.train_path": f"/{task}.jsonl"}
        overrides |= {"checkpoint": f"/a/runs/{placement}/checkpoints/step-9"}
        overrides |= {"task.epochs": 3 if task == "mnli" else 2}  # differs too, and has to be seen
        result = {"command": "finetune", "val/accuracy": 0.8}
        writer.run(f"{task}{placement}", overrides, result=result)
    section = section_of(writer)
    assert section.keys == ["task", "checkpoint", "task.epochs"]
    named = [section.name("checkpoint", group.values["checkpoint"]) for group in section.groups]
    assert named == [f"checkpoint {p}/checkpoints/step-9" for p in ("post", "pre")] * 2
    assert [section.name("task.epochs", n) for n in (3, None)] == ["epochs 3", "epochs null"]


def test_a_larger_model_is_not_worse_for_being_slower(writer):
    for size, value in {"tiny": 50, "mini": 40}.items():
        result = {"command": "benchmark", "size": size, "perf/tflops_per_gpu": value}
        writer.run(size, {"size": size}, result=result)
    assert section_of(writer).best("perf/tflops_per_gpu") == set()


@pytest.mark.parametrize(
    ("result", "diverged"),
    [
        ({"val/loss": 2.0}, False),
        ({"val/loss": math.nan}, True),
        ({"val/loss": None}, True),
        ({"val/loss": "inf"}, True),
        ({"val/loss": 2.0, "train/loss": math.inf}, True),
        ({"val/loss": 3.0, "val/unigram_entropy": 2.91}, True),
        ({"val/loss": 2.9, "val/unigram_entropy": 2.91}, False),
        ({"val/loss": 2.91, "val/unigram_entropy": 2.91}, True),
        # masked LM + sentence order: only the language-model part compares with an entropy
        ({"val/loss": 3.2, "val/mlm_loss": 2.5, "val/unigram_entropy": 2.91}, False),
        ({"status": "failed", "error": "loss is not finite at step 7"}, True),
        ({"status": "failed", "error": "information: no space left on device"}, False),
    ],
)
def test_a_run_has_diverged(writer, result, diverged):
    assert has_diverged(load_run(writer.run("a", {}, result=result))) is diverged


def test_a_run_stopped_by_an_infinite_loss_stays_in_the_median(writer):
    writer.run("1", {"seed": 1}, result={"val/loss": 2.0})
    writer.run("2", {"seed": 2}, result={"val/loss": 2.2})
    error = {"status": "failed", "error": "loss not finite"}
    writer.run("3", {"seed": 3}, result=error, metrics="step,val/loss\n1,4.0\n2,nan\n")
    writer.run("4", {"seed": 4}, result={"status": "failed", "error": "disk full", "val/loss": 1.0})
    (group,) = section_of(writer).groups
    assert group.spread("val/loss") == Spread(median=2.2, min=2.0, max=math.inf, n=3)
    assert (group.num_diverged, len(group.judged)) == (1, 3)


def test_sizes_are_in_the_order_of_their_parameters(writer):
    for size, count in {"752m": 752e6, "mini": 5e6, "1.3b": 1.3e9}.items():
        writer.run(size, {"size": size}, result={"size": size, "num_parameters": count})
    assert [g.values["size"] for g in section_of(writer).groups] == ["mini", "752m", "1.3b"]


def test_each_command_is_a_section(writer):
    writer.run("a", {}, result={})
    writer.run("b", {}, result={"command": "finetune"})
    sections = split_sections(load_runs([writer.root]))
    assert [section.command for section in sections] == ["pretrain", "finetune"]
