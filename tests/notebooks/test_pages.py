"""Every page of `experiments/`, and the README's tables, say what the CSV files beside them hold;
figures are those of the CSV files.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hydratron.report.canvas import style_of

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
PAGES = [*sorted(EXPERIMENTS.glob("*/README.md")), EXPERIMENTS / "LOG.md"]
# Other folders that a page's tables quote.
QUOTED = {
    ROOT.name: ("00_quickstart", "01_layernorm_placement", "02_speed"),
    "03_scale": ("01_layernorm_placement",),
    EXPERIMENTS.name: ("01_layernorm_placement", "02_speed"),
}
# What a column says of the setting, not of an outcome.
SETTINGS = ("layers x hidden", "longest", "trained on", "scored on", "micro-batches", "commit")
SETTINGS += ("tried or claimed",)
LONG = 300  # rows: in a longer file every number is found
KEYS = (
    "size",
    "model.hidden_size",
    "warmup_steps",
    "model.num_layers",
    "layernorm",
    "init",
    "optimizer.lr",
)
KEYS += ("task", "system", "variant", "stage")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


def tables(page: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The (header, row) pairs of every table of a page."""
    header: list[str] = []
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("|-: "):
            yield header, cells


def result_rows(folder: str) -> list[np.ndarray]:
    """The numbers of each row of a folder's CSV files, and of medians over seeds, in the units that
    pages use.
    """
    found = []
    for path in (EXPERIMENTS / folder).glob("*.csv"):
        frame = pd.read_csv(path)
        if len(frame) > LONG:
            continue
        if "overrides" in frame:  # made by a report
            frame["optimizer.lr"] = frame["overrides"].str.extract(r"lr=(\S+)")[0].astype(float)
        frames = [frame.select_dtypes("number")]
        keys = [key for key in KEYS if key in frame]
        if "seed" in frame and keys:
            groups = frame.groupby(keys, dropna=False, as_index=False)
            rest = [name for name in frames[0] if name not in keys]
            frames += [groups[rest].agg(how) for how in ("median", "min", "max")]
        for numbers in frames:
            found += list(numbers.select_dtypes("number").to_numpy(dtype=float))
    return [np.concatenate([row, 100 * row, row / 1e6, row / 1e9]) for row in found]


def stands(text: str, known: np.ndarray) -> bool:
    """Whether a number rounds to `text`, either way at a half."""
    value = float(text.replace(",", ""))
    decimals = len(re.sub(r"e.*", "", text).partition(".")[2])
    unit = 10.0**-decimals
    if "e" in text:
        unit *= 10.0 ** int(text.partition("e")[2])
    elif decimals == 0 and text.endswith("00"):
        unit = 100.0
    return bool((np.abs(known - abs(value)) <= 0.5000001 * unit).any())


def shown_numbers(header: list[str], row: list[str]) -> Iterator[tuple[str, str, list[float]]]:
    """A row's outcomes of three digits or more: column, number, and all numbers of the row."""
    cells = [re.sub(r"\([^)]*\)|`[^`]*`|\]\([^)]*\)", "", cell) for cell in row]
    every = [float(n.replace(",", "")) for cell in cells for n in NUMBER.findall(cell)]
    for name, cell in zip(header[1:], cells[1:], strict=True):
        if not any(word in name for word in SETTINGS):
            for number in NUMBER.findall(cell):
                if len(re.sub(r"e.*|\D", "", number).strip("0")) >= 3:
                    yield name, number, every


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.parent.name)
def test_every_number_of_a_table_stands_in_a_csv_beside_it(page: Path) -> None:
    folders = (
        *QUOTED.get(page.parent.name, ()),
        *([] if page.parent == ROOT else [page.parent.name]),
    )
    known = np.concatenate([np.zeros(1), *(row for f in folders for row in result_rows(f))])
    wrong = []
    for header, row in tables(page):
        for name, number, every in shown_numbers(header, row):
            ratios = [a / b for a in every for b in every if b] if "ratio" in name else []
            if not stands(number, np.concatenate([known, ratios])):
                wrong.append((name, number))
    assert not wrong


ROWS = [  # page, a column that names the table, how many of its rows are whole rows of a CSV file
    ("01_layernorm_placement", "held-out loss (nats)", "seed", 13),
    ("02_speed", "sequences/s", "memory (GiB)", 23),
    ("02_speed", "matrix products", "idle", 12),
    ("03_scale", "predicted GiB", "predicted ms", 12),
    ("03_scale", "peak GiB a rank", "TFLOP/s per GPU", 9),
]


@pytest.mark.parametrize(("folder", "column", "other", "num_rows"), ROWS)
def test_a_row_of_a_page_is_one_row_of_a_csv(folder, column, other, num_rows) -> None:
    known, found = result_rows(folder), 0
    for header, row in tables(EXPERIMENTS / folder / "README.md"):
        if {column, other} <= set(header):
            given = [n for name, n, _ in shown_numbers(header, row) if "weak scaling" not in name]
            assert any(all(stands(n, numbers) for n in given) for numbers in known), row
            found += 1
    assert found == num_rows


LAYERNORM = EXPERIMENTS / "01_layernorm_placement"
RATES = {"1e-4": 1e-4, "3e-4": 3e-4, "1e-3": 1e-3, "3e-3": 3e-3, "1e-2": 1e-2}


def figure1(row: list[str], **other: object) -> pd.DataFrame:
    """The runs of Figure 1 at the size, warmup and learning rate that a row begins with."""
    runs = pd.read_csv(LAYERNORM / "figure1.csv")
    runs = runs[(runs["size"] == row[0].lower()) & np.isclose(runs["optimizer.lr"], float(row[2]))]
    runs = runs[runs["warmup_steps"] == int(row[1].partition(" of ")[0])]
    for key, value in other.items():
        runs = runs[runs[key] == value]
    return runs.sort_values("seed")


def test_the_readme_s_losses_of_figure_1_are_those_of_their_recipes() -> None:
    entropy = pd.read_csv(LAYERNORM / "figure1.csv")["val/unigram_entropy"].max()
    found = 0
    for header, row in tables(ROOT / "README.md"):
        if header[:3] != ["size", "warmup steps", "learning rate"]:
            continue
        for name, cell in zip(header[3:], row[3:], strict=True):
            runs = figure1(row, layernorm=name.removesuffix("-LN"))
            bold = [f"**{x:.3f}**" if x >= entropy else f"{x:.3f}" for x in runs["val/loss"]]
            assert cell == (", ".join(bold) or "not run")
            steps = {int(row[1].partition(" of ")[2].replace(",", ""))}
            assert set(runs["steps"]) <= steps
            found += len(runs)
    assert found == len(pd.read_csv(LAYERNORM / "figure1.csv"))


def test_figure_1_s_rows_are_those_of_their_recipes_and_bold_on_the_plateau() -> None:
    entropy = pd.read_csv(LAYERNORM / "figure1.csv")["val/unigram_entropy"].max()
    found = 0
    for header, row in tables(LAYERNORM / "README.md"):
        cells = dict(zip(header, row, strict=True))
        if not {"warmup steps", "held-out loss (nats)"} <= set(cells):
            continue
        recipe = [cells["parameters"], cells["warmup steps"], cells["learning rate"]]
        runs = figure1(recipe, layernorm=cells["LayerNorm"], seed=int(cells["seed"]))
        (run,) = runs.to_dict("records")
        said = f"{run['val/loss']:.3f}"
        on_plateau = run["val/loss"] >= entropy
        assert cells["held-out loss (nats)"] == (f"**{said}**" if on_plateau else said)
        assert cells["commit"] == run["commit"]
        found += 1
    assert found == 13


def test_the_lowest_layer_s_gradients_are_those_of_their_csv() -> None:
    norms = pd.read_csv(LAYERNORM / "figure1_norms.csv")
    norms = norms[(norms["layer"] == 0) & (norms["layernorm"] == "post")]
    same = ["seed", "size", "warmup_steps", "optimizer.lr"]
    found = 0
    for header, row in tables(LAYERNORM / "README.md"):
        if "step 10" not in header:
            continue
        run = figure1(row, layernorm="post", seed=int(row[3]))
        mine = run[same].merge(norms, on=same).set_index("step")["norm"]
        for name, cell in zip(header[4:], row[4:], strict=True):
            assert stands(cell, np.array([mine[int(name.removeprefix("step "))]]))
            found += 1
    assert found == 42


def test_the_map_of_depths_and_rates_is_that_of_its_csv() -> None:
    runs = pd.read_csv(LAYERNORM / "results.csv")
    cells = 0
    for header, row in tables(LAYERNORM / "README.md"):
        if header[:2] != ["layers", "LayerNorm"] or header[2:] != list(RATES):
            continue
        for name, cell in zip(header[2:], row[2:], strict=True):
            mine = runs[
                (runs["model.num_layers"] == int(row[0]))
                & (runs["layernorm"] == row[1])
                & np.isclose(runs["optimizer.lr"], RATES[name])
            ]
            losses = mine["val/loss"]
            numbers = [float(number) for number in NUMBER.findall(cell)]
            assert numbers[0] == pytest.approx(losses.median(), abs=5.1e-4)
            if len(numbers) > 1:
                assert numbers[1:] == pytest.approx([losses.min(), losses.max()], abs=5.1e-3)
            on_plateau = (losses >= runs["val/unigram_entropy"].max()).all()
            assert cell.startswith("**") == on_plateau
            cells += 1
    assert cells == 40


def test_initialisation_is_that_of_its_csv_and_no_effect_is_as_small_as_a_repeat() -> None:
    runs = pd.read_csv(LAYERNORM / "init.csv")
    page = (LAYERNORM / "README.md").read_text()
    cells = 0
    for header, row in tables(LAYERNORM / "README.md"):
        if header[:2] != ["LayerNorm", "init"]:
            continue
        for name, cell in zip(header[2:], row[2:], strict=True):
            at = (runs["layernorm"] == row[0]) & (runs["init"] == row[1])
            mine = runs[at & np.isclose(runs["optimizer.lr"], RATES[name])].sort_values("seed")
            shown = [float(number) for number in NUMBER.findall(cell)]
            assert shown == pytest.approx(list(mine["val/loss"]), abs=5.1e-4)
            cells += 1
    assert cells == 12
    same = ["seed", "model.num_layers", "layernorm", "init", "optimizer.lr"]
    repeats = runs.merge(pd.read_csv(LAYERNORM / "results.csv"), on=same)
    apart = (repeats["val/loss_x"] - repeats["val/loss_y"]).abs()
    assert len(apart) == 12
    assert f"differs by up to {apart.max():.3f} nats" in page


def test_what_is_said_of_fp8_is_what_its_csv_holds() -> None:
    losses = pd.read_csv(EXPERIMENTS / "02_speed/fp8_loss.csv")
    curves = losses.pivot(index="step", columns="precision", values="train/loss")
    apart = (curves["fp8"] - curves["bf16-true"]).rolling(25).mean().abs().dropna()
    page = " ".join((EXPERIMENTS / "02_speed/README.md").read_text().split())
    assert f"at most {apart.max():.3f} apart (steps {apart.idxmax() - 24} to" in page
    assert f"above 0.02 in {(apart > 0.02).sum()} of the {len(apart)} windows" in page
    last = losses.dropna(subset="val/loss").set_index("precision")["val/loss"]
    assert f"{last['bf16-true']:.3f} in bf16 and {last['fp8']:.3f} in fp8" in page


def paths(svg: Path) -> list[np.ndarray]:
    """The corners of every shape of an SVG, in its order."""
    shapes = re.findall(r'<path[^>]* d="([^"]*)"', svg.read_text())
    return [np.array(re.findall(r"-?\d+\.?\d*", shape), dtype=float) for shape in shapes]


@pytest.mark.parametrize(
    ("slug", "module", "names"),
    [
        ("01_layernorm_placement", "figure1", ["figure1", "figure1_norms"]),
        ("03_scale", "published", ["published_scaling"]),
        ("03_scale", "recipes", ["memory_bert_3.9b", "memory_gpt2_8.3b"]),
    ],
)
def test_a_figure_is_what_its_csv_draws(slug, module, names, tmp_path: Path, monkeypatch) -> None:
    folder = EXPERIMENTS / slug
    monkeypatch.syspath_prepend(folder)
    importlib.import_module(module).draw(tmp_path)
    for name in names:
        drawn, kept = paths(tmp_path / f"{name}.svg"), paths(folder / f"{name}.svg")
        assert len(drawn) == len(kept) > 20
        for mine, theirs in zip(drawn, kept, strict=True):
            assert mine == pytest.approx(theirs, abs=0.01)
        assert (folder / f"{name}.png").stat().st_size > 10_000


def test_the_divergence_map_s_figure_is_that_of_its_csv() -> None:
    runs = pd.read_csv(LAYERNORM / "results.csv")
    runs = runs[runs["status"] == "ok"]  # a report counts runs with a result
    words = re.findall(r"<!-- (.*?) -->", (LAYERNORM / "divergence_map.svg").read_text())
    runs["diverged"] = runs["val/loss"] >= runs["val/unigram_entropy"]
    groups = runs.groupby(["layernorm", "optimizer.lr", "model.num_layers"])
    cells = [f"{int(g['diverged'].sum())} of {len(g)}" for _, g in groups]
    medians = [f"{group['val/loss'].median():.3f}" for _, group in groups]
    assert [word for word in words if re.fullmatch(r"\d of \d", word)] == cells
    losses = [word for word in words if re.fullmatch(r"[1-9]\.\d{3}", word)]  # no learning rate
    assert losses == medians


def test_no_two_series_of_a_figure_look_alike() -> None:
    styles = [style_of(None, None, index) for index in range(24)]
    assert len(set(map(str, styles))) == 24
    for attribute in zip(*styles[:8], strict=True):
        assert len(set(map(str, attribute))) == 8
    placements = [
        style_of("layernorm", name, index) for index, name in enumerate(("a", "pre", "post"))
    ]
    assert len(set(map(str, placements))) == 3
