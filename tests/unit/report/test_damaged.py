"""Runs whose files are damaged or somebody else's: listed by name, and the others are reported."""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from hydratron.report.document import print_summary, write_report
from hydratron.report.runs import load_runs

RESULT = {
    "command": "pretrain",
    "status": "ok",
    "error": None,
    "overrides": {"layernorm": "pre", "seed": "1"},
    "seed": 1,
    "git_commit": "1a2b3c4",
    "versions": {"torch": "2.13.0"},
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "layernorm": "pre",
    "model": "gpt2",
    "size": "tiny",
    "finished": "2026-01-01T00:00:00+00:00",
    "num_parameters": 616_000,
    "steps": 600,
    "tokens": 1000,
    "duration_s": 10.0,
    "batch": 16,
    "seq_len": 1024,
    "device": "cpu",
    "task": "mnli",
    "timing.peer": "transformers",
    "train/loss": 2.5,
    "val/loss": 2.4,
    "val/unigram_entropy": 2.9,
    "val/accuracy": 0.5,
    "test/accuracy": 0.5,
    "perf/step_ms": 10.0,
    "perf/step_ms_low": 9.0,
    "perf/step_ms_high": 11.0,
    "perf/tokens_per_second": 1000.0,
    "perf/tflops_per_gpu": 10.0,
    "perf/mfu": 0.1,
    "perf/breakdown/idle_ms": 1.0,
    "peer/step_ms": 12.0,
}
FORMULA = "=cmd|' /C calc'!A0"
WRONG: tuple[Any, ...] = (
    *([], ["pre"], {}, {"a": []}, None, True, 0, -1, 1.5, 10**400, 1e308, -1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, "", "nan", "x", "../../../x", "/x", "a\nb\rc", FORMULA),
    *("\x1b]0;owned\x07\x1b[31m", "$\\frac$", "[/bold]", "|<b>|", "\ud800", "\u202e", "é" * 300),
)
LOGGED = "step,train/loss,val/loss\n1,4.0,4.0\n2,3.0,3.0\n"
COMMANDS = ("pretrain", "finetune", "benchmark")
# of these most wrong values are refused; what else is read takes words of any kind
READ = ("status", "num_parameters", "steps", "tokens", "batch", "duration_s", "val/loss",
        "perf/step_ms", "versions", "overrides", "tensor_parallel_size")  # fmt: skip
FILES = ("result.json", "metrics.csv", ".hydra/overrides.yaml", ".hydra/config.yaml",
         ".hydra/hydra.yaml", "../multirun.yaml", "../../protocol.json")  # fmt: skip
CONTENTS = {
    "not UTF-8": b"\xff\xfe\x00\xd8",
    "a list": b"[1, 2]\n",
    "a list of lists": b"[[1], {}]\n",
    "a word": b"word",
    "a number": b"7",
    "nothing": b"",
    "null": b"null",
    "not JSON": b'{"status": NaN',
    "deep": b"[" * 5_000 + b"\n",
    "recursive": b"&a [*a]",
    "code": b"!!python/object/apply:os.system ['touch owned']",
    "tags": b"a: !!timestamp x\nb: !!bool x\nc: !!int ''",
    "twice": b"step,val/loss,val/loss\n1,2,3\n",
    "no step": b"a,b\n1,2\n",
    "ragged": b"step,val/loss\n1\n1,2,3\n",
    "far": b"step,val/loss\ninf,1\n1e300,2\n-5,3\n",
    "layers": b"step,train/grad_norm/layer_99999999999999999999\n1,2\n2,inf\n",
    "huge": b"step,val/loss,train/loss\n1,1e308,-1e308\n2,-1e308,1e308\n3,nan,inf\n",
    "hydra": b"hydra: []",
    "hydra word": b"hydra: {runtime: x, sweeper: x, overrides: {task: x}}",
    "sweeper": b"hydra: {sweeper: {n_trials: x, params: [1]}, overrides: {task: [[1]]}}",
    "endless sweep": b"hydra: {overrides: {task: ['a=range(1,1e12)', 'b=range(1,2,0)']}}",
    "many jobs": b"hydra: {sweeper: {params: {%s}}}"
    % b", ".join(b"k%d: '1,2,3,4,5,6,7,8,9'" % i for i in range(30)),
    "runtime": b"hydra: {runtime: {choices: [model]}}",
    "protocol": b'{"scores": 5, "ensemble": []}',
    "protocol words": b'{"scores": [1], "ensemble": {"val/f1": "x"}, "val/f1": []}',
}


@pytest.fixture
def whole(writer) -> Path:
    """A folder with two whole runs, beside which others are to be damaged."""
    for seed in (1, 2):
        overrides = {"layernorm": "post", "seed": seed}
        writer.run(f"whole/{seed}", overrides, result={"val/loss": 2.0}, metrics=LOGGED)
    return writer.root


def assert_reported(root: Path, *, drawn: bool = False) -> str:
    """The two whole runs are in the tables, nothing lies elsewhere, and no text acts."""
    before = sorted(root.rglob("*"))
    console = Console(file=io.StringIO(), width=300)
    collection = load_runs([root])
    print_summary(collection, console, against_seed=True)
    printed = console.file.getvalue()
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "2.000" in printed
    output = root / "out" / "of" / "here"
    with contextlib.nullcontext() if drawn else _without_figures():
        write_report(collection, output, against_seed=True)
    made = [path for path in root.rglob("*") if path not in before]
    assert all(path.is_relative_to(root / "out") for path in made)
    for name in ("table.md", "report.html", "table.csv", "runs.csv"):
        text = (output / name).read_text(encoding="utf-8")
        assert text.replace("\n", "").isprintable(), name
    for name in ("table.csv", "runs.csv"):
        frame = pd.read_csv(output / name, dtype=str, keep_default_na=False)
        cells = [*frame.columns, *frame.to_numpy().ravel()]
        assert not any(cell.startswith(("=", "+", "@")) for cell in cells)
    return printed


@contextlib.contextmanager
def _without_figures() -> Iterator[None]:
    """Figures take most of the time: one value of each kind is drawn, in a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydratron.report.document.draw_figures", lambda *_, **__: [])
        yield


@pytest.mark.parametrize("key", RESULT)
def test_no_value_of_a_field_ends_the_report(writer, whole: Path, key: str) -> None:
    for value, (number, command) in zip(WRONG, enumerate(cycle(COMMANDS)), strict=False):
        path = writer.run(f"broken{number}", {}, metrics=LOGGED)
        text = json.dumps(RESULT | {"command": command, key: value})
        (path / "result.json").write_text(text)
    printed = assert_reported(whole)
    listed = sum(line.startswith("unreadable: ") for line in printed.splitlines())
    assert listed == 0 or f"{listed} unreadable" in printed
    if key in READ:
        assert listed > 10, printed


@pytest.mark.parametrize("name", FILES)
def test_no_content_of_a_file_ends_the_report(writer, whole: Path, name: str) -> None:
    for kind in (*CONTENTS, "a directory", "a pipe"):
        path = writer.run(f"{kind}/seeds/run", {}, result={}, metrics=LOGGED) / name
        path.unlink(missing_ok=True)
        if kind == "a directory":
            path.mkdir()
        elif kind == "a pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(CONTENTS[kind])
    printed = assert_reported(whole)
    assert not Path("owned").exists()
    listed = [line for line in printed.splitlines() if line.startswith("unreadable: ")]
    assert all(Path(name).name in line for line in listed)
    # result.json has the overrides too
    assert len(listed) >= (0 if "overrides" in name else 3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of sums beyond 1e308
def test_figures_of_hostile_words_are_drawn_and_nowhere_else(writer, whole: Path) -> None:
    for number, text in enumerate(("$\\frac$\n", "../../../x")):
        overrides = {"layernorm": text, "optimizer.lr": text, "model.num_layers": text}
        result = {"val/loss": 2.5 + number, "num_parameters": 10_000 * (number + 1)}
        metrics = "step,train/loss,train/grad_norm/layer_00\n1,1e308,inf\n2,-1e308,0\n3,nan,1\n"
        writer.run(f"words{number}", overrides, result=result, metrics=metrics)
        result = {"command": "finetune", "val/accuracy": 0.5 + number / 10}
        writer.run(f"scores{number}", {"task": text}, result=result)
        path = writer.run(f"path{number}", {}, metrics=LOGGED)
        (path / "result.json").write_text(json.dumps(RESULT | {"command": f"../../../x{number}"}))
    printed = assert_reported(whole, drawn=True)
    assert printed.count("unreadable: path") == 2
    drawn = {path.stem for path in (whole / "out/of/here").glob("*.svg")}
    assert {"pretrain_loss_curves", "pretrain_divergence_map", "finetune_val_accuracy"} <= drawn
