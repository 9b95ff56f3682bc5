"""`hydratron plan`: which splits of a run over a cluster fit, and what the fastest costs."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hydratron.commands.report import FILE_WIDTH
from hydratron.commands.steps import read_measured_step, read_step
from hydratron.launch import InputError
from hydratron.perf.calibration import calibrate
from hydratron.perf.estimates import Estimator
from hydratron.perf.hardware import Hardware
from hydratron.perf.planner import nearest_fit, search, weak_scaling
from hydratron.perf.step import StepConfig
from hydratron.report.planning import show_plan
from hydratron.settings import build


@dataclass(frozen=True)
class PlanJob:
    """A checked job: the configuration's own step, and the cluster to put it on."""

    step: StepConfig
    hardware: Hardware
    estimator: Estimator
    num_steps: int
    rows: int
    title: str


def prepare(config: Mapping[str, Any]) -> PlanJob:
    """Check configuration and cluster; ValueError says what is wrong with them."""
    rows, calibration = config["rows"], config["calibration"]
    hardware = build(Hardware, config["hardware"], name="hardware")
    step, estimator = read_step(config), Estimator()
    hardware.check_precision(step.precision)
    if calibration is not None:
        measured, seconds = read_measured_step(calibration)
        hardware = calibrate(hardware, measured, estimator.traces(measured), seconds)
    title = f"{config['model']['family']} {config['size']}, {hardware.num_gpus} x {hardware.name}"
    num_steps = config["trainer"]["max_steps"]
    return PlanJob(step, hardware, estimator, num_steps, rows, title)


def run(job: PlanJob, run_dir: Path) -> dict[str, Any]:
    """Search, print and write; return the fastest split."""
    try:
        plan = search(job.step, job.hardware, job.estimator)
    except ValueError as error:
        raise InputError(str(error)) from error
    own = None
    if job.step.world_size == job.hardware.num_gpus:
        own = job.estimator.estimate(job.step, job.hardware)
        plan.add(own)
    if not plan.fitting:
        raise InputError(nearest_fit(job.step, job.hardware, job.estimator))
    scaling = weak_scaling(plan.fitting[0], job.estimator)
    files = show_plan(
        [e.row(job.num_steps) for e in (*plan.fitting, *plan.too_big)],
        Console(width=None if sys.stdout.isatty() else FILE_WIDTH),
        run_dir,
        own=own.row(job.num_steps) if own else None,
        wanted_gpus=job.step.world_size,
        impossible=plan.impossible,
        scaling=[e.row(job.num_steps) for e in scaling],
        limit_gib=job.hardware.usable_gib,
        num_shown=job.rows,
        title=f"{job.title}, {job.step.global_batch_size} sequences a step",
    )
    for path in files:
        print(path)
    best = plan.fitting[0].row(job.num_steps)
    return {"hardware": job.hardware.name, "steps": job.num_steps} | {
        f"plan/{key}": value for key, value in best.items()
    }
