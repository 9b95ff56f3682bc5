"""`metrics.csv`: a row per logged step, complete at every moment, continued by a resumed run.

Lightning's CSVLogger deletes the file of the run it continues; this one cuts the rows after the
step it goes on from and appends.
"""

import csv
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

FILE_NAME = "metrics.csv"


class MetricsFile(Logger):
    """Writes `metrics.csv` in `run_dir`; metrics of one step share one row."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / FILE_NAME
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step"]
        self._last_row_start = 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        return self

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside, in `.hydra/`."""

    @rank_zero_only
    def continue_after(self, step: int) -> None:
        """Keep the rows up to `step` of an existing file."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or ["step"])
            self.rows = [r for r in reader if r["step"].isdigit() and int(r["step"]) <= step]
        for row in self.rows:
            row["step"] = int(row["step"])
        self._rewrite()

    def last_values(self) -> dict[str, float]:
        """Return the last value of every metric; none on ranks other than 0, which have no file."""
        values: dict[str, float] = {}
        for row in self.rows:
            values |= {k: float(v) for k, v in row.items() if k != "step" and v not in ("", None)}
        return values

    def is_validated(self, step: int) -> bool:
        """Whether the newest row is that of `step` and holds what a validation found."""
        newest = self.rows[-1] if self.rows else {"step": -1}
        held = (key for key, value in newest.items() if value not in ("", None))
        return newest["step"] == step and any(key.startswith("val/") for key in held)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        is_same_row = bool(self.rows) and self.rows[-1]["step"] == step
        if is_same_row:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
        new_columns = [key for key in metrics if key not in self.columns]
        if new_columns or not self.path.exists():
            self.columns += new_columns
            self._rewrite()
            return
        with self.path.open("r+", newline="") as file:
            if is_same_row:
                file.truncate(self._last_row_start)
            self._last_row_start = file.seek(0, os.SEEK_END)
            csv.DictWriter(file, self.columns).writerow(self.rows[-1])

    def _rewrite(self) -> None:
        temporary = self.path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            for row in self.rows:
                self._last_row_start = file.tell()
                writer.writerow(row)
        os.replace(temporary, self.path)
