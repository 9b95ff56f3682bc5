"""Tiny networks of every family with random weights, as directories of ours and with tokenizers."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hydratron.checkpoint.sharded import save_checkpoint
from hydratron.checkpoint.source import write_model
from hydratron.data.tokenizer import train_tokenizer
from hydratron.models.bert import BertForPretraining
from hydratron.models.config import ModelConfig
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.parallel.mesh import ParallelMesh

NETWORKS = {"bert": BertForPretraining, "gpt2": Gpt2ForPretraining}
KINDS = {"bert-post": ("bert", "post"), "bert-pre": ("bert", "pre"), "gpt2": ("gpt2", "pre")}
TOLERANCE = 1e-5  # design section 3: float32, kernels that add in another order


def config(kind: str, **changes: object) -> ModelConfig:
    """Sizes that divide by 4; an intermediate size and an epsilon that are no default."""
    family, layernorm = KINDS.get(kind, ("gpt2", "post"))
    settings = {
        "family": family,
        "layernorm": layernorm,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "vocab_size": 96,
        "max_seq_len": 40,
        "intermediate_size": 48,
        "layernorm_eps": 1e-6,
        "activation": "gelu_tanh" if family == "gpt2" else "gelu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return ModelConfig(**settings | changes)  # type: ignore[arg-type]


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Draw biases and LayerNorms too: at zeros and ones a wrong copy of them would not show."""
    for name, parameter in network.named_parameters():
        parameter.normal_(0.0, 0.2)
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter += 1.0
    return network.eval()


def random_network(kind: str, **changes: object) -> nn.Module:
    model = config(kind, **changes)
    return randomize(NETWORKS[model.family](model))


def write_directory(directory: Path, network: nn.Module) -> Path:
    """Write a directory of ours with the network as `step-3`."""
    save_checkpoint(
        directory / "checkpoints/step-3",
        network=network,
        optimizers=[],
        mesh=ParallelMesh(),
        loop_state={"global_step": 3},
    )
    write_model(directory, network.config)
    return directory


def inputs(model: ModelConfig) -> dict[str, Tensor]:
    """Three sequences, one of them with padding and segments where the family knows such."""
    ids = torch.randint(model.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))
    if model.family == "gpt2":
        return {"input_ids": ids}
    lengths = torch.tensor([11, 7, 4])
    return {
        "input_ids": ids,
        "token_type_ids": (torch.arange(11) > 5).long().expand(3, -1),
        "attention_mask": torch.arange(11) < lengths.unsqueeze(-1),
    }


@torch.no_grad()
def logits(network: nn.Module) -> list[Tensor]:
    found = network.logits(**inputs(network.config))
    return [found] if isinstance(found, Tensor) else list(found)


def tokenizer(vocab_size: int = 90, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    texts = ["The quick brown fox jumps over the lazy dog. " * 3, "Casterbridge had a Mayor."]
    return train_tokenizer("character", texts, vocab_size=vocab_size, lowercase=lowercase)
