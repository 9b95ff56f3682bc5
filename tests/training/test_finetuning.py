"""Finetuning: gradients of split and whole encoders, every example once, resuming."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from safetensors.numpy import load_file, save_file
from torch import Tensor

from hydratron.checkpoint.layouts import Head
from hydratron.checkpoint.sharded import load_loop_state
from hydratron.checkpoint.source import read_checkpoint, write_model
from hydratron.commands import convert
from hydratron.data.glue import GlueTask
from hydratron.data.tokenizer import load_tokenizer
from hydratron.models.bert import BertEncoder
from hydratron.models.config import ModelConfig
from hydratron.models.heads import Classifier, SpanExtractor, seed_dropout
from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import reduce_partial_gradients
from hydratron.training.config import ParallelConfig, TrainerConfig
from hydratron.training.evaluation import load_ensemble, score_ensemble
from hydratron.training.finetuning import (
    FinetuneJob,
    Finetuning,
    PretrainedBert,
    StopWhenWorse,
    finetune,
)
from hydratron.training.optimisation import OptimizerConfig
from hydratron.training.task_data import BatchConfig, TaskData
from hydratron.training.tasks import (
    ClassificationTask,
    RaceTask,
    SquadTask,
    load_scores,
    write_outputs,
)
from tests.distributed import run_distributed
from tests.parallel.twins import (
    backward_over_micro_batches,
    copy_shards,
    deviation,
    randomize,
    shard,
    split_dimension,
    tiny_config,
)
from tests.tasks import write_bert, write_mnli, write_race, write_squad

CPU = torch.device("cpu")
SPEC = GlueTask("mnli", ("premise", "hypothesis"), ("contradiction", "entailment", "neutral"))


# every head, split against whole


def head_on(kind: str, config: ModelConfig, group: Any) -> Any:
    encoder = BertEncoder(config, group)
    if kind.startswith("squad"):
        return SpanExtractor(
            encoder, config.hidden_size, answerability=kind == "squad2", dropout=0.3
        ).double()
    num_labels = 1 if kind == "race" else 3
    return Classifier(encoder, config.hidden_size, num_labels=num_labels, dropout=0.3).double()


def batch_of(kind: str, num_rows: int, seq_len: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    shape = (num_rows, 4, seq_len) if kind == "race" else (num_rows, seq_len)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, ..., -1] = False
    batch = {"input_ids": integers(24, *shape), "token_type_ids": integers(2, *shape)}
    batch |= {"attention_mask": mask, "labels": integers(4 if kind == "race" else 3, num_rows)}
    for name in ("start_positions", "end_positions"):
        batch[name] = integers(seq_len - 1, num_rows)
    return batch | {"answerable": integers(2, num_rows)}


def head_gradients(rank: int, world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for kind in ("mnli", "race", "squad1", "squad2"):
        for layernorm in ("pre", "post"):
            config = tiny_config(layernorm=layernorm)
            dense, split = head_on(kind, config, None), head_on(kind, config, group)
            randomize(dense)
            copy_shards(dense, split, group)
            for network in (dense, split):
                seed_dropout(network, seed=1, dp_rank=0, device=CPU)
            torch.manual_seed(7 + rank)  # the default streams of peers differ, as in a run
            # 5 and 7 tokens a row: 15 tokens do not divide by 2
            micro_batches = [batch_of(kind, 3, 5, 1), batch_of(kind, 2, 7, 2)]
            loss = backward_over_micro_batches(dense, micro_batches)
            local_loss = backward_over_micro_batches(split, micro_batches)
            reduce_partial_gradients(split, group)
            whole = dict(dense.named_parameters())
            result: dict[str, Any] = {"loss": deviation(local_loss, loss), "heads": {}}
            for name, parameter in split.named_parameters():
                expected = whole[name].grad
                if expected is None:
                    assert parameter.grad is None, name
                    continue
                expected = shard(expected, split_dimension(name), group)
                result[name] = deviation(parameter.grad, expected)
                if "head" in name or "pooler" in name:
                    result["heads"][name] = parameter.grad
            found[kind, layernorm] = result
    return found


def test_every_head_has_whole_gradients_at_tensor_parallel_2(tmp_path: Path) -> None:
    """With accumulation 2, dropout in the head, and lengths that do not divide by 2."""
    first, second = run_distributed(head_gradients, 2, tmp_path)
    for case, found in first.items():
        for name, value in found.items():
            if name != "heads":
                assert value <= 1e-10, (case, name)
        assert len(found["heads"]) == {"squad1": 2, "squad2": 6}.get(case[0], 4)
        for name, gradient in found["heads"].items():  # bit for bit: peers must not drift apart
            assert torch.equal(gradient, second[case]["heads"][name]), (case, name)


# whole runs


def write_inputs(folder: Path) -> None:
    write_bert(folder / "bert")
    write_mnli(folder / "train.jsonl", 48)
    write_mnli(folder / "dev.jsonl", 23)
    for version in ("1.1", "2.0"):
        write_squad(folder / f"train-v{version}.json", 12, version=version)
        write_squad(folder / f"dev-v{version}.json", 7, version=version)
    write_race(folder / "train.race.jsonl", 12)
    write_race(folder / "dev.race.jsonl", 7)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(1)
    write_inputs(folder)
    return folder


def task_of(kind: str, folder: Path, **changes: Any) -> Any:
    files = {
        "mnli": ("train.jsonl", "dev.jsonl"),
        "squad1": ("train-v1.1.json", "dev-v1.1.json"),
        "squad2": ("train-v2.0.json", "dev-v2.0.json"),
        "race": ("train.race.jsonl", "dev.race.jsonl"),
    }[kind]
    paths = [str(folder / name) for name in files]
    common = {"name": kind, "train_path": paths[0], "validation_path": paths[1], "epochs": 2}
    common |= {"max_seq_len": 48} | changes
    if kind == "mnli":
        return ClassificationTask(spec=SPEC, **common)
    if kind == "race":
        return RaceTask(max_question_len=16, **common)
    version = {"squad1": "1.1", "squad2": "2.0"}[kind]
    return SquadTask(version=version, max_query_len=8, doc_stride=8, **common)


def job_for(
    folder: Path, kind: str = "mnli", *, tp: int = 1, dp: int = 1, steps: int = 6, **changes: Any
) -> FinetuneJob:
    task = task_of(kind, folder, **changes.pop("task", {}))
    checkpoint = read_checkpoint(folder / "bert")
    model = dataclasses.replace(checkpoint.model, **changes.pop("model", {}))
    source = PretrainedBert(checkpoint, model, task)
    batches = BatchConfig(
        global_batch_size=12,
        micro_batch_size=changes.pop("micro_batch_size", None),
        evaluation_batch_size=4,
        cache_dir=os.environ["HYDRATRON_CACHE"],
    )
    tokenizer = load_tokenizer(str(folder / "bert"))
    data = TaskData(
        task, batches, tokenizer, max_positions=64, groups=("train", "validation"), seed=1
    )
    settings = {"accelerator": "cpu", "log_every": 1, "val_every": 3, "checkpoint_every": 3}
    return FinetuneJob(
        TrainerConfig(**settings | {"max_steps": steps} | changes),
        ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp),
        OptimizerConfig(lr=1e-3, warmup_steps=1, schedule="constant"),
        source,
        data,
        seed=1,
    )


def test_a_sequence_length_that_the_model_has_not_is_cut_with_a_warning(inputs: Path) -> None:
    with pytest.warns(UserWarning, match="task.max_seq_len 80 is cut to the 64 positions that"):
        job = job_for(inputs, task={"max_seq_len": 80})
    assert job.data.max_seq_len == 64


def finetune_on(job: FinetuneJob, run_dir: Path) -> dict[str, Any]:
    run_dir.mkdir(parents=True, exist_ok=True)
    is_external = "RANK" in os.environ
    environment = TorchElasticEnvironment() if is_external else LightningEnvironment()
    return finetune(job, run_dir, loggers=[], environment=environment)


def finetune_on_ranks(
    rank: int, world_size: int, inputs: Path, run_dir: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    return finetune_on(job_for(inputs, **settings), run_dir)


def compare_runs(found: dict[str, Any], expected: dict[str, Any], folders: list[Path]) -> None:
    """The same metrics and the same scores of every held-out example, each once."""
    assert found.keys() - {"perf/examples_per_second"} == expected.keys() - {
        "perf/examples_per_second"
    }
    for key, value in expected.items():
        if isinstance(value, float) and not key.startswith("perf/"):
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    files = sorted((folders[0] / "predictions").glob("*.safetensors"))
    assert files
    for path in files:
        one, other = load_scores(path), load_scores(folders[1] / "predictions" / path.name)
        for name, rows in one.items():
            for row, same in zip(rows, other[name], strict=True):
                # a softmax does not see what is added to all: Adam moves that by rounding errors
                shift = 0.0 if name == "answerable" else np.mean(row - same)
                assert np.allclose(row, same + shift, atol=1e-4), name


@pytest.mark.parametrize("kind", ["mnli", "race", "squad1", "squad2"])
def test_tensor_parallel_2_finetunes_as_one_device_with_dropout_in_the_head(
    kind: str, inputs: Path, tmp_path: Path
) -> None:
    settings = {"kind": kind, "micro_batch_size": 5, "task": {"head_dropout": 0.2}}
    expected = finetune_on(job_for(inputs, **settings), tmp_path / "one")
    run_dir = tmp_path / "two"
    found = run_distributed(finetune_on_ranks, 2, tmp_path, inputs, run_dir, settings | {"tp": 2})
    for result in found:
        compare_runs(result, expected, [tmp_path / "one", run_dir])


@pytest.mark.parametrize("kind", ["mnli", "squad2"])
def test_data_parallel_3_counts_every_example_once(kind: str, inputs: Path, tmp_path: Path) -> None:
    """23 rows or 14 questions over 3 ranks: they differ in rows, and one may lack a batch."""
    settings = {"kind": kind, "task": {"head_dropout": 0.0}}
    expected = finetune_on(job_for(inputs, **settings), tmp_path / "one")
    run_dir = tmp_path / "three"
    found = run_distributed(finetune_on_ranks, 3, tmp_path, inputs, run_dir, settings | {"dp": 3})
    for result in found:
        compare_runs(result, expected, [tmp_path / "one", run_dir])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_resuming_repeats_and_omits_nothing(inputs: Path, tmp_path: Path) -> None:
    """Trunk and head dropout on; the break lies inside an epoch (4 steps)."""
    settings: dict[str, Any] = {"model": {"hidden_dropout": 0.1}, "checkpoint_every": 2}
    whole = finetune_on(job_for(inputs, steps=8, **settings), tmp_path / "whole")
    first = finetune_on(job_for(inputs, steps=6, **settings), tmp_path / "parts")
    assert first["steps"] == 6
    second = finetune_on(job_for(inputs, steps=8, **settings), tmp_path / "parts")
    assert second["train/loss"] == whole["train/loss"]
    assert second["val/loss"] == whole["val/loss"]


def test_patience_stops_and_keeps_the_best(inputs: Path, tmp_path: Path) -> None:
    """A learning rate this high makes it worse soon."""
    job = job_for(inputs, steps=40, val_every=1, checkpoint_every=0, task={"patience": 3})
    job = dataclasses.replace(job, optimizer=OptimizerConfig(lr=0.3, schedule="constant"))
    found = finetune_on(job, tmp_path / "run")
    assert found["steps"] == found["best_step"] + 3 < 40
    assert (tmp_path / "run/checkpoints/best/loops.pt").is_file()
    last = tmp_path / "run/checkpoints/last"
    assert last.resolve().name == f"step-{found['steps']}"
    write_model(tmp_path / "run", job.source.model)
    given = {"to": "huggingface", "checkpoint": str(tmp_path / "run"), "tokenizer": None}
    converted = convert.prepare(given | {"output": str(tmp_path / "exported")})
    assert converted.checkpoint.path.name == "best"  # the one that the scores are of
    scores = load_scores(tmp_path / "run/predictions/validation.safetensors")
    labels = [row["label"] for row in job.data.splits["validation"][0].examples]
    accuracy = np.mean(np.stack(scores["logits"]).argmax(1) == labels)
    assert accuracy == pytest.approx(found["val/accuracy"])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_run_killed_while_it_writes_its_best_ends_with_the_files_of_one_that_was_not(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between predictions and checkpoint of the best validation, and after both."""
    job = job_for(inputs, steps=40, val_every=1, checkpoint_every=1, task={"patience": 3})
    job = dataclasses.replace(job, optimizer=OptimizerConfig(lr=0.3, schedule="constant"))
    whole = finetune_on(job, tmp_path / "whole")
    assert whole["best_step"] > 1
    keep_best = StopWhenWorse.on_validation_end
    for run, is_kept in ((tmp_path / "before", False), (tmp_path / "after", True)):

        def killed(self: StopWhenWorse, trainer: Any, module: Any, is_kept: bool = is_kept) -> None:
            is_there = trainer.global_step == whole["best_step"]
            if is_kept or not is_there:
                keep_best(self, trainer, module)
            if is_there:
                raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(StopWhenWorse, "on_validation_end", killed)
            with pytest.raises(InterruptedError):
                finetune_on(job, run)
        rate = {"perf/examples_per_second": 0}
        assert finetune_on(job, run) | rate == whole | rate
        for path in (tmp_path / "whole/predictions").iterdir():
            assert path.read_bytes() == (run / "predictions" / path.name).read_bytes()
        assert load_loop_state(run / "checkpoints/best")["global_step"] == whole["best_step"]


def test_a_split_without_labels_gets_predictions_with_patience_too(
    inputs: Path, tmp_path: Path
) -> None:
    job = job_for(inputs, steps=1, task={"patience": 2})
    (split,) = job.data.splits["validation"]
    unlabelled = [row | {"label": -1} for row in split.examples]
    split = dataclasses.replace(split, examples=unlabelled)
    scoring = Finetuning(job.source, job.data, output=tmp_path)
    job.data.splits["validation"] = [split]
    scoring.rows = [{i: {"logits": np.zeros(3)} for i in range(len(unlabelled))}]
    one_process = SimpleNamespace(
        mesh=ParallelMesh(), is_global_zero=True, broadcast=lambda found: found
    )
    assert scoring.finish_validation(one_process, 0) == {}
    assert (tmp_path / "validation.tsv").is_file()


# ensembles


def reversed_rows(path: Path) -> Path:
    """Write the rows of a file in the opposite order beside it."""
    other = path.with_name(f"reversed-{path.name}")
    if path.suffix == ".jsonl":
        other.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
        return other
    document = json.loads(path.read_text())
    document["data"][0]["paragraphs"].reverse()
    other.write_text(json.dumps(document))
    return other


def perfect_scores(data: TaskData) -> dict[str, list[np.ndarray]]:
    """Logits that are right, and differ by row as those of a network do."""
    (split,) = data.splits["validation"]
    if isinstance(data.task, SquadTask):
        found: dict[str, list[np.ndarray]] = {"start": [], "end": []}
        for number, length in enumerate(split.encodings.lengths):
            for name, rows in found.items():
                place = split.encodings.values[f"{name}_positions"][number]
                rows.append(9.0 * (np.arange(length) == place))
        return found
    is_race = isinstance(data.task, RaceTask)
    labels = [row.label if is_race else row["label"] for row in split.examples]
    classes = np.eye(4 if is_race else 3)
    return {"logits": [(5.0 + i % 3) * classes[label] for i, label in enumerate(labels)]}


def validation_data(folder: Path, kind: str, path: Path, **changes: Any) -> TaskData:
    task = task_of(kind, folder, validation_path=str(path), **changes)
    batches = BatchConfig(global_batch_size=1, cache_dir=os.environ["HYDRATRON_CACHE"])
    tokenizer = load_tokenizer(str(folder / "bert"))
    return TaskData(task, batches, tokenizer, max_positions=64, groups=("validation",))


@pytest.mark.parametrize("kind", ["mnli", "race", "squad1"])
def test_an_ensemble_pairs_rows_by_what_was_read_in_whatever_order(
    kind: str, inputs: Path, tmp_path: Path
) -> None:
    """Rows of the files repeat: 23 of MNLI are of 12 kinds."""
    path = Path(task_of(kind, inputs).validation_path)
    orders = [validation_data(inputs, kind, p) for p in (path, reversed_rows(path))]
    runs = [tmp_path / "a", tmp_path / "b"]
    for data, run in zip(orders, runs, strict=True):
        (split,) = data.splits["validation"]
        write_outputs(run / "predictions", data.task, split, perfect_scores(data))
    for data in orders:
        [scores] = load_ensemble(runs, data)
        for name, rows in scores[0].items():
            for one, other in zip(rows, scores[1][name], strict=True):
                assert len(one) == len(other)
                assert one.argmax() == other.argmax()
        metrics = score_ensemble([scores], data, tmp_path / "mean")
        key = "val/f1" if kind == "squad1" else "val/accuracy"
        assert metrics[key] == (100.0 if kind == "squad1" else 1.0)


def test_an_ensemble_of_other_rows_is_refused(inputs: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join((inputs / "dev.jsonl").read_text().splitlines(keepends=True)[1:]))
    other = tmp_path / "other.jsonl"
    other.write_text((inputs / "dev.jsonl").read_text().replace("it sat", "it ran", 1))
    whole = validation_data(inputs, "mnli", inputs / "dev.jsonl")
    for path, message in (
        (short, "it has 22, and lacks 1 of the 23"),
        (other, "it has 23, and lacks 1 of the 23"),
    ):
        data = validation_data(inputs, "mnli", path)
        run = tmp_path / path.stem
        (split,) = data.splits["validation"]
        write_outputs(run / "predictions", data.task, split, perfect_scores(data))
        with pytest.raises(ValueError, match=message):
            load_ensemble([run], whole)
    # windows of other tokens are other rows, though there be as many of them
    path = inputs / "dev-v1.1.json"
    data = validation_data(inputs, "squad1", path, max_seq_len=24)
    whole = validation_data(inputs, "squad1", path, max_seq_len=25)
    (split,) = data.splits["validation"]
    write_outputs(tmp_path / "windows/predictions", data.task, split, perfect_scores(data))
    with pytest.raises(ValueError, match="other windows or tokenizer"):
        load_ensemble([tmp_path / "windows"], whole)
    file = tmp_path / "windows/predictions/validation.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != "row_keys"}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not say which rows it scores"):
        load_ensemble([tmp_path / "windows"], whole)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        load_ensemble([tmp_path / "windows"], whole)


def test_a_head_of_other_classes_is_refused_unless_a_new_one_is_asked_for(
    inputs: Path, tmp_path: Path
) -> None:
    finetune_on(job_for(inputs, steps=1), tmp_path / "run")
    (tmp_path / "run/model.json").write_text(
        json.dumps(dataclasses.asdict(read_checkpoint(inputs / "bert").model))
    )
    checkpoint = read_checkpoint(tmp_path / "run")
    task = task_of("race", inputs)
    with pytest.raises(ValueError, match=r"needs a head of 1 outputs, and head.weight .* has 3"):
        PretrainedBert(checkpoint, checkpoint.model, task)
    PretrainedBert(checkpoint, checkpoint.model, task_of("race", inputs, new_head=True))
    bare = read_checkpoint(inputs / "bert")
    with pytest.raises(ValueError, match="it is not finetuned on mnli"):
        PretrainedBert(bare, bare.model, task_of("mnli", inputs), needs_head=True)


def test_a_head_of_the_same_shape_for_another_task_is_refused_by_name(
    inputs: Path, tmp_path: Path
) -> None:
    """Two classes, and start and end: both heads are [2, H]."""
    pair = GlueTask("qqp", ("premise", "hypothesis"), ("0", "1"))
    other = GlueTask("rte", ("premise", "hypothesis"), ("entailment", "not_entailment"))
    common = {"name": "x", "max_seq_len": 48}
    tasks = {spec.name: ClassificationTask(spec=spec, **common) for spec in (pair, other)}
    bare = read_checkpoint(inputs / "bert")
    spans = task_of("squad1", inputs)
    finetune_on(job_for(inputs, kind="squad1", steps=1), tmp_path)
    write_model(tmp_path, bare.model, Head("span"))
    checkpoint = read_checkpoint(tmp_path)
    PretrainedBert(checkpoint, checkpoint.model, spans)
    with pytest.raises(ValueError, match="needs a head for classification, and .* for span;"):
        PretrainedBert(checkpoint, checkpoint.model, tasks["qqp"])
    new = dataclasses.replace(tasks["qqp"], new_head=True)
    PretrainedBert(checkpoint, checkpoint.model, new)
    for labels in (("0", "1"), ("LABEL_0", "LABEL_1"), ()):
        known = dataclasses.replace(checkpoint, head=Head("classification", labels))
        PretrainedBert(known, known.model, tasks["qqp"])
    with pytest.raises(ValueError, match=r"for span, and .* for classification;"):
        PretrainedBert(known, known.model, spans)
    known = dataclasses.replace(checkpoint, head=Head("classification", ("0", "1")))
    with pytest.raises(
        ValueError, match=r"classes entailment, not_entailment, and .* classes 0, 1;"
    ):
        PretrainedBert(known, known.model, tasks["rte"])
