"""Products in 8 bits stay near those in float32, in all three directions."""

import pytest
import torch
import torch.nn.functional as F

from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.parallel.fp8 import E4M3, E5M2, fp8_linear, quantise, use_fp8

T, IN, OUT = 48, 32, 64


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float(), expected.detach()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_quantising_keeps_the_bits_of_the_type(dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(1000) * 1e-5  # far below what 8 bits hold without a scale
    quantised, factor = quantise(x, dtype)
    assert quantised.dtype == dtype
    assert float(quantised.float().abs().max()) == torch.finfo(dtype).max
    large = x.abs() > x.abs().max() / 64  # normal numbers: half a unit in the last place
    error = (quantised.float() * factor - x).abs() / x.abs()
    assert float(error[large].max()) <= bound
    zeros, _ = quantise(torch.zeros(4), dtype)
    assert torch.equal(zeros.float(), torch.zeros(4))


def test_forward_and_both_gradients_are_near_the_dense_layer_s() -> None:
    x = torch.randn(T, IN, requires_grad=True)
    weight = torch.randn(OUT, IN, requires_grad=True)
    bias = torch.randn(OUT, requires_grad=True)
    upstream = torch.randn(T, OUT)
    expected = F.linear(x, weight, bias)
    expected_gradients = torch.autograd.grad(expected, (x, weight, bias), upstream)
    low = x.detach().bfloat16().requires_grad_()
    y = fp8_linear(low, weight, bias)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, (low, weight, bias), upstream.bfloat16())
    # rounding errors are independent: 3 bits give 2-3 % each operand, e5m2's 2 bits twice that
    assert relative_error(y, expected) < 0.05
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(found, wanted) < 0.09
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
