import math
from itertools import product
from pathlib import Path

import matplotlib.image
import pytest

from hydratron.report import curves
from hydratron.report.canvas import save_figure
from hydratron.report.curves import assign_keys, curve_range
from hydratron.report.figures import draw_figures
from hydratron.report.groups import split_sections
from hydratron.report.layers import layer_profiles
from hydratron.report.runs import load_runs
from hydratron.report.scaling import PowerLaw


def section_of(writer):
    (section,) = split_sections(load_runs([writer.root]))
    return section


def assert_drawn(png: Path) -> None:
    """The PNG has ink on it, and an SVG lies beside it."""
    image = matplotlib.image.imread(png)
    assert min(image.shape[:2]) > 250
    assert 0.01 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.9
    assert png.with_suffix(".svg").stat().st_size > 5_000


def test_the_ablation_gets_loss_curves_and_no_throughput_noise(ablation, tmp_path):
    figures = draw_figures(section_of(ablation), tmp_path)
    assert [path.name for path in figures] == ["loss_curves.png"]
    assert_drawn(figures[0])


def test_depth_and_learning_rate_get_a_divergence_map_and_loss_by_size(writer, tmp_path):
    for lr, depth, placement in product((0.001, 0.01), (6, 12), ("pre", "post")):
        if (lr, depth, placement) == (0.01, 12, "pre"):
            continue  # not run yet: hatched
        loss = math.inf if (lr, placement) == (0.01, "post") else 2.0 + lr * depth
        overrides = {"optimizer.lr": lr, "model.num_layers": depth, "layernorm": placement}
        result = {"val/loss": loss, "num_parameters": depth * 50_000, "layernorm": placement}
        metrics = f"step,train/loss,val/loss\n1,4,4\n2,3,3\n3,{loss},{loss}\n"
        speed = {"perf/tokens_per_second": 1000 / depth}
        name = f"{lr}-{depth}-{placement}"
        writer.run(name, overrides, result=result | speed, metrics=metrics)
    section = section_of(writer)
    figures = draw_figures(section, tmp_path, "pretrain_")
    names = ["loss_curves", "loss_by_size", "divergence_map", "throughput"]
    assert [path.stem for path in figures] == [f"pretrain_{name}" for name in names]
    for path in figures:
        assert_drawn(path)
    layout = assign_keys(section)
    assert (layout.column, layout.row, layout.lines) == (
        "optimizer.lr",
        "model.num_layers",
        ["layernorm"],
    )
    assert layout.shape == (2, 2)


def test_sizes_of_different_lengths_get_a_panel_each_and_none_that_was_never_run(writer):
    for (size, steps), placement in product((("336m", 1000), ("752m", 300)), ("pre", "post")):
        overrides = {"size": size, "trainer.max_steps": steps, "layernorm": placement}
        writer.run(f"{size}{placement}", overrides, result={})
    layout = assign_keys(section_of(writer))
    assert layout.panels == [(1000, "336m"), (300, "752m")]
    assert (layout.shape, layout.lines) == ((1, 2), ["layernorm"])


def test_against_the_seed_losses_by_size_get_their_power_law(writer, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda *a: (drawn.append(a[0]), save_figure(*a))[1])
    for width, placement in product((128, 256, 512), ("pre", "post")):
        size = 40.0 * width**2
        loss = 20 * size**-0.1 if placement == "pre" else 6.6  # post learns nothing at any size
        overrides = {"model.hidden_size": width, "layernorm": placement}
        result = {"val/loss": loss, "num_parameters": size, "layernorm": placement}
        metrics = f"step,train/loss,val/loss\n1,9,\n2,8,\n3,{loss},{loss}\n"
        writer.run(f"{width}{placement}", overrides, result=result, metrics=metrics)
    figures = draw_figures(section_of(writer), tmp_path, against_seed=True)
    assert [p.stem for p in figures] == ["loss_curves", "training_curves", "loss_by_size"]
    for path in figures:
        assert_drawn(path)
    entries = [text.get_text() for text in drawn[1].legends[0].get_texts()]
    assert "fit, LayerNorm pre: parameters^-0.100" in entries
    assert not any("post:" in entry for entry in entries)
    assert any(entry.startswith("seed") for entry in entries)


def test_panels_of_one_line_get_no_power_law_of_both(writer, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda *a: (drawn.append(a[0]), save_figure(*a))[1])
    for width, lr, placement in product((128, 256, 512), (1e-3, 1e-4), ("pre", "post")):
        size = 40.0 * width**2
        overrides = {"model.hidden_size": width, "optimizer.lr": lr, "layernorm": placement}
        result = {"val/loss": 20 * size**-0.1 + 1e3 * lr, "num_parameters": size}
        writer.run(f"{width}{lr}{placement}", overrides, result=result | {"layernorm": placement})
    draw_figures(section_of(writer), tmp_path, against_seed=True)
    entries = [text.get_text() for text in drawn[-1].legends[0].get_texts()]
    assert [entry for entry in entries if "parameters^" in entry] == [
        "seed, its own corpus: parameters^-0.127"
    ]


def test_a_power_law_is_found_again():
    fit = PowerLaw.fit((1e6, 1e7, 1e9), [7 * n**-0.07 for n in (1e6, 1e7, 1e9)])
    assert (fit.factor, fit.exponent) == pytest.approx((7, 0.07))
    assert fit([1e8])[0] == pytest.approx(7 * 1e8**-0.07)


def test_logged_layer_norms_are_drawn_from_first_to_last_step(writer, tmp_path):
    header = "step,train/loss,train/grad_norm/layer_00,train/grad_norm/layer_01\n"
    for placement, seed in product(("pre", "post"), (1, 2)):
        overrides = {"layernorm": placement, "seed": seed}
        rows = f"1,4,{seed},10\n2,3,0.1,0.2\n"
        result = {"layernorm": placement}
        writer.run(f"{placement}{seed}", overrides, result=result, metrics=header + rows)
    section = section_of(writer)
    profiles = layer_profiles(section.groups[0])
    assert {step: list(norms) for step, norms in profiles.items()} == {1: [1.5, 10], 2: [0.1, 0.2]}
    figures = draw_figures(section, tmp_path)
    assert [path.stem for path in figures] == ["loss_curves", "gradient_norms"]
    assert_drawn(figures[-1])


def test_a_benchmark_shows_throughput_first(writer, tmp_path):
    for size in (1, 2):
        result = {"command": "benchmark", "perf/tflops_per_gpu": 100.0 + size}
        metrics = "step,train/loss\n1,4\n2,3\n"
        writer.run(str(size), {"parallel": f"tp{size}"}, result=result, metrics=metrics)
    figures = draw_figures(section_of(writer), tmp_path)
    assert figures[0].name == "throughput.png"
    assert_drawn(figures[0])


def test_scores_are_drawn_by_group(writer, tmp_path):
    for task, seed in product(("mnli", "qqp"), (1, 2)):
        result = {"command": "finetune", "val/accuracy": 0.8 + seed / 100}
        writer.run(f"{task}{seed}", {"task": task, "seed": seed}, result=result)
    (figure,) = draw_figures(section_of(writer), tmp_path)
    assert figure.name == "val_accuracy.png"
    assert_drawn(figure)


def test_curves_are_median_and_range_at_each_step(writer):
    for seed, losses in enumerate(((4, 3), (4.4, 2), (5, 2.2))):
        rows = "".join(f"{step},{loss}\n" for step, loss in enumerate(losses))
        result = {"val/loss": losses[-1]}
        writer.run(str(seed), {"seed": seed}, result=result, metrics=f"step,val/loss\n{rows}")
    (group,) = section_of(writer).groups
    curve = curve_range(group, "val/loss")
    assert curve.loc[0].to_dict() == {"median": 4.4, "min": 4, "max": 5}
    assert curve.loc[1].to_dict() == {"median": 2.2, "min": 2, "max": 3}


def test_a_run_that_diverged_and_stopped_does_not_leave_the_curve(writer):
    writer.run("1", {"seed": 1}, result={"val/loss": 2.0}, metrics="step,val/loss\n1,4\n2,3\n3,2\n")
    error = {"status": "failed", "error": "loss is nan"}
    writer.run("2", {"seed": 2}, result=error, metrics="step,val/loss\n1,4\n2,nan\n")
    (group,) = section_of(writer).groups
    curve = curve_range(group, "val/loss")
    assert list(curve["median"]) == [4, math.inf, math.inf]
    assert list(curve["min"]) == [4, 3, 2]


@pytest.mark.parametrize("metrics", [None, "step,train/loss\n"])
def test_runs_without_metrics_draw_nothing(writer, tmp_path, metrics):
    writer.run("a", {}, result={}, metrics=metrics)
    assert draw_figures(section_of(writer), tmp_path) == []


def test_the_same_runs_give_the_same_svg(ablation, tmp_path):
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (figure,) = draw_figures(section_of(ablation), tmp_path / name)
        texts.append(figure.with_suffix(".svg").read_bytes())
    assert texts[0] == texts[1]
