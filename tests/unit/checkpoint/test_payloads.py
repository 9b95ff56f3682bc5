"""Code in any file of a foreign checkpoint does not run, whatever reads it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from hydratron.checkpoint.baseline import read_baseline
from hydratron.checkpoint.conversion import to_huggingface
from hydratron.checkpoint.source import read_checkpoint
from hydratron.commands import convert
from hydratron.data.tokenizer import load_tokenizer
from tests.unit.checkpoint.megatron_files import arguments, random_weights, write
from tests.unit.checkpoint.networks import random_network, tokenizer, write_directory

MEGATRON_FILE = "iter_0000020/mp_rank_00/model_optim_rng.pt"
MODULE = "import pathlib\npathlib.Path({!r}).touch()\nclass Evil: pass\n"


class Payload:
    """Code that its pickle runs in a careless reader; it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    found = Payload(tmp_path / "ran")
    pickle.loads(pickle.dumps(found))
    assert found.trace.exists()  # it would run
    found.trace.unlink()
    return found


def attempt(reader: Callable[[], object]) -> str:
    """Return the one line that refuses, empty where something was read."""
    try:
        reader()
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is looked at
        return str(error)
    return ""


def read_everywhere(path: Path, tmp_path: Path) -> list[str]:
    """What all readers of this package say of a folder."""
    given = {"checkpoint": str(path), "output": str(tmp_path / "out"), "tokenizer": None}
    readers = [
        lambda: read_checkpoint(path),
        lambda: convert.prepare(given | {"to": "hydratron"}),
        lambda: convert.prepare(given | {"to": "huggingface"}),
        lambda: read_baseline({"path": str(path)}, None, tokenizer(), 0),
        lambda: load_tokenizer(str(path)),
    ]
    return [attempt(reader) for reader in readers]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = write_directory(tmp_path / "run", random_network("bert-post"))
    to_huggingface(read_checkpoint(run), tmp_path / "folder", tokenizer())
    return tmp_path / "folder"


def save(payload: Payload, path: Path, *, is_zip: bool = True) -> None:
    torch.save({"state": payload}, path, _use_new_zipfile_serialization=is_zip)


def test_pickles_beside_safetensors_are_not_opened(
    folder: Path, payload: Payload, tmp_path: Path
) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        save(payload, folder / name)
    save(payload, folder / "rng_state.pth", is_zip=False)
    (folder / "vocab.pkl").write_bytes(pickle.dumps(payload))
    assert read_everywhere(folder, tmp_path) == [""] * 5
    assert not payload.trace.exists()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "x.safetensors"])
def test_pickled_weights_are_refused(
    name: str, is_zip: bool, folder: Path, payload: Payload, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    save(payload, folder / name, is_zip=is_zip)
    if name.startswith("x"):
        index = json.dumps({"weight_map": {"bert.pooler.dense.weight": name}, "metadata": {}})
        (folder / "model.safetensors.index.json").write_text(index)
    network, *rest, ours = read_everywhere(folder, tmp_path)
    assert "only safetensors are read" in network or "cannot be read as safetensors" in network
    assert all(rest)
    assert ours == ""  # the tokenizer is sound
    assert not payload.trace.exists()


def test_modules_that_a_configuration_names_are_not_imported(
    folder: Path, payload: Payload, tmp_path: Path
) -> None:
    (folder / "evil.py").write_text(MODULE.format(str(payload.trace)))
    names = ("AutoConfig", "AutoModel", "AutoTokenizer")
    auto_map = {"auto_map": {name: "evil.Evil" for name in names}}
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | auto_map))
    network, *_, baseline, _ = read_everywhere(folder, tmp_path)
    assert "config.json: auto_map is {" in network
    assert "its config.json has auto_map, which is not read" in baseline
    assert not payload.trace.exists()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("key", ["model", "args", "optimizer", "np_rng_state", "iteration"])
def test_code_anywhere_in_a_megatron_file_is_refused(
    key: str, is_zip: bool, payload: Payload, tmp_path: Path
) -> None:
    directory = write(tmp_path / "run", random_weights("gpt2"), arguments("gpt2", 1))
    content = torch.load(directory / MEGATRON_FILE, weights_only=False)
    content[key] = {"language_model": payload} if key == "model" else payload
    torch.save(content, directory / MEGATRON_FILE, _use_new_zipfile_serialization=is_zip)
    found = read_everywhere(directory, tmp_path)
    assert all(found)
    assert "system to be loaded: a pickle can run code" in found[0]
    assert not payload.trace.exists()


def test_other_files_of_megatron_are_refused_or_left_alone(
    payload: Payload, tmp_path: Path
) -> None:
    weights, args = random_weights("gpt2"), arguments("gpt2", 2)
    directory = write(tmp_path / "run", weights, args, size=2)
    save(payload, directory / "iter_0000020/mp_rank_00/distrib_optim.pt")
    assert attempt(lambda: read_checkpoint(directory)) == ""
    save(payload, directory / "iter_0000020/mp_rank_01/model_optim_rng.pt")
    assert "a pickle can run code" in attempt(lambda: read_checkpoint(directory))
    (directory / "latest_checkpointed_iteration.txt").write_bytes(pickle.dumps(payload))
    assert "neither an iteration nor release" in attempt(lambda: read_checkpoint(directory))
    shutil.rmtree(directory)
    core = tmp_path / "run/iter_0000020"
    core.mkdir(parents=True)
    for name in (".metadata", "metadata.json", "__0_0.distcp"):
        (core / name).write_bytes(pickle.dumps(payload))
    save(payload, core / "common.pt")
    found = read_everywhere(core, tmp_path)
    assert all(found)
    assert "is a checkpoint of Megatron Core" in found[0]
    assert not payload.trace.exists()


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    shape = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = RobertaModel(RobertaConfig(**shape, intermediate_size=16))
    model.save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


def test_a_baseline_is_read_whole_or_refused(roberta: Path, payload: Payload) -> None:
    def read() -> str:
        return attempt(lambda: read_baseline({"path": str(roberta)}, None, tokenizer(), 0))

    assert read() == ""
    path = roberta / "config.json"
    config = json.loads(path.read_text())
    for num_layers in (1, 3):
        path.write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
        assert "incomplete or of another model than its config.json: encoder.layer." in read()
    path.write_text(json.dumps(config | {"hidden_size": 32}))
    assert read().startswith(f"model.path {str(roberta)!r} ")
    path.write_text(json.dumps(config | {"num_attention_heads": "two"}))
    assert "is no model of transformers: Validation error for field" in read()
    path.write_text(json.dumps(config))
    (roberta / "model.safetensors").unlink()
    save(payload, roberta / "pytorch_model.bin")
    assert f"model.path {str(roberta)!r} cannot be read: " in read()
    assert not payload.trace.exists()
