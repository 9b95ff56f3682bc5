"""The mask of compiled dropout: fair, independent of its neighbours and of other keys' masks."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from hydratron.models.dropout import Dropout, keep_mask

SHAPE = torch.Size((1024, 768))
STREAM = torch.Generator().manual_seed(0)
KEYS = torch.randint(-(2**31), 2**31, (8, 2), generator=STREAM).to(torch.int32)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors: of n independent pairs the coefficient is normal with 1 / sqrt(n)."""
    pair = torch.stack([a.flatten(), b.flatten()]).double()
    return float(torch.corrcoef(pair)[0, 1]) * pair.size(1) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_values_are_dropped_with_the_given_probability(p: float) -> None:
    deviation = (p * (1 - p) / SHAPE.numel()) ** 0.5
    for key in KEYS:
        mask = keep_mask(key, SHAPE, p)
        assert abs(float((~mask).double().mean()) - p) < 4.5 * deviation
        by_row = (~mask).double().mean(1)  # spread of the rows' means: that of 768 coins each
        assert float(by_row.std()) == pytest.approx((p * (1 - p) / 768) ** 0.5, rel=0.15)


@pytest.mark.parametrize("lag", [1, 2, 31, 32, 64, 768, 768 * 16, 768 * 512])
def test_a_mask_does_not_repeat_itself(lag: int) -> None:
    for key in KEYS:
        mask = keep_mask(key, SHAPE, 0.1).flatten()
        assert abs(correlation(mask[lag:], mask[:-lag])) < 4.5


def test_masks_of_two_keys_are_independent() -> None:
    masks = [keep_mask(key, SHAPE, 0.1) for key in KEYS]
    for a, b in combinations(masks, 2):
        assert abs(correlation(a, b)) < 4.5


def test_compiled_dropout_is_the_mask_in_both_passes_and_anew_at_every_call() -> None:
    dropout = Dropout(0.25)
    compiled = torch.compile(dropout, fullgraph=True)
    x = torch.full((64, 512), 3.0, requires_grad=True)
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    assert set(first.unique().tolist()) == {0.0, 4.0}
    assert abs(correlation(first.detach(), second.detach())) < 4.5
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient, first.detach() / 3)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), first), "the stream decides"
    dropout.eval()
    assert torch.equal(compiled(x), x)
