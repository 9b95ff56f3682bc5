"""Where torch.distributed.checkpoint puts tensors: safetensors files that the manifest lists.

torch's own storage keeps its metadata in a pickle, and unpickling runs what the file says. Here no
file can run code. Checkpoints that torch's storage wrote are read with an unpickler that makes
nothing but descriptions of tensors.
"""

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hydratron.checkpoint.manifest import (
    LEGACY_METADATA,
    DamagedCheckpointError,
    describe_file,
    read_manifest,
    write_manifest,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
# what the metadata of torch's own storage is made of, besides torch's sizes and types
LEGACY_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},  # of the checkpoint, where it was written
}


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Writer(StorageWriter):
    """Writes this rank's `<section>-<rank>.safetensors` and, on the coordinator, the manifest.

    A section is what stands before the first dot of a tensor's name: `model`, `optimizer_0`. Files
    are hashed as they are written. `run` goes into the manifest as it is.
    """

    def __init__(self, directory: Path, *, run: Mapping[str, Any]) -> None:
        self.directory, self.run = directory, run
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        sections: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            sections.setdefault(item.index.fqn.partition(".")[0], []).append(item)
        results = []
        for section, items in sections.items():
            name = f"{section}-{self.rank}.safetensors"
            written = _write_safetensors(self.directory / name, items, planner)
            for item in items:
                stored = written | {"file": name, "key": _key(item)}
                results.append(WriteResult(item.index, item.tensor_storage_size() or 0, stored))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {_place(r.index): r.storage_data for parts in results for r in parts}
        tensors, files = {}, {}
        for path in sorted(self.directory.iterdir()):
            if path.suffix != ".safetensors":
                files[path.name] = describe_file(path)
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            chunks = []
            for chunk in entry.chunks:
                place = stored[name, tuple(chunk.offsets)]
                files[place["file"]] = {"bytes": place["bytes"], "xxh3": place["xxh3"]}
                where = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
                chunks.append(where | {"file": place["file"], "key": place["key"]})
            tensors[name] = {
                "dtype": NAMES[entry.properties.dtype],
                "shape": list(entry.size),
                "chunks": chunks,
            }
        content = {"format": 2, "run": dict(self.run), "files": files, "tensors": tensors}
        write_manifest(self.directory, content)


def _place(index: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(index.offset or ())


def _key(item: WriteItem) -> str:
    """The name of a chunk in its file: the tensor's, with the offsets of a part of one."""
    name, data = item.index.fqn, item.tensor_data
    assert data is not None, name
    if data.chunk.sizes == data.size:
        return name
    return f"{name}@{','.join(map(str, data.chunk.offsets))}"


def _write_safetensors(
    path: Path, items: list[WriteItem], planner: SavePlanner
) -> dict[str, int | str]:
    """Write the format by hand, a tensor at a time, where the library needs all of them at once."""
    header: dict[str, Any] = {}
    end = 0
    for item in items:
        assert item.tensor_data is not None
        dtype, shape = item.tensor_data.properties.dtype, list(item.tensor_data.chunk.sizes)
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[_key(item)] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    digest, size = xxhash.xxh3_64(), 0
    with path.open("wb", buffering=0) as file:
        for block in _blocks(len(text).to_bytes(8, "little") + text, items, planner):
            view = memoryview(block)
            digest.update(view)
            size += view.nbytes
            while view.nbytes:  # the system writes at most 2 GiB at a time
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return {"bytes": size, "xxh3": digest.hexdigest()}


def _blocks(header: bytes, items: list[WriteItem], planner: SavePlanner) -> Iterator[Any]:
    yield header
    for item in items:
        data: Any = planner.resolve_data(item)
        yield data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class Reader(StorageReader):
    """Reads what Writer wrote. `verify` of the manifest's module checks the files beforehand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.places: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return torch's description of the tensors.

        Raises:
            DamagedCheckpointError: the manifest has another form.
        """
        entries, places = {}, {}
        try:
            for name, tensor in read_manifest(self.directory)["tensors"].items():
                chunks = []
                for chunk in tensor["chunks"]:
                    offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
                    chunks.append(ChunkStorageMetadata(offsets, sizes))
                    places[name, tuple(offsets)] = chunk
                properties = TensorProperties(dtype=DTYPES[tensor["dtype"]])
                entries[name] = TensorStorageMetadata(
                    properties, torch.Size(tensor["shape"]), chunks
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{self.directory} is damaged: {error}") from error
        return Metadata(entries, planner_data={}, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.places[_place(item.storage_index)]["file"], []).append(item)
        for name, items in files.items():
            path = self.directory / name
            try:
                with safe_open(path, framework="pt") as file:
                    for item in items:
                        self._read(file, item, planner)
            except (SafetensorError, FileNotFoundError) as error:
                raise DamagedCheckpointError(f"{path} is damaged: {error}") from error
        return _done(None)

    def _read(self, file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        key = self.places[_place(item.storage_index)]["key"]
        target = planner.resolve_tensor(item).detach()
        if item.lengths == torch.Size(file.get_slice(key).get_shape()):
            source: Tensor = file.get_tensor(key)
        else:
            within = zip(item.storage_offsets, item.lengths, strict=True)
            source = file.get_slice(key)[tuple(slice(at, at + length) for at, length in within)]
        target.copy_(source)
        planner.commit_tensor(item, target)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes descriptions of tensors and refuses everything else, before anything is called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in LEGACY_CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is no part of a checkpoint")
        return super().find_class(module_name, global_name)


class LegacyReader(FileSystemReader):
    """Reads the tensors that torch's own storage wrote; its other values are pickles."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / LEGACY_METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            entries, stored = metadata.state_dict_metadata, metadata.storage_data
            are_tensors = all(isinstance(e, TensorStorageMetadata) for e in entries.values())
            names = {info.relative_path for info in stored.values()}
            are_beside = all(Path(name).name == name for name in names)
        except (pickle.UnpicklingError, EOFError, *_UNPICKLING) as error:
            raise DamagedCheckpointError(f"{path} is damaged: {error}") from error
        if not (isinstance(metadata, Metadata) and are_tensors and are_beside):
            raise DamagedCheckpointError(f"{path} describes more than tensors beside it")
        return metadata


# what a damaged pickle raises besides its own error
_UNPICKLING = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError)


def reader(directory: Path) -> StorageReader:
    """Return what reads a checkpoint of either kind."""
    make: Callable[[Path], StorageReader] = Reader if read_manifest(directory) else LegacyReader
    return make(directory)
