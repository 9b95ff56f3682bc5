"""What clients of transformers feed an exported network, and get from it, is what we do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoModelForNextSentencePrediction,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from hydratron.commands import convert
from hydratron.data.encodings import make_frame, tokenize
from hydratron.data.tokenizer import (
    TOKENIZER_KINDS,
    TokenizerKind,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from tests.tasks import WORDS
from tests.unit.checkpoint.networks import TOLERANCE, random_network, write_directory
from tests.unit.checkpoint.test_finetuned import LABELS, finetuned

FIRST, SECOND = "the red cat sat on a mat.", "who ran?"
TEXTS = [FIRST, SECOND, "it was there, and the small dog was not big."]


def made_tokenizer(kind: TokenizerKind) -> PreTrainedTokenizerFast:
    return train_tokenizer(kind, TEXTS, vocab_size=300 if kind == "bpe" else 90)


def exported(run: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """What `hydratron convert` makes of a run with this tokenizer beside its checkpoints."""
    tokenizer.save_pretrained(run / "tokenizer")
    output = run.with_name("exported")
    given = {"to": "huggingface", "checkpoint": str(run), "output": str(output), "tokenizer": None}
    convert.run(convert.prepare(given), run)
    return output


def our_inputs(tokenizer: PreTrainedTokenizerFast, *texts: str) -> dict[str, Tensor]:
    """A sequence as the tasks and pretraining frame it, [1, S]."""
    found = make_frame(tokenizer, len(texts)).assemble(*tokenize(tokenizer, texts))
    ids, types = (torch.from_numpy(column.astype("int64"))[None] for column in found)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids) == 1}


@pytest.fixture
def wordpiece(tmp_path: Path) -> PreTrainedTokenizerFast:
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab/vocab.txt").write_text("\n".join(WORDS) + "\n")
    return load_tokenizer(str(tmp_path / "vocab"))


@pytest.mark.parametrize("texts", [(FIRST,), (FIRST, SECOND)])
@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_an_exported_tokenizer_gives_bert_our_inputs(
    kind: TokenizerKind, texts: tuple[str, ...], tmp_path: Path
) -> None:
    tokenizer = made_tokenizer(kind)
    run = write_directory(tmp_path / "run", random_network("bert-pre", vocab_size=300))
    client = AutoTokenizer.from_pretrained(exported(run, tokenizer))
    found, expected = client(*texts, return_tensors="pt"), our_inputs(tokenizer, *texts)
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert found[name].tolist() == column.tolist(), name
    tokens = client.convert_ids_to_tokens(found["input_ids"][0])
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", len(texts))
    assert found["token_type_ids"].sum() == (len(tokenize(tokenizer, texts)[-1]) + 1) * (
        len(texts) - 1
    )
    assert client.model_max_length == 40
    assert len(client(" ".join([FIRST] * 40), truncation=True).input_ids) == 40


def test_a_tokenizer_that_an_earlier_run_kept_without_a_frame_gets_one(tmp_path: Path) -> None:
    tokenizer = made_tokenizer("wordpiece")
    known = tokenizer_hash(tokenizer)
    plain = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = plain  # what transformers gives a new tokenizer
    del tokenizer.init_kwargs["model_input_names"]
    assert tokenizer_hash(tokenizer) == known  # corpora and caches of earlier runs stay valid
    run = write_directory(tmp_path / "run", random_network("bert-pre"))
    client = AutoTokenizer.from_pretrained(exported(run, tokenizer))
    assert client(FIRST, SECOND, return_tensors="pt").token_type_ids.sum() == 4
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "exported"))) == known


@torch.no_grad()
def pretrained_logits(network: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return network.logits(**given)


@pytest.mark.parametrize("kind", ["bert-post", "bert-pre"])
def test_masks_are_filled_and_sentences_ordered_as_by_us(
    kind: str, tmp_path: Path, wordpiece: PreTrainedTokenizerFast
) -> None:
    network = random_network(kind)
    folder = exported(write_directory(tmp_path / "run", network), wordpiece)
    text = "the [MASK] sat on a mat."
    fill: Any = pipeline("fill-mask", model=str(folder), top_k=96)
    found = {answer["token"]: answer["score"] for answer in fill(text)}
    given = our_inputs(wordpiece, text)
    assert given["input_ids"][0, 2] == wordpiece.mask_token_id
    expected = pretrained_logits(network, given)[0][0, 2].softmax(-1)
    assert len(found) == 96
    for token, score in found.items():
        assert abs(expected[token].item() - score) < TOLERANCE

    order = AutoModelForNextSentencePrediction.from_pretrained(folder).eval()
    client = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        scores = order(**client(FIRST, SECOND, return_tensors="pt")).logits
    ours = pretrained_logits(network, our_inputs(wordpiece, FIRST, SECOND))[1]
    torch.testing.assert_close(scores, ours, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["bert-post", "bert-pre"])
def test_pairs_are_classified_as_by_us(
    kind: str, tmp_path: Path, wordpiece: PreTrainedTokenizerFast
) -> None:
    network = finetuned("mnli", kind, tmp_path / "run")
    folder = exported(tmp_path / "run", wordpiece)
    classify: Any = pipeline("text-classification", model=str(folder), top_k=None)
    answers = classify({"text": FIRST, "text_pair": SECOND})
    with torch.no_grad():
        expected = network.logits(our_inputs(wordpiece, FIRST, SECOND))[0].softmax(-1)
    assert {answer["label"] for answer in answers} == set(LABELS)
    for answer in answers:
        assert abs(expected[LABELS.index(answer["label"])].item() - answer["score"]) < TOLERANCE


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_an_exported_gpt2_generates_as_by_us(kind: TokenizerKind, tmp_path: Path) -> None:
    tokenizer = made_tokenizer(kind)
    network = random_network("gpt2", vocab_size=300)
    folder = exported(write_directory(tmp_path / "run", network), tokenizer)
    client = AutoTokenizer.from_pretrained(folder)
    plain = tokenize(tokenizer, [FIRST])[0].tolist()
    found = client(FIRST)
    assert found.input_ids == plain
    assert found.keys() == {"input_ids", "attention_mask"}
    assert client.bos_token == client.eos_token == "<|endoftext|>"
    assert client.model_max_length == 40
    generate: Any = pipeline("text-generation", model=str(folder), return_full_text=False)
    settings = {"do_sample": False, "max_new_tokens": 5, "return_tensors": True}
    ids = generate(FIRST, **settings)[0]["generated_token_ids"]
    expected = torch.tensor([plain])
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, network.logits(expected)[:, -1:].argmax(-1)], 1)
    assert list(ids) == expected[0].tolist()
    # the caller's tokenizer is as it was
    assert tokenizer(FIRST).input_ids[0] == tokenizer.cls_token_id
