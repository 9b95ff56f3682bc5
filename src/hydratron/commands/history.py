"""A W&B run that is gone on with: its history is `metrics.csv`, each value once.

A killed process has not given W&B its last rows, and a resumed one starts before the last that it
gave. What W&B has stands in the run's own files, also where it is online.
"""

import csv
import json
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from hydratron.training.metrics import FILE_NAME

STEP = "trainer/global_step"  # Lightning's name
FILE_HEADER = 7  # ":W&B", a magic number and a version
# LevelDB's log format: checksum, length, type
BLOCK, CHUNK = 32768, struct.Struct("<IHB")
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Yield every complete record of a `.wandb` file, as wandb's own protocol buffers."""
    read_record = get_class("wandb.proto.wandb_internal_pb2.Record").FromString  # pyright: ignore
    data, position, parts = path.read_bytes(), FILE_HEADER, b""
    while position + CHUNK.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK.size:  # a block's end is padded
            position += left
            continue
        _, length, kind = CHUNK.unpack_from(data, position)
        position += CHUNK.size
        if position + length > len(data):
            return  # cut off by a kill
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield read_record(parts)
            parts = b""


def logged_values(directory: Path, run_id: str) -> set[tuple[int, str]]:
    """Return the steps and keys that the W&B run has, from what lies below its `save_dir`."""
    found = set()
    for path in directory.glob(f"wandb/*run-*/run-{run_id}.wandb"):
        for record in records(path):
            items = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if STEP in items:
                found |= {(int(json.loads(items[STEP])), key) for key in items}
    return found


class WholeHistoryLogger(WandbLogger):
    """Logs no value that the run has already, and first those rows of `metrics.csv` that it lacks.

    The file must be written before this logs the same metrics.
    """

    def __init__(self, *, save_dir: str, **arguments: Any) -> None:
        super().__init__(save_dir=save_dir, **arguments)
        self._metrics = Path(save_dir) / FILE_NAME
        run_id = arguments.get("id")
        self._known = logged_values(Path(save_dir), run_id) if run_id else set()
        self._is_behind = True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is not None:
            self.catch_up(but={(step, key) for key in metrics})
        missing = {k: v for k, v in metrics.items() if (step, k) not in self._known}
        if missing:
            super().log_metrics(missing, step)

    @rank_zero_only
    def catch_up(self, *, but: Collection[tuple[int, str]] = ()) -> None:
        """Log once what stands in `metrics.csv` and the run has not, all `but` some values."""
        if not self._is_behind or not self._metrics.exists():
            return
        self._is_behind = False
        with self._metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            step = int(row.pop("step"))
            values = {k: float(v) for k, v in row.items() if v and (step, k) not in but}
            self.log_metrics(values, step)
            self._known |= {(step, key) for key in values}
