"""Reads W&B's offline files: what a run would send, as wandb's own protocol buffers."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER = 7  # ":W&B", a magic number and a version
BLOCK, RECORD_HEADER = 32768, 7  # LevelDB's log format: checksum, length, type
FULL, LAST = 1, 4


def records(path: Path) -> list[Record]:
    """Return every record of a `.wandb` file."""
    data, position, parts, found = path.read_bytes(), FILE_HEADER, b"", []
    assert data[:4] == b":W&B"
    while position + RECORD_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:  # a block's end is padded
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + RECORD_HEADER])
        position += RECORD_HEADER
        if position + length > len(data):
            break  # the last record of a killed process
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            found.append(Record.FromString(parts))
            parts = b""
    return found


@dataclass
class OfflineRun:
    """What one `.wandb` file says of its run."""

    id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def column(self, key: str) -> dict[int, float]:
        """The logged values of a metric by optimizer step."""
        return {row["trainer/global_step"]: row[key] for row in self.history if key in row}


def items(updates: Any) -> dict[str, Any]:
    return {".".join(u.nested_key) or u.key: json.loads(u.value_json) for u in updates}


def read_offline_run(path: Path) -> OfflineRun:
    """Read one `.wandb` file."""
    run = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            said = record.run
            run.id, run.project, run.name = said.run_id, said.project, said.display_name
            run.group, run.job_type, run.tags = said.run_group, said.job_type, list(said.tags)
            run.config |= items(said.config.update)
        elif kind == "config":
            run.config |= items(record.config.update)
        elif kind == "history":
            run.history.append(items(record.history.item))
        elif kind == "summary":
            run.summary |= items(record.summary.update)
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "exit":
            assert run.exit_code is None, "a run ends once"
            run.exit_code = record.exit.exit_code
    return run


def read_offline_runs(directory: Path) -> list[OfflineRun]:
    """Read every `.wandb` file below a run or sweep, oldest first."""
    paths = sorted(directory.rglob("offline-run-*/run-*.wandb"), key=lambda p: p.parent.name)
    return [read_offline_run(path) for path in paths]
