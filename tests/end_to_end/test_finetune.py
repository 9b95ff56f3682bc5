"""`hydratron finetune`, `evaluate` and `protocol` as a user calls them, on tiny tasks."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.numpy import load_file

from hydratron.commands import finetune as finetune_command
from hydratron.launch import configuration_directory
from tests.end_to_end.conftest import SCRIPT, metrics, result
from tests.tasks import write_baseline, write_bert, write_mnli, write_race, write_squad

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ["data.global_batch_size=8", "trainer.log_every=1", "task.max_seq_len=48"]
MNLI = ["task=mnli", "task.train_path=train.jsonl", "task.validation_path=dev_matched.jsonl"]
SQUAD2 = [
    "task=squad2",
    "task.train_path=train-v2.0.json",
    "task.validation_path=dev-v2.0.json",
    "+task.max_query_len=8",
    "task.doc_stride=8",
]
RACE = [
    "task=race",
    "task.train_path=train.race.jsonl",
    "task.validation_path=dev.race.jsonl",
    "task.max_question_len=16",
]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The files that the commands name, in the directory they run in."""
    torch.manual_seed(1)
    write_bert(tmp_path / "bert")
    write_mnli(tmp_path / "train.jsonl", 32)
    write_mnli(tmp_path / "dev_matched.jsonl", 23)
    write_squad(tmp_path / "train-v2.0.json", 6, version="2.0")
    write_squad(tmp_path / "dev-v2.0.json", 7, version="2.0")
    write_race(tmp_path / "train.race.jsonl", 8)
    write_race(tmp_path / "dev.race.jsonl", 7)
    return tmp_path


def finetune(hydratron: Run, run: str, *arguments: str) -> None:
    done = hydratron("finetune", *SMALL, *arguments, f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr


def test_a_finetuned_run_evaluates_to_its_own_scores(in_process: Run, inputs: Path) -> None:
    """Finetuned at TP 2, evaluated at TP 1 and by itself in an ensemble of one."""
    finetune(in_process, "run", *SQUAD2, "checkpoint=bert", "parallel=tp2", "task.epochs=1")
    found = result(inputs / "run")
    assert found["task"] == "squad2"
    assert found["tensor_parallel_size"] == 2
    assert found["selection_metric"] == "val/f1"
    answers = json.loads((inputs / "run/predictions/validation.json").read_text())
    assert len(answers) == 14
    for name, what in (("again", "checkpoint=run"), ("mean", "runs=[run]")):
        done = in_process("evaluate", what, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
        scores = {k: v for k, v in result(inputs / name).items() if k.startswith("val/")}
        assert scores
        for key, value in scores.items():
            assert value == pytest.approx(found[key], abs=1e-4), (name, key)
        path = inputs / name / "predictions/validation.json"
        assert json.loads(path.read_text()) == answers
        assert f"val/f1 {found['val/f1']:.5g}" in done.stdout
    done = in_process("evaluate", "runs=[run,./run]", "hydra.run.dir=twice")
    assert done.returncode == 2, done.stderr
    assert "runs= names run twice" in done.stderr
    assert len(metrics(inputs / "run")) == found["steps"]


@pytest.mark.slow
def test_finetuning_goes_on_after_a_kill(hydratron: Run, inputs: Path) -> None:
    settings = [*SMALL, *MNLI, "checkpoint=bert", "trainer.checkpoint_every=2"]
    settings += ["optimizer.schedule=constant", "optimizer.warmup_steps=1"]
    process = subprocess.Popen(
        [SCRIPT, "finetune", *settings, "task.epochs=10000", "hydra.run.dir=run"],
        cwd=inputs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoint = inputs / "run/checkpoints"
    deadline = time.monotonic() + 90
    while not (checkpoint / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    step = int((checkpoint / "last").resolve().name.removeprefix("step-"))
    length = f"trainer.max_steps={step + 3}"
    again = hydratron("finetune", "resume=run", length)
    assert again.returncode == 0, again.stderr
    finetune(hydratron, "whole", *settings, length)
    keys = ["step", "train/loss", "train/grad_norm"]
    run, whole = metrics(inputs / "run")[keys], metrics(inputs / "whole")[keys]
    assert run.equals(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "albert", "xlnet"])
def test_encoders_of_transformers_run_through_the_same_commands(
    kind: str, hydratron: Run, inputs: Path
) -> None:
    write_baseline(inputs / kind, kind)
    model = ["model=huggingface", f"model.path={kind}", "task.epochs=1"]
    task = {"roberta": MNLI, "albert": RACE, "xlnet": SQUAD2}[kind]
    finetune(hydratron, "run", *model, *task)
    done = hydratron("evaluate", "checkpoint=run", "hydra.run.dir=again")
    assert done.returncode == 0, done.stderr
    found, again = result(inputs / "run"), result(inputs / "again")
    assert again[found["selection_metric"]] == pytest.approx(found[found["selection_metric"]])


WRONG = [
    (["task.train_path=none.jsonl"], "none.jsonl: no such file"),
    (["task.train_path=bad.jsonl"], "bad.jsonl:2: label 'maybe' is not one of"),
    (["checkpoint=nowhere/x/y"], "nowhere/x/y does not exist"),
    ([*RACE, "checkpoint=run"], "task race needs a head of 1 outputs"),
    (
        ["model=huggingface", "model.path=bert", "parallel=tp2"],
        "model=huggingface runs on one device",
    ),
    (["model=huggingface"], "model=huggingface needs model.path"),
    (["data.global_batch_size=7", "parallel=dp2"], "7 is not divisible by data_parallel"),
    (["+task.epoch=3"], "unknown key task.epoch"),
    (["trainer.precision=bf16-true"], "trainer.precision bf16-true is for pretraining: finetune"),
    (["trainer.precision=fp8"], "trainer.precision fp8 needs a GPU"),
]


def prepare(arguments: list[str]) -> None:
    """What the command does before anything runs."""
    given = {a.partition("=")[0]: a for a in [*SMALL, *MNLI, "checkpoint=bert", *arguments]}
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        config = compose("finetune", list(given.values()))
    finetune_command.prepare(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))


def test_wrong_input_is_named_before_anything_runs(
    in_process: Run, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(in_process, "run", *MNLI, "checkpoint=bert", "trainer.max_steps=1")
    rows = (inputs / "train.jsonl").read_text().splitlines()
    rows[1] = rows[1].replace("contradiction", "maybe")
    (inputs / "bad.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(inputs)
    prepare([])
    for arguments, message in WRONG:
        with pytest.raises(ValueError, match=re.escape(message)):
            prepare(arguments)
    shutil.rmtree(inputs / "run/predictions")
    done = in_process("evaluate", "runs=[run]")
    assert done.returncode == 2
    assert "has not been evaluated on that split" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = in_process("evaluate", "checkpoint=bert")
    assert done.returncode == 2
    assert "bert is no finetuned run" in done.stderr


@pytest.mark.slow
def test_the_protocol_is_grid_median_and_ensemble(hydratron: Run, inputs: Path) -> None:
    shutil.copy(inputs / "dev_matched.jsonl", inputs / "test_matched.jsonl")
    arguments = [*SMALL[1:], *MNLI, "checkpoint=bert", "task.test_path=test_matched.jsonl"]
    arguments += ["task.epochs=2", "data.global_batch_size=8,16", "optimizer.lr=1e-3,3e-3"]
    done = hydratron("protocol", *arguments, "output=out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((inputs / "out/protocol.json").read_text())
    grid = [result(inputs / f"out/grid/{i}") for i in range(4)]
    top = max(run["val/accuracy_matched"] for run in grid)
    chosen = next(run for run in grid if run["val/accuracy_matched"] == top)
    for key, value in summary["chosen"].items():
        assert chosen["overrides"][key] == value
    seeds = [result(inputs / f"out/seeds/{i}") for i in range(5)]
    assert [run["seed"] for run in seeds] == [1, 2, 3, 4, 5]
    assert {run["overrides"]["optimizer.lr"] for run in seeds} == {
        chosen["overrides"]["optimizer.lr"]
    }
    scores = [run["val/accuracy_matched"] for run in seeds]
    assert summary["val/accuracy_matched"] == statistics.median(scores)
    median_run = inputs / summary["median_run"]
    assert result(median_run)["val/accuracy_matched"] == statistics.median(scores)
    # the test rows are the development rows here
    assert summary["test/accuracy_matched"] == statistics.median(scores)
    logits = [
        load_file(inputs / f"out/seeds/{i}/predictions/validation_matched.safetensors")
        for i in range(5)
    ]
    stacked = np.stack([run["logits.values"].reshape(23, 3) for run in logits]).astype(np.float64)
    shares = np.exp(stacked) / np.exp(stacked).sum(-1, keepdims=True)
    names = ("contradiction", "entailment", "neutral")
    said = [names[i] for i in shares.mean(0).argmax(-1)]
    rows = [json.loads(line) for line in (inputs / "dev_matched.jsonl").read_text().splitlines()]
    right = np.mean([row["label"] == label for row, label in zip(rows, said, strict=True)])
    assert summary["ensemble"]["val/accuracy_matched"] == pytest.approx(right)
    written = (inputs / "out/ensemble/predictions/validation_matched.tsv").read_text().splitlines()
    assert written[1:] == [f"{i}\t{label}" for i, label in enumerate(said)]
    report = hydratron("report", "out/seeds", "--against", "seed")
    assert report.returncode == 0, report.stderr
    assert "Megatron-3.9B" in report.stdout
    rows = (inputs / "out/seeds/report/table.md").read_text()
    assert f"| ours: bert, median of 5 | {100 * statistics.median(scores):.1f} |" in rows
