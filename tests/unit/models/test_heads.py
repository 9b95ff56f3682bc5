"""Heads on an encoder: losses against their definitions, padding, dropout's own stream."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydratron.models.bert import BertEncoder
from hydratron.models.config import ModelConfig
from hydratron.models.heads import Classifier, ReplicatedDropout, SpanExtractor, seed_dropout

CONFIG = ModelConfig(
    family="bert",
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    vocab_size=24,
    max_seq_len=16,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
CPU = torch.device("cpu")


def randomized(network: Any) -> Any:
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def classifier(num_labels: int = 3, dropout: float = 0.0) -> Classifier:
    return randomized(
        Classifier(BertEncoder(CONFIG), CONFIG.hidden_size, num_labels=num_labels, dropout=dropout)
    )


def spans(*, answerability: bool) -> SpanExtractor:
    encoder = BertEncoder(CONFIG)
    return randomized(
        SpanExtractor(encoder, CONFIG.hidden_size, answerability=answerability, dropout=0.0)
    )


def batch_of(*shape: int) -> dict[str, Tensor]:
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 0, -2:] = False
    return {
        "input_ids": torch.randint(5, 24, shape),
        "token_type_ids": torch.randint(2, shape),
        "attention_mask": mask,
    }


def test_classification_loss_is_the_cross_entropy_of_the_pooled_token() -> None:
    network = classifier()
    batch = batch_of(5, 8) | {"labels": torch.tensor([0, 1, 2, -100, 1])}
    _, pooled = network.encoder(*list(batch.values())[:2], batch["attention_mask"])
    logits = network.head(pooled)
    kept = torch.tensor([0, 1, 2, 4])
    expected = F.cross_entropy(logits[kept], batch["labels"][kept], reduction="sum")
    assert torch.allclose(network(batch)["task"], expected)
    assert int(network.loss_counts(batch)["task"]) == 4


def test_choices_are_scored_as_rows_of_their_own() -> None:
    network = classifier(num_labels=1)
    batch = batch_of(3, 4, 8) | {"labels": torch.tensor([0, 3, 1])}
    found = network.logits(batch)
    assert found.shape == (3, 4)
    for row in range(3):
        for choice in range(4):
            one = {name: batch[name][row, choice][None] for name in list(batch)[:3]}
            assert torch.allclose(network.logits(one)[0, 0], found[row, choice], atol=1e-6)
    expected = F.cross_entropy(found, batch["labels"], reduction="sum")
    assert torch.allclose(network(batch)["task"], expected)


@pytest.mark.parametrize("answerability", [False, True])
def test_span_losses_are_those_of_start_end_and_answerability(answerability: bool) -> None:
    network = spans(answerability=answerability)
    positions = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    batch = batch_of(2, 8) | positions | {"answerable": torch.tensor([1, 0])}
    start, end, answerable = network.logits(batch)
    losses = network(batch)
    expected = -sum(
        F.log_softmax(logits, dim=-1)[row, positions[name][row]]
        for logits, name in ((start, "start_positions"), (end, "end_positions"))
        for row in range(2)
    )
    assert torch.allclose(losses["span"], torch.as_tensor(expected) / 2)
    assert tuple(losses) == network.losses == tuple(network.loss_counts(batch))
    if answerable is not None:
        probability = torch.sigmoid(answerable)
        right = torch.stack([probability[0], 1 - probability[1]])
        assert torch.allclose(losses["answerability"], -right.log().sum(), rtol=1e-5)


def test_padding_changes_no_span_logit_and_takes_no_probability() -> None:
    network = spans(answerability=True).eval()
    batch = batch_of(2, 8)
    batch["attention_mask"][:] = True
    padded = {name: F.pad(column, (0, 4)) for name, column in batch.items()}
    short, long = network.predict(batch), network.predict(padded)
    for name in ("start", "end"):
        assert torch.allclose(short[name], long[name][:, :8], atol=1e-5)
        assert (long[name].softmax(-1)[:, 8:] == 0).all()
    assert torch.allclose(short["answerable"], long["answerable"], atol=1e-5)


def test_squad_1_leaves_the_pooler_alone() -> None:
    frozen = {n for n, p in spans(answerability=False).named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pooler.weight", "encoder.pooler.bias"}
    assert all(p.requires_grad for p in spans(answerability=True).parameters())


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    dropout = ReplicatedDropout(0.25)
    x = torch.ones(200_000)
    y = dropout(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(y.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_stream_depends_on_the_replica_and_not_on_the_default_stream() -> None:
    def draw(dp_rank: int, default_seed: int) -> Tensor:
        network = classifier(dropout=0.5)
        seed_dropout(network, seed=1, dp_rank=dp_rank, device=CPU)
        torch.manual_seed(default_seed)
        return network.dropout(torch.ones(64))

    assert torch.equal(draw(0, 1), draw(0, 2))
    assert not torch.equal(draw(0, 1), draw(1, 1))
