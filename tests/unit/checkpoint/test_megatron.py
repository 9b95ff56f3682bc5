"""Megatron-LM checkpoints of every layout give Megatron-LM's logits; what is refused, and how."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from hydratron.checkpoint.conversion import to_huggingface, to_hydratron
from hydratron.checkpoint.megatron_options import REQUIRED
from hydratron.checkpoint.source import read_checkpoint
from hydratron.parallel.mesh import ParallelMesh
from tests.unit.checkpoint.megatron_files import (
    POSITIONS,
    VOCAB,
    arguments,
    forward,
    random_weights,
    training_state,
    write,
)
from tests.unit.checkpoint.networks import NETWORKS, TOLERANCE, tokenizer

FILE = "iter_0000020/mp_rank_{:02d}/model_optim_rng.pt"


@pytest.fixture(autouse=True)
def _megatron_is_not_installed() -> Iterator[None]:
    """Forget the stand-in module of the loss scaler after each test."""
    yield
    for name in ("megatron.fp16", "megatron.fp16.loss_scaler"):
        sys.modules.pop(name, None)


def batch() -> dict[str, Tensor]:
    lengths = torch.tensor([POSITIONS, 9, 5])
    return {
        "input_ids": torch.randint(VOCAB, (3, POSITIONS)),
        "token_type_ids": (torch.arange(POSITIONS) > 5).long().expand(3, -1),
        "attention_mask": torch.arange(POSITIONS) < lengths.unsqueeze(-1),
    }


@torch.no_grad()
def our_logits(directory: Path, given: dict[str, Tensor]) -> list[Tensor]:
    checkpoint = read_checkpoint(directory)
    network = NETWORKS[checkpoint.model.family](checkpoint.model).eval()
    assert checkpoint.load(network, ParallelMesh()) == []
    if checkpoint.model.family == "gpt2":
        return [network.logits(given["input_ids"])]
    return list(network.logits(**given))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert expected[0].std() > 0.5  # large enough for the tolerance to mean much
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("version", [None, 1.0, 2.0])
@pytest.mark.parametrize(
    ("family", "is_post"), [("bert", False), ("bert", True), ("gpt2", False), ("gpt2", True)]
)
def test_every_layout_gives_the_logits_of_megatron(
    family: str, is_post: bool, version: float | None, size: int, tmp_path: Path
) -> None:
    weights, given = random_weights(family), batch()
    args = arguments(family, size, is_post=is_post)
    directory = write(tmp_path / "run", weights, args, size=size, version=version)
    expected = forward(weights, given, is_post=is_post)
    assert_close(our_logits(directory, given), expected)
    assert_close(our_logits(directory / "iter_0000020", given), expected)
    model = read_checkpoint(directory).model
    assert (model.family, model.layernorm) == (family, "post" if is_post else "pre")


@pytest.mark.parametrize("size", [1, 2])
def test_a_megatron_checkpoint_goes_on_to_any_kind(size: int, tmp_path: Path) -> None:
    weights, given = random_weights("bert"), batch()
    args = arguments("bert", size, is_post=True)
    source = read_checkpoint(write(tmp_path / "run", weights, args, size=size, version=1.0))
    to_hydratron(source, tmp_path / "ours", None)
    assert_close(our_logits(tmp_path / "ours", given), forward(weights, given, is_post=True))
    to_huggingface(source, tmp_path / "theirs", None)
    assert_close(our_logits(tmp_path / "theirs", given), forward(weights, given, is_post=True))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_training_checkpoint_is_read_with_all_it_holds(is_zip: bool, tmp_path: Path) -> None:
    weights, given = random_weights("bert"), batch()
    extra = training_state()
    directory = write(
        tmp_path / "run", weights, arguments("bert", 2), size=2, is_zip=is_zip, **extra
    )
    assert_close(our_logits(directory, given), forward(weights, given, is_post=False))


def test_later_names_and_a_release_are_read(tmp_path: Path) -> None:
    weights, given = random_weights("gpt2"), batch()
    later = {
        name.replace(".transformer.", ".encoder.").replace(".attention.", ".self_attention."): t
        for name, t in weights.items()
    }
    args = arguments("gpt2", 1, openai_gelu=False, bias_gelu_fusion=True, ffn_hidden_size=128)
    write(tmp_path / "run", later, args)
    (tmp_path / "run/iter_0000020/mp_rank_00").rename(tmp_path / "run/iter_0000020/mp_rank_00_000")
    (tmp_path / "run/iter_0000020").rename(tmp_path / "run/release")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("release\n")
    assert_close(our_logits(tmp_path / "run", given), forward(weights, given, is_post=False))


class Code:
    """A pickle of this runs a command when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(is_zip: bool, tmp_path: Path) -> None:
    directory = write(
        tmp_path / "run",
        random_weights("bert"),
        arguments("bert", 1),
        is_zip=is_zip,
        optimizer=Code(tmp_path / "ran"),
    )
    with pytest.raises(
        ValueError, match=r"rng.pt needs (posix|os).system to be loaded: a pickle can run code"
    ) as caught:
        read_checkpoint(directory)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError, match=str(directory)) as caught:
        read_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_rank_is_refused_by_its_file(tmp_path: Path) -> None:
    directory = write(tmp_path / "run", random_weights("gpt2"), arguments("gpt2", 4), size=4)
    shutil.rmtree(directory / "iter_0000020/mp_rank_02")
    assert refusal(directory) == (
        f"{directory / FILE.format(2)} is missing: every tensor-parallel rank has a file"
    )
    shutil.rmtree(directory / "iter_0000020/mp_rank_00")
    assert f"{FILE.format(0)} is missing" in refusal(directory)


def test_files_of_another_tensor_parallel_size_are_refused(tmp_path: Path) -> None:
    weights = random_weights("bert")
    two = write(tmp_path / "two", weights, arguments("bert", 2), size=2)
    four = write(tmp_path / "four", weights, arguments("bert", 4), size=4)
    shutil.copy(four / FILE.format(1), two / FILE.format(1))
    assert (
        "mp_rank_01/model_optim_rng.pt: language_model.embedding.word_embeddings.weight has shape"
        " [32, 32], and rank 0 has [64, 32]: files of different tensor-parallel sizes or models"
    ) in refusal(two)
    shutil.copytree(four / "iter_0000020/mp_rank_03", two / "iter_0000020/mp_rank_03")
    assert "has 3 rank files, and the args of rank 0 say 2" in refusal(two)


def test_files_of_different_iterations_are_refused(tmp_path: Path) -> None:
    weights, args = random_weights("gpt2"), arguments("gpt2", 2)
    directory = write(tmp_path / "run", weights, args, size=2)
    later = write(tmp_path / "later", weights, args, size=2, iteration=40)
    shutil.copy(later / "iter_0000040/mp_rank_01/model_optim_rng.pt", directory / FILE.format(1))
    assert "iteration 40, and rank 0 has 20: files of different checkpoints" in refusal(directory)


def test_what_the_tracker_names_must_be_there(tmp_path: Path) -> None:
    directory = write(tmp_path / "run", random_weights("gpt2"), arguments("gpt2", 1))
    tracker = directory / "latest_checkpointed_iteration.txt"
    tracker.write_text("40")
    assert "iteration.txt says 40, and there is no" in refusal(directory)
    tracker.write_text("best")
    assert "says 'best': neither an iteration nor release" in refusal(directory)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "run", random_weights("gpt2"), arguments("gpt2", 1))
    path = directory / FILE.format(0)
    path.write_bytes(path.read_bytes()[:-5000])
    assert f"{path} cannot be read" in refusal(directory)


@pytest.mark.parametrize(
    "content",
    [b"", b"junk" * 100, b"PK\x03\x04" + b"x" * 50, b"\x80\x02.", b"\x80\x02]q\0.", b"\0" * 99],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_its_name(
    content: bytes, tmp_path: Path
) -> None:
    directory = write(tmp_path / "run", random_weights("gpt2"), arguments("gpt2", 1))
    path = directory / FILE.format(0)
    path.write_bytes(content)
    found = refusal(directory)
    assert found.startswith(f"{path} cannot be read: ")
    assert "weights_only" not in found  # torch's advice is to run what the file holds


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """Torch's reader raises whatever it stumbles over."""
    directory = write(tmp_path / "run", random_weights("gpt2"), arguments("gpt2", 1), is_zip=False)
    path = directory / FILE.format(0)
    content, random = path.read_bytes(), Random(3)
    refusals = []
    for _ in range(60):
        damaged = bytearray(content)
        damaged[random.randrange(4000)] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            read_checkpoint(directory)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all(str(directory) in text and "\n" not in text for text in refusals)


def test_a_directory_named_like_a_rank_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "run/mp_rank_xx").mkdir(parents=True)
    assert refusal(tmp_path / "run").endswith("mp_rank_xx is not named mp_rank_ and a number")


@pytest.mark.parametrize("names", [(".metadata", "common.pt", "__0_0.distcp"), ("__0_0.distcp",)])
@pytest.mark.parametrize("has_tracker", [True, False])
def test_a_checkpoint_of_megatron_core_is_refused_by_its_format(
    names: tuple[str, ...], has_tracker: bool, tmp_path: Path
) -> None:
    iteration = tmp_path / "run/iter_0000010"
    iteration.mkdir(parents=True)
    for name in names:
        (iteration / name).write_bytes(b"x")
    if has_tracker:
        (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("10")
    assert (
        f"{iteration} is a checkpoint of Megatron Core ({', '.join(names)}: --ckpt-format"
        " torch_dist), which is not read"
    ) in refusal(tmp_path / "run" if has_tracker else iteration)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("apply_layernorm_1p", True),
        ("squared_relu", True),
        ("quick_geglu", True),
        ("window_size", (128, 0)),
        ("add_bias_linear", False),
        ("use_rotary_position_embeddings", True),
        ("position_embedding_type", "rope"),
        ("position_embedding_type", torch.zeros(2)),
        ("softmax_type", "off-by-one"),
        ("qk_layernorm", True),
        ("num_experts", 8),
        ("pipeline_model_parallel_size", 2),
    ],
)
def test_an_option_that_changes_the_network_is_refused(
    option: str, value: Any, tmp_path: Path
) -> None:
    args = arguments("gpt2", 1, **{option: value})
    directory = write(tmp_path / "run", random_weights("gpt2"), args)
    assert f"{FILE.format(0)}: {option} is {value!r}, only " in refusal(directory)


def test_the_neutral_values_of_todays_options_are_read(tmp_path: Path) -> None:
    """As a run of Megatron-LM writes them that uses none of what is newer than BERT and GPT-2."""
    neutral = {key: values[-1] for key, values in REQUIRED.items()} | {"norm_epsilon": 1e-3}
    args = arguments("gpt2", 1, **neutral, hidden_dropout=0)
    del args.layernorm_epsilon
    model = read_checkpoint(write(tmp_path / "run", random_weights("gpt2"), args)).model
    assert (model.layernorm_eps, model.hidden_dropout) == (1e-3, 0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_layers", None, "its args hold no num_layers"),
        ("num_layers", 9_999, "33 tensors cannot be the 9999 layers"),
        ("num_attention_heads", "four", "num_attention_heads is 'four', which is no size"),
        ("openai_gelu", 3, "openai_gelu is 3, neither True nor False"),
        ("hidden_dropout", 2.0, "model.hidden_dropout 2.0 is not in [0, 1)"),
    ],
)
def test_options_that_are_no_numbers_are_refused(
    option: str, value: Any, message: str, tmp_path: Path
) -> None:
    args = arguments("gpt2", 1, **{option: value})
    found = refusal(write(tmp_path / "run", random_weights("gpt2"), args))
    assert message.replace("33", str(len(random_weights("gpt2")))) in found


def test_a_missing_layer_and_a_wrong_shape_are_refused_by_the_first_tensors(
    tmp_path: Path,
) -> None:
    weights = random_weights("gpt2")
    body = "language_model.transformer.layers"
    first = {name: t for name, t in weights.items() if not name.startswith(f"{body}.1.")}
    found = refusal(write(tmp_path / "stage", first, arguments("gpt2", 1)))
    assert f"is of another model: {body}.1.input_layernorm.weight needs [32] and it holds" in found
    assert found.endswith("and 9 more")
    name = f"{body}.0.mlp.dense_h_to_4h.weight"
    narrow = weights | {name: torch.zeros(64, 32)}
    found = refusal(write(tmp_path / "narrow", narrow, arguments("gpt2", 2), size=2))
    assert f"{name} needs [64, 32] and it holds [32, 32]" in found
    integers = weights | {name: torch.zeros(128, 32, dtype=torch.int8)}
    found = refusal(write(tmp_path / "int8", integers, arguments("gpt2", 1)))
    assert f"{name} is no weight of 16, 32 or 64 bits, floating point" in found


def test_a_head_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    weights = random_weights("bert")
    without = {name: t for name, t in weights.items() if not name.startswith("binary_head")}
    missing = to_hydratron(
        read_checkpoint(write(tmp_path / "without", without, arguments("bert", 1))),
        tmp_path / "ours",
        None,
    )["missing"]
    assert missing == ["sentence_order_head.weight", "sentence_order_head.bias"]
    del weights["binary_head.bias"]
    found = refusal(write(tmp_path / "half", weights, arguments("bert", 1)))
    assert "binary_head.bias needs [2] and it holds nothing" in found


def test_networks_that_we_do_not_have_are_refused(tmp_path: Path) -> None:
    weights = random_weights("gpt2")
    cases: list[tuple[dict[str, Tensor], Any, dict[str, Any], str]] = [
        (weights, arguments("gpt2", 1, swiglu=True), {}, "swiglu is True, only False can be read"),
        (weights, None, {}, "holds no args, so that its number of heads is unknown"),
        (weights, arguments("gpt2", 1), {"version": 4.0}, "checkpoint_version 4.0 is not one of"),
        (
            weights | {"language_model.transformer.layers.0.adapter.weight": torch.zeros(2)},
            arguments("gpt2", 1),
            {},
            "holds language_model.transformer.layers.0.adapter.weight, which no gpt2 of ours has",
        ),
    ]
    for i, (given, args, options, message) in enumerate(cases):
        directory = write(tmp_path / str(i), given, args, **options)
        assert message in refusal(directory)
    (tmp_path / "0/iter_0000020/mp_rank_00").rename(tmp_path / "0/iter_0000020/mp_rank_00_001")
    assert "checkpoints split over pipeline stages are not read" in refusal(tmp_path / "0")


def test_the_tokenizer_must_be_that_of_the_checkpoint(tmp_path: Path) -> None:
    def read(kind: str | None, rows: int, size: int = 1) -> Any:
        weights = random_weights("bert")
        word = "language_model.embedding.word_embeddings.weight"
        weights |= {word: torch.zeros(rows, 32), "lm_head.bias": torch.zeros(rows)}
        args = arguments("bert", size, tokenizer_type=kind)
        return read_checkpoint(write(tmp_path / f"{kind}-{rows}-{size}", weights, args, size=size))

    uncased, cased = tokenizer(), tokenizer(lowercase=False)
    read("BertWordPieceLowerCase", 128).check_tokenizer(uncased, "T")
    read("BertWordPieceCase", 256, size=2).check_tokenizer(cased, "T")
    with pytest.raises(
        ValueError, match="tokenizer T is uncased, and the vocabulary of .* is cased"
    ):
        read("BertWordPieceCase", 128).check_tokenizer(uncased, "T")
    with pytest.raises(
        ValueError, match="tokenizer T is cased, and the vocabulary of .* is uncased"
    ):
        read("BertWordPieceLowerCase", 128).check_tokenizer(cased, "T")
    with pytest.raises(ValueError, match="which pad to 128, 256, 512, 1024, and .* has 384"):
        read(None, 384).check_tokenizer(uncased, "T")


def test_the_published_cased_and_uncased_vocabularies_are_told_apart_by_their_sizes(
    tmp_path: Path,
) -> None:
    """The NGC "uncased" checkpoint had the cased vocabulary of 29056 (Megatron-LM issue 54)."""

    class Tokens:
        backend_tokenizer = argparse.Namespace(normalizer=None)

        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

    weights = random_weights("bert")
    word = "language_model.embedding.word_embeddings.weight"
    for rows, fits, misfits in (
        (29056, 28996, 30522),
        (30592, 30522, 28996),
        (30720, 30522, 28996),
    ):
        sizes = {word: torch.zeros(rows, 32), "lm_head.bias": torch.zeros(rows)}
        args = arguments("bert", 1, tokenizer_type=None)
        checkpoint = read_checkpoint(write(tmp_path / str(rows), weights | sizes, args))
        checkpoint.check_tokenizer(Tokens(fits), "T")
        with pytest.raises(ValueError, match=f"tokenizer T has {misfits} entries"):
            checkpoint.check_tokenizer(Tokens(misfits), "T")
