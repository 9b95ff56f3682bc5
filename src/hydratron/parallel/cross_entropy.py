"""Cross entropy over logits whose vocabulary is split over a tensor-parallel group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from hydratron.parallel.mappings import all_reduce

IGNORED_LABEL = -100


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
        local_vocab_size = logits.size(-1)
        logits = logits - all_reduce(logits.amax(dim=-1), "max", group).unsqueeze(-1)
        local_labels = labels - group.rank() * local_vocab_size
        absent = (local_labels < 0) | (local_labels >= local_vocab_size)
        local_labels = local_labels.masked_fill(absent, 0)
        label_logits = logits.gather(-1, local_labels.unsqueeze(-1)).squeeze(-1)
        exponentials = logits.exp()
        sums = torch.stack([label_logits.masked_fill(absent, 0.0), exponentials.sum(dim=-1)])
        label_logits, denominators = all_reduce(sums, "sum", group).unbind()
        ignored = labels == IGNORED_LABEL
        probabilities = exponentials / denominators.unsqueeze(-1)
        ctx.save_for_backward(probabilities, local_labels, absent, ignored)
        return (denominators.log() - label_logits).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        probabilities, local_labels, absent, ignored = ctx.saved_tensors
        one_hot = (~absent).to(probabilities.dtype).unsqueeze(-1)
        gradient = probabilities.scatter_add(-1, local_labels.unsqueeze(-1), -one_hot)
        return gradient * gradients[0].masked_fill(ignored, 0.0).unsqueeze(-1), None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: ProcessGroup | None
) -> Tensor:
    """Return the loss of every row in at least float32: logits [M, V/t], labels [M] to [M].

    Rows labelled -100 give 0 and no gradient. The loss is the same on all ranks; the gradient is
    that of this rank's columns. Padded vocabulary rows take part in the softmax.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if group is None:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL)
    return _VocabParallelCrossEntropy.apply(logits, labels, group)  # type: ignore[return-value]
