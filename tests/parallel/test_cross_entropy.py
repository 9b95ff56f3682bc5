"""Cross entropy over a split vocabulary against F.cross_entropy over the whole one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hydratron.parallel.cross_entropy import vocab_parallel_cross_entropy
from tests.distributed import run_distributed
from tests.parallel.twins import deviation, random_values, shard

VOCAB = 24
# borders of the shards of 2 and of 4 ranks, ignored rows at both ends and in the middle
LABELS = torch.tensor([-100, 0, 5, 6, 11, -100, 12, 17, 18, 23, 3, -100])
TOLERANCE = 1e-10  # float64; logits of 1e4 lose four of sixteen digits


def cases() -> dict[str, Tensor]:
    usual = random_values(len(LABELS), VOCAB, seed=0)
    extreme = usual * 1e4  # exp() of these overflows unless the maximum of all ranks is taken off
    far = usual.clone()
    far[:, : VOCAB // 2] -= 2e4  # a rank whose every exponential underflows
    return {"usual": usual, "extreme": extreme, "one shard far below": far}


def deviations(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    group = dist.group.WORLD
    assert group is not None
    weights = random_values(len(LABELS), seed=9)  # the losses' own gradients, each different
    found = {}
    for name, logits in cases().items():
        logits = logits.clone().requires_grad_()
        losses = F.cross_entropy(logits, LABELS, reduction="none", ignore_index=-100)
        (losses * weights).sum().backward()
        local = shard(logits.detach(), 1, group).clone().requires_grad_()
        local_losses = vocab_parallel_cross_entropy(local, LABELS, group)
        (local_losses * weights).sum().backward()
        assert local.grad is not None
        assert logits.grad is not None
        assert logits.grad.abs().max() > 0.1
        found[name] = (
            deviation(local_losses, losses),
            deviation(local.grad, shard(logits.grad, 1, group)),
        )
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_vocab_parallel_cross_entropy_matches_dense(world_size: int, tmp_path: Path) -> None:
    for found in run_distributed(deviations, world_size, tmp_path):
        assert set(found) == set(cases())
        for case, (loss, gradient) in found.items():
            assert loss <= TOLERANCE, case
            assert gradient <= TOLERANCE, case


def all_ignored_and_bfloat16(rank: int, world_size: int) -> tuple[Tensor, Tensor, torch.dtype]:
    local = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    losses = vocab_parallel_cross_entropy(local, torch.full((3,), -100), dist.group.WORLD)
    losses.sum().backward()
    assert local.grad is not None
    return losses.detach(), local.grad, losses.dtype


def test_ignored_rows_give_zero_and_half_precision_logits_a_float32_loss(tmp_path: Path) -> None:
    for losses, gradient, dtype in run_distributed(all_ignored_and_bfloat16, 2, tmp_path):
        assert losses.tolist() == [0.0] * 3
        assert gradient.abs().max() == 0
        assert dtype == torch.float32


def test_cross_entropy_without_a_group_is_that_of_torch() -> None:
    logits = random_values(len(LABELS), VOCAB, seed=0)
    expected = F.cross_entropy(logits, LABELS, reduction="none", ignore_index=-100)
    assert torch.equal(vocab_parallel_cross_entropy(logits, LABELS, None), expected)
    half = vocab_parallel_cross_entropy(logits.bfloat16(), LABELS, None)
    assert half.dtype == torch.float32
