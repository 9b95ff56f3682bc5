"""`hydratron evaluate`: a finetuned run, an ensemble of them, or a GPT-2 zero-shot."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydratron.commands import tasks
from hydratron.commands.environment import check_devices, cluster_environment
from hydratron.settings import build
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.evaluation import evaluate, load_ensemble, score_ensemble
from hydratron.training.finetuning import OUTPUT, Finetuning

Job = Callable[[Path], dict[str, Any]]


def prepare(config: Mapping[str, Any]) -> Job:
    """Check a configuration and read its data; ValueError says what is wrong with it."""
    parallel = build(ParallelConfig, config["parallel"], name="parallel")
    trainer = build(TrainerConfig, config["trainer"], name="trainer")
    check_devices(trainer, parallel.world_size)
    trainer.check_float32_weights("evaluate")
    grid = {"trainer": trainer, "parallel": parallel}
    if config["runs"] is not None:
        if config["checkpoint"] is not None:
            raise ValueError(f"runs= and checkpoint={config['checkpoint']}: give one of them")
        runs = [Path(run).expanduser() for run in config["runs"]]
        data = tasks.open_ensemble(config, runs)
        scores = load_ensemble(runs, data)

        def job(run_dir: Path) -> dict[str, Any]:
            tasks.remember_task(data, run_dir)
            described = {"task": data.task.name, "num_runs": len(runs)}
            return described | score_ensemble(scores, data, run_dir)

    elif tasks.is_zero_shot(config):
        objective, sets, described = tasks.open_zero_shot(config)

        def job(run_dir: Path) -> dict[str, Any]:
            environment = cluster_environment()
            return described | evaluate(objective, sets, run_dir, environment=environment, **grid)

    else:
        source, split = tasks.open_finetuned(config)

        def job(run_dir: Path) -> dict[str, Any]:
            described = tasks.describe_source(source, split, run_dir)
            environment = cluster_environment()
            objective = Finetuning(source, split, output=run_dir / OUTPUT)
            return described | evaluate(objective, split, run_dir, environment=environment, **grid)

    return job


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Evaluate; return what `result.json` says of it."""
    return job(run_dir)
