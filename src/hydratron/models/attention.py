"""Which kernel computes attention: the fastest there is for padding or none, on a GPU or elsewhere.

Letters: B batch, S sequence, N heads of this rank, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Fastest first on a Hopper GPU: with dropout, cuDNN's kernel takes 0.83 of the time of
# FlashAttention 2 at [16, 15, 1024, 128], causal, and 0.93 at [32, 16, 512, 64].
UNMASKED_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_HALVES = (torch.float16, torch.bfloat16)


def attend(
    qkv: Tensor, seq_len: int, key_mask: Tensor | None, *, dropout: float, is_causal: bool
) -> Tensor:
    """Softmax attention of whole sequences.

    Args:
        qkv: [B*S, 3, N, D], queries, keys and values.
        seq_len: S.
        key_mask: [B, 1, 1, S] bool: a row's tokens (True), then its padding (False), or the other
            way round; None when nothing is padding. What comes out for padding is of no use.
        dropout: of the attention weights.
        is_causal: whether a token sees those before it alone.

    Returns:
        [B*S, N, D]
    """
    if key_mask is not None and qkv.is_cuda and takes_segments(qkv):
        query, key, value = qkv.unbind(1)
        starts = segment_starts(key_mask)
        return torch.ops.aten._flash_attention_forward(
            query, key, value, starts, starts, seq_len, seq_len, dropout, is_causal, False
        )[0]
    # [B, S, 3, N, D] -> 3 x [B, N, S, D]
    query, key, value = qkv.unflatten(0, (-1, seq_len)).permute(2, 0, 3, 1, 4).unbind(0)
    inputs = {"attn_mask": key_mask, "dropout_p": dropout, "is_causal": is_causal}
    if qkv.is_cuda and key_mask is None:
        with sdpa_kernel(UNMASKED_KERNELS, set_priority=True):
            context = F.scaled_dot_product_attention(query, key, value, **inputs)
    else:  # torch's own order
        context = F.scaled_dot_product_attention(query, key, value, **inputs)
    return context.transpose(1, 2).flatten(0, 1)


def takes_segments(qkv: Tensor) -> bool:
    """Whether FlashAttention 2 computes what `attend` is given: a GPU's type, size and age."""
    head_dim = qkv.size(-1)
    has_kernel = qkv.dtype in _HALVES and head_dim % 8 == 0 and head_dim <= 256
    return has_kernel and is_ampere_or_newer(qkv.device)


@torch.compiler.assume_constant_result
def is_ampere_or_newer(device: torch.device) -> bool:
    """Whether a GPU's compute capability is 8.0 or above: a constant to the compiler."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def segment_starts(key_mask: Tensor) -> Tensor:
    """Return where sequences start that see themselves alone: each row's tokens and its padding.

    Kernels for sequences of many lengths need no mask and keep their shapes whatever the lengths:
    [2B + 1] int32 for a `key_mask` of [B, 1, 1, S], the last one the end.
    """
    batch_size, seq_len = key_mask.size(0), key_mask.size(-1)
    mask = key_mask.flatten(1)  # [B, S]
    # as many as are like the first: its tokens, or the padding before them
    lengths = (mask == mask[:, :1]).sum(1, dtype=torch.int32)  # [B]
    rows = torch.arange(batch_size + 1, dtype=torch.int32, device=key_mask.device) * seq_len
    seconds = rows[:-1] + lengths
    return torch.cat([torch.stack([rows[:-1], seconds], dim=1).flatten(), rows[-1:]])
