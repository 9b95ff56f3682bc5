"""The files of a Hugging Face folder: safetensors, read a slice at a time, and JSON."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydratron.checkpoint.layouts import Layout
from hydratron.checkpoint.tensors import StoredTensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; ValueError that names the file if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of `model.safetensors`, or of the files that its index names.

    Raises:
        ValueError: a file is missing or cannot be read, by name.
    """
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        names = {name for name in named if isinstance(name, str) and Path(name).name == name}
        if not names or not names.issuperset(named):
            raise ValueError(f"{folder / INDEX} has no weight_map of names of files beside it")
        files = [folder / name for name in sorted(names)]
    stored: dict[str, StoredTensor] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{folder} holds no {path.name}: only safetensors are read")
        try:
            file = safe_open(path, "pt")
            stored |= {name: _from_safetensors(file, name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
    return stored


def _from_safetensors(file: Any, name: str) -> StoredTensor:
    view = file.get_slice(name)

    def read(dim: int | None, start: int, stop: int) -> Tensor:
        if dim is None:
            return file.get_tensor(name)
        return view[(*[slice(None)] * dim, slice(start, stop))]

    # types that we do not know are of no weight that we read
    return StoredTensor(tuple(view.get_shape()), _DTYPES.get(view.get_dtype(), torch.uint8), read)


def write_safetensors(
    path: Path, pieces: list[tuple[Layout, StoredTensor]], *, prefix: str = ""
) -> None:
    """Write tensors in their layout one after the other, holding one of ours at a time.

    The library's own writer wants all of them in memory. Format: the header's length in 8 bytes,
    a JSON header with dtype, shape and offsets of each name, the bytes. `prefix` is taken off
    the names.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for layout, stored in pieces:
        for name, tensor in layout.write(torch.empty(stored.shape, device="meta")).items():
            end = offset + tensor.numel() * stored.dtype.itemsize
            header[name.removeprefix(prefix)] = {
                "dtype": _DTYPE_NAMES[stored.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for layout, stored in pieces:
            for tensor in layout.write(stored.whole()).values():
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
