"""Products in 8 bits stay near those in float32, in all three directions."""

import pytest
import torch
import torch.nn.functional as F

from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.parallel.fp8 import E4M3, fp8_linear, quantise, use_fp8

T, IN, OUT = 48, 32, 64


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def test_quantising_rounds_to_three_bits_and_its_factors_round_nothing() -> None:
    rows = torch.randn(40, 100) * torch.logspace(-20, 20, 40).unsqueeze(1)  # one scale cannot do
    quantised, factor = quantise(rows)
    assert quantised.dtype == E4M3
    assert factor.shape == (40, 1)
    assert torch.equal(factor.log2(), factor.log2().round())
    highest = quantised.float().abs().amax(1)
    # the next power of two: at least half of the largest number is used, and nothing overflows
    assert bool(((highest >= 224) & (highest <= 448)).all())
    error = (quantised.float() * factor - rows).abs() / rows.abs()
    normal = rows.abs() > rows.abs().amax(1, keepdim=True) / 2**13
    assert float(error[normal].max()) <= 2**-4  # half a unit in the last place
    zeros, factor = quantise(torch.zeros(4, 8))
    assert torch.equal(zeros.float() * factor, torch.zeros(4, 8))


def test_a_row_with_an_outlier_costs_the_other_rows_nothing() -> None:
    x, weight = torch.randn(32, 64), torch.randn(48, 64)
    expected = fp8_linear(x, weight)
    x[7, 3], weight[5, 9] = 1e6, -1e6
    found = fp8_linear(x, weight)
    rows, columns = torch.arange(32) != 7, torch.arange(48) != 5
    assert torch.equal(found[rows][:, columns], expected[rows][:, columns])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_both_gradients_are_near_the_dense_layer_s(device: str) -> None:
    x = torch.randn(T, IN, device=device, requires_grad=True)
    weight = torch.randn(OUT, IN, device=device, requires_grad=True)
    bias = torch.randn(OUT, device=device, requires_grad=True)
    upstream = torch.randn(T, OUT, device=device)
    expected = F.linear(x, weight, bias)
    expected_gradients = torch.autograd.grad(expected, (x, weight, bias), upstream)
    low = x.detach().bfloat16().requires_grad_()
    y = fp8_linear(low, weight, bias)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, (low, weight, bias), upstream.bfloat16())
    # rounding errors are independent: 3 bits give 2-3 % each operand
    assert relative_error(y, expected) < 0.05
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(found, wanted) < 0.05
    assert gradients[1].dtype == weight.dtype


def test_sizes_that_the_kernels_refuse_are_named() -> None:
    with pytest.raises(ValueError, match="fp8: tokens 40 is not divisible by 16"):
        fp8_linear(torch.randn(40, 32), torch.randn(32, 32))


def test_only_the_transformer_s_layers_multiply_in_8_bits() -> None:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    config = ModelConfig("gpt2", **shape, max_seq_len=16)
    network = Gpt2ForPretraining(config)
    use_fp8(network)
    changed = [n for n, m in network.named_modules() if getattr(m, "linear", None) is fp8_linear]
    assert len(changed) == 4 * config.num_layers
    assert all(".layers." in name for name in changed)
