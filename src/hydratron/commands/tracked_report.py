"""A report as Weights & Biases keeps it, apart from a run's tracking: only this reads tables."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pytorch_lightning.loggers import WandbLogger

from hydratron.checkpoint.runs import FROZEN_CONFIG
from hydratron.commands.tracking import is_offline
from hydratron.report.files import parse_value, read_node
from hydratron.result import TRACKED, sync_command


def track_report(run_dirs: Sequence[Path], directory: Path, report: Path) -> None:
    """Keep a report as an artifact of a W&B run that closes the sweep, in the group of its jobs.

    Args:
        run_dirs: the jobs; the first one with `logger=wandb` says which project and group.
        directory: where the W&B run is written.
        report: the folder that the artifact holds.

    Raises:
        ValueError: no job was made with `logger=wandb`.
    """
    tracked_dirs = [run_dir for run_dir in run_dirs if (run_dir / TRACKED).exists()]
    if not tracked_dirs:
        raise ValueError("--wandb: none of the runs was made with logger=wandb")
    given = read_node(tracked_dirs[0] / FROZEN_CONFIG, "logger")
    # no class and no server of a directory that may be somebody else's
    where = {key: parse_value(given.get(key)) for key in ("project", "entity", "group", "offline")}
    if where["offline"] is None:
        where["offline"] = is_offline()
    logger = WandbLogger(
        **where,
        job_type="report",
        name=f"report {directory.name}",
        save_dir=directory,
        settings={"silent": True},
    )
    for figure in sorted(report.glob("*.png")):
        logger.log_image(figure.stem, [str(figure)])
    logger.log_table("summary", dataframe=pd.read_csv(report / "table.csv"))
    logger.experiment.log_artifact(str(report), name="report", type="report")
    logger.experiment.finish(exit_code=0)
    if logger._offline:
        print(sync_command(directory), flush=True)
