"""BERT with its two pretraining objectives: masked tokens and sentence order.

Letters: B batch, S sequence, M masked positions a sequence, T tokens, H hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydratron.models.config import ModelConfig
from hydratron.models.transformer import Transformer
from hydratron.parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy
from hydratron.parallel.layers import local_size
from hydratron.parallel.mappings import (
    copy_to_tensor_parallel_region,
    gather_into_replicated_region,
)
from hydratron.parallel.mesh import ProcessGroup
from hydratron.parallel.placement import Placement


class BertEncoder(nn.Module):
    """Transformer and pooler: what finetuning starts from.

    The last hidden states are gathered once: everything after them (pooler, heads) is computed in
    full by every rank.
    """

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.transformer = Transformer(config, tp_group)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layers, all alike, once: a fraction of the time that the whole would take."""
        for layer in self.transformer.layers:
            layer.compile(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states [B, S, H] and the pooled first token [B, H], whole on every rank.

        Arguments and errors as in `Transformer.forward`.
        """
        hidden = self.transformer(input_ids, token_type_ids, attention_mask)  # [T/t, H]
        hidden = gather_into_replicated_region(hidden, self.tp_group)[: input_ids.numel()]
        hidden = hidden.view(*input_ids.shape, -1)  # [B, S, H]
        return hidden, torch.tanh(self.pooler(hidden[:, 0]))


class MaskedLmHead(nn.Module):
    """Transform and vocabulary product, tied to the word embeddings: [K, H] to [K, V/t].

    The transform is replicated compute; its output enters the split vocabulary by
    identity-forward, all-reduce-backward.
    """

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        local_vocab_size = local_size(config.vocab_size, tp_group, name="vocab_size")
        self.bias = nn.Parameter(torch.empty(local_vocab_size))
        self.placements = {"bias": Placement(tp_dim=0)}

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        hidden = self.layernorm(F.gelu(self.transform(hidden), approximate=self.approximate))
        hidden = copy_to_tensor_parallel_region(hidden, self.tp_group)
        return F.linear(hidden, word_embeddings, self.bias)


class BertForPretraining(nn.Module):
    """BERT with masked-LM and sentence-order heads; `forward` gives summed losses."""

    losses = ("lm", "sentence_order")

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.encoder = BertEncoder(config, tp_group)
        self.masked_lm_head = MaskedLmHead(config, tp_group)
        self.sentence_order_head = nn.Linear(config.hidden_size, 2)

    def logits(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return masked-LM logits [B, M, V/t] and sentence-order logits [B, 2].

        Args:
            masked_positions: [B, M] positions to predict; all S positions by default.
        """
        hidden, pooled = self.encoder(input_ids, token_type_ids, attention_mask)
        if masked_positions is not None:
            index = masked_positions.unsqueeze(-1).expand(-1, -1, hidden.size(-1))  # [B, M, H]
            hidden = hidden.gather(1, index)
        weight = self.encoder.transformer.word_embeddings.weight
        return self.masked_lm_head(hidden, weight), self.sentence_order_head(pooled)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the summed losses of a micro-batch, whole on every rank of the group.

        `batch`: input_ids, token_type_ids [B, S]; attention_mask [B, S] bool, optional;
        masked_positions, masked_labels [B, M] (-100 where unused); sentence_order [B].
        """
        lm_logits, order_logits = self.logits(
            batch["input_ids"],
            batch["token_type_ids"],
            batch.get("attention_mask"),
            batch["masked_positions"],
        )
        lm_losses = vocab_parallel_cross_entropy(
            lm_logits.flatten(0, 1), batch["masked_labels"].flatten(), self.tp_group
        )
        order_losses = vocab_parallel_cross_entropy(order_logits, batch["sentence_order"], None)
        return {"lm": lm_losses.sum(), "sentence_order": order_losses.sum()}

    @staticmethod
    def loss_counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what each summed loss is divided by: masked tokens and sequences, as 0-d int64."""
        labels = batch["masked_labels"]
        return {
            "lm": (labels != IGNORED_LABEL).sum(),
            "sentence_order": torch.full_like(labels.flatten()[0], len(labels)),
        }
