"""BERT and GPT-2 against the transformers library, with its random weights copied across.

The copy is written here, independently of the package's own conversion.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    MegatronBertConfig,
    MegatronBertForPreTraining,
)

from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining

LAYERS, HIDDEN, HEADS, VOCAB, POSITIONS = 3, 32, 4, 96, 16
TOLERANCE = 1e-5  # the bound of design section 3: float32, kernels that add in another order
Tensors = dict[str, Tensor]


def config(family: str, layernorm: str) -> ModelConfig:
    return ModelConfig(
        family=family,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        vocab_size=VOCAB,
        max_seq_len=POSITIONS,
        layernorm=layernorm,
        activation="gelu" if family == "bert" else "gelu_tanh",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def reference(layernorm: str) -> BertForPreTraining | MegatronBertForPreTraining:
    """`eager`: the library's own attention arithmetic, not the kernel that we call too."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * HIDDEN,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }
    if layernorm == "post":
        return BertForPreTraining(BertConfig(**settings))
    return MegatronBertForPreTraining(MegatronBertConfig(**settings))


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Biases and LayerNorm too: at zeros and ones a wrong copy of them would not show."""
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.2)
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter += 1.0


def bert_tensors(theirs: Tensors, layernorm: str) -> Tensors:
    """Our names and layouts for their parameters, or for the gradients of their parameters."""
    names = {
        "encoder.transformer.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
        "encoder.transformer.position_embeddings.weight": (
            "bert.embeddings.position_embeddings.weight"
        ),
        "encoder.transformer.token_type_embeddings.weight": (
            "bert.embeddings.token_type_embeddings.weight"
        ),
        "masked_lm_head.bias": "cls.predictions.bias",
    }
    modules = {
        "encoder.pooler": "bert.pooler.dense",
        "masked_lm_head.transform": "cls.predictions.transform.dense",
        "masked_lm_head.layernorm": "cls.predictions.transform.LayerNorm",
        "sentence_order_head": "cls.seq_relationship",
    }
    is_post = layernorm == "post"
    if is_post:
        modules["encoder.transformer.embedding_layernorm"] = "bert.embeddings.LayerNorm"
    else:
        modules["encoder.transformer.final_layernorm"] = "bert.encoder.ln"
    stacked: Tensors = {}
    for i in range(LAYERS):
        ours, layer = f"encoder.transformer.layers.{i}", f"bert.encoder.layer.{i}"
        modules |= {
            f"{ours}.attention.output": f"{layer}.attention.output.dense",
            f"{ours}.mlp.input": f"{layer}.intermediate.dense",
            f"{ours}.mlp.output": f"{layer}.output.dense",
            f"{ours}.attention_layernorm": (
                f"{layer}.attention.output.LayerNorm" if is_post else f"{layer}.attention.ln"
            ),
            f"{ours}.mlp_layernorm": f"{layer}.output.LayerNorm" if is_post else f"{layer}.ln",
        }
        for kind in ("weight", "bias"):
            products = [
                f"{layer}.attention.self.{part}.{kind}" for part in ("query", "key", "value")
            ]
            stacked[f"{ours}.attention.qkv.{kind}"] = torch.stack([theirs[p] for p in products])
    for ours, module in modules.items():
        names |= {f"{ours}.{kind}": f"{module}.{kind}" for kind in ("weight", "bias")}
    return {ours: theirs[name] for ours, name in names.items()} | stacked


def gpt2_tensors(theirs: Tensors) -> Tensors:
    """Conv1D keeps its weights as [in, out], query, key and value side by side."""
    tensors = {
        "transformer.word_embeddings.weight": theirs["transformer.wte.weight"],
        "transformer.position_embeddings.weight": theirs["transformer.wpe.weight"],
    }
    modules = {"transformer.final_layernorm": "transformer.ln_f"}
    for i in range(LAYERS):
        ours, layer = f"transformer.layers.{i}", f"transformer.h.{i}"
        modules[f"{ours}.attention_layernorm"] = f"{layer}.ln_1"
        modules[f"{ours}.mlp_layernorm"] = f"{layer}.ln_2"
        products = {"attention.output": "attn.c_proj", "mlp.input": "mlp.c_fc"}
        for ending, name in (products | {"mlp.output": "mlp.c_proj"}).items():
            tensors[f"{ours}.{ending}.weight"] = theirs[f"{layer}.{name}.weight"].T
            tensors[f"{ours}.{ending}.bias"] = theirs[f"{layer}.{name}.bias"]
        weight = theirs[f"{layer}.attn.c_attn.weight"].T
        tensors[f"{ours}.attention.qkv.weight"] = weight.reshape(3, HIDDEN, HIDDEN)
        bias = theirs[f"{layer}.attn.c_attn.bias"]
        tensors[f"{ours}.attention.qkv.bias"] = bias.reshape(3, HIDDEN)
    for ours, module in modules.items():
        tensors |= {f"{ours}.{kind}": theirs[f"{module}.{kind}"] for kind in ("weight", "bias")}
    return tensors


def inputs() -> Tensors:
    """Four sequences of different lengths, their segments and masked tokens."""
    ids = torch.randint(VOCAB, (4, POSITIONS))
    lengths = torch.tensor([POSITIONS, 11, 3, 7])
    return {
        "input_ids": ids,
        "token_type_ids": (torch.arange(POSITIONS) > 5).long().expand(4, -1),
        "attention_mask": torch.arange(POSITIONS) < lengths.unsqueeze(-1),
    }


def masked_targets(attention_mask: Tensor) -> Tensors:
    """Two predictions a sequence, one of them unused in the second sequence."""
    positions = torch.tensor([[2, 15], [10, 4], [0, 1], [6, 3]])
    assert attention_mask.gather(1, positions).all()
    labels = torch.randint(VOCAB, (4, 2))
    labels[1, 1] = -100
    return {
        "masked_positions": positions,
        "masked_labels": labels,
        "sentence_order": torch.tensor([0, 1, 1, 0]),
    }


@pytest.mark.parametrize("layernorm", ["post", "pre"])
def test_bert_gives_the_logits_of_transformers(layernorm: str) -> None:
    theirs = reference(layernorm).eval()
    randomize(theirs)
    ours = BertForPretraining(config("bert", layernorm)).eval()
    ours.load_state_dict(bert_tensors(theirs.state_dict(), layernorm))
    batch = inputs()
    with torch.no_grad():
        expected = theirs(**batch | {"attention_mask": batch["attention_mask"].long()})
        lm_logits, order_logits = ours.logits(**batch)
        without_padding, _ = ours.logits(batch["input_ids"], batch["token_type_ids"])
    assert expected.prediction_logits.std() > 0.5  # large enough for the tolerance to mean much
    assert (lm_logits - without_padding).abs().max() > 0.1  # and the padding mask does act
    torch.testing.assert_close(lm_logits, expected.prediction_logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        order_logits, expected.seq_relationship_logits, atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("layernorm", ["post", "pre"])
def test_bert_gives_the_loss_and_every_gradient_of_transformers(layernorm: str) -> None:
    theirs = reference(layernorm).double()
    randomize(theirs)
    ours = BertForPretraining(config("bert", layernorm)).double()
    ours.load_state_dict(bert_tensors(theirs.state_dict(), layernorm))
    batch = inputs()
    batch |= masked_targets(batch["attention_mask"])

    sums, counts = ours(batch), ours.loss_counts(batch)
    loss = torch.stack([sums[key] / counts[key] for key in ours.losses]).sum()
    loss.backward()
    labels = torch.full_like(batch["input_ids"], -100)
    labels.scatter_(1, batch["masked_positions"], batch["masked_labels"])
    expected = theirs(
        input_ids=batch["input_ids"],
        token_type_ids=batch["token_type_ids"],
        attention_mask=batch["attention_mask"].long(),
        labels=labels,
        next_sentence_label=batch["sentence_order"],
    )
    expected.loss.backward()

    # float64: nothing but a difference in the mathematics exceeds this
    tight = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(loss, expected.loss, **tight)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected_gradients = bert_tensors(grads, layernorm)
    named = dict(ours.named_parameters())
    assert expected_gradients.keys() == named.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(named[name].grad, gradient, **tight, msg=name)


def gpt2_reference() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=POSITIONS,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


def test_gpt2_gives_the_logits_of_transformers() -> None:
    theirs = gpt2_reference().eval()
    randomize(theirs)
    ours = Gpt2ForPretraining(config("gpt2", "pre")).eval()
    ours.load_state_dict(gpt2_tensors(theirs.state_dict()))
    ids = torch.randint(VOCAB, (3, 13))
    with torch.no_grad():
        expected = theirs(ids).logits
        logits = ours.logits(ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_gpt2_gives_the_loss_and_every_gradient_of_transformers() -> None:
    theirs = gpt2_reference().double()
    randomize(theirs)
    ours = Gpt2ForPretraining(config("gpt2", "pre")).double()
    ours.load_state_dict(gpt2_tensors(theirs.state_dict()))
    ids = torch.randint(VOCAB, (3, POSITIONS))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    batch = {"input_ids": ids, "labels": labels}
    loss = ours(batch)["lm"] / ours.loss_counts(batch)["lm"]
    loss.backward()
    # their own loss is computed in float32 whatever the model's dtype
    expected = F.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    tight = {"atol": 1e-10, "rtol": 1e-10}  # float64
    torch.testing.assert_close(loss, expected, **tight)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected_gradients = gpt2_tensors(grads)
    named = dict(ours.named_parameters())
    assert expected_gradients.keys() == named.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(named[name].grad, gradient, **tight, msg=name)
