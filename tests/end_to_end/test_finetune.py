"""`hydratron finetune`, `evaluate` and `protocol` as a user calls them, on tiny tasks."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from safetensors.numpy import load_file

from hydratron.commands import evaluate as evaluate_command
from hydratron.commands import finetune as finetune_command
from hydratron.commands import protocol as protocol_command
from hydratron.data.tokenizer import load_tokenizer
from hydratron.launch import configuration_directory
from tests.end_to_end.conftest import SCRIPT, Spawn, metrics, result
from tests.tasks import write_baseline, write_bert, write_mnli, write_race, write_squad
from tests.waiting import wait_for

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ["data.global_batch_size=8", "trainer.log_every=1", "task.max_seq_len=48"]
MNLI = ["task=mnli", "task.train_path=train.jsonl", "task.validation_path=dev_matched.jsonl"]
SQUAD2 = [
    "task=squad2",
    "task.train_path=train-v2.0.json",
    "task.validation_path=dev-v2.0.json",
    "task.max_query_len=8",
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
    check_other_questions(in_process, inputs, found)
    done = in_process("evaluate", "runs=[run,./run]", "hydra.run.dir=twice")
    assert done.returncode == 2, done.stderr
    assert "runs= names run twice" in done.stderr
    assert len(metrics(inputs / "run")) == found["steps"]


def check_other_questions(in_process: Run, inputs: Path, found: dict[str, Any]) -> None:
    """Their scores are at the threshold that the run tuned in its validation, not at their own."""
    write_squad(inputs / "other.json", 3, version="2.0")
    files = {"test": "task.test_path=other.json", "validation": "task.validation_path=other.json"}
    for split, path in files.items():
        name = f"other_{split}"
        done = in_process("evaluate", "checkpoint=run", f"split={split}", path, "task.num_best=5",
                          f"hydra.run.dir={name}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        prefix = {"validation": "val"}.get(split, split)
        threshold = result(inputs / name)[f"{prefix}/null_threshold"]
        assert threshold == found["val/null_threshold"], split
        answers = json.loads((inputs / name / f"predictions/{split}.json").read_text())
        odds = json.loads((inputs / name / f"predictions/{split}.null_odds.json").read_text())
        assert len(answers) == 6
        assert all((answers[k] == "") == (odds[k] > threshold) for k in answers)
        assert json.loads((inputs / name / "task.json").read_text())["num_best"] == 5
    text = (inputs / "run/result.json").read_text()
    for wrong in (text.replace('"ok"', '"failed"'), text.replace("val/null_threshold", "x")):
        (inputs / "run/result.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"task.null_threshold= is missing: run has no"):
            evaluate("checkpoint=run", "split=test", "task.test_path=other.json")
    (inputs / "run/result.json").write_text(text)
    with pytest.raises(ValueError, match=r"run is finetuned on squad2: leave out task="):
        evaluate("checkpoint=run", "task=squad2")
    with pytest.raises(ValueError, match=r"runs= and checkpoint=run: give one of them"):
        evaluate("checkpoint=run", "runs=[run]")
    with pytest.raises(ValueError, match=r"task.num_best of other_test is 5, of run 20"):
        evaluate("runs=[run,other_test]")


@pytest.mark.slow
def test_finetuning_goes_on_after_a_kill(hydratron: Run, spawn: Spawn, inputs: Path) -> None:
    settings = [*SMALL, *MNLI, "checkpoint=bert", "trainer.checkpoint_every=2"]
    settings += ["optimizer.schedule=constant", "optimizer.warmup_steps=1"]
    process = spawn(SCRIPT, "finetune", *settings, "task.epochs=10000", "hydra.run.dir=run")
    checkpoint = inputs / "run/checkpoints"
    wait_for((checkpoint / "last").exists, of=process)
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
    (["task._target_=collections.OrderedDict"], "collections.OrderedDict is not one of hydratron."),
    (["task._target_=hydratron.training.zeroshot.LambadaTask"], "LambadaTask is not one of"),
    (["task.patience=0"], "task.patience 0 is not positive"),
    (["data.global_batch_size=100"], "data.global_batch_size 100 is more than the 32 training"),
    (
        ["task.validation_path=one_matched.jsonl", "parallel=dp2"],
        "validation_matched has 1 rows, fewer than parallel.data_parallel_size 2",
    ),
    (["data.cache_dir=/proc/none"], "data.cache_dir '/proc/none': No such file"),
    (
        ["optimizer.shard=true", "trainer=gpu", "trainer.precision=16-mixed"],
        "optimizer.shard works with every trainer.precision but 16-mixed",
    ),
    (["trainer.precision=bf16-true"], "trainer.precision bf16-true is for pretraining: finetune"),
    (["tokenizer=left"], "has padding_side 'left': a BERT's first token is [CLS]"),
    (
        ["trainer=gpu", "trainer.precision=fp8"],
        "trainer.precision fp8 is for pretraining: finetune",
    ),
    (["trainer.precision=fp8"], "trainer.precision fp8 needs a GPU"),
]


def composed(command: str, arguments: list[str]) -> dict[str, Any]:
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        config = compose(command, arguments)
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def prepare(arguments: list[str]) -> None:
    """What the command does before anything runs."""
    given = {a.partition("=")[0]: a for a in [*SMALL, *MNLI, "checkpoint=bert", *arguments]}
    finetune_command.prepare(composed("finetune", list(given.values())))


def evaluate(*arguments: str) -> None:
    """The same of `hydratron evaluate`."""
    evaluate_command.prepare(composed("evaluate", list(arguments)))


def test_wrong_input_is_named_before_anything_runs(
    in_process: Run, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(in_process, "run", *MNLI, "checkpoint=bert", "trainer.max_steps=1")
    left = load_tokenizer(str(inputs / "bert"))
    left.padding_side = left.init_kwargs["padding_side"] = "left"  # what save_pretrained writes
    left.save_pretrained(inputs / "left")
    rows = (inputs / "train.jsonl").read_text().splitlines()
    rows[1] = rows[1].replace("contradiction", "maybe")
    (inputs / "bad.jsonl").write_text("\n".join(rows))
    write_mnli(inputs / "one_matched.jsonl", 1)
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    prepare([])
    for arguments, message in WRONG:
        with pytest.raises(ValueError, match=re.escape(message)):
            prepare(arguments)
    check_foreign_tasks(inputs / "run/task.json", monkeypatch)
    shutil.rmtree(inputs / "run/predictions")
    done = in_process("evaluate", "runs=[run]")
    assert done.returncode == 2
    assert "has not been evaluated on that split" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = in_process("evaluate", "checkpoint=bert")
    assert done.returncode == 2
    assert "bert is no finetuned run" in done.stderr


def check_foreign_tasks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory of somebody else names a class: it is not even imported."""
    folder = file.parents[1]
    for name in ("payload", "zeroshot_payload"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(folder)
    text = file.read_text()
    for target in ("payload.Task", "zeroshot_payload.Task", "os.system"):
        file.write_text(json.dumps(json.loads(text) | {"_target_": target}))
        for what in (["checkpoint=run"], ["runs=[run]"]):
            with pytest.raises(ValueError, match=f"task._target_ {target} is not one of"):
                evaluate(*what)
        with pytest.raises(ValueError, match=f"task._target_ {target} is not one of"):
            evaluate("checkpoint=bert", f"+task._target_={target}")
    for junk, message in (("[1]", "describes no task"), ("{", "task.json:1: not JSON")):
        file.write_text(junk)
        with pytest.raises(ValueError, match=message):
            evaluate("checkpoint=run")
    file.write_text(text)


PROTOCOL_WRONG = {
    "=1": "'=1' is not KEY=VALUE",
    "--help": "'--help' is not KEY=VALUE",
    "resume=x": "resume= is not for a protocol",
    "+hydra.sweep.dir=x": "+hydra.sweep.dir= is not for a protocol",
    "seed=1,x": "seed 'x' is not an integer",
    "seed=": "seed '' is not an integer",
    "seed=2,1,2": "seed=2,1,2 names a seed twice",
    "seed=1 seed=2": "seed= is given twice: 1 and 2",
    "checkpoint=none/x/y": "checkpoint none/x/y does not exist",
    "checkpoint=null": "checkpoint= is missing",
    "optimizer.lr=1e-3,abc": "optimizer.lr 'abc' is not a number",
    "task.test_path=none.jsonl": "none.jsonl: no such file",
    "output=/proc/x": "output=/proc/x: cannot be written to",
    "output=bert": "output=bert is not empty and holds no protocol's settings.json",
}


def test_a_protocol_is_continued_by_its_own_command_alone(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong is said before any job; the jobs themselves are left out."""
    jobs: list[tuple[str, ...]] = []

    def interrupted(*arguments: str) -> None:
        jobs.append(arguments)
        raise InterruptedError

    def protocol(*arguments: str, **changes: str) -> None:
        given = dict(a.split("=", 1) for a in [*SMALL, *MNLI, *arguments])
        protocol_command.main([f"{key}={value}" for key, value in (given | changes).items()])

    monkeypatch.chdir(inputs)
    monkeypatch.setattr(protocol_command, "hydratron", interrupted)
    shutil.copytree("bert", "bert2")
    for wrong, message in PROTOCOL_WRONG.items():
        words = wrong.split()
        given = {a.partition("=")[0]: a for a in [*SMALL, *MNLI, "checkpoint=bert", "output=out"]}
        with pytest.raises((ValueError, HydraException), match=re.escape(message)):
            protocol_command.main(
                [*(given | {words[0].partition("=")[0]: words[0]}).values(), *words[1:]]
            )
    assert jobs == []
    assert not Path("out").exists()
    first = ["checkpoint=bert", "optimizer.lr=1e-3,3e-3", "seed=1,2", "output=out"]
    same = [f"checkpoint={inputs}/bert", "optimizer.lr=choice(0.001,0.003)", "seed=range(1,3)",
            f"output={inputs}/out", "task.train_path=./train.jsonl"]  # fmt: skip
    for arguments in (first, same):
        with pytest.raises(InterruptedError):
            protocol(*arguments)
    assert [job[:2] for job in jobs] == [("finetune", "-m")] * 2
    kept = (inputs / "out/settings.json").read_text()
    for key, value, message in (
        ("checkpoint", "bert2", f"checkpoint {inputs}/bert there, {inputs}/bert2 here"),
        ("optimizer.lr", "1e-1", "optimizer.lr [0.001, 0.003] there, 0.1 here"),
        ("seed", "3,4,5", "seed [1, 2] there, [3, 4, 5] here"),
        ("task.max_seq_len", "32", "task.max_seq_len 48 there, 32 here"),
        ("task.patience", "2", "task.patience None there, 2 here"),
        ("hydra/launcher", "joblib", "hydra/launcher None there, hydra/launcher=joblib here"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"out holds another protocol: {message}")):
            protocol(*first, **{key: value})
    assert len(jobs) == 2
    assert (inputs / "out/settings.json").read_text() == kept


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
