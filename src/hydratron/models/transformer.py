"""The Transformer of BERT and GPT-2, and the one place where LayerNorm placements differ.

Activations are flattened tokens. Inside a tensor-parallel region all T = B x S tokens meet a share
of the heads or of the intermediate width; outside, each rank holds T/t of them. Because the split
runs over the flattened tokens, no layout change is needed on either side.
Letters: B batch, S sequence, T tokens (padded to a multiple of t), H hidden, N heads, D head dim.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hydratron.models.attention import attend
from hydratron.models.config import ModelConfig
from hydratron.models.dropout import Dropout
from hydratron.models.interleaving import run_interleaved
from hydratron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    compute_dtype,
    local_size,
)
from hydratron.parallel.mappings import local_tokens
from hydratron.parallel.mesh import ProcessGroup
from hydratron.parallel.placement import mark_sequence_sharded

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
# What selective recomputation keeps: what is slow to compute again for the memory it takes.
ATTENTION_WITH_DROPOUT = [
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._flash_attention_forward.default,
    _aten._scaled_dot_product_efficient_attention.default,
]
KEPT_OPERATIONS = [
    *(_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    *(_c10d.reduce_scatter_tensor.default, _c10d.all_gather_into_tensor.default),
    _c10d.wait_tensor.default,
]


def kept_operations(config: ModelConfig) -> list[Any]:
    """Return what selective recomputation keeps of a layer.

    A kernel that is kept does not draw its random numbers again, so that what draws after it would
    get others: not compiled, attention with dropout is computed again. A compiled graph keeps
    its random numbers itself.
    """
    if torch.compiler.is_compiling() or not config.attention_dropout:
        return KEPT_OPERATIONS + ATTENTION_WITH_DROPOUT
    return KEPT_OPERATIONS


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 whose output, and so the residual stream, is autocast's type.

    Half the bytes of what autocast itself returns; Megatron-LM keeps the residual stream so too.
    """

    def forward(self, x: Tensor) -> Tensor:
        return compute_dtype(super().forward(x))


def layer_norm(config: ModelConfig) -> LayerNorm:
    """A LayerNorm over this rank's tokens."""
    return mark_sequence_sharded(LayerNorm(config.hidden_size, eps=config.layernorm_eps))


class Attention(nn.Module):
    """Multi-head self-attention with the heads split over the group: [T/t, H] to [T/t, H]."""

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.num_local_heads = local_size(config.num_heads, tp_group, name="num_heads")
        self.is_causal = config.family == "gpt2"
        self.dropout = config.attention_dropout
        self.qkv = ColumnParallelLinear(
            config.hidden_size, config.hidden_size, group=tp_group, num_stacked=3
        )
        self.output = RowParallelLinear(config.hidden_size, config.hidden_size, group=tp_group)

    def forward(self, x: Tensor, shape: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        return self.output(self.attend(self.qkv(x), shape, key_mask))

    def attend(self, qkv: Tensor, shape: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        """Queries, keys and values [T, 3H/t] to what the heads gather [T, H/t]."""
        batch_size, seq_len = shape
        num_padding = qkv.size(0) - batch_size * seq_len
        qkv = qkv[: batch_size * seq_len]
        context = attend(
            qkv.unflatten(1, (3, self.num_local_heads, -1)),
            seq_len,
            key_mask,
            dropout=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
        ).flatten(1)  # [B*S, H/t]
        return F.pad(context, (0, 0, 0, num_padding)) if num_padding else context


class Mlp(nn.Module):
    """Two linear layers around GELU, the intermediate width split: [T/t, H] to [T/t, H]."""

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        width = config.feedforward_size
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.input = ColumnParallelLinear(config.hidden_size, width, group=tp_group)
        self.output = RowParallelLinear(width, config.hidden_size, group=tp_group)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activate(self.input(x)))

    def activate(self, x: Tensor) -> Tensor:
        """GELU, as the family has it."""
        return F.gelu(x, approximate=self.approximate)


class TransformerLayer(nn.Module):
    """Attention and MLP, each with its residual connection and LayerNorm."""

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.placement = config.layernorm
        self.dropout = Dropout(config.hidden_dropout)
        self.attention_layernorm = layer_norm(config)
        self.attention = Attention(config, tp_group)
        self.mlp_layernorm = layer_norm(config)
        self.mlp = Mlp(config, tp_group)

    def forward(self, x: Tensor, shape: tuple[int, int], key_mask: Tensor | None) -> Tensor:
        y = self.attention(self.enter(x, self.attention_layernorm), shape, key_mask)
        x = self.leave(x, y, self.attention_layernorm)
        y = self.mlp(self.enter(x, self.mlp_layernorm))
        return self.leave(x, y, self.mlp_layernorm)

    def enter(self, x: Tensor, layernorm: nn.Module) -> Tensor:
        """What a sublayer sees of the residual stream: pre-LN, figure 1(b), normalises it here."""
        return layernorm(x) if self.placement == "pre" else x

    def leave(self, x: Tensor, y: Tensor, layernorm: nn.Module) -> Tensor:
        """Add a sublayer's output to the stream: post-LN, figure 1(a), normalises the sum."""
        x = x + self.dropout(y)
        return layernorm(x) if self.placement == "post" else x


class Transformer(nn.Module):
    """Embeddings and layers. Post-LN normalises the embeddings, pre-LN the last layer's output,
    so both placements have the same parameters in number and shape.
    """

    def __init__(self, config: ModelConfig, tp_group: ProcessGroup | None = None) -> None:
        super().__init__()
        config.check_tensor_parallel(1 if tp_group is None else tp_group.size())
        self.config, self.tp_group = config, tp_group
        self.interleaves = False  # hide tensor-parallel communication: see interleaving.py
        hidden_size = config.hidden_size
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, hidden_size, group=tp_group
        )
        self.position_embeddings = mark_sequence_sharded(
            nn.Embedding(config.max_seq_len, hidden_size)
        )
        self.token_type_embeddings = (
            mark_sequence_sharded(nn.Embedding(config.num_token_types, hidden_size))
            if config.family == "bert"
            else None
        )
        is_pre = config.layernorm == "pre"
        self.embedding_layernorm = None if is_pre else layer_norm(config)
        self.dropout = Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(config, tp_group) for _ in range(config.num_layers)
        )
        self.final_layernorm = layer_norm(config) if is_pre else None

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        batch_size, seq_len = input_ids.shape
        positions = torch.arange(seq_len, device=input_ids.device).repeat(batch_size)  # [B*S]
        group_size = 1 if self.tp_group is None else self.tp_group.size()
        num_padding = -input_ids.numel() % group_size

        def flat(ids: Tensor) -> Tensor:
            return F.pad(ids.flatten(), (0, num_padding))  # [T]

        x = self.word_embeddings(flat(input_ids))  # [T/t, H]
        x = x + self.position_embeddings(local_tokens(flat(positions), self.tp_group))
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            x = x + self.token_type_embeddings(local_tokens(flat(token_type_ids), self.tp_group))
        return compute_dtype(x)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states of this rank's tokens.

        Args:
            input_ids: [B, S], the same on every rank of the group, as are the others.
            token_type_ids: [B, S], BERT only; zeros by default.
            attention_mask: [B, S] bool: a row's tokens (True), then its padding (False), or the
                other way round; None when nothing is padding. Positions count from 0.

        Returns:
            [T/t, H] with T = B x S, padded at the end to a multiple of the group's size.

        Raises:
            ValueError: S exceeds max_seq_len.
        """
        batch_size, seq_len = input_ids.shape
        if seq_len > self.config.max_seq_len:
            raise ValueError(
                f"sequence length {seq_len} exceeds the model's max_seq_len"
                f" {self.config.max_seq_len}"
            )
        key_mask = None if attention_mask is None else attention_mask[:, None, None, :]  # [B,1,1,S]
        x = self._embed(input_ids, token_type_ids)
        if self.embedding_layernorm is not None:
            x = self.embedding_layernorm(x)
        x = self.dropout(x)
        if self.tp_group is not None and self.can_interleave(batch_size):
            x = run_interleaved(self.layers, x, (batch_size, seq_len), key_mask, self.tp_group)
        else:
            for layer in self.layers:
                x = self._run(layer, x, (batch_size, seq_len), key_mask)
        return x if self.final_layernorm is None else self.final_layernorm(x)

    def can_interleave(self, batch_size: int) -> bool:
        """Halves of every rank's tokens must be whole sequences; validation is not worth it."""
        assert self.tp_group is not None
        divides = batch_size % (2 * self.tp_group.size()) == 0
        recomputes = self.config.recompute != "none"
        return self.interleaves and self.training and divides and not recomputes

    def _run(
        self, layer: nn.Module, x: Tensor, shape: tuple[int, int], key_mask: Tensor | None
    ) -> Tensor:
        if self.config.recompute == "none" or not self.training:
            return layer(x, shape, key_mask)
        context = {}
        if self.config.recompute == "selective":
            kept = kept_operations(self.config)
            context["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
        return checkpoint(layer, x, shape, key_mask, use_reentrant=False, **context)


def interleave_halves(network: nn.Module) -> None:
    """Let tensor-parallel training hide one half's communication behind the other's compute."""
    for module in network.modules():
        if isinstance(module, Transformer):
            module.interleaves = True
