"""Finetuned networks leave as ...ForSequenceClassification and so on, and come back bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from hydratron.checkpoint.conversion import to_huggingface, to_hydratron
from hydratron.checkpoint.layouts import Head
from hydratron.checkpoint.source import read_checkpoint
from hydratron.models.bert import BertEncoder
from hydratron.models.config import ModelConfig
from hydratron.models.heads import Classifier, SpanExtractor
from hydratron.parallel.mesh import ParallelMesh
from tests.unit.checkpoint.networks import TOLERANCE, config, inputs, randomize, write_directory

LABELS = ["contradiction", "entailment", "neutral"]
TASKS: dict[str, dict[str, Any]] = {
    "mnli": {"_target_": "a.ClassificationTask", "name": "mnli", "spec": {"labels": LABELS}},
    "race": {"_target_": "a.RaceTask", "name": "race"},
    "squad1": {"_target_": "a.SquadTask", "name": "squad1"},
    "squad2": {"_target_": "a.SquadTask", "name": "squad2"},
}
ENDINGS = {
    "mnli": "ForSequenceClassification",
    "race": "ForMultipleChoice",
    "squad1": "ForQuestionAnswering",
    "squad2": "ForQuestionAnswering",
}


def build(task: str, model: ModelConfig) -> nn.Module:
    encoder, size = BertEncoder(model), model.hidden_size
    if task in ("mnli", "race"):
        return Classifier(encoder, size, num_labels=3 if task == "mnli" else 1, dropout=0.0)
    return SpanExtractor(encoder, size, answerability=task == "squad2", dropout=0.0)


def finetuned(task: str, kind: str, run: Path) -> nn.Module:
    """A run directory as `hydratron finetune` leaves it."""
    network = randomize(build(task, config(kind)))
    network.config = config(kind)
    write_directory(run, network)
    (run / ".hydra").mkdir()
    frozen = {"task": TASKS[task], "model": {"family": None}, "data": {"global_batch_size": 8}}
    (run / ".hydra/resolved.yaml").write_text(yaml.safe_dump(frozen))
    return network


def batch(task: str) -> dict[str, Tensor]:
    given = inputs(config("bert-post"))
    return {k: v[None] for k, v in given.items()} if task == "race" else given  # [1, C, S]


@pytest.mark.parametrize("kind", ["bert-post", "bert-pre"])
@pytest.mark.parametrize("task", TASKS)
def test_a_finetuned_network_gives_the_same_scores_elsewhere(
    task: str, kind: str, tmp_path: Path
) -> None:
    ours = finetuned(task, kind, tmp_path / "run")
    found = to_huggingface(read_checkpoint(tmp_path / "run"), tmp_path / "out", None)
    prefix = "Bert" if kind == "bert-post" else "MegatronBert"
    assert found["architecture"] == prefix + ENDINGS[task]
    auto = getattr(transformers, f"AutoModel{ENDINGS[task]}")
    theirs, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    given = batch(task)
    with torch.no_grad():
        output = theirs.eval()(**given | {"attention_mask": given["attention_mask"].long()})
        logits = ours.logits(given)
    if task in ("mnli", "race"):
        torch.testing.assert_close(logits, output.logits, atol=TOLERANCE, rtol=0)
    else:
        is_token = given["attention_mask"]  # ours gives padding no chance
        for left, right in zip(logits, (output.start_logits, output.end_logits), strict=False):
            torch.testing.assert_close(left[is_token], right[is_token], atol=TOLERANCE, rtol=0)
    if task == "mnli":
        assert theirs.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("task", TASKS)
def test_a_finetuned_network_comes_back_bit_for_bit(task: str, tmp_path: Path) -> None:
    ours = finetuned(task, "bert-pre", tmp_path / "run")
    to_huggingface(read_checkpoint(tmp_path / "run"), tmp_path / "out", None)
    converted = to_hydratron(read_checkpoint(tmp_path / "out"), tmp_path / "back", None)
    assert converted["missing"] == []
    again = build(task, config("bert-pre"))
    checkpoint = read_checkpoint(tmp_path / "back")
    assert checkpoint.load(again, ParallelMesh()) == []
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    # and so it can leave again as what it was
    assert to_huggingface(checkpoint, tmp_path / "again", None)["architecture"] == (
        f"MegatronBert{ENDINGS[task]}"
    )
    if task == "mnli":
        assert checkpoint.head == Head("classification", tuple(LABELS))


def test_a_card_names_the_task(tmp_path: Path) -> None:
    finetuned("race", "bert-post", tmp_path / "run")
    to_huggingface(read_checkpoint(tmp_path / "run"), tmp_path / "out", None)
    card = (tmp_path / "out/README.md").read_text()
    assert "| task | race |" in card
    assert "| tokens | not recorded |" in card
