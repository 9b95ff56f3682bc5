"""Matrix products in 8-bit floats (Micikevicius et al. 2022) with one dynamic scale a row.

Every operand is e4m3, and each of its rows, along which is summed, has a scale of its own: one
large value costs the small ones of its own row alone, and finding the scale and applying it is one
kernel. torchao has the same recipe (`rowwise_with_gw_hp`). Scales are powers of two: applying them
rounds nothing. Results have the input's dtype. A weight's gradient, a sum over the tokens, is
multiplied in the input's dtype: in 8 bits it needs both operands transposed, which took longer than
it won (22 % of a GPT-2 step on an H200).
Letters: T tokens, I input features, O output features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hydratron.parallel.layers import ColumnParallelLinear, RowParallelLinear, compute_dtype

E4M3 = torch.float8_e4m3fn
# The kernels take only sizes that divide by this.
MULTIPLE = 16
# The scale of a row of zeros; far below that of any gradient's row.
_SMALLEST = 2.0**-100


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [R, K] with each row scaled into e4m3, and the factors [R, 1] that undo it."""
    largest = torch.finfo(E4M3).max
    highest = x.abs().amax(dim=1, keepdim=True).float()
    factor = (highest / largest).clamp(min=_SMALLEST).log2().ceil().exp2()
    return (x.float() / factor).clamp(-largest, largest).to(E4M3), factor


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a @ b^T + bias for a [M, K], b [N, K] and bias [N], in a's dtype.

    A GPU sums in fewer bits than float32 has.
    """
    (a8, a_factor), (b8, b_factor) = quantise(a), quantise(b)
    return torch._scaled_mm(
        a8,
        b8.t(),
        scale_a=a_factor,
        scale_b=b_factor.t(),
        bias=bias,
        out_dtype=a.dtype,
        use_fast_accum=True,
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return multiply(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        # the kernels sum over rows of what is stored, so the transpose is written out
        x_gradient = multiply(gradient, weight.t().contiguous())
        weight_gradient = (gradient.t() @ x).to(weight.dtype)
        if ctx.bias_dtype is None:
            return x_gradient, weight_gradient, None
        # a sum over the tokens, as a product: Inductor would fuse it with the sums over features
        ones = gradient.new_ones(MULTIPLE, gradient.size(0))
        return x_gradient, weight_gradient, (ones @ gradient)[0].to(ctx.bias_dtype)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, I] times weight [O, I] transposed, in 8 bits, plus the bias, rounded to x's dtype.

    Raises:
        ValueError: T, I or O does not divide by 16.
    """
    for name, size in (("tokens", x.size(0)), ("in", weight.size(1)), ("out", weight.size(0))):
        if size % MULTIPLE:
            raise ValueError(f"fp8: {name} {size} is not divisible by {MULTIPLE}")
    return _Linear.apply(compute_dtype(x), weight, bias)  # type: ignore[return-value]


def use_fp8(network: nn.Module) -> None:
    """Let the linear layers inside the Transformer multiply in 8 bits; heads stay as they are."""
    for module in network.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.linear = fp8_linear
