"""Finetuning heads on an encoder: classification, multiple choice, answer spans.

Heads are replicated compute: every tensor-parallel peer has them in full and gets whole gradients,
so their dropout must be the same on all peers. An encoder gives hidden states [B, S, H] and a
pooled token [B, H] from (input_ids, token_type_ids, attention_mask).
Letters: B batch, C classes or choices, S sequence, H hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydratron.parallel.cross_entropy import IGNORED_LABEL

_PADDING_LOGIT = -1e9  # finite: a softmax over nothing but padding must not give NaN


class ReplicatedDropout(nn.Module):
    """Dropout from a stream of its own: equal on tensor-parallel peers, another on each replica.

    `seed_dropout` places the stream; without it the default stream is drawn from.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        uniform = torch.rand(x.shape, generator=self.generator, device=x.device)
        return x * (uniform >= self.p) / (1.0 - self.p)


def seed_dropout(network: nn.Module, *, seed: int, dp_rank: int, device: torch.device) -> None:
    """Give the heads' dropout its stream, a function of `seed` and the data-parallel rank."""
    for module in network.modules():
        if isinstance(module, ReplicatedDropout):
            # apart from the trunk's streams, which are seed * 1_000_003 + rank
            module.generator = torch.Generator(device).manual_seed(
                seed * 1_000_003 + 500_009 + dp_rank
            )


class _TaskNetwork(nn.Module):
    """An encoder and dropout; only the encoder is compiled: dropout's stream is not traceable."""

    losses = ("task",)

    def __init__(self, encoder: nn.Module, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = ReplicatedDropout(dropout)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the encoder, for batches of any length."""
        self.encoder.compile(*args, **({"dynamic": True} | kwargs))

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return hidden states [B, S, H] and pooled [B, H]; choices are rows of their own."""
        rows = [
            batch[name].flatten(0, -2)  # [B, C, S] -> [B*C, S]
            for name in ("input_ids", "token_type_ids", "attention_mask")
        ]
        return self.encoder(*rows)


class Classifier(_TaskNetwork):
    """Dropout and a linear layer on the pooled token: `num_labels` classes a sequence.

    With `num_choices` above 1 (RACE) each of a row's sequences gets one logit, and the softmax runs
    over the choices (Radford et al. 2018).
    """

    def __init__(
        self, encoder: nn.Module, hidden_size: int, *, num_labels: int, dropout: float
    ) -> None:
        super().__init__(encoder, dropout)
        self.head = nn.Linear(hidden_size, num_labels)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return [B, C] in float32: classes, or choices for input_ids [B, C, S]."""
        logits = self.head(self.dropout(self.encode(batch)[1]))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).view(
            len(batch["input_ids"]), -1
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the summed cross entropy; labels [B], -100 is ignored."""
        loss = F.cross_entropy(self.logits(batch), batch["labels"], reduction="sum")
        return {"task": loss}

    @staticmethod
    def loss_counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the number of labelled rows, 0-d int64."""
        return {"task": (batch["labels"] != IGNORED_LABEL).sum()}

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `logits` [B, C]."""
        return {"logits": self.logits(batch)}


class SpanExtractor(_TaskNetwork):
    """Start and end of an answer among the tokens (Devlin et al. 2019, section 4.2).

    With `answerability` (SQuAD 2.0; RoBERTa, section 5.2) a binary classifier on the pooled token
    says whether the window holds an answer, and its loss is added. Without it the pooler has no
    part in the loss and stays as it is.
    """

    def __init__(
        self, encoder: nn.Module, hidden_size: int, *, answerability: bool, dropout: float
    ) -> None:
        super().__init__(encoder, dropout)
        self.head = nn.Linear(hidden_size, 2)
        self.answerability_head = nn.Linear(hidden_size, 1) if answerability else None
        self.losses = ("span", "answerability") if answerability else ("span",)
        if not answerability:
            encoder.get_submodule("pooler").requires_grad_(False)

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return start and end logits [B, S] and answerability [B], above 0 for yes; float32."""
        hidden, pooled = self.encode(batch)
        logits = self.head(self.dropout(hidden))  # [B, S, 2]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        padding = ~batch["attention_mask"].unsqueeze(-1)
        start, end = logits.masked_fill(padding, _PADDING_LOGIT).unbind(-1)
        if self.answerability_head is None:
            return start, end, None
        answerable = self.answerability_head(self.dropout(pooled)).squeeze(-1)
        return start, end, answerable.to(start.dtype)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the summed losses; the span's is the mean of start's and end's.

        `batch`: beside the encoder's inputs start_positions, end_positions, answerable [B].
        """
        start, end, answerable = self.logits(batch)
        span = F.cross_entropy(start, batch["start_positions"], reduction="sum")
        span = (span + F.cross_entropy(end, batch["end_positions"], reduction="sum")) / 2
        if answerable is None:
            return {"span": span}
        truth = batch["answerable"].to(answerable.dtype)
        loss = F.binary_cross_entropy_with_logits(answerable, truth, reduction="sum")
        return {"span": span, "answerability": loss}

    def loss_counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the number of windows, 0-d int64."""
        positions = batch["start_positions"]
        return {key: torch.full_like(positions[0], len(positions)) for key in self.losses}

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `start`, `end` [B, S] and, with that head, `answerable` [B]."""
        start, end, answerable = self.logits(batch)
        found = {"start": start, "end": end}
        return found if answerable is None else found | {"answerable": answerable}
