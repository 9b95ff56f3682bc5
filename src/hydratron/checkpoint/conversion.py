"""From any kind of checkpoint to one of ours or to a Hugging Face folder with a model card."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hydratron.checkpoint import huggingface, sharded
from hydratron.checkpoint.folders import read_json
from hydratron.checkpoint.manifest import NAME_PREFIX
from hydratron.checkpoint.runs import read_run_config
from hydratron.checkpoint.source import CHECKPOINTS, TOKENIZER, Checkpoint, write_model
from hydratron.parallel.mesh import ParallelMesh


def check_output(output: Path) -> None:
    """Raise ValueError where `output` exists already or cannot be made."""
    if os.path.lexists(output):
        raise ValueError(f"output {output} exists already")
    try:
        above = next(path for path in output.absolute().parents if os.path.lexists(path))
        TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise ValueError(f"output {output} cannot be written to: {error.strerror}") from error


@contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """Give a directory that gets the name `output` when all is well, and vanishes otherwise."""
    check_output(output)
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_huggingface(
    checkpoint: Checkpoint, output: Path, tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    """Write a folder for `from_pretrained`; return what `result.json` says of it.

    Raises:
        ValueError: `output` exists, or the network has no counterpart in transformers.
    """
    with _complete_or_absent(output) as folder:
        architecture = huggingface.write_folder(
            folder,
            checkpoint.model,
            checkpoint.tensors,
            tokenizer=tokenizer,
            head=checkpoint.head,
        )
        card = model_card(checkpoint, architecture, tokenizer)
        (folder / "README.md").write_text(card)
    return {"architecture": architecture, "missing": []}


def to_hydratron(
    checkpoint: Checkpoint, output: Path, tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    """Write a directory like a run's, with one checkpoint, `step-0`, in float32.

    What the source lacks (the heads of a bare BertModel) is left out and returned as `missing`.

    Raises:
        ValueError: `output` exists, or the source is of another model.
    """
    network = checkpoint.build_network().to_empty(device="cpu")
    missing = checkpoint.load(network, ParallelMesh())
    for name in missing:
        owner, _, attribute = name.rpartition(".")
        network.get_submodule(owner).register_parameter(attribute, None)
    with _complete_or_absent(output) as directory:
        write_model(directory, checkpoint.model, checkpoint.head)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory / TOKENIZER)
        sharded.save_checkpoint(
            directory / CHECKPOINTS / f"{NAME_PREFIX}0",
            network=network,
            optimizers=[],
            mesh=ParallelMesh(),
            loop_state={"global_step": 0},
        )
        (directory / CHECKPOINTS / "last").symlink_to(f"{NAME_PREFIX}0")
    head = checkpoint.head and checkpoint.head.kind
    return {"architecture": head or type(network).__name__, "missing": missing}


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the source says of its training; None where it says nothing."""
    config = read_run_config(checkpoint.directory)
    if checkpoint.kind != "hydratron" or not config:
        unknown = dict.fromkeys(("data", "tokens", "commit"))
        return {"source": f"{checkpoint.kind} checkpoint {checkpoint.directory.name}"} | unknown
    path = checkpoint.directory / "result.json"
    result = read_json(path) if path.is_file() else {}
    data, task = config.get("data") or {}, config.get("task") or {}
    step = int(sharded.load_loop_state(checkpoint.path).get("global_step", 0))
    shipped = "the novels hydratron ships" if data.get("source") == "text" else None
    where = data.get("path") or shipped
    if task:
        where = task.get("train_path") or "the Hugging Face hub's"
    tokens_per_step = data.get("global_batch_size", 0) * data.get("seq_len", 0)
    is_final = result.get("best_step", result.get("steps")) == step
    scores = {
        key: f"{value:.4f}"
        for key, value in result.items()
        if key.startswith("val/") and isinstance(value, float)
    }
    return {
        "source": f"run {checkpoint.directory.name}, step {step:,}",
        **({"task": task.get("name")} if task else {}),
        "data": where,
        "tokens": f"{step * tokens_per_step:,}" if tokens_per_step else None,
        "seed": config.get("seed"),
        "commit": result.get("git_commit"),
        **(scores if is_final else {}),
    }


def model_card(
    checkpoint: Checkpoint, architecture: str, tokenizer: PreTrainedTokenizerFast | None
) -> str:
    """Return a README.md that states data, tokens, placement and commit."""
    model = checkpoint.model
    num_parameters = sum(torch.Size(stored.shape).numel() for stored in checkpoint.tensors.values())
    facts = {
        "network": f"`{architecture}`",
        "LayerNorm": {
            "pre": "before attention and MLP (pre), a final one after the last layer",
            "post": "after each residual sum (post, the original BERT)",
        }[model.layernorm],
        "parameters": f"{num_parameters:,}",
        "layers x hidden x heads": f"{model.num_layers} x {model.hidden_size} x {model.num_heads}",
        "vocabulary": f"{model.vocab_size:,} rows"
        + (f", {len(tokenizer):,} of them used by the tokenizer" if tokenizer else ""),
        "sequence length": model.max_seq_len,
    } | _facts(checkpoint)
    rows = [f"| {k} | {'not recorded' if v is None else v} |" for k, v in facts.items()]
    lines = ["---", "library_name: transformers", "tags: [hydratron]", "---", ""]
    lines += [f"# {checkpoint.directory.name}", "", "| | |", "|---|---|", *rows, ""]
    if any(name.startswith("sentence_order_head") for name in checkpoint.tensors):
        lines += [
            "The head for next-sentence prediction was trained on sentence order: label 0 means"
            " that the two segments are in order, label 1 that they are swapped.",
            "",
        ]
    return "\n".join([*lines, "Written by `hydratron convert to=huggingface`.", ""])
