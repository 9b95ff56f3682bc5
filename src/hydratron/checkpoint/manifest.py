"""What a checkpoint directory says it holds, and whether it holds it undamaged.

`checkpoint.json` is written last. It lists every tensor with its chunks, every file with its size
and XXH3-64 hash, and the run that saved it. It has a hash of itself. Nothing here needs torch.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "checkpoint.json"
LEGACY_METADATA = ".metadata"  # a pickle, of checkpoints without a manifest
LOOPS = "loops.pt"
NAME_PREFIX = "step-"
BLOCK = 1 << 24


class CheckpointError(ValueError):
    """No complete checkpoint, or one of another model, or one that cannot be read or written."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cut short or changed since it was written."""


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    if (directory / MANIFEST).is_file():
        return True
    return (directory / LEGACY_METADATA).is_file() and (directory / LOOPS).is_file()


def step_directories(directory: Path) -> list[Path]:
    """Return the `step-<n>` below `directory`, complete or not, the largest n first."""
    found = {
        int(path.name.removeprefix(NAME_PREFIX)): path
        for path in directory.glob(f"{NAME_PREFIX}*")
        if path.name.removeprefix(NAME_PREFIX).isdecimal() and path.is_dir()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the complete `step-<n>` of the largest n below `directory`, if there is one."""
    return next(filter(is_complete, step_directories(directory)), None)


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size and hash by which `verify` knows a file again."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
    return {"bytes": size, "xxh3": digest.hexdigest()}


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Write `checkpoint.json`; the checkpoint is complete from then on."""
    text = json.dumps({"xxh3": _digest(content), "content": content})
    (directory / MANIFEST).write_text(text)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest, empty for a checkpoint from before there was one.

    Raises:
        DamagedCheckpointError: it is not what was written, or there is none of either kind.
    """
    path = directory / MANIFEST
    if not path.exists() and is_complete(directory):
        return {}
    try:
        written = json.loads(path.read_bytes())
        content = written["content"]
        is_intact = _digest(content) == written["xxh3"]
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{directory} is not a complete checkpoint: it has no {MANIFEST}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: it cannot be read") from error
    names = [*content.get("files", {}), *(c["file"] for c in _chunks(content))]
    if not is_intact or any(Path(name).name != name for name in names):
        raise DamagedCheckpointError(f"{path} is damaged: its checksum differs")
    return content


def _chunks(content: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (chunk for tensor in content.get("tensors", {}).values() for chunk in tensor["chunks"])


def verify(
    directory: Path, *, sections: Iterable[str] = ("",), part: int = 0, num_parts: int = 1
) -> None:
    """Check the files whose names begin with one of `sections` against the manifest.

    Of `num_parts` processes that share the work, this one does `part`. A checkpoint from before
    there were manifests has no checksums, so nothing of it can be checked.

    Raises:
        DamagedCheckpointError: names the file.
    """
    files = read_manifest(directory).get("files", {})
    prefixes = tuple(sections)
    for name in sorted(name for name in files if name.startswith(prefixes))[part::num_parts]:
        path = directory / name
        try:
            found = describe_file(path)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} is damaged: {error.strerror}") from error
        if found != files[name]:
            raise DamagedCheckpointError(f"{path} is damaged: its checksum differs")


def newest_intact(directory: Path, *, sections: Iterable[str] = ("",)) -> Path | None:
    """Return the newest complete checkpoint below `directory` whose `sections` are undamaged.

    A line names each one that is passed over.
    """
    for path in step_directories(directory):
        try:
            verify(path, sections=sections)
        except DamagedCheckpointError as error:
            report_damage(error)
        else:
            return path
    return None


def report_damage(error: DamagedCheckpointError) -> None:
    """Say that a checkpoint is passed over for an older one."""
    print(f"{error}; using the checkpoint before it", flush=True)
