"""Attention's choice of kernels: segments in place of a mask."""

from itertools import pairwise

import pytest
import torch

from hydratron.models.attention import attend, segment_starts, takes_segments

LENGTHS = [5, 8, 1]


def right_padded(lengths: list[int], seq_len: int) -> torch.Tensor:
    return (torch.arange(seq_len) < torch.tensor(lengths)[:, None])[:, None, None, :]


def test_a_row_is_two_segments_tokens_and_padding() -> None:
    starts = segment_starts(right_padded(LENGTHS, 8))
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 5, 8, 16, 16, 17, 24]  # the full row's padding is empty


@pytest.mark.parametrize("is_left", [False, True])
def test_the_segments_are_what_the_mask_says(is_left: bool) -> None:
    """A kernel for segments gives each token what the masked one does, on whatever side padding is.

    The kernel is imitated: each segment attends to itself alone.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(24, 3, 2, 8, generator=generator)
    mask = right_padded(LENGTHS, 8)
    mask = mask.flip(-1) if is_left else mask
    settings = {"dropout": 0.0, "is_causal": False}
    ends = segment_starts(mask).tolist()
    alone = [
        attend(qkv[start:stop], stop - start, None, **settings)
        for start, stop in pairwise(ends)
        if stop > start
    ]
    is_token = mask.flatten()
    found = torch.cat(alone)[is_token]
    torch.testing.assert_close(found, attend(qkv, 8, mask, **settings)[is_token])


def test_real_tokens_see_real_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(24, 3, 2, 8, generator=generator)
    settings = {"dropout": 0.0, "is_causal": False}
    masked = attend(qkv, 8, right_padded(LENGTHS, 8), **settings).unflatten(0, (3, 8))
    for row, length in enumerate(LENGTHS):
        alone = attend(qkv[8 * row : 8 * row + length], length, None, **settings)
        torch.testing.assert_close(masked[row, :length], alone)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "expected"),
    [
        ((9, 0), 64, torch.bfloat16, True),
        ((8, 0), 256, torch.float16, True),
        ((7, 5), 64, torch.float16, False),  # a T4
        ((9, 0), 264, torch.bfloat16, False),
        ((9, 0), 20, torch.bfloat16, False),
        ((9, 0), 64, torch.float32, False),
    ],
)
def test_segments_are_for_what_the_kernel_computes(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert takes_segments(torch.empty(2, 3, 1, head_dim, dtype=dtype)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize(("is_causal", "is_left"), [(False, False), (False, True), (True, False)])
def test_segments_on_a_gpu_are_the_mask_on_a_cpu(is_causal: bool, is_left: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(24, 3, 2, 64, generator=generator).requires_grad_()
    mask = right_padded(LENGTHS, 8)
    mask = mask.flip(-1) if is_left else mask
    is_token = mask.flatten()
    weight = torch.randn(int(is_token.sum()), 2, 64, generator=generator)
    settings = {"dropout": 0.0, "is_causal": is_causal}
    # a causal mask and one of keys do not go together in torch's own
    key_mask = None if is_causal else mask
    slow = attend(qkv, 8, key_mask, **settings)[is_token]
    (wanted,) = torch.autograd.grad((slow * weight).sum(), qkv)
    half = qkv.detach().cuda().bfloat16().requires_grad_()
    fast = attend(half, 8, mask.cuda(), **settings)[is_token.cuda()]
    (found,) = torch.autograd.grad((fast.float() * weight.cuda()).sum(), half)
    torch.testing.assert_close(fast.float().cpu(), slow, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=0.05, atol=0.05)
