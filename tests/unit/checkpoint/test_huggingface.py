"""Hugging Face folders both ways: logits, weights bit for bit, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
)

from hydratron.checkpoint.conversion import to_huggingface, to_hydratron
from hydratron.checkpoint.huggingface import read_tensors
from hydratron.checkpoint.source import read_checkpoint
from hydratron.commands.convert import prepare
from hydratron.parallel.mesh import ParallelMesh
from tests.unit.checkpoint.networks import (
    KINDS,
    NETWORKS,
    TOLERANCE,
    config,
    inputs,
    logits,
    random_network,
    tokenizer,
    write_directory,
)


def load(path: Path) -> nn.Module:
    """Read a checkpoint of any kind into a network whose every parameter it holds."""
    checkpoint = read_checkpoint(path)
    network = NETWORKS[checkpoint.model.family](checkpoint.model).eval()
    assert checkpoint.load(network, ParallelMesh()) == []
    return network


def assert_same_weights(ours: nn.Module, other: nn.Module) -> None:
    expected, found = ours.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def export(kind: str, tmp_path: Path, **changes: object) -> tuple[nn.Module, Path]:
    network = random_network(kind, **changes)
    checkpoint = read_checkpoint(write_directory(tmp_path / "run", network))
    to_huggingface(checkpoint, tmp_path / "exported", tokenizer())
    return network, tmp_path / "exported"


def their_network(kind: str, folder: Path) -> nn.Module:
    auto = AutoModelForCausalLM if kind == "gpt2" else AutoModelForPreTraining
    network, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return network.eval()


@torch.no_grad()
def their_logits(network: nn.Module, kind: str) -> list[Tensor]:
    given = inputs(config(kind))
    if kind == "gpt2":
        return [network(**given).logits]
    given["attention_mask"] = given["attention_mask"].long()
    output = network(**given)
    return [output.prediction_logits, output.seq_relationship_logits]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_folder_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    ours, folder = export(kind, tmp_path)
    expected = logits(ours)
    found = their_logits(their_network(kind, folder), kind)
    assert expected[0].std() > 0.5  # large enough for the tolerance to mean much
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(left, right, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_export_from_pretrained_import_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    ours, folder = export(kind, tmp_path)
    their_network(kind, folder).save_pretrained(tmp_path / "saved")
    to_hydratron(read_checkpoint(tmp_path / "saved"), tmp_path / "back", None)
    assert_same_weights(ours, load(tmp_path / "back"))
    assert_same_weights(ours, load(folder))
    assert read_checkpoint(tmp_path / "back").model == config(kind)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_activation_travels_with_the_weights(
    kind: str, activation: str, tmp_path: Path
) -> None:
    ours, folder = export(kind, tmp_path, activation=activation)
    found = their_logits(their_network(kind, folder), kind)
    torch.testing.assert_close(logits(ours)[0], found[0], atol=TOLERANCE, rtol=0)
    assert read_checkpoint(folder).model.activation == activation


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_several_files_is_read(kind: str, tmp_path: Path) -> None:
    ours, folder = export(kind, tmp_path)
    their_network(kind, folder).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert_same_weights(ours, load(tmp_path / "cut"))


def test_half_precision_is_loaded_as_float32_and_exported_as_it_is(tmp_path: Path) -> None:
    ours, folder = export("bert-post", tmp_path)
    half = their_network("bert-post", folder).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    checkpoint = read_checkpoint(tmp_path / "half")
    assert {stored.dtype for stored in checkpoint.tensors.values()} == {torch.bfloat16}
    assert_same_weights(ours.to(torch.bfloat16).float(), load(tmp_path / "half"))
    to_huggingface(checkpoint, tmp_path / "again", None)
    assert AutoModel.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


def test_a_gpt2_export_generates_what_our_logits_say(tmp_path: Path) -> None:
    ours, folder = export("gpt2", tmp_path)
    prompt = torch.tensor([[5, 17, 60]])
    network = their_network("gpt2", folder)
    mask = torch.ones_like(prompt)
    found = network.generate(
        prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    ids = prompt
    for _ in range(20):
        with torch.no_grad():
            ids = torch.cat([ids, ours.logits(ids)[:, -1:].argmax(-1)], 1)
    assert found.tolist() == ids.tolist()
    assert len(set(ids[0].tolist())) > 3


@pytest.mark.parametrize("kind", ["bert-post", "gpt2"])
def test_a_network_without_heads_is_read(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "intermediate_size": 64, "n_inner": 64}
    if kind == "gpt2":
        network: nn.Module = GPT2Model(
            GPT2Config(
                vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
            )
        )
    else:
        network = BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **sizes)
        )
    network.save_pretrained(tmp_path / "bare")
    checkpoint = read_checkpoint(tmp_path / "bare")
    ours = NETWORKS[checkpoint.model.family](checkpoint.model)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    missing = checkpoint.load(ours, ParallelMesh())
    heads = {name for name in before if name.startswith(("masked_lm_head", "sentence_order_head"))}
    assert set(missing) == heads
    assert all(torch.equal(before[name], ours.state_dict()[name]) for name in heads)

    converted = to_hydratron(checkpoint, tmp_path / "converted", None)
    assert converted["missing"] == missing
    to_huggingface(read_checkpoint(tmp_path / "converted"), tmp_path / "again", None)
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert_same_weights(network, again)


def test_a_masked_lm_without_pooler_comes_back_as_one(tmp_path: Path) -> None:
    settings = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    theirs = BertForMaskedLM(settings)
    theirs.save_pretrained(tmp_path / "mlm")
    converted = to_hydratron(read_checkpoint(tmp_path / "mlm"), tmp_path / "converted", None)
    assert converted["missing"] == [
        "encoder.pooler.weight",
        "encoder.pooler.bias",
        "sentence_order_head.weight",
        "sentence_order_head.bias",
    ]
    again = to_huggingface(read_checkpoint(tmp_path / "converted"), tmp_path / "again", None)
    assert again["architecture"] == "BertForMaskedLM"
    assert_same_weights(theirs, BertForMaskedLM.from_pretrained(tmp_path / "again"))


def test_names_of_converted_tensorflow_checkpoints_are_read(tmp_path: Path) -> None:
    ours, folder = export("bert-post", tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].decode()
    for old, new in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        text = text.replace(old, new)
    header = text.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert_same_weights(ours, load(folder))


def test_vocabulary_and_tokenizer_travel_with_the_weights(tmp_path: Path) -> None:
    _, folder = export("bert-pre", tmp_path)
    exported = json.loads((folder / "config.json").read_text())
    assert exported["vocab_size"] == 96
    assert exported["tokenizer_vocab_size"] == len(tokenizer())
    assert exported["pad_token_id"] == tokenizer().pad_token_id
    text = "The mayor jumps."
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer()(text).input_ids
    assert read_checkpoint(folder).tokenizer == folder
    card = (folder / "README.md").read_text()
    assert "before attention and MLP (pre)" in card
    assert f"96 rows, {len(tokenizer())} of them used" in card
    assert "label 1 that they are swapped" in card


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    network = random_network("bert-post", vocab_size=16)
    checkpoint = read_checkpoint(write_directory(tmp_path / "run", network))
    with pytest.raises(ValueError, match=r"tokenizer T has \d+ entries, more than .* of 16 of"):
        checkpoint.check_tokenizer(tokenizer(), "T")


def test_a_post_gpt2_has_no_counterpart(tmp_path: Path) -> None:
    network = random_network("gpt2-post")
    checkpoint = read_checkpoint(write_directory(tmp_path / "run", network))
    with pytest.raises(ValueError, match="GPT-2 with layernorm post has no Hugging Face"):
        to_huggingface(checkpoint, tmp_path / "out", None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    _, folder = export("bert-post", tmp_path)
    with pytest.raises(ValueError, match="output .*run exists already"):
        to_huggingface(read_checkpoint(folder), tmp_path / "run", None)
    with pytest.raises(ValueError, match="output .*run exists already"):
        to_hydratron(read_checkpoint(folder), tmp_path / "run", None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "roberta", "model_type 'roberta' is not one of bert, megatron-bert, gpt2"),
        ("hidden_act", "relu", "activation 'relu' is not one of gelu"),
        ("is_decoder", True, "is_decoder is True, only False can be read"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("sliding_window", 128, "config.json: sliding_window is 128, only None can be read"),
        ("auto_map", {"AutoModel": "m.M"}, "auto_map is {'AutoModel': 'm.M'}, only None"),
        ("quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}, only None"),
        ("architectures", ["BertPreLN"], "architectures names 'BertPreLN', no class of transf"),
        ("num_hidden_layers", 9_999, "62 tensors cannot be the 9999 layers that it says"),
        ("hidden_size", "wide", "config.json: Validation error for field 'hidden_size'"),
        ("num_attention_heads", 5, "config.json: hidden_size 32 is not divisible by num_heads 5"),
        ("hidden_size", 64, r"is of another model: .*word_embeddings.weight needs \[96, 64\] and"),
        ("num_hidden_layers", 4, r"bert.encoder.layer.3.attention.output.LayerNorm.weight needs"),
    ],
)
def test_a_folder_of_another_network_is_refused(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    _, folder = export("bert-post", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def changed_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Let `change` edit the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_missing_weight_is_refused_in_both_directions(tmp_path: Path) -> None:
    """As loaded by transformers, it would be drawn at random."""
    _, folder = export("bert-post", tmp_path)
    name = "bert.encoder.layer.1.output.dense.weight"
    changed_weights(folder, lambda tensors: tensors.pop(name))
    for to in ("huggingface", "hydratron"):
        given = {"to": to, "checkpoint": str(folder), "output": str(tmp_path / to)}
        with pytest.raises(ValueError, match=rf"{name} needs \[32, 48\] and it holds nothing$"):
            prepare(given | {"tokenizer": None})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_shape_or_type_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    _, folder = export(kind, tmp_path)
    names = load_file(folder / "model.safetensors")
    name = next(n for n in names if "key.weight" in n or "c_attn.weight" in n)
    shape = list(names[name].shape)
    changed_weights(folder, lambda tensors: tensors.update({name: torch.zeros(7, 5)}))
    with pytest.raises(ValueError, match=re.escape(f"{name} needs {shape} and it holds [7, 5]")):
        load(folder)
    integers = torch.zeros(shape, dtype=torch.int8)
    changed_weights(folder, lambda tensors: tensors.update({name: integers}))
    with pytest.raises(ValueError, match=f"{name} is no weight of 16, 32 or 64 bits"):
        load(folder)


def test_a_weight_that_no_network_of_ours_has_is_refused(tmp_path: Path) -> None:
    _, folder = export("bert-pre", tmp_path)
    name = "bert.encoder.layer.0.adapter.weight"
    changed_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(ValueError, match=f"holds {name}, which no bert of ours has"):
        load(folder)


def test_names_of_no_bert_are_refused_by_the_first(tmp_path: Path) -> None:
    _, folder = export("bert-pre", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file(parallel, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no name of a bert: its first is module\.bert\."):
        load(folder)


@pytest.mark.parametrize(
    "dtype",
    [torch.int16, torch.int8, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_buffers_of_any_type_are_left_out(dtype: torch.dtype, tmp_path: Path) -> None:
    ours, folder = export("bert-post", tmp_path)
    extra = {"bert.embeddings.extra": torch.zeros(3).to(dtype)}
    changed_weights(folder, lambda tensors: tensors.update(extra))
    assert_same_weights(ours, load(folder))


def test_what_older_gpt2_folders_hold_beside_weights_is_left_out(tmp_path: Path) -> None:
    ours, folder = export("gpt2", tmp_path)
    extra = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 40, 40).tril(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": torch.zeros(96, 32),
    }
    changed_weights(folder, lambda tensors: tensors.update(extra))
    assert_same_weights(ours, load(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "\udcff", "[" * 10**5])
def test_broken_json_is_refused_by_its_file(name: str, text: str, tmp_path: Path) -> None:
    _, folder = export("bert-post", tmp_path)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{folder / name} (cannot be read as|holds no) JSON"):
        load(folder)


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    _, folder = export("bert-post", tmp_path)
    index = folder / "model.safetensors.index.json"
    for weight_map in (None, 5, {"a": 5}, {"a": "../exported/model.safetensors"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=f"{index} has no weight_map of names of files"):
            load(folder)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    _, folder = export("bert-post", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read as safetensors"):
        load(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no model.safetensors: only safetensors are read"):
        load(folder)


def test_every_parameter_has_a_place_in_theirs(tmp_path: Path) -> None:
    for kind in KINDS:
        ours, folder = export(kind, tmp_path / kind)
        assert read_tensors(folder, config(kind)).keys() == ours.state_dict().keys()
