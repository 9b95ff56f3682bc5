"""Placements, inputs and losses of the networks on one device."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from hydratron.models.bert import BertForPretraining
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.models.transformer import TransformerLayer
from tests.parallel.twins import batch_for, build, deviation, random_values, randomize, tiny_config

TOLERANCE = 1e-12  # float64, values of size 1


def shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(parameter.shape) for parameter in network.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_post_normalises_the_embeddings_and_pre_the_last_layer(family: str) -> None:
    post = build(tiny_config(family=family, layernorm="post"))
    pre = build(tiny_config(family=family, layernorm="pre"))
    only_post = dict(post.named_parameters()).keys() - dict(pre.named_parameters()).keys()
    only_pre = dict(pre.named_parameters()).keys() - dict(post.named_parameters()).keys()
    prefix = "encoder.transformer" if family == "bert" else "transformer"
    kinds = ("weight", "bias")
    assert only_post == {f"{prefix}.embedding_layernorm.{kind}" for kind in kinds}
    assert only_pre == {f"{prefix}.final_layernorm.{kind}" for kind in kinds}
    assert shapes(post) == shapes(pre)


@pytest.mark.parametrize("layernorm", ["post", "pre"])
def test_layer_is_one_of_the_two_figures(layernorm: str) -> None:
    """Against the two formulas, written with the layer's own attention and MLP."""
    layer = TransformerLayer(tiny_config(layernorm=layernorm)).double()
    randomize(layer)
    x = random_values(12, 16, seed=1)
    shape = (3, 4)
    if layernorm == "post":  # figure 1(a): x = LN(x + f(x))
        middle = layer.attention_layernorm(x + layer.attention(x, shape, None))
        expected = layer.mlp_layernorm(middle + layer.mlp(middle))
    else:  # figure 1(b): x = x + f(LN(x))
        middle = x + layer.attention(layer.attention_layernorm(x), shape, None)
        expected = middle + layer.mlp(layer.mlp_layernorm(middle))
    assert deviation(layer(x, shape, None), expected) <= TOLERANCE


def logits_of(network: nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    assert isinstance(network, BertForPretraining | Gpt2ForPretraining)
    result = network.logits(ids, **inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("layernorm", ["post", "pre"])
def test_gpt2_sees_no_later_token_and_bert_sees_all(layernorm: str) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    changed = torch.tensor([[1, 2, 3, 9, 5]])
    for family in ("gpt2", "bert"):
        network = build(tiny_config(family=family, layernorm=layernorm))
        randomize(network)
        difference = (logits_of(network, ids) - logits_of(network, changed)).abs().amax(-1)[0]
        if family == "gpt2":
            assert (difference[:3] == 0).all()
        else:
            assert (difference[:3] > 1e-6).all()
        assert (difference[3:] > 1e-6).all()


@pytest.mark.parametrize("layernorm", ["post", "pre"])
def test_padding_does_not_change_what_stands_before_it(layernorm: str) -> None:
    network = build(tiny_config(layernorm=layernorm))
    randomize(network)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[True] * 4 + [False] * 2])
    padded = logits_of(network, ids, attention_mask=mask)[:, :4]
    assert deviation(padded, logits_of(network, ids[:, :4])) <= TOLERANCE
    other = torch.tensor([[1, 2, 3, 4, 20, 21]])
    assert torch.equal(padded, logits_of(network, other, attention_mask=mask)[:, :4])


def test_masked_positions_choose_rows_of_the_full_logits() -> None:
    network = build(tiny_config())
    randomize(network)
    ids = torch.arange(10).view(2, 5)
    positions = torch.tensor([[4, 0], [2, 2]])
    chosen = logits_of(network, ids, masked_positions=positions)
    full = logits_of(network, ids)
    for row, column in itertools.product(range(2), range(2)):
        expected = full[row, positions[row, column]]
        assert deviation(chosen[row, column], expected) <= TOLERANCE


def test_token_types_are_zero_unless_given() -> None:
    network = build(tiny_config())
    randomize(network)
    ids = torch.arange(5)[None]
    zeros, ones = (torch.full_like(ids, kind) for kind in (0, 1))
    assert torch.equal(logits_of(network, ids), logits_of(network, ids, token_type_ids=zeros))
    assert not torch.equal(logits_of(network, ids), logits_of(network, ids, token_type_ids=ones))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_sequence_longer_than_the_positions_is_refused(family: str) -> None:
    network = build(tiny_config(family=family))
    with pytest.raises(ValueError, match="sequence length 9 exceeds the model's max_seq_len 8"):
        logits_of(network, torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_losses_are_sums_so_that_micro_batches_add_up(family: str) -> None:
    config = tiny_config(family=family)
    network: Any = build(config)
    randomize(network)
    batch = batch_for(config, batch_size=4, seq_len=6, padded=True)
    halves = [{key: x[part] for key, x in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    whole, parts = network(batch), [network(half) for half in halves]
    counts = network.loss_counts(batch)
    assert set(whole) == set(network.losses) == set(counts)
    for key in whole:
        assert deviation(whole[key], parts[0][key] + parts[1][key]) <= 1e-10  # sums of about 100
        assert counts[key] == sum(network.loss_counts(half)[key] for half in halves)
    # 4 sequences with 3 masked tokens (BERT) or 6 labels (GPT-2), one of them -100
    assert counts["lm"] == (4 * 3 - 1 if family == "bert" else 4 * 6 - 1)
    if family == "bert":
        assert counts["sentence_order"] == 4


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_activation_is_the_one_that_is_named(activation: str, approximate: str) -> None:
    layer = TransformerLayer(tiny_config(activation=activation)).double()
    randomize(layer)
    x = random_values(4, 16, seed=0)
    hidden = nn.functional.gelu(layer.mlp.input(x), approximate=approximate)
    assert deviation(layer.mlp(x), layer.mlp.output(hidden)) <= TOLERANCE


def test_dropout_acts_in_training_only() -> None:
    network = build(tiny_config(hidden_dropout=0.5, attention_dropout=0.5))
    randomize(network)
    ids = torch.arange(8)[None]
    assert not torch.equal(logits_of(network, ids), logits_of(network, ids))
    network.eval()
    assert torch.equal(logits_of(network, ids), logits_of(network, ids))
