"""Matrix products in 8-bit floats with one dynamic scale a tensor (Micikevicius et al. 2022).

Forward operands are e4m3, summed on a GPU in fewer bits than float32 has; the incoming gradient is
e5m2, whose range is larger. Results have the input's dtype. A weight's gradient is multiplied in
the input's dtype: in 8 bits it needs both operands transposed, which took longer than it won (22 %
of a GPT-2 step on an H200).
Letters: T tokens, I input features, O output features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hydratron.parallel.layers import ColumnParallelLinear, RowParallelLinear, compute_dtype

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The kernels take only sizes that divide by this.
MULTIPLE = 16


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `x` scaled into the range of `dtype`, and the float32 factor that undoes the scale."""
    largest = torch.finfo(dtype).max
    factor = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / factor).clamp(-largest, largest).to(dtype), factor


def multiply(
    a: Tensor, b: Tensor, factors: tuple[Tensor, Tensor], *, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """Return a @ b^T for quantised a [M, K] and b [N, K]; `fast` sums with fewer bits."""
    return torch._scaled_mm(
        a, b.t(), scale_a=factors[0], scale_b=factors[1], out_dtype=dtype, use_fast_accum=fast
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_factor = quantise(x, E4M3)
        w8, w_factor = quantise(weight, E4M3)
        ctx.save_for_backward(x, w8, w_factor)
        ctx.weight_dtype = weight.dtype
        return multiply(x8, w8, (x_factor, w_factor), dtype=x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, w8, w_factor = ctx.saved_tensors
        gradient = gradients[0]
        g8, g_factor = quantise(gradient, E5M2)
        # the kernels sum over rows of what is stored, so the transpose is written out
        x_gradient = multiply(g8, w8.t().contiguous(), (g_factor, w_factor), dtype=gradient.dtype)
        return x_gradient, (gradient.t() @ x).to(ctx.weight_dtype)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, I] times weight [O, I] transposed, in 8 bits; the bias is added in x's dtype.

    Raises:
        ValueError: T, I or O does not divide by 16.
    """
    for name, size in (("tokens", x.size(0)), ("in", weight.size(1)), ("out", weight.size(0))):
        if size % MULTIPLE:
            raise ValueError(f"fp8: {name} {size} is not divisible by {MULTIPLE}")
    y = _Linear.apply(compute_dtype(x), weight)
    return y if bias is None else y + bias.to(y.dtype)  # type: ignore[union-attr,return-value]


def use_fp8(network: nn.Module) -> None:
    """Let the linear layers inside the Transformer multiply in 8 bits; heads stay as they are."""
    for module in network.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.linear = fp8_linear
