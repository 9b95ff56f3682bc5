"""From any kind of checkpoint to one of ours or to a Hugging Face folder with a model card."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from hydratron.checkpoint import huggingface, sharded
from hydratron.checkpoint.manifest import NAME_PREFIX
from hydratron.checkpoint.runs import read_run_config
from hydratron.checkpoint.source import CHECKPOINTS, TOKENIZER, Checkpoint, write_model
from hydratron.models.bert import BertEncoder, BertForPretraining
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.parallel.mesh import ParallelMesh

NETWORKS = {"bert": BertForPretraining, "gpt2": Gpt2ForPretraining}


@contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """Give a directory that gets the name `output` when all is well, and vanishes otherwise."""
    if output.exists():
        raise ValueError(f"output {output} exists already")
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


def _build_network(checkpoint: Checkpoint) -> nn.Module:
    """Return the network for pretraining, or the encoder with the heads that were finetuned."""
    with torch.device("meta"):
        if "head.weight" not in checkpoint.tensors:
            return NETWORKS[checkpoint.model.family](checkpoint.model)
        network = nn.Module()
        network.encoder = BertEncoder(checkpoint.model)
        for name in ("head", "answerability_head"):
            if f"{name}.weight" in checkpoint.tensors:
                num_outputs, hidden_size = checkpoint.tensors[f"{name}.weight"].shape
                setattr(network, name, nn.Linear(hidden_size, num_outputs))
    return network


def to_hydratron(
    checkpoint: Checkpoint, output: Path, tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    """Write a directory like a run's, with one checkpoint, `step-0`, in float32.

    What the source lacks (the heads of a bare BertModel) is left out and returned as `missing`.

    Raises:
        ValueError: `output` exists, or the source is of another model.
    """
    network = _build_network(checkpoint).to_empty(device="cpu")
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
    result = json.loads(path.read_text()) if path.is_file() else {}
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
