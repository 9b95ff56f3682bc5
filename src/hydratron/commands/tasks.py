"""What finetune and evaluate share: the task, the network to put it on, its tokenizer."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from hydratron.checkpoint.baseline import Baseline, read_baseline
from hydratron.checkpoint.manifest import newest_intact
from hydratron.checkpoint.runs import read_run_config
from hydratron.checkpoint.source import (
    CHECKPOINTS,
    TOKENIZER,
    Checkpoint,
    read_checkpoint,
    write_model,
)
from hydratron.commands.configuration import NetworkChoice
from hydratron.data.encodings import make_frame
from hydratron.data.examples import read_json, write_text
from hydratron.data.tokenizer import PreTrainedTokenizerFast, load_tokenizer
from hydratron.processes import is_first_rank
from hydratron.result import read_result
from hydratron.settings import build
from hydratron.training.finetuning import BEST, PretrainedBert
from hydratron.training.protocol import NULL_THRESHOLD
from hydratron.training.task_data import BatchConfig, TaskData
from hydratron.training.tasks import GROUPS, SquadTask, Task
from hydratron.training.zeroshot import ZeroShot, ZeroShotData, ZeroShotTask

TASK = "task.json"
# of the pretrained model, what a run may choose anew
MODEL_SETTINGS = ("hidden_dropout", "attention_dropout", "recompute")
Source = PretrainedBert | Baseline
FINETUNED, ZERO_SHOT = get_args(Task), get_args(ZeroShotTask)


def build_task(node: Any, known: tuple[type, ...] = FINETUNED + ZERO_SHOT) -> Any:
    """Return the task that `_target_` names, typed and checked. Nothing but `known` is imported:
    the name may come from a run directory of somebody else.
    """
    classes = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in known}
    target = str(node.get("_target_")) if isinstance(node, Mapping) else str(node)
    if target not in classes:
        raise ValueError(f"task._target_ {target} is not one of {', '.join(classes)}")
    return build(classes[target], {k: v for k, v in node.items() if k != "_target_"}, name="task")


def is_zero_shot(config: Mapping[str, Any]) -> bool:
    """Whether the task is one of those that train nothing."""
    return str((config.get("task") or {}).get("_target_")).startswith(f"{ZERO_SHOT[0].__module__}.")


def fill(node: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `node` with `defaults` in place of what is null."""
    return {k: defaults.get(k) if v is None else v for k, v in node.items()}


def open_checkpoint(name: str | None) -> Checkpoint:
    """Read a checkpoint; of a run that kept its best one, that."""
    if not name:
        raise ValueError("checkpoint= is missing: a run directory, a Hugging Face folder or name")
    if not isinstance(name, str | Path):
        raise ValueError(f"checkpoint={name} is not the name of a directory")
    best = Path(name).expanduser() / CHECKPOINTS / BEST
    return read_checkpoint(best if best.is_dir() else name)


def open_run(name: str) -> Path:
    """Return the best, else the newest checkpoint of a run directory.

    Raises:
        ValueError: it has none.
    """
    directory = Path(name).expanduser() / CHECKPOINTS
    found = directory / BEST if (directory / BEST).is_dir() else newest_intact(directory)
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
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"the tokenizer of {checkpoint.path} has padding_side {tokenizer.padding_side!r}:"
            " a BERT's first token is [CLS], so that padding comes last"
        )
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
    write_text(run_dir / TASK, json.dumps({"_target_": target} | values, indent=2) + "\n")


def stored_task(run: Path) -> dict[str, Any]:
    """Return what `remember_task` wrote, empty where it did not.

    Raises:
        ValueError: the file is not what it wrote.
    """
    if not (run / TASK).is_file():
        return {}
    found = read_json(run / TASK)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError(f"{run / TASK} describes no task")
    return found


def run_directory(checkpoint: str) -> Path:
    """Return the run that `checkpoint` is, or lies in."""
    path = Path(checkpoint).expanduser()
    return path.parents[1] if path.parent.name == CHECKPOINTS else path


def task_of_run(node: Mapping[str, Any], checkpoint: str | None) -> Any:
    """Return the task of a finetuned run, with what `task.` gives in place of its own.

    Raises:
        ValueError: no such run, one that is not finetuned, or a task= for one that knows its own.
    """
    if not checkpoint:
        raise ValueError("checkpoint= is missing: a finetuned run, or runs=[...] for an ensemble")
    stored = stored_task(run_directory(checkpoint))
    given = {key: value for key, value in node.items() if value is not None}
    if stored and "_target_" in given:
        raise ValueError(
            f"{checkpoint} is finetuned on {stored['name']}: leave out task=, whose settings need"
            " not be the run's; task.KEY=VALUE changes one"
        )
    if not stored and "_target_" not in given:
        raise ValueError(f"{checkpoint} is no finetuned run: it has no {TASK}; name its task=")
    return build_task(stored | given, FINETUNED)


def with_null_threshold(task: Task, config: Mapping[str, Any]) -> Task:
    """Give SQuAD 2.0 the threshold that the run tuned in its validation, unless just those
    questions are scored again: a threshold tuned on a test set is one that has seen its answers.

    Raises:
        ValueError: the run has tuned none for this checkpoint.
    """
    if not isinstance(task, SquadTask) or not task.tunes_threshold:
        return task
    checkpoint = Path(config["checkpoint"]).expanduser()
    run = run_directory(config["checkpoint"])
    is_other = bool(stored_task(run)) and bool(config["task"].get("validation_path"))
    if config["split"] == "validation" and not is_other:
        return task
    result = read_result(run)
    found = result.get(NULL_THRESHOLD)
    is_of_result = (run / CHECKPOINTS).is_dir() and checkpoint.resolve() in (
        run.resolve(),
        open_run(str(run)).resolve(),
    )
    if result.get("status") != "ok" or not is_of_result or not isinstance(found, float):
        raise ValueError(
            f"task.null_threshold= is missing: {checkpoint} has no threshold that a finished"
            " run tuned for it in validation"
        )
    return dataclasses.replace(task, null_threshold=found)


def open_finetuned(config: Mapping[str, Any]) -> tuple[Source, TaskData]:
    """Return the network of a finetuned run and the split to score."""
    task = with_null_threshold(task_of_run(config["task"], config["checkpoint"]), config)
    model = config["model"]
    stored = read_run_config(run_directory(config["checkpoint"])).get("model") or {}
    if model.get("family") is None and stored.get("family") == "huggingface":
        model = stored
    source, tokenizer = open_source(dict(config) | {"model": model}, task, needs_head=True)
    data = open_split(config, task, tokenizer, max_positions=source.max_positions)
    data.check_rows(config["parallel"]["data_parallel_size"])
    return source, data


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
    groups = (config["split"],)
    batches = read_batches(config)
    return TaskData(task, batches, tokenizer, max_positions=max_positions, groups=groups)


def read_batches(config: Mapping[str, Any]) -> BatchConfig:
    """Return the batches of an evaluation, which has no optimizer steps."""
    return build(BatchConfig, dict(config["data"]) | {"global_batch_size": 1}, name="data")


def open_zero_shot(config: Mapping[str, Any]) -> tuple[ZeroShot, ZeroShotData, dict[str, Any]]:
    """Return a GPT-2, sets on which it was not trained, and what `result.json` says of both."""
    task = build_task(config["task"], ZERO_SHOT)
    checkpoint = open_checkpoint(config["checkpoint"])
    checkpoint.model.check_tensor_parallel(config["parallel"]["tensor_parallel_size"])
    tokenizer = open_tokenizer(config["tokenizer"], checkpoint)
    sets = task.load(tokenizer, checkpoint.model.max_seq_len)
    data = ZeroShotData(sets, batch_size=read_batches(config).evaluation_batch_size)
    described = describe_checkpoint(checkpoint) | {"task": task.name}
    return ZeroShot(checkpoint, sets), data, described


def open_ensemble(config: Mapping[str, Any], runs: list[Path]) -> TaskData:
    """Return the examples that all of `runs` have scored, encoded as the first run did.

    Raises:
        ValueError: a run is no finetuned one, of another task than the first or scored in another
            way, or named twice.
    """
    for run in runs:
        if [other.resolve() for other in runs].count(run.resolve()) > 1:
            raise ValueError(f"runs= names {run} twice: its votes would count double")
    found = [task_of_run(config["task"], str(run)) for run in runs]
    for run, task in zip(runs, found, strict=True):
        if task.name != found[0].name:
            raise ValueError(f"{run} is of task {task.name}, {runs[0]} of {found[0].name}")
        for key in task.scored_with:
            own, first = getattr(task, key), getattr(found[0], key)
            if own != first:
                raise ValueError(f"task.{key} of {run} is {own}, of {runs[0]} {first}")
    tokenizer = load_tokenizer(str(runs[0] / TOKENIZER))
    return open_split(config, found[0], tokenizer, max_positions=found[0].max_seq_len)
