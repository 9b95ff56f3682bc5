"""transformers' network of the same shape, untrained: what a user would otherwise pick."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hydratron.checkpoint.huggingface import export_architecture, export_config
from hydratron.models.config import ModelConfig
from hydratron.parallel.cross_entropy import IGNORED_LABEL

# What BERT has beside its encoder, as `export_architecture` wants to know it.
PRETRAINING_HEADS = {"masked_lm_head.bias", "sentence_order_head.weight"}


def build_peer(config: ModelConfig, device: torch.device) -> nn.Module:
    """Return BertForPreTraining, MegatronBertForPreTraining or GPT2LMHeadModel, in training mode.

    Attention is what transformers chooses by itself.

    Raises:
        ValueError: transformers has no such network.
    """
    architecture = export_architecture(config, PRETRAINING_HEADS)
    cls: Any = getattr(transformers, architecture)
    with device:
        network = cls(export_config(config, architecture=architecture, tokenizer=None))
    if config.recompute != "none":
        network.gradient_checkpointing_enable()
    return network.train()


def peer_batch(config: ModelConfig, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our batch under the names of transformers; BERT's labels spread over all positions."""
    ids = batch["input_ids"]
    if config.family == "gpt2":
        return {"input_ids": ids, "labels": ids}  # shifted inside
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels.scatter_(1, batch["masked_positions"], batch["masked_labels"])
    return {
        "input_ids": ids,
        "token_type_ids": batch["token_type_ids"],
        "attention_mask": batch["attention_mask"].long(),
        "labels": labels,
        "next_sentence_label": batch["sentence_order"],
    }
