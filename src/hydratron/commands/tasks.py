"""What finetune and evaluate share: the task, the network to put it on, its tokenizer."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class

from hydratron.checkpoint.baseline import Baseline, read_baseline
from hydratron.checkpoint.runs import read_run_config
from hydratron.checkpoint.sharded import newest_checkpoint
from hydratron.checkpoint.source import (
    CHECKPOINTS,
    TOKENIZER,
    Checkpoint,
    read_checkpoint,
    write_model,
)
from hydratron.commands.configuration import NetworkChoice
from hydratron.data.encodings import make_frame
from hydratron.data.tokenizer import PreTrainedTokenizerFast, load_tokenizer
from hydratron.processes import is_first_rank
from hydratron.settings import build
from hydratron.training.finetuning import BEST, PretrainedBert
from hydratron.training.task_data import BatchConfig, TaskData
from hydratron.training.tasks import GROUPS, Task
from hydratron.training.zeroshot import ZeroShot, ZeroShotData

TASK = "task.json"
# of the pretrained model, what a run may choose anew
MODEL_SETTINGS = ("hidden_dropout", "attention_dropout", "recompute")
Source = PretrainedBert | Baseline


def build_task(node: Mapping[str, Any]) -> Any:
    """Return the task that `_target_` names, typed and checked."""
    try:
        cls = get_class(node["_target_"])
    except (KeyError, HydraException) as error:
        raise ValueError(f"task needs a _target_ that is one of its classes: {error}") from error
    return build(cls, {k: v for k, v in node.items() if k != "_target_"}, name="task")


def fill(node: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `node` with `defaults` in place of what is null."""
    return {k: defaults.get(k) if v is None else v for k, v in node.items()}


def open_checkpoint(name: str | None) -> Checkpoint:
    """Read a checkpoint; of a run that kept its best one, that."""
    if not name:
        raise ValueError("checkpoint= is missing: a run directory, a Hugging Face folder or name")
    best = Path(name).expanduser() / CHECKPOINTS / BEST
    return read_checkpoint(best if best.is_dir() else name)


def open_run(name: str) -> Path:
    """Return the best, else the newest checkpoint of a run directory.

    Raises:
        ValueError: it has none.
    """
    directory = Path(name).expanduser() / CHECKPOINTS
    found = directory / BEST if (directory / BEST).is_dir() else newest_checkpoint(directory)
    if found is None:
        raise ValueError(f"{directory} holds no complete checkpoint")
    return found


def open_tokenizer(name: str | None, checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """Load the tokenizer that `tokenizer=` names, else the one beside the checkpoint."""
    name = name or (str(checkpoint.tokenizer) if checkpoint.tokenizer else None)
    if name is None:
        raise ValueError(
            f"checkpoint {checkpoint.path} has no tokenizer beside it: give tokenizer="
        )
    tokenizer = load_tokenizer(name)
    checkpoint.check_tokenizer(tokenizer, name)
    return tokenizer


def open_source(
    config: Mapping[str, Any], task: Task, *, needs_head: bool = False
) -> tuple[Source, PreTrainedTokenizerFast]:
    """Return what builds the network for `task`, and the tokenizer it was made with.

    Raises:
        ValueError: no such checkpoint, one of another family or task, or a size that does not
            divide by the tensor-parallel size.
    """
    build(NetworkChoice, config["model"], name="model")
    tensor_parallel_size = config["parallel"]["tensor_parallel_size"]
    if config["model"].get("family") == "huggingface":
        if tensor_parallel_size > 1:
            raise ValueError(
                "model=huggingface runs on one device: parallel.tensor_parallel_size"
                f" {tensor_parallel_size} is not 1"
            )
        if not config["model"].get("path"):
            raise ValueError("model=huggingface needs model.path: a folder or Hub name")
        tokenizer = load_tokenizer(config["tokenizer"] or config["model"]["path"])
        frame = make_frame(tokenizer, 2)
        cls_index = 0 if frame.cls_id in frame.parts[0] else -1
        baseline = read_baseline(config["model"], task, tokenizer, cls_index)
        if needs_head:
            finetuned = open_run(config["checkpoint"])
            baseline = dataclasses.replace(baseline, finetuned=finetuned)
        return baseline, tokenizer
    checkpoint = open_checkpoint(config["checkpoint"])
    chosen = {k: config["model"].get(k) for k in MODEL_SETTINGS}
    changes = {k: v for k, v in chosen.items() if v is not None}
    model = dataclasses.replace(checkpoint.model, **changes)
    model.check_tensor_parallel(tensor_parallel_size)
    tokenizer = open_tokenizer(config["tokenizer"], checkpoint)
    return PretrainedBert(checkpoint, model, task, needs_head=needs_head), tokenizer


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `result.json` says of the network that a checkpoint holds."""
    size = read_run_config(checkpoint.directory).get("size")
    model = checkpoint.model
    return {"model": model.family, "layernorm": model.layernorm, "size": size}


def describe_source(source: Source, data: TaskData, run_dir: Path) -> dict[str, Any]:
    """Keep beside the checkpoints what reads them again; return what `result.json` says of it."""
    described = {"task": data.task.name, "num_parameters": source.num_parameters}
    if isinstance(source, PretrainedBert):
        described |= describe_checkpoint(source.checkpoint)
    if is_first_rank() and isinstance(source, PretrainedBert):
        write_model(run_dir, source.model)
    remember_task(data, run_dir)
    return described


def remember_task(data: TaskData, run_dir: Path) -> None:
    """Write the task and the tokenizer, so that the run can be evaluated again or in an ensemble.

    Paths become absolute, `max_seq_len` what it was cut to.
    """
    if not is_first_rank():
        return
    data.tokenizer.save_pretrained(run_dir / TOKENIZER)
    task = data.task
    values = dataclasses.asdict(task) | {"max_seq_len": data.max_seq_len}
    for group in GROUPS:
        path = task.path(group)
        values[f"{group}_path"] = None if path is None else str(path.absolute())
    target = f"{type(task).__module__}.{type(task).__qualname__}"
    (run_dir / TASK).write_text(json.dumps({"_target_": target} | values, indent=2) + "\n")


def run_directory(checkpoint: str) -> Path:
    """Return the run that `checkpoint` is, or lies in."""
    path = Path(checkpoint).expanduser()
    return path.parents[1] if path.parent.name == CHECKPOINTS else path


def task_of_run(node: Mapping[str, Any], checkpoint: str | None) -> Any:
    """Return the task of a finetuned run, with what `task.` gives in place of its own.

    Raises:
        ValueError: no such run, or one that is not finetuned.
    """
    if not checkpoint:
        raise ValueError("checkpoint= is missing: a finetuned run, or runs=[...] for an ensemble")
    path = run_directory(checkpoint) / TASK
    given = {key: value for key, value in node.items() if value is not None}
    if path.is_file():
        if "_target_" in given and given["name"] != (name := json.loads(path.read_text())["name"]):
            raise ValueError(f"{checkpoint} is finetuned on {name}, not on {given['name']}")
        return build_task(json.loads(path.read_text()) | given)
    if "_target_" in given:
        return build_task(given)
    raise ValueError(f"{checkpoint} is no finetuned run: it has no {TASK}; name its task=")


def open_finetuned(config: Mapping[str, Any]) -> tuple[Source, TaskData]:
    """Return the network of a finetuned run and the split to score."""
    task = task_of_run(config["task"], config["checkpoint"])
    model = config["model"]
    stored = read_run_config(run_directory(config["checkpoint"])).get("model") or {}
    if model.get("family") is None and stored.get("family") == "huggingface":
        model = stored
    source, tokenizer = open_source(dict(config) | {"model": model}, task, needs_head=True)
    return source, open_split(config, task, tokenizer, max_positions=source.max_positions)


def open_split(
    config: Mapping[str, Any],
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_positions: int,
) -> TaskData:
    """Return the data of `split=`."""
    if config["split"] not in ("validation", "test"):
        raise ValueError(f"split {config['split']!r} is not one of validation, test")
    batches = build(BatchConfig, dict(config["data"]) | {"global_batch_size": 1}, name="data")
    groups = (config["split"],)
    return TaskData(task, batches, tokenizer, max_positions=max_positions, groups=groups)


def open_zero_shot(config: Mapping[str, Any]) -> tuple[ZeroShot, ZeroShotData, dict[str, Any]]:
    """Return a GPT-2, sets on which it was not trained, and what `result.json` says of both."""
    task, checkpoint = build_task(config["task"]), open_checkpoint(config["checkpoint"])
    checkpoint.model.check_tensor_parallel(config["parallel"]["tensor_parallel_size"])
    tokenizer = open_tokenizer(config["tokenizer"], checkpoint)
    sets = task.load(tokenizer, checkpoint.model.max_seq_len)
    data = ZeroShotData(sets, batch_size=config["data"]["evaluation_batch_size"])
    described = describe_checkpoint(checkpoint) | {"task": task.name}
    return ZeroShot(checkpoint, sets), data, described


def open_ensemble(config: Mapping[str, Any], runs: list[Path]) -> TaskData:
    """Return the examples that all of `runs` have scored, encoded as the first run did.

    Raises:
        ValueError: a run is no finetuned one, of another task than the first, or named twice.
    """
    for run in runs:
        if [other.resolve() for other in runs].count(run.resolve()) > 1:
            raise ValueError(f"runs= names {run} twice: its votes would count double")
    found = [task_of_run(config["task"], str(run)) for run in runs]
    for run, task in zip(runs, found, strict=True):
        if task.name != found[0].name:
            raise ValueError(f"{run} is of task {task.name}, {runs[0]} of {found[0].name}")
    tokenizer = load_tokenizer(str(runs[0] / TOKENIZER))
    return open_split(config, found[0], tokenizer, max_positions=found[0].max_seq_len)
