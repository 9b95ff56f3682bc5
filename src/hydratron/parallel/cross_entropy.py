"""Cross entropy over logits whose vocabulary is split over a tensor-parallel group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from hydratron.parallel.mappings import all_reduce

IGNORED_LABEL = -100


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came: wider ones exist a kernel at a time where it is compiled."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
        local_vocab_size = logits.size(-1)
        wide = _widen(logits)
        highest = all_reduce(wide.amax(dim=-1), "max", group)
        local_labels = labels - group.rank() * local_vocab_size
        absent = (local_labels < 0) | (local_labels >= local_vocab_size)
        index = local_labels.masked_fill(absent, 0).unsqueeze(-1)
        label_logits = wide.gather(-1, index).squeeze(-1) - highest
        exponentials = (wide - highest.unsqueeze(-1)).exp()
        sums = torch.stack([label_logits.masked_fill(absent, 0.0), exponentials.sum(dim=-1)])
        label_logits, denominators = all_reduce(sums, "sum", group).unbind()
        ignored = labels == IGNORED_LABEL
        ctx.save_for_backward(logits, local_labels, highest, denominators, ignored)
        return (denominators.log() - label_logits).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, local_labels, highest, denominators, ignored = ctx.saved_tensors
        exponentials = (_widen(logits) - highest.unsqueeze(-1)).exp()
        columns = torch.arange(logits.size(-1), device=logits.device)
        is_label = columns == local_labels.unsqueeze(-1)  # nowhere, if another rank has the label
        gradient = exponentials / denominators.unsqueeze(-1) - is_label.to(exponentials.dtype)
        scale = gradients[0].masked_fill(ignored, 0.0).unsqueeze(-1)
        return (gradient * scale).to(logits.dtype), None, None


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: ProcessGroup | None
) -> Tensor:
    """Return the loss of every row in at least float32: logits [M, V/t], labels [M] to [M].

    Rows labelled -100 give 0 and no gradient. The loss is the same on all ranks; the gradient is
    that of this rank's columns. Padded vocabulary rows take part in the softmax.
    """
    if group is None:
        wide = _widen(logits)
        return F.cross_entropy(wide, labels, reduction="none", ignore_index=IGNORED_LABEL)
    return _VocabParallelCrossEntropy.apply(logits, labels, group)  # type: ignore[return-value]
