"""Megatron-LM checkpoints in: BERT and GPT-2 of any tensor-parallel size, versions 0 to 3.

`DIR/latest_checkpointed_iteration.txt`, `DIR/iter_0001000/mp_rank_00/model_optim_rng.pt`, one file
a tensor-parallel rank. Query, key and value of a rank are rows [3, N/t, D] where the checkpoint has
no version, [N/t, D, 3] in version 1, [N/t, 3, D] from version 2 on.
Letters: H hidden, N heads, D head dim, t tensor-parallel size of the checkpoint.
"""

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydratron.checkpoint.megatron_options import FLAGS, check_options, number
from hydratron.checkpoint.tensors import (
    StoredTensor,
    build_network,
    check_num_layers,
    check_tensors,
    concatenated,
    sliced,
)
from hydratron.models.config import ModelConfig

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
RANK, CORE_FILES = "mp_rank_", (".metadata", "common.pt", "metadata.json")
UNUSED = ("word_embeddings_for_head.weight", "_extra_state")
LOWERCASE = {"BertWordPieceLowerCase": True, "BertWordPieceCase": False}
MAX_DEPTH = 20  # of names in a checkpoint; a dictionary may hold itself
VOCABULARY_DIVISOR = 128  # --make-vocab-size-divisible-by


class Inert:
    """Stands for the loss scaler objects of version 1.0: holds their values, does nothing."""


# What a training checkpoint holds beside tensors and plain values: options, NumPy's random state
# and (version 1.0, fp16) a loss scaler. None of these runs code of the file's choosing.
_NUMPY_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")
_SCALERS = [
    f"{package}.{name}"
    for package in ("megatron.fp16.loss_scaler", "fp16.loss_scaler")
    for name in ("LossScaler", "DynamicLossScaler")
]
# What torch's reader raises at bytes that are no checkpoint, or no longer one.
DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, TypeError),
    *(ValueError, ImportError),
)
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((np.zeros(0).__reduce__()[0], f"{module}._reconstruct") for module in _NUMPY_MODULES),
    *((Inert, name) for name in _SCALERS),
]


@dataclass(frozen=True)
class MegatronCheckpoint:
    """What was found: `tensors` by our names; `lowercase` of its tokenizer where it says so;
    `vocabulary_multiples` to which its vocabulary may have been padded.
    """

    model: ModelConfig
    tensors: dict[str, StoredTensor]
    lowercase: bool | None
    vocabulary_multiples: tuple[int, ...]
    iteration: int | None


def is_megatron(directory: Path) -> bool:
    """Whether `directory` is the save directory of a Megatron run or one of its iterations."""
    return (
        (directory / TRACKER).is_file()
        or any(directory.glob(f"{RANK}*"))
        or bool(_core_files(directory))
    )


def _core_files(directory: Path) -> list[str]:
    """Return what Megatron Core's own format (--ckpt-format torch_dist) has left here."""
    found = [name for name in CORE_FILES if (directory / name).is_file()]
    return found + sorted(path.name for path in directory.glob("*.distcp"))[:1]


def _rank_directories(directory: Path) -> dict[int, Path]:
    found = {}
    for path in sorted(directory.glob(f"{RANK}*")):
        named = re.fullmatch(r"(\d+)(?:_(\d+))*", path.name.removeprefix(RANK))
        if named is None:
            raise ValueError(f"{path} is not named {RANK} and a number")
        if int(named[2] or 0):
            raise ValueError(f"{path}: checkpoints split over pipeline stages are not read")
        found[int(named[1])] = path
    return found


def _iteration_directory(directory: Path) -> Path:
    tracker = directory / TRACKER
    if not tracker.is_file():
        return directory
    name = tracker.read_text(errors="replace").strip()
    if name != "release" and not name.isdigit():
        raise ValueError(f"{tracker} says {name!r}: neither an iteration nor release")
    iteration = directory / (name if name == "release" else f"iter_{int(name):07d}")
    if not iteration.is_dir():
        raise ValueError(f"{tracker} says {name}, and there is no {iteration}")
    return iteration


def _load(path: Path) -> dict[str, Any]:
    """Load a rank's file; its tensors stay on disk until they are read, where the format allows."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: every tensor-parallel rank has a file")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except DAMAGE as error:
        if named := re.search(r"(?:GLOBAL|global:?) ([\w.]+\.\w+)", str(error)):
            raise ValueError(
                f"{path} needs {named[1]} to be loaded: a pickle can run code, so nothing but"
                " tensors, plain values and argparse.Namespace is read"
            ) from error
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {what}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is not a Megatron-LM checkpoint: it has no key 'model'")
    return content


def _flatten(node: Mapping[str, Any], path: Path, prefix: str = "") -> dict[str, Tensor]:
    if prefix.count(".") > MAX_DEPTH:
        raise ValueError(f"{path} cannot be read: its model has names like {prefix[:80]}")
    flat: dict[str, Tensor] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, path, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized:
                raise ValueError(f"{path}: {prefix}{key} is no plain tensor")
            flat[f"{prefix}{key}"] = value
    return flat


def _tensors_of(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return a rank's tensors under the names of version 1."""
    renamed = {}
    for name, tensor in _flatten(content["model"], path).items():
        name = name.removeprefix("module.").replace(".self_attention.", ".attention.")
        name = re.sub(r"^language_model\.encoder\.", "language_model.transformer.", name)
        if not name.endswith(UNUSED):
            renamed[name] = tensor
    return renamed


def read_megatron(directory: Path) -> MegatronCheckpoint:
    """Read the newest iteration of a Megatron-LM save directory, or the iteration given.

    Raises:
        ValueError: a file that is missing, of another tensor-parallel size, or that needs code to
            be unpickled; a network that is neither BERT nor GPT-2 as we know them.
    """
    directory = _iteration_directory(directory)
    found = _rank_directories(directory)
    if not found and (files := _core_files(directory)):
        raise ValueError(
            f"{directory} is a checkpoint of Megatron Core ({', '.join(files)}: --ckpt-format"
            " torch_dist), which is not read: the classic format (torch) is"
        )
    if not found:
        raise ValueError(f"{directory} holds no mp_rank_00")
    first = found.get(0, directory / "mp_rank_00") / FILE
    content = _load(first)
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"{first} holds no args, so that its number of heads is unknown")
    check_options(args, first)
    names = ("tensor_model_parallel_size", "model_parallel_size")
    size = number(args, names, len(found), first)
    if len(found) > size:
        raise ValueError(
            f"{directory} has {len(found)} rank files, and the args of rank 0 say {size}"
        )
    shards = [_tensors_of(content, first)]
    for rank in range(1, size):
        path = found.get(rank, directory / f"mp_rank_{rank:02d}") / FILE
        other = _load(path)
        shards.append(_tensors_of(other, path))
        _check_peer(content, other, shards[0], shards[-1], path)
    layout = _qkv_layout(content.get("checkpoint_version", 0), first)
    model = _model_config(args, shards, first)
    divisor = number(args, ("make_vocab_size_divisible_by",), VOCABULARY_DIVISOR, first)
    return MegatronCheckpoint(
        model=model,
        tensors=_merge(shards, model, layout, first),
        lowercase=LOWERCASE.get(str(getattr(args, "tokenizer_type", None))),
        # a tool of version 1 merges partitions and leaves the padding of one
        vocabulary_multiples=tuple(sorted({divisor * t for t in (1, 2, 4, 8, size)})),
        iteration=content.get("iteration"),
    )


def _check_peer(
    first: dict[str, Any],
    other: dict[str, Any],
    shards: dict[str, Tensor],
    peers: dict[str, Tensor],
    path: Path,
) -> None:
    """Raise ValueError unless rank 0 and another rank are parts of one checkpoint."""
    for key in ("iteration", "checkpoint_version"):
        if str(first.get(key)) != str(other.get(key)):
            raise ValueError(
                f"{path}: {key} {other.get(key)}, and rank 0 has {first.get(key)}:"
                " files of different checkpoints"
            )
    for name in shards | peers:
        shape, needed = (list(t[name].shape) if name in t else "none" for t in (peers, shards))
        if shape != needed:
            raise ValueError(
                f"{path}: {name} has shape {shape}, and rank 0 has {needed}:"
                " files of different tensor-parallel sizes or models"
            )


def _model_config(
    args: argparse.Namespace, shards: list[dict[str, Tensor]], path: Path
) -> ModelConfig:
    embedding = "language_model.embedding"
    kinds = ("word", "position", "tokentype")
    tables = [shards[0].get(f"{embedding}.{kind}_embeddings.weight") for kind in kinds]
    words, positions, types = (t if t is None or t.dim() == 2 else None for t in tables)
    if words is None or positions is None:
        raise ValueError(
            f"{path} holds no {embedding}.word_embeddings.weight or no position_embeddings.weight,"
            " as a classic Megatron-LM model has"
        )
    flags = {key: getattr(args, key, None) for key in FLAGS}
    is_fused = flags["bias_gelu_fusion"] and not flags["onnx_safe"]
    try:
        return ModelConfig(
            family="gpt2" if types is None else "bert",
            hidden_size=words.size(1),
            num_layers=number(args, ("num_layers",), None, path),
            num_heads=number(args, ("num_attention_heads",), None, path),
            vocab_size=words.size(0) * len(shards),
            max_seq_len=positions.size(0),
            intermediate_size=number(args, ("ffn_hidden_size",), 4 * words.size(1), path),
            num_token_types=2 if types is None else types.size(0),
            layernorm="post" if flags["apply_residual_connection_post_layernorm"] else "pre",
            init_std=number(args, ("init_method_std",), 0.02, path),
            layernorm_eps=number(args, ("layernorm_epsilon", "norm_epsilon"), 1e-5, path),
            activation="gelu_tanh" if flags["openai_gelu"] or is_fused else "gelu",
            hidden_dropout=number(args, ("hidden_dropout",), 0.1, path),
            attention_dropout=number(args, ("attention_dropout",), 0.1, path),
        )
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _qkv_layout(version: Any, path: Path) -> str:
    if not isinstance(version, int | float) or version not in (0, 1.0, 2.0, 3.0):
        raise ValueError(f"{path}: checkpoint_version {version} is not one of 0, 1.0, 2.0, 3.0")
    return "3nd" if version == 0 else "nd3" if version == 1.0 else "n3d"


def _stack_qkv(rows: Tensor, layout: str, num_heads: int) -> Tensor:
    """A rank's query, key and value rows [3H/t, ...] as [3, H/t, ...]."""
    sizes = {"3": 3, "n": num_heads, "d": rows.size(0) // (3 * num_heads)}
    split = rows.view(*(sizes[letter] for letter in layout), *rows.shape[1:])
    rest = range(3, split.dim())
    return split.permute(*(layout.index(letter) for letter in "3nd"), *rest).flatten(1, 2)


def _stored(shard: Tensor, arrange: Callable[[Tensor], Tensor]) -> StoredTensor:
    """A shard that is rearranged only when it is read, so that no copy is made before."""

    def read(dim: int | None, start: int, stop: int) -> Tensor:
        return sliced(arrange(shard), dim, start, stop)

    meta = arrange(torch.empty_like(shard, device="meta"))
    return StoredTensor(tuple(meta.shape), shard.dtype, read)


def layer_names(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Return for each of our modules Megatron's, and the dimension over which it is split.

    Both placements have the same modules there. In post-LN the residual is taken from the output
    of `input_layernorm`, so that this is the embeddings' LayerNorm in the first layer and the
    output LayerNorm of the layer before in every other; `final_layernorm` is the last layer's.
    """
    body = "language_model.transformer"
    names: dict[str, tuple[str, int | None]] = {}
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"{body}.layers.{index}"
        names |= {
            f"{ours}.attention.qkv": (f"{theirs}.attention.query_key_value", 0),
            f"{ours}.attention.output": (f"{theirs}.attention.dense", 1),
            f"{ours}.mlp.input": (f"{theirs}.mlp.dense_h_to_4h", 0),
            f"{ours}.mlp.output": (f"{theirs}.mlp.dense_4h_to_h", 1),
        }
        before = f"{theirs}.input_layernorm"
        between = f"{theirs}.post_attention_layernorm"
        if config.layernorm == "pre":
            names[f"{ours}.attention_layernorm"] = (before, None)
            names[f"{ours}.mlp_layernorm"] = (between, None)
        else:
            shifted = f"layers.{index - 1}.mlp_layernorm" if index else "embedding_layernorm"
            names[shifted] = (before, None)
            names[f"{ours}.attention_layernorm"] = (between, None)
    last = f"layers.{config.num_layers - 1}.mlp_layernorm"
    final = "final_layernorm" if config.layernorm == "pre" else last
    return names | {final: (f"{body}.final_layernorm", None)}


def parameter_names(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Return for each of our parameters Megatron's, and the dimension over which that is split."""
    is_bert = config.family == "bert"
    body = "encoder.transformer" if is_bert else "transformer"
    embedding = "language_model.embedding"
    names: dict[str, tuple[str, int | None]] = {
        f"{body}.word_embeddings.weight": (f"{embedding}.word_embeddings.weight", 0),
        f"{body}.position_embeddings.weight": (f"{embedding}.position_embeddings.weight", None),
    }
    modules = {f"{body}.{ours}": theirs for ours, theirs in layer_names(config).items()}
    if is_bert:
        types = f"{body}.token_type_embeddings.weight"
        names[types] = (f"{embedding}.tokentype_embeddings.weight", None)
        names["masked_lm_head.bias"] = ("lm_head.bias", 0)
        modules |= {
            "encoder.pooler": ("language_model.pooler.dense", None),
            "masked_lm_head.transform": ("lm_head.dense", None),
            "masked_lm_head.layernorm": ("lm_head.layernorm", None),
            "sentence_order_head": ("binary_head", None),
        }
    for ours, (theirs, dim) in modules.items():
        names[f"{ours}.weight"] = (f"{theirs}.weight", dim)
        names[f"{ours}.bias"] = (f"{theirs}.bias", 0 if dim == 0 else None)
    return names


def _merge(
    shards: list[dict[str, Tensor]], config: ModelConfig, layout: str, path: Path
) -> dict[str, StoredTensor]:
    """Return our global parameters, each joined from its shards when it is read."""
    check_num_layers(config, len(shards[0]), path=path)
    names = parameter_names(config)
    network = build_network(config, None, {})
    needed = {}
    for ours, parameter in network.named_parameters():
        theirs, dim = names[ours]
        shape = list((parameter.flatten(0, 1) if ".qkv." in ours else parameter).shape)
        if dim is not None:
            shape[dim] //= len(shards)
        needed[ours] = {theirs: shape}
    held = {name: _stored(tensor, torch.Tensor.detach) for name, tensor in shards[0].items()}
    check_tensors(needed, held, path=path, family=config.family)

    def arrange_qkv(shard: Tensor) -> Tensor:
        return _stack_qkv(shard, layout, config.num_heads // len(shards))

    tensors: dict[str, StoredTensor] = {}
    for ours, (theirs, dim) in names.items():
        if theirs not in shards[0]:
            continue
        is_qkv = ".qkv." in ours
        arrange = arrange_qkv if is_qkv else torch.Tensor.detach
        parts = [_stored(shard[theirs], arrange) for shard in shards]
        tensors[ours] = parts[0] if dim is None else concatenated(parts, dim + is_qkv)
    return tensors
