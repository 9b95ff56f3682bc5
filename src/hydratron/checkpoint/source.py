"""Whatever a run can start from, read in one way: our runs, Hugging Face folders, Megatron-LM's.

A directory of ours holds `checkpoints/step-<n>`, `model.json` (else the run's frozen configuration)
and `tokenizer/`.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerFast

from hydratron.checkpoint import huggingface, sharded
from hydratron.checkpoint.folders import read_json
from hydratron.checkpoint.layouts import HEADS, Head
from hydratron.checkpoint.manifest import is_complete, newest_intact, verify
from hydratron.checkpoint.megatron import is_megatron, read_megatron
from hydratron.checkpoint.runs import FROZEN_CONFIG, read_run_config
from hydratron.checkpoint.storage import reader
from hydratron.checkpoint.tensors import (
    StoredTensor,
    build_network,
    check_num_layers,
    check_parameters,
    check_tensors,
    fill_parameters,
    sliced,
)
from hydratron.models.config import ModelConfig
from hydratron.parallel.mesh import ParallelMesh

CHECKPOINTS, TOKENIZER, MODEL = "checkpoints", "tokenizer", "model.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "encoder.json")
# what the head of a finetuned run does, by the end of its task's class
TASK_HEADS = {
    "ClassificationTask": "classification",
    "RaceTask": "multiple_choice",
    "SquadTask": "span",
}
HUB_FILES = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any kind: what its network is, its tokenizer, global tensors by our names.

    `directory` is the run's, the folder's; `path` what is read. `lowercase` says whether its
    tokenizer must be uncased (None: unknown), `vocabulary_multiples` to what its vocabulary may be
    padded (empty: anything), `head` what the head of a finetuned network does.
    """

    kind: str
    path: Path
    directory: Path
    model: ModelConfig
    tokenizer: Path | None
    tensors: dict[str, StoredTensor] = field(repr=False)
    lowercase: bool | None = None
    vocabulary_multiples: tuple[int, ...] = ()
    head: Head | None = None

    def build_network(self) -> nn.Module:
        """Return the network that it holds, on the meta device."""
        kind = self.head.kind if self.head else None
        return build_network(self.model, kind, {n: s.shape for n, s in self.tensors.items()})

    def load(self, network: nn.Module, mesh: ParallelMesh) -> list[str]:
        """Fill this rank's share of `network` in place; every rank must call it.

        Returns the names of the parameters that the checkpoint does not hold: heads, and the
        pooler, which are left as they were.

        Raises:
            ValueError: the checkpoint is of another model; the first parameter is named.
        """
        if self.kind != "hydratron":
            return fill_parameters(network, mesh, self.tensors, path=self.path)
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        missing = check_parameters(network, mesh, shapes, path=self.path)
        parameters = sharded.global_parameters(network, mesh)
        held = {name: tensor for name, tensor in parameters.items() if name not in missing}
        sharded.load_parameters(self.path, held)
        return missing

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast, name: Path | str) -> None:
        """Raise ValueError, with both sizes, where `tokenizer` is not that of the checkpoint."""
        rows, entries = self.model.vocab_size, len(tokenizer)
        if entries > rows:
            raise ValueError(
                f"tokenizer {name} has {entries} entries, more than the vocabulary of {rows} of"
                f" {self.path}"
            )
        normalizer = tokenizer.backend_tokenizer.normalizer
        lowercase = normalizer is not None and normalizer.normalize_str("A") == "a"
        kinds = {True: "uncased", False: "cased"}
        if self.lowercase is not None and lowercase != self.lowercase:
            raise ValueError(
                f"tokenizer {name} is {kinds[lowercase]}, and the vocabulary of {self.path} is"
                f" {kinds[self.lowercase]}"
            )
        padded = {-(-entries // multiple) * multiple for multiple in self.vocabulary_multiples}
        if padded and rows not in padded | {entries}:
            raise ValueError(
                f"tokenizer {name} has {entries} entries, which pad to"
                f" {', '.join(map(str, sorted(padded)))}, and the vocabulary of {self.path} has"
                f" {rows}"
            )


def read_checkpoint(name: Path | str) -> Checkpoint:
    """Read what `name` is: a run directory, a checkpoint in one, a converted directory, a Hugging
    Face folder or Hub name, a Megatron-LM save directory or iteration. No weight is read yet.

    Raises:
        ValueError: nothing of the kind, or one that cannot be read; names the file and the rule.
    """
    path = Path(name).expanduser()
    if not os.path.exists(path):  # a name may be too long for a Path to say
        path = _download(str(name))
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} is not a directory")
    if is_complete(path):
        verify(path, sections=sharded.MODEL_FILES)
        return _read_sharded(path.resolve())
    if (path / CHECKPOINTS).is_dir():
        newest = newest_intact(path / CHECKPOINTS, sections=sharded.MODEL_FILES)
        if newest is None:
            raise ValueError(f"{path / CHECKPOINTS} holds no complete checkpoint")
        return _read_sharded(newest.resolve())
    if is_megatron(path):
        found = read_megatron(path)
        return Checkpoint(
            kind="megatron",
            path=path,
            directory=path,
            model=found.model,
            tokenizer=_tokenizer_in(path / TOKENIZER) or _tokenizer_in(path),
            tensors=found.tensors,
            lowercase=found.lowercase,
            vocabulary_multiples=found.vocabulary_multiples,
        )
    if huggingface.is_huggingface(path):
        config = huggingface.read_config(path)
        head = huggingface.read_head(path)
        return Checkpoint(
            kind="huggingface",
            path=path,
            directory=path,
            model=config,
            tokenizer=_tokenizer_in(path),
            tensors=huggingface.read_tensors(path, config, head),
            head=head,
        )
    raise ValueError(
        f"{path} is no checkpoint: it holds neither {CHECKPOINTS}/, nor config.json with a"
        " model_type, nor mp_rank_00"
    )


def _download(name: str) -> Path:
    """Fetch a folder of the Hugging Face Hub, or find it in the local cache."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"checkpoint {name} does not exist")
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"checkpoint {name!r} is no directory, and not to be had from the Hub: {reason}"
        ) from error


def _tokenizer_in(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def write_model(directory: Path, model: ModelConfig, head: Head | None = None) -> None:
    """Say beside the checkpoints of `directory` what their network is."""
    values = dataclasses.asdict(model)
    if head is not None:
        values["head"] = dataclasses.asdict(head)
    (directory / MODEL).write_text(json.dumps(values, indent=2) + "\n")


def _read_model(directory: Path) -> tuple[ModelConfig, Head | None]:
    run = read_run_config(directory)
    is_written = (directory / MODEL).is_file()
    values = read_json(directory / MODEL) if is_written else run.get("model")
    if not values:
        raise ValueError(
            f"{directory} does not say what its network is: it has neither {MODEL} nor"
            f" {FROZEN_CONFIG}"
        )
    if values.get("family") == "huggingface":
        raise ValueError(
            f"{directory} is a run of {values.get('path')}, which is no network of ours"
        )
    written, task = values.pop("head", None), run.get("task") or {}
    kind = TASK_HEADS.get(str(task.get("_target_")).rpartition(".")[2])
    labels = (task.get("spec") or {}).get("labels") or ()
    if written:
        kind, labels = written.get("kind"), written.get("labels") or ()
        if kind not in HEADS:
            raise ValueError(f"{directory / MODEL}: head {kind!r} is not one of {', '.join(HEADS)}")
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    if set(values) - known:
        raise ValueError(f"{directory}: unknown key model.{min(set(values) - known)}")
    try:
        return ModelConfig(**values), Head(kind, tuple(labels)) if kind else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory} does not say what its network is: {error}") from error


def _read_sharded(path: Path) -> Checkpoint:
    if path.parent.name != CHECKPOINTS:
        raise ValueError(f"checkpoint {path} does not lie in {CHECKPOINTS}/ of a run directory")
    directory = path.parents[1]
    model, head = _read_model(directory)
    found = Checkpoint(
        kind="hydratron",
        path=path,
        directory=directory,
        model=model,
        tokenizer=_tokenizer_in(directory / TOKENIZER),
        tensors=_sharded_tensors(path),
        head=head,
    )
    check_num_layers(model, len(found.tensors), path=path)
    parameters = found.build_network().named_parameters()
    needed = {name: {name: parameter.shape} for name, parameter in parameters}
    check_tensors(needed, found.tensors, path=path, family=model.family)
    return found


def _sharded_tensors(path: Path) -> dict[str, StoredTensor]:
    metadata = reader(path).read_metadata().state_dict_metadata
    stored = {}
    for key, entry in metadata.items():
        section, _, name = key.partition(".")
        if section == "model" and isinstance(entry, TensorStorageMetadata):
            stored[name] = _from_sharded(path, name, tuple(entry.size), entry.properties.dtype)
    return stored


def _from_sharded(
    path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> StoredTensor:
    def read(dim: int | None, start: int, stop: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        sharded.load_parameters(path, {name: tensor}, no_dist=True)
        return sliced(tensor, dim, start, stop)

    return StoredTensor(shape, dtype, read)
