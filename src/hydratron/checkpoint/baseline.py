"""Encoders of transformers as baselines: RoBERTa, ALBERT, XLNet, BERT under our heads, one device.

Letters: B batch, S sequence, H hidden.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from transformers.utils import logging

from hydratron.checkpoint import sharded
from hydratron.checkpoint.huggingface import BAD_CONFIG
from hydratron.models.initialisation import parameter_generator
from hydratron.parallel.mesh import ParallelMesh

INIT_STD = 0.02  # of what a checkpoint lacks, as in all of these models
NEVER_USED = ("mask_emb",)  # XLNet's, of pretraining


class TransformersEncoder(nn.Module):
    """A bare model of transformers with a pooler: hidden states [B, S, H] and a token [B, H].

    The pooler is the model's own where it has one (BERT, ALBERT), else a new one on the
    classification token, as in RoBERTa's head and XLNet's sequence summary. `cls_index` is where
    that token is: 0, or -1 in XLNet.
    """

    def __init__(self, trunk: nn.Module, *, cls_index: int) -> None:
        super().__init__()
        hidden_size: int = trunk.config.hidden_size  # pyright: ignore
        own = getattr(trunk, "pooler", None)
        linear = getattr(own, "dense", own)
        if isinstance(linear, nn.Linear):
            trunk.register_module("pooler", None)
        else:
            linear = nn.Linear(hidden_size, hidden_size)
        self.trunk, self.pooler, self.cls_index = trunk, linear, cls_index
        takes_types = "token_type_ids" in inspect.signature(trunk.forward).parameters
        self.has_types = takes_types and getattr(trunk.config, "type_vocab_size", 2) > 1
        for name, parameter in trunk.named_parameters():
            if name.endswith(NEVER_USED):
                parameter.requires_grad_(False)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        types = {"token_type_ids": token_type_ids} if self.has_types else {}
        found = self.trunk(input_ids=input_ids, attention_mask=attention_mask.long(), **types)
        hidden = found.last_hidden_state  # [B, S, H]
        return hidden, torch.tanh(self.pooler(hidden[:, self.cls_index]))


@dataclass(frozen=True)
class Baseline:
    """A folder or Hub name of transformers, a task's head to put on it, and its checkpoint of ours
    if it is finetuned already.
    """

    path: str
    config: Any
    task: Any
    cls_index: int
    finetuned: Path | None = None

    @property
    def max_positions(self) -> int:
        """The longest sequence it takes; RoBERTa's first positions stand for padding."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if not positions or positions < 1:
            return 10**6  # relative positions
        is_shifted = "roberta" in self.config.model_type
        return positions - (self.config.pad_token_id + 1 if is_shifted else 0)

    @property
    def num_parameters(self) -> int:
        """Parameters of encoder and head."""
        with torch.device("meta"):
            network = self._network(AutoModel.from_config(self.config))
        return sum(parameter.numel() for parameter in network.parameters())

    def _network(self, trunk: nn.Module) -> nn.Module:
        encoder = TransformersEncoder(trunk, cls_index=self.cls_index)
        return self.task.build_network(encoder, self.config.hidden_size)

    def build(
        self, mesh: ParallelMesh, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """Return encoder and head; what the folder lacks is drawn from `seed`."""
        trunk, missing = _read_trunk(self.path, self.config)
        is_new = getattr(trunk, "pooler", None) is None or bool(missing)
        network = self._network(trunk)
        for name, parameter in network.named_parameters():
            if name.startswith("encoder.trunk.") or ("encoder.pooler" in name and not is_new):
                continue
            generator = parameter_generator(seed, name, torch.device("cpu"))
            with torch.no_grad():
                parameter.zero_()
                if parameter.dim() > 1:
                    parameter.normal_(0.0, INIT_STD, generator=generator)
        network.to(device, dtype)
        if self.finetuned is not None:
            sharded.load_model(self.finetuned, network, mesh)
        return network


def _read_trunk(path: str, config: Any) -> tuple[nn.Module, list[str]]:
    """Return a bare model of transformers and the parameters of its pooler that are not stored.

    Raises:
        ValueError: no safetensors there, or not those of this model.
    """
    logging.set_verbosity_error()
    try:
        # float32: a half-precision folder kept in half precision trains to chance
        trunk, info = AutoModel.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model.path {path!r} cannot be read: {_one_line(error)}") from error
    # transformers draws what is missing at random, and leaves out layers that are too many
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if "pooler" not in name]
    lost += [name for name in info["unexpected_keys"] if re.search(r"\blayers?\.\d+\.", name)]
    if lost:
        raise ValueError(
            f"model.path {path!r} is incomplete or of another model than its config.json:"
            f" {lost[0]} is in one of them alone"
        )
    return trunk, missing


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_baseline(
    node: Mapping[str, Any], task: Any, tokenizer: PreTrainedTokenizerFast, cls_index: int
) -> Baseline:
    """Return the baseline of `model.path`, with the dropout that `model` names, if any.

    Raises:
        ValueError: nothing of transformers there, or not all of it.
    """
    path = node["path"]
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, *BAD_CONFIG) as error:
        reason = _one_line(error)
        raise ValueError(f"model.path {path!r} is no model of transformers: {reason}") from error
    for key in ("auto_map", "quantization_config"):
        if getattr(config, key, None):
            raise ValueError(f"model.path {path!r}: its config.json has {key}, which is not read")
    for key, names in {
        "hidden_dropout": ("hidden_dropout_prob", "dropout"),
        "attention_dropout": ("attention_probs_dropout_prob",),
    }.items():
        for name in names:
            if node.get(key) is not None and hasattr(config, name):
                setattr(config, name, node[key])
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer of {len(tokenizer)} entries for the vocabulary of {config.vocab_size}"
            f" of {path}"
        )
    _read_trunk(path, config)
    return Baseline(str(path), config, task, cls_index)
