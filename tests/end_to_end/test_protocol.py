"""`hydratron protocol` on a few real rows: a grid of 2 x 2, five seeds, median, ensemble, report.

Scores are computed again from the runs' files with nothing of the project's.
"""

import json
import re
import shutil
import statistics
import string
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.end_to_end.conftest import SCRIPT, result
from tests.tasks import write_bert
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow
GRID = ["optimizer.lr=1e-3,3e-3", "data.global_batch_size=8,16", "task.epochs=2"]
LETTERS = "ABCD"
Score = Callable[[Mapping[str, str]], float]


def protocol(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the protocol in `folder`; return its summary."""
    done = subprocess.run(
        [SCRIPT, "protocol", *arguments, "checkpoint=bert", *GRID, "trainer.log_every=1",
         "output=out"],
        cwd=folder, capture_output=True, text=True, timeout=4 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out/protocol.json").read_text())


def answers(run: Path, split: str) -> dict[str, str]:
    return json.loads((run / f"predictions/{split}.json").read_text())


def check_choices(folder: Path, summary: dict[str, Any], score: Score, percent: float) -> Path:
    """Grid, seeds and median by `score` of the predictions; return the median run."""
    metric = summary["selection_metric"]
    grid = {folder / f"out/grid/{i}": 0.0 for i in range(4)}
    settings = set()
    for run in grid:
        grid[run] = score(answers(run, "validation"))
        found = result(run)
        assert found["seed"] == 1
        assert found[metric] * percent == pytest.approx(grid[run], abs=1e-9)
        settings.add(tuple(found["overrides"][key] for key in sorted(summary["chosen"])))
    assert len(settings) == 4
    winner = result(max(grid, key=grid.__getitem__))["overrides"]
    assert {key: winner[key] for key in summary["chosen"]} == summary["chosen"]
    seeds = [folder / f"out/seeds/{i}" for i in range(5)]
    assert [result(run)["seed"] for run in seeds] == [1, 2, 3, 4, 5]
    for run in seeds:
        overrides = result(run)["overrides"]
        assert {key: overrides[key] for key in summary["chosen"]} == summary["chosen"]
    scores = [score(answers(run, "validation")) for run in seeds]
    assert len(set(scores)) > 1, "seeds that change nothing say nothing of a median"
    assert [x * percent for x in summary["scores"]] == pytest.approx(scores)
    assert summary[metric] * percent == pytest.approx(statistics.median(scores))
    chosen = folder / summary["median_run"]
    assert score(answers(chosen, "validation")) == statistics.median(scores)
    return chosen


def report_rows(folder: Path) -> dict[str, list[str]]:
    """The cells of the report's tables by their first one."""
    command = [SCRIPT, "report", "out/seeds", "--against", "seed"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "Megatron-3.9B" in done.stdout
    lines = (folder / "out/seeds/report/table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in rows}


def mean_of_softmax(logits: Sequence[np.ndarray]) -> np.ndarray:
    shares = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits]
    return np.mean(shares, axis=0)


def write_model(folder: Path, shared_data: Path) -> None:
    """A small random BERT with the real vocabulary."""
    torch.manual_seed(1)
    vocabulary = shared_data / "vocab/bert-uncased/vocab.txt"
    size = len(vocabulary.read_text(encoding="utf-8").splitlines())
    write_bert(folder / "bert", vocab_size=size, max_position_embeddings=128)
    shutil.copy(vocabulary, folder / "bert/vocab.txt")


def test_race_by_the_protocol(shared_data: Path, tmp_path: Path) -> None:
    """Its test scores are those of the median run's checkpoint, and of the ensemble."""
    write_model(tmp_path, shared_data)
    passages = {
        level: (shared_data / f"race/dev.{level}.jsonl").read_text(encoding="utf-8").splitlines()
        for level in ("middle", "high")
    }
    parts = {"train": slice(0, 8), "dev": slice(8, 20), "test": slice(20, 32)}
    gold: dict[str, dict[str, str]] = {}
    for name, part in parts.items():
        lines = [line for rows in passages.values() for line in rows[part]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = [json.loads(line) for line in lines]
        gold[name] = {f"{r['id']}-{k}": a for r in rows for k, a in enumerate(r["answers"])}

    def accuracy(split: str, said: Mapping[str, str], level: str = "") -> float:
        right = gold[split]
        assert said.keys() == right.keys()
        return 100 * statistics.mean(said[k] == a for k, a in right.items() if k.startswith(level))

    summary = protocol(
        tmp_path, "task=race", "task.train_path=train.jsonl", "task.validation_path=dev.jsonl",
        "task.test_path=test.jsonl", "task.max_seq_len=128", "task.max_question_len=48",
    )  # fmt: skip
    chosen = check_choices(tmp_path, summary, lambda said: accuracy("dev", said), 100)
    said = answers(tmp_path / "out/test" / chosen.name, "test")
    for name, level in (("", ""), ("_middle", "middle"), ("_high", "high")):
        found = 100 * summary[f"test/accuracy{name}"]
        assert found == pytest.approx(accuracy("test", said, level)), name
    for split, file, runs, key in (
        ("dev", "validation", "seeds", ("ensemble", "val")),
        ("test", "test", "test", ("test_ensemble", "test")),
    ):
        folders = [tmp_path / "out" / runs / str(i) for i in range(5)]
        tensors = [load_file(run / f"predictions/{file}.safetensors") for run in folders]
        logits = [t["logits.values"].astype(np.float64).reshape(-1, 4) for t in tensors]
        letters = [LETTERS[i] for i in mean_of_softmax(logits).argmax(-1)]
        mean = dict(zip(gold[split], letters, strict=True))
        assert answers(tmp_path / "out" / key[0], file) == mean
        found = 100 * summary[key[0]][f"{key[1]}/accuracy"]
        assert found == pytest.approx(accuracy(split, mean))
    rows = report_rows(tmp_path)
    assert rows["Megatron-3.9B"][-1] == "89.5 (91.8 / 88.6)"
    assert rows["Megatron-3.9B ensemble"][-1] == "90.9 (93.1 / 90.0)"
    expected = [f"{accuracy('test', said, level):.1f}" for level in ("", "middle", "high")]
    assert rows["ours: bert, median of 5"][-1] == "{} ({} / {})".format(*expected)
    expected = [f"{accuracy('test', mean, level):.1f}" for level in ("", "middle", "high")]
    assert rows["ours: bert, ensemble of 5"][-1] == "{} ({} / {})".format(*expected)


def words(text: str) -> list[str]:
    """Without case, punctuation and articles, as SQuAD compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(said: str, right: str) -> float:
    """F1 of the words that two answers share."""
    one, other = words(said), words(right)
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other)) if common else float(one == other)


def test_squad_by_the_protocol(shared_data: Path, tmp_path: Path) -> None:
    write_model(tmp_path, shared_data)
    document = json.loads((shared_data / "squad/dev-v1.1.json").read_text(encoding="utf-8"))
    paragraphs = [p for article in document["data"] for p in article["paragraphs"]]
    for name, part in (("train", paragraphs[:6]), ("dev", paragraphs[6:12])):
        cut = {"version": "1.1", "data": [{"title": "cut", "paragraphs": part}]}
        (tmp_path / f"{name}-v1.1.json").write_text(json.dumps(cut), encoding="utf-8")
    right = {
        qa["id"]: [a["text"] for a in qa["answers"]] for p in paragraphs[6:12] for qa in p["qas"]
    }

    def f1(said: Mapping[str, str]) -> float:
        assert said.keys() == right.keys()
        return 100 * statistics.mean(max(overlap(said[k], a) for a in right[k]) for k in right)

    summary = protocol(
        tmp_path, "task=squad1", "task.train_path=train-v1.1.json",
        "task.validation_path=dev-v1.1.json", "task.max_seq_len=96", "task.doc_stride=32",
    )  # fmt: skip
    check_choices(tmp_path, summary, f1, 1)
    folders = [tmp_path / f"out/seeds/{i}" for i in range(5)] + [tmp_path / "out/ensemble"]
    tensors = [load_file(run / "predictions/validation.safetensors") for run in folders]
    for name in ("start.values", "end.values"):
        mean = np.mean([t[name].astype(np.float64) for t in tensors[:5]], axis=0)
        assert np.allclose(tensors[5][name], mean, atol=1e-6), name  # float32 on disk
    said = answers(tmp_path / "out/ensemble", "validation")
    assert summary["ensemble"]["val/f1"] == pytest.approx(f1(said))
    rows = report_rows(tmp_path)
    assert rows["Megatron-3.9B"][2:4] == ["95.5 / 90.0", "91.2 / 88.5"]
    exact = statistics.median(result(run)["val/exact_match"] for run in folders[:5])
    assert rows["ours: bert, median of 5"][2] == f"{summary['val/f1']:.1f} / {exact:.1f}"
    assert rows["ours: bert, ensemble of 5"][2].startswith(f"{f1(said):.1f} / ")
