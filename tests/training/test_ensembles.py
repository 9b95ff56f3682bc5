"""Ensembles of scores on disk: which row of one run is which of another's."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hydratron.data.tokenizer import load_tokenizer
from hydratron.training.evaluation import load_ensemble, score_ensemble
from hydratron.training.task_data import BatchConfig, TaskData
from hydratron.training.tasks import RaceTask, SquadTask, write_outputs
from tests.training.test_finetuning import task_of, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensembles")
    torch.manual_seed(1)
    write_inputs(folder)
    return folder


def reversed_rows(path: Path) -> Path:
    """Write the rows of a file in the opposite order beside it."""
    other = path.with_name(f"reversed-{path.name}")
    if path.suffix == ".jsonl":
        other.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
        return other
    document = json.loads(path.read_text())
    document["data"][0]["paragraphs"].reverse()
    other.write_text(json.dumps(document))
    return other


def perfect_scores(data: TaskData) -> dict[str, list[np.ndarray]]:
    """Logits that are right, and differ by row as those of a network do."""
    (split,) = data.splits["validation"]
    if isinstance(data.task, SquadTask):
        found: dict[str, list[np.ndarray]] = {"start": [], "end": []}
        for number, length in enumerate(split.encodings.lengths):
            for name, rows in found.items():
                place = split.encodings.values[f"{name}_positions"][number]
                rows.append(9.0 * (np.arange(length) == place))
        return found
    is_race = isinstance(data.task, RaceTask)
    labels = [row.label if is_race else row["label"] for row in split.examples]
    classes = np.eye(4 if is_race else 3)
    return {"logits": [(5.0 + i % 3) * classes[label] for i, label in enumerate(labels)]}


def validation_data(folder: Path, kind: str, path: Path, **changes: Any) -> TaskData:
    task = task_of(kind, folder, validation_path=str(path), **changes)
    batches = BatchConfig(global_batch_size=1, cache_dir=os.environ["HYDRATRON_CACHE"])
    tokenizer = load_tokenizer(str(folder / "bert"))
    return TaskData(task, batches, tokenizer, max_positions=64, groups=("validation",))


@pytest.mark.parametrize("kind", ["mnli", "race", "squad1"])
def test_an_ensemble_pairs_rows_by_what_was_read_in_whatever_order(
    kind: str, inputs: Path, tmp_path: Path
) -> None:
    """Rows of the files repeat: 23 of MNLI are of 12 kinds."""
    path = Path(task_of(kind, inputs).validation_path)
    orders = [validation_data(inputs, kind, p) for p in (path, reversed_rows(path))]
    runs = [tmp_path / "a", tmp_path / "b"]
    for data, run in zip(orders, runs, strict=True):
        (split,) = data.splits["validation"]
        write_outputs(run / "predictions", data.task, split, perfect_scores(data))
    for data in orders:
        [scores] = load_ensemble(runs, data)
        for name, rows in scores[0].items():
            for one, other in zip(rows, scores[1][name], strict=True):
                assert len(one) == len(other)
                assert one.argmax() == other.argmax()
        metrics = score_ensemble([scores], data, tmp_path / "mean")
        key = "val/f1" if kind == "squad1" else "val/accuracy"
        assert metrics[key] == (100.0 if kind == "squad1" else 1.0)


def test_an_ensemble_of_other_rows_is_refused(inputs: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join((inputs / "dev.jsonl").read_text().splitlines(keepends=True)[1:]))
    other = tmp_path / "other.jsonl"
    other.write_text((inputs / "dev.jsonl").read_text().replace("it sat", "it ran", 1))
    whole = validation_data(inputs, "mnli", inputs / "dev.jsonl")
    for path, message in (
        (short, "it has 22, and lacks 1 of the 23"),
        (other, "it has 23, and lacks 1 of the 23"),
    ):
        data = validation_data(inputs, "mnli", path)
        run = tmp_path / path.stem
        (split,) = data.splits["validation"]
        write_outputs(run / "predictions", data.task, split, perfect_scores(data))
        with pytest.raises(ValueError, match=message):
            load_ensemble([run], whole)
    # windows of other tokens are other rows, though there be as many of them
    path = inputs / "dev-v1.1.json"
    data = validation_data(inputs, "squad1", path, max_seq_len=24)
    whole = validation_data(inputs, "squad1", path, max_seq_len=25)
    (split,) = data.splits["validation"]
    write_outputs(tmp_path / "windows/predictions", data.task, split, perfect_scores(data))
    with pytest.raises(ValueError, match="other windows or tokenizer"):
        load_ensemble([tmp_path / "windows"], whole)
    file = tmp_path / "windows/predictions/validation.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != "row_keys"}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not say which rows it scores"):
        load_ensemble([tmp_path / "windows"], whole)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        load_ensemble([tmp_path / "windows"], whole)
