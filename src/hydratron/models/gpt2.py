"""GPT-2: a causal Transformer whose output weights are its word embeddings."""

import torch.nn.functional as F
from torch import Tensor, nn

from hydratron.models.config import ModelConfig
from hydratron.models.transformer import Transformer
from hydratron.parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy
from hydratron.parallel.layers import compute_dtype
from hydratron.parallel.mappings import gather_into_tensor_parallel_region
from hydratron.parallel.mesh import ProcessGroup


class Gpt2ForPretraining(nn.Module):
    """GPT-2 with its tied language-model head, without bias; `forward` gives the summed loss."""

    losses = ("lm",)

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.transformer = Transformer(config, tp_group)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits [B, S, V/t] for ids [B, S]."""
        hidden = compute_dtype(self.transformer(input_ids))
        hidden = gather_into_tensor_parallel_region(hidden, self.tp_group)
        hidden = hidden[: input_ids.numel()].view(*input_ids.shape, -1)  # [B, S, H]
        return F.linear(hidden, self.transformer.word_embeddings.weight)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the summed loss of a micro-batch: input_ids, labels [B, S] (-100 is ignored)."""
        logits = self.logits(batch["input_ids"])
        losses = vocab_parallel_cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), self.tp_group
        )
        return {"lm": losses.sum()}

    @staticmethod
    def loss_counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the number of predicted tokens, 0-d int64."""
        return {"lm": (batch["labels"] != IGNORED_LABEL).sum()}
