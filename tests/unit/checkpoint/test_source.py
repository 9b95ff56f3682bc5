"""One function reads whatever a run can start from, and each rank reads its share only."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hydratron.checkpoint.conversion import model_card, to_huggingface
from hydratron.checkpoint.source import MODEL, read_checkpoint
from hydratron.checkpoint.tensors import (
    StoredTensor,
    concatenated,
    fill_parameters,
    sliced,
    split,
    stacked,
    transposed,
)
from hydratron.commands.convert import prepare
from hydratron.parallel.mesh import ParallelMesh
from hydratron.parallel.placement import parameter_placements
from tests.unit.checkpoint.networks import (
    KINDS,
    config,
    random_network,
    tokenizer,
    write_directory,
)


def in_memory(tensor: torch.Tensor) -> StoredTensor:
    def read(dim: int | None, start: int, stop: int) -> torch.Tensor:
        return sliced(tensor, dim, start, stop)

    return StoredTensor(tuple(tensor.shape), tensor.dtype, read)


def test_every_slice_of_a_rearranged_tensor_is_the_slice_of_the_whole() -> None:
    tensors = [torch.randn(6, 8) for _ in range(3)]
    whole = torch.cat(tensors)  # [18, 8]
    parts = [in_memory(t) for t in tensors]
    cases = [
        (in_memory(whole), whole),
        (transposed(in_memory(whole)), whole.T),
        (stacked(parts), torch.stack(tensors)),
        (stacked(split(in_memory(whole), 3)), whole.view(3, 6, 8)),
        (stacked(split(transposed(in_memory(whole.T)), 3)), whole.view(3, 6, 8)),
        (concatenated(parts, 0), whole),
        (concatenated(parts, 1), torch.cat(tensors, 1)),
        (concatenated([stacked(parts)] * 2, 1), torch.stack(tensors).repeat(1, 2, 1)),
    ]
    for stored, expected in cases:
        assert stored.shape == expected.shape
        assert torch.equal(stored.whole(), expected)
        for dim in range(1 if expected.dim() == 3 else 0, expected.dim()):
            for start in range(expected.size(dim)):
                for stop in range(start + 1, expected.size(dim) + 1):
                    found = stored.read(dim, start, stop)
                    assert torch.equal(found, expected.narrow(dim, start, stop - start))


def test_directories_and_checkpoints_of_ours_are_found_by_any_of_their_names(
    tmp_path: Path,
) -> None:
    network = random_network("bert-pre")
    run = write_directory(tmp_path / "run", network)
    (run / "checkpoints/last").symlink_to("step-3")
    for path in (run, run / "checkpoints/step-3", run / "checkpoints/last"):
        found = read_checkpoint(path)
        assert found.kind == "hydratron"
        assert found.directory == run
        assert found.path == run / "checkpoints/step-3"
        assert found.model == config("bert-pre")
        assert found.tokenizer is None
    tokenizer().save_pretrained(run / "tokenizer")
    assert read_checkpoint(run).tokenizer == run / "tokenizer"


def test_a_run_is_read_by_its_frozen_configuration(tmp_path: Path) -> None:
    run = write_directory(tmp_path / "run", random_network("gpt2"))
    values = json.loads((run / MODEL).read_text())
    (run / MODEL).unlink()
    with pytest.raises(ValueError, match="does not say what its network is: it has neither"):
        read_checkpoint(run)
    (run / ".hydra").mkdir()
    data = {"source": "text", "path": None, "global_batch_size": 8, "seq_len": 16}
    frozen = {"model": values, "data": data, "seed": 4}
    (run / ".hydra/resolved.yaml").write_text(yaml.safe_dump(frozen))
    (run / "result.json").write_text(json.dumps({"git_commit": "abc1234", "steps": 3}))
    checkpoint = read_checkpoint(run)
    assert checkpoint.model == config("gpt2")
    card = model_card(checkpoint, "GPT2LMHeadModel", tokenizer())
    for row in (
        "| tokens | 384 |",
        "| commit | abc1234 |",
        "| data | the novels hydratron ships |",
    ):
        assert row in card


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_reads_its_share_and_no_more(kind: str, tmp_path: Path) -> None:
    """A rank's network is imitated by one built without a group and cut to the share."""
    network = random_network(kind)
    to_huggingface(
        read_checkpoint(write_directory(tmp_path / "run", network)), tmp_path / "out", None
    )
    checkpoint = read_checkpoint(tmp_path / "out")
    num_read: Counter[str] = Counter()

    def counted(name: str, stored: StoredTensor) -> StoredTensor:
        def read(dim: int | None, start: int, stop: int) -> torch.Tensor:
            found = stored.read(dim, start, stop)
            num_read[name] += found.numel()
            return found

        return replace(stored, read=read)

    tensors = {name: counted(name, stored) for name, stored in checkpoint.tensors.items()}
    placements = parameter_placements(network)
    share = random_network(kind)
    for name, parameter in share.named_parameters():
        dim = placements[name].tp_dim
        if dim is not None:
            parameter.data = parameter.data.narrow(dim, 0, parameter.size(dim) // 4).clone()
    fill_parameters(share, ParallelMesh(tensor_parallel_size=4, tp_rank=3), tensors, path=tmp_path)
    for name, parameter in share.named_parameters():
        assert num_read[name] == parameter.numel()
        dim, whole = placements[name].tp_dim, network.get_parameter(name)
        expected = whole if dim is None else whole.chunk(4, dim)[3]
        assert torch.equal(parameter, expected), name


def test_another_model_is_refused_by_its_first_parameter(tmp_path: Path) -> None:
    run = write_directory(tmp_path / "run", random_network("bert-post"))
    checkpoint = read_checkpoint(run)
    with pytest.raises(
        ValueError, match=r"another model: .*word_embeddings.weight needs \[64, 32\]"
    ):
        checkpoint.load(random_network("bert-post", vocab_size=64), ParallelMesh())
    with pytest.raises(ValueError, match="final_layernorm.weight needs .32. and it holds nothing"):
        checkpoint.load(random_network("bert-pre"), ParallelMesh())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_layers": 4},
            r"layers.3.attention_layernorm.weight needs \[32\] and it holds nothing",
        ),
        ({"num_layers": 2}, r"holds .*layers.2.* and 9 more, which no bert of ours has"),
        ({"num_layers": 9_999}, "tensors cannot be the 9999 layers that it says it has"),
        ({"head": {"kind": "span", "labels": []}}, "is incomplete: it has no head.weight"),
        ({"head": {"kind": "evil"}}, "model.json: head 'evil' is not one of classification"),
        ({"hidden_size": None}, "does not say what its network is: "),
        ({"num_heads": 5}, "does not say what its network is: hidden_size 32 is not divisible"),
    ],
)
def test_a_directory_of_ours_is_whole_or_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = write_directory(tmp_path / "run", random_network("bert-pre"))
    values = json.loads((run / MODEL).read_text())
    (run / MODEL).write_text(json.dumps(values | changes))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(run)
    (run / MODEL).write_text("{")
    with pytest.raises(ValueError, match=r"run/model.json cannot be read as JSON"):
        read_checkpoint(run)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no checkpoint: it holds neither checkpoints/"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "empty/checkpoints").mkdir()
    with pytest.raises(ValueError, match="checkpoints holds no complete checkpoint"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        read_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a directory"):
        read_checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match="does not exist"):
        read_checkpoint("/" + "x" * 300)
    with pytest.raises(ValueError, match="'some-org/some-bert' is no directory, and not to be had"):
        read_checkpoint("some-org/some-bert")


def test_the_command_refuses_wrong_input_before_anything_is_written(tmp_path: Path) -> None:
    run = write_directory(tmp_path / "run", random_network("gpt2", vocab_size=16))
    tokenizer().save_pretrained(tmp_path / "large")
    given = {"to": "huggingface", "checkpoint": run, "output": tmp_path / "out", "tokenizer": None}
    cases = [
        ({"to": "onnx"}, "to=onnx is not one of huggingface, hydratron"),
        ({"checkpoint": None}, "checkpoint= is missing"),
        ({"output": None}, "output= is missing"),
        ({"output": run}, "run exists already"),
        ({"output": "/proc/x"}, "output /proc/x cannot be written to: "),
        ({"output": run / "model.json/x"}, "model.json/x cannot be written to: Not a directory"),
        ({"output": 5}, "output=5 is not the name of a directory"),
        ({"checkpoint": 5}, "checkpoint=5 is not the name of a directory"),
        ({"checkpoint": ["a", "b"]}, r"checkpoint=\['a', 'b'\] is not the name of a directory"),
        ({"checkpoint": "no/such/folder"}, "checkpoint no/such/folder does not exist"),
        (
            {"tokenizer": tmp_path / "large"},
            r"large has \d+ entries, more than the vocabulary of 16",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(given | changes)
    assert not (tmp_path / "out").exists()
    assert prepare(given).tokenizer is None


def test_a_run_on_an_encoder_of_transformers_is_refused(tmp_path: Path) -> None:
    run = write_directory(tmp_path / "run", random_network("gpt2"))
    (run / MODEL).unlink()
    (run / ".hydra").mkdir()
    model = {"family": "huggingface", "path": "roberta-base"}
    (run / ".hydra/resolved.yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(ValueError, match="is a run of roberta-base, which is no network of ours"):
        read_checkpoint(run)
