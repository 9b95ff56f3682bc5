"""Megatron-LM checkpoints written by hand, and Megatron-LM's forward pass, slow and plain.

Both follow `mlm` v1.0: module names, block order and the row layouts of query, key and value.
Letters: B batch, S sequence, H hidden, N heads, D head dim, V vocabulary.
"""

import argparse
import math
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, HEADS, LAYERS, VOCAB, POSITIONS = 32, 4, 2, 128, 16
HEAD_DIM = HIDDEN // HEADS
WHERE_SPLIT = {  # the dimension that is split over the tensor-parallel ranks
    "word_embeddings.weight": 0,
    "lm_head.bias": 0,
    "attention.dense.weight": 1,
    "dense_h_to_4h.weight": 0,
    "dense_h_to_4h.bias": 0,
    "dense_4h_to_h.weight": 1,
}


def random_weights(family: str) -> dict[str, Tensor]:
    """Draw a network; query, key and value are [3, N, D, H] and [3, N, D] here."""

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape)

    body = "language_model.transformer"
    weights = {
        "language_model.embedding.word_embeddings.weight": draw(VOCAB, HIDDEN),
        "language_model.embedding.position_embeddings.weight": draw(POSITIONS, HIDDEN),
    }
    linears = {}
    layernorms = [f"{body}.final_layernorm"]
    for i in range(LAYERS):
        layer = f"{body}.layers.{i}"
        layernorms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        qkv = f"{layer}.attention.query_key_value"
        weights[f"{qkv}.weight"] = draw(3, HEADS, HEAD_DIM, HIDDEN)
        weights[f"{qkv}.bias"] = draw(3, HEADS, HEAD_DIM)
        linears[f"{layer}.attention.dense"] = (HIDDEN, HIDDEN)
        linears[f"{layer}.mlp.dense_h_to_4h"] = (4 * HIDDEN, HIDDEN)
        linears[f"{layer}.mlp.dense_4h_to_h"] = (HIDDEN, 4 * HIDDEN)
    if family == "bert":
        weights["language_model.embedding.tokentype_embeddings.weight"] = draw(2, HIDDEN)
        weights["lm_head.bias"] = draw(VOCAB)
        layernorms.append("lm_head.layernorm")
        linears |= {"language_model.pooler.dense": (HIDDEN, HIDDEN)}
        linears |= {"lm_head.dense": (HIDDEN, HIDDEN), "binary_head": (2, HIDDEN)}
    for name, shape in linears.items():
        weights |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    for name in layernorms:
        weights |= {f"{name}.weight": 1 + draw(HIDDEN), f"{name}.bias": draw(HIDDEN)}
    return weights


def forward(weights: dict[str, Tensor], batch: dict[str, Tensor], *, is_post: bool) -> list[Tensor]:
    """Return the logits as Megatron-LM computes them, head by head."""
    ids = batch["input_ids"]
    is_bert = "lm_head.bias" in weights
    body = "language_model.transformer"

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (HIDDEN,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:  # BERT: erf; GPT-2 here: --openai-gelu
        if is_bert:
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    words = weights["language_model.embedding.word_embeddings.weight"]
    x = words[ids] + weights["language_model.embedding.position_embeddings.weight"][: ids.size(1)]
    if is_bert:
        types = weights["language_model.embedding.tokentype_embeddings.weight"]
        x = x + types[batch["token_type_ids"]]
        hidden_keys = ~batch["attention_mask"][:, None, :]  # [B, 1, S]
    else:
        hidden_keys = torch.ones(ids.size(1), ids.size(1)).triu(1).bool()  # [S, S]
    for i in range(LAYERS):
        layer = f"{body}.layers.{i}"
        y = norm(f"{layer}.input_layernorm", x)
        qkv = f"{layer}.attention.query_key_value"
        contexts = []
        for head in range(HEADS):
            query, key, value = (
                y @ weights[f"{qkv}.weight"][p, head].T + weights[f"{qkv}.bias"][p, head]
                for p in range(3)
            )
            scores = query @ key.transpose(1, 2) / math.sqrt(HEAD_DIM)  # [B, S, S]
            scores = scores.masked_fill(hidden_keys, -10000.0)
            contexts.append(scores.softmax(-1) @ value)
        attention = linear(f"{layer}.attention.dense", torch.cat(contexts, -1))
        x = (y if is_post else x) + attention
        z = norm(f"{layer}.post_attention_layernorm", x)
        mlp = linear(f"{layer}.mlp.dense_4h_to_h", gelu(linear(f"{layer}.mlp.dense_h_to_4h", z)))
        x = (z if is_post else x) + mlp
    x = norm(f"{body}.final_layernorm", x)
    if not is_bert:
        return [x @ words.T]
    pooled = torch.tanh(linear("language_model.pooler.dense", x[:, 0]))
    x = norm("lm_head.layernorm", gelu(linear("lm_head.dense", x)))
    return [x @ words.T + weights["lm_head.bias"], linear("binary_head", pooled)]


def shard(name: str, tensor: Tensor, rank: int, size: int, version: float | None) -> Tensor:
    """Return a rank's part, the rows of query, key and value one by one in the version's order."""
    if "query_key_value" in name:
        num_local = HEADS // size
        heads = range(rank * num_local, (rank + 1) * num_local)
        parts, dims = range(3), range(HEAD_DIM)
        if version is None:
            order = [(p, n, d) for p in parts for n in heads for d in dims]
        elif version == 1.0:
            order = [(p, n, d) for n in heads for d in dims for p in parts]
        else:
            order = [(p, n, d) for n in heads for p in parts for d in dims]
        return torch.stack([tensor[index] for index in order])
    for ending, dim in WHERE_SPLIT.items():
        if name.endswith(ending):
            return tensor.chunk(size, dim)[rank].clone()
    return tensor


def nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Return the dictionaries of v1.0: flat below transformer, pooler and each head."""
    model: dict[str, Any] = {}
    for name, tensor in flat.items():
        if name.startswith("language_model.embedding"):
            path = name.split(".")
        elif name.startswith("language_model"):
            path = name.split(".", 2)
        else:
            path = name.split(".", 1)
        node = model
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = tensor
    return model


def arguments(family: str, size: int, *, is_post: bool = False, **changes: Any) -> Any:
    """The options that v1.0 saves, among them ones that nobody here reads."""
    values = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "layernorm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": is_post,
        "openai_gelu": family == "gpt2",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "init_method_std": 0.02,
        "model_parallel_size": size,
        "tokenizer_type": "BertWordPieceLowerCase" if family == "bert" else "GPT2BPETokenizer",
        "make_vocab_size_divisible_by": 128,
        "params_dtype": torch.half,
        "lr": 1e-4,
    }
    return argparse.Namespace(**values | changes)


def training_state() -> dict[str, Any]:
    """What a training checkpoint holds besides: random states, optimizer, fp16's loss scaler."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        "optimizer": {"loss_scaler": loss_scaler(), "state": {0: {"exp_avg": torch.zeros(3)}}},
        "lr_scheduler": {"start_lr": 1e-4, "num_iters": 20},
    }


def loss_scaler() -> Any:
    """An object of a class that the reader cannot import."""
    name = "megatron.fp16.loss_scaler"
    if name not in sys.modules:
        module = types.ModuleType(name)
        scaler_class = type("DynamicLossScaler", (), {"__module__": name})
        module.DynamicLossScaler = scaler_class  # type: ignore[attr-defined]
        sys.modules |= {"megatron.fp16": types.ModuleType("megatron.fp16"), name: module}
    scaler = sys.modules[name].DynamicLossScaler()
    scaler.cur_scale = 65536.0
    return scaler


def write(
    directory: Path,
    weights: dict[str, Tensor],
    args: Any,
    *,
    size: int = 1,
    version: float | None = 2.0,
    iteration: int = 20,
    is_zip: bool = True,
    **extra: Any,
) -> Path:
    """Write one file a rank and the tracker."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "latest_checkpointed_iteration.txt").write_text(f"{iteration}")
    for rank in range(size):
        flat = {name: shard(name, t, rank, size, version) for name, t in weights.items()}
        content = {"args": args, "iteration": iteration, "model": nested(flat), **extra}
        if version is not None:
            content["checkpoint_version"] = version
        path = directory / f"iter_{iteration:07d}/mp_rank_{rank:02d}/model_optim_rng.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return directory
