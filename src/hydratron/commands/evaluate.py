"""`hydratron evaluate`: a finetuned run, an ensemble of them, or a GPT-2 zero-shot."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydratron.commands import tasks
from hydratron.commands.configuration import build, cluster_environment
from hydratron.training.evaluation import evaluate, load_ensemble, score_ensemble
from hydratron.training.finetuning import OUTPUT, Finetuning
from hydratron.training.trainer import ParallelConfig, TrainerConfig
from hydratron.training.zeroshot import ZeroShot, ZeroShotData

Job = Callable[[Path], dict[str, Any]]


def prepare(config: Mapping[str, Any]) -> Job:
    """Check a configuration and read its data; ValueError says what is wrong with it."""
    parallel = build(ParallelConfig, config["parallel"], name="parallel")
    trainer = build(TrainerConfig, config["trainer"], name="trainer")
    trainer.local_devices(parallel.world_size)
    trainer.check_float32_weights("evaluate")
    if config["runs"]:
        return ensemble(config)
    is_zero_shot = "zeroshot" in config["task"].get("_target_", "")
    make = zero_shot if is_zero_shot else finetuned
    objective, data, describe = make(config)

    def job(run_dir: Path) -> dict[str, Any]:
        described = describe(run_dir)
        grid = {"trainer": trainer, "parallel": parallel, "environment": cluster_environment()}
        return described | evaluate(objective, data, run_dir, **grid)

    return job


def finetuned(config: Mapping[str, Any]) -> Any:
    """A finetuned run on its task's held-out rows."""
    task = tasks.task_of_run(config["task"], config["checkpoint"])
    source, data = tasks.open_finetuned(config, task)
    objective = Finetuning(source, data, output=None)

    def describe(run_dir: Path) -> dict[str, Any]:
        objective.output = run_dir / OUTPUT
        return tasks.describe_source(source, data, run_dir)

    return objective, data, describe


def zero_shot(config: Mapping[str, Any]) -> Any:
    """A GPT-2 on a set on which nothing was trained."""
    task, checkpoint = tasks.build_task(config["task"]), tasks.open_checkpoint(config["checkpoint"])
    checkpoint.model.check_tensor_parallel(config["parallel"]["tensor_parallel_size"])
    tokenizer = tasks.open_tokenizer(config["tokenizer"], checkpoint)
    sets = task.load(tokenizer, checkpoint.model.max_seq_len)
    data = ZeroShotData(sets, batch_size=config["data"]["evaluation_batch_size"])
    described = tasks.describe_checkpoint(checkpoint) | {"task": task.name}
    return ZeroShot(checkpoint, sets), data, lambda run_dir: described


def ensemble(config: Mapping[str, Any]) -> Job:
    """Runs of one task, by the scores they wrote; no network is needed."""
    runs = [Path(run).expanduser() for run in config["runs"]]
    data = tasks.open_ensemble(config, runs)
    scores = load_ensemble(runs, data)

    def job(run_dir: Path) -> dict[str, Any]:
        tasks.remember_task(data, run_dir)
        described = {"task": data.task.name, "num_runs": len(runs)}
        return described | score_ensemble(scores, data, run_dir)

    return job


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Evaluate; return what `result.json` says of it."""
    return job(run_dir)
