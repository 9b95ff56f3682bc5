import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hydratron.data import examples
from hydratron.data.tokenizer import load_tokenizer
from hydratron.data.zeroshot import (
    count_original_tokens,
    encode_lambada,
    lambada_batches,
    lambada_num_correct,
    load_lambada,
    load_wikitext,
    perplexity_batches,
    perplexity_metrics,
    wikitext_detokenize,
)

Write = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's byte-level tokenizer without merges: a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the dogs ' bowl", "the dogs' bowl"),
        ("1 @,@ 000 @.@ 5 ship @-@ yard", "1,000.5 ship-yard"),
        ("so : a ; b . c ! d ? e , f", "so: a; b. c! d? e, f"),
        ("a ; . b . ; c", "a;. b .; c"),
        ("a ( b c ) [ d ] { e }", "a (b c) [d] {e}"),
        ("he said \" red \" and ' blue ' now", "he said \"red\" and 'blue' now"),
        (
            " \n = Title = \n = = Part = = \n = = = Sub = = = \n",
            "\n= Title =\n== Part ==\n=== Sub ===\n",
        ),
        ("51 ° 30 N of it", "51°30 1 of it"),
        ("Smith 's cat", "Smith's cat"),
    ],
)
def test_the_detokeniser_undoes_wikitext(text: str, expected: str) -> None:
    assert wikitext_detokenize(text) == expected


def test_original_tokens_lie_between_single_spaces() -> None:
    assert count_original_tokens(" \n = A = \n b c \n") == 6  # a line feed is one


def slow_losses(model: GPT2LMHeadModel, ids: list[int], size: int, overlap: int) -> list[float]:
    """The loss of each target by itself: the context is where its window begins."""
    losses: list[float] = []
    for target in range(1, len(ids)):
        window = max(0, -(-(target - size) // overlap))
        context = torch.tensor([ids[window * overlap : target]])
        with torch.no_grad():
            logits = model(context).logits[0, -1].double()
        losses.append(float(-torch.log_softmax(logits, -1)[ids[target]]))
    return losses


@pytest.mark.parametrize("num_tokens", [2, 9, 16, 17, 18, 21, 40])
@pytest.mark.parametrize("overlap", [1, 4, 16])
def test_windows_score_every_target_once_with_the_right_context(
    model: GPT2LMHeadModel, num_tokens: int, overlap: int
) -> None:
    ids = np.random.default_rng(num_tokens).integers(0, 256, num_tokens).astype(np.int32)
    loss_sum, num_scored, targets = 0.0, 0, []
    for rank in range(3):
        for batch in perplexity_batches(
            ids, max_seq_len=16, batch_size=2, overlap=overlap, rank=rank, world_size=3
        ):
            assert batch.input_ids.shape[1] == 16
            with torch.no_grad():
                log_p = model(batch.input_ids).logits.double().log_softmax(-1)
            losses = -log_p.gather(-1, batch.labels[..., None])[..., 0]
            loss_sum += float(losses[batch.loss_mask].sum())
            num_scored += int(batch.loss_mask.sum())
            targets += batch.labels[batch.loss_mask].tolist()
    assert num_scored == num_tokens - 1
    assert sorted(targets) == sorted(ids[1:].tolist())
    expected = sum(slow_losses(model, ids.tolist(), 16, overlap))
    assert loss_sum == pytest.approx(expected, rel=1e-5)  # float32 model


def test_perplexities_follow_the_formula_and_are_capped() -> None:
    metrics = perplexity_metrics(300.0, 101, 81)
    assert metrics == {
        "loss": 3.0,
        "perplexity": math.exp(3.0),
        "adjusted_perplexity": math.exp(3.0 * 100 / 80),
    }
    assert perplexity_metrics(1e6, 101, 81)["adjusted_perplexity"] == math.exp(20)


def test_an_overlap_out_of_range_is_refused() -> None:
    for overlap in (0, 17):
        with pytest.raises(ValueError, match=f"overlap {overlap} is not between"):
            list(perplexity_batches(np.arange(9), max_seq_len=16, batch_size=1, overlap=overlap))


def test_the_hub_gives_the_text_of_the_file(
    write: Write, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["", " = A = \n", "", " b , c . \n"]
    path = write("wiki.test.tokens", "".join(line or " \n" for line in lines))
    rows = [{"text": line} for line in lines]
    monkeypatch.setattr(examples.datasets, "load_dataset", lambda *args, **kwargs: rows)
    from_file = load_wikitext(path, byte_tokenizer)
    from_hub = load_wikitext(None, byte_tokenizer)
    assert from_file.num_original_tokens == from_hub.num_original_tokens
    assert from_file.token_ids.tolist() == from_hub.token_ids.tolist()
    assert byte_tokenizer.decode(from_file.token_ids) == "\n= A =\n\nb, c.\n"
    with pytest.raises(ValueError, match="no text to score"):
        load_wikitext(write("empty.tokens", ""), byte_tokenizer)


def test_the_target_of_lambada_is_the_last_word_or_loosely_the_last_token(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ["the cat\nsat on the cat"]
    [(context, target)] = encode_lambada(texts, byte_tokenizer)
    assert byte_tokenizer.decode(context) == "the cat\nsat on the"
    assert byte_tokenizer.decode(target) == " cat"
    [(context, target)] = encode_lambada(texts, byte_tokenizer, strict=False)
    assert byte_tokenizer.decode(context) == "the cat\nsat on the ca"
    assert byte_tokenizer.decode(target) == "t"


@pytest.mark.parametrize("strict", [True, False])
def test_lambada_accuracy_equals_a_slow_count(
    model: GPT2LMHeadModel, byte_tokenizer: PreTrainedTokenizerFast, strict: bool
) -> None:
    rng = np.random.default_rng(0)
    letters = [chr(97 + i) for i in range(3)]
    texts = [
        " ".join("".join(rng.choice(letters, rng.integers(1, 3))) for _ in range(6))
        for _ in range(400)
    ]
    pairs = encode_lambada(texts, byte_tokenizer, strict=strict)

    def argmax(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits[..., :128].argmax(-1)

    # Make the model right where its guess decides: otherwise a random one never is.
    guessed = [
        (context, argmax(torch.tensor(context[None, -16:].astype(np.int64)))[0, -1:].numpy())
        if index % 3 == 0 and len(target) == 1
        else (context, target)
        for index, (context, target) in enumerate(pairs)
    ]
    num_correct, num_rows = 0, 0
    for rank in range(3):
        for batch in lambada_batches(
            guessed, max_seq_len=16, batch_size=7, pad_id=0, rank=rank, world_size=3
        ):
            num_correct += lambada_num_correct(argmax(batch.input_ids), batch)
            num_rows += len(batch.input_ids)
    expected = 0
    for context, target in guessed:
        ids = np.concatenate([context, target]).astype(np.int64)[-17:]
        guesses = argmax(torch.tensor(ids[None, :-1]))[0, -len(target) :]
        expected += guesses.tolist() == target.tolist()
    assert num_rows == 400
    assert num_correct == expected
    assert strict or expected >= 100


def test_wrong_lambada_files_are_named_by_line(write: Write) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: missing field 'text'"):
        load_lambada(write("a.jsonl", '{"txt": "a b"}\n'))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: needs a context and a last word"):
        load_lambada(write("a.jsonl", '{"text": "a b"}\n{"text": "a"}\n'))
    with pytest.raises(ValueError, match=r"a\.jsonl: no passages"):
        load_lambada(write("a.jsonl", ""))


@pytest.fixture(scope="module")
def gpt2_tokenizer(shared_data: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(shared_data / "vocab" / "gpt2"))


@pytest.mark.parametrize(
    ("file", "num_original_tokens", "num_tokens"),
    [
        ("wikitext103.valid.tokens", 217_642, 236_892),
        ("wikitext2.valid.raw.txt", 217_646, 237_489),
    ],
)
def test_token_counts_of_the_real_validation_texts(
    shared_data: Path,
    gpt2_tokenizer: PreTrainedTokenizerFast,
    file: str,
    num_original_tokens: int,
    num_tokens: int,
) -> None:
    path = shared_data / "wikitext" / file
    text = load_wikitext(path, gpt2_tokenizer)
    raw = path.read_bytes().decode("utf-8")
    # Words between single spaces: each space inside the stripped text ends one.
    assert text.num_original_tokens == raw.strip().count(" ") + 1 == num_original_tokens
    assert len(text.token_ids) == num_tokens
    assert gpt2_tokenizer.decode(text.token_ids) == wikitext_detokenize(raw)
    assert len(gpt2_tokenizer.encode(wikitext_detokenize(raw))) == num_tokens


def test_the_real_text_keeps_its_letters_and_loses_only_spaces_and_marks(shared_data: Path) -> None:
    raw = (shared_data / "wikitext" / "wikitext103.valid.tokens").read_text(encoding="utf-8")
    clean = wikitext_detokenize(raw)
    raw = re.sub(r" @([-,.])@ ", r"\1", raw)
    # It reads N as the number that the Penn Treebank writes so.
    assert re.sub(r"[N1\s]", "", clean) == re.sub(r"[N1\s]", "", raw)


def test_real_lambada_targets_join_to_the_passages(
    shared_data: Path, gpt2_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = shared_data / "lambada" / "lambada_test.first500.jsonl"
    passages = load_lambada(path)
    assert passages == [json.loads(line)["text"] for line in path.read_bytes().split(b"\n") if line]
    assert len(passages) == 500
    for text, (context, target) in zip(
        passages, encode_lambada(passages, gpt2_tokenizer), strict=True
    ):
        joined = gpt2_tokenizer.decode(context) + gpt2_tokenizer.decode(target)
        assert joined.split() == text.split()
