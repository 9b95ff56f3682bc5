import threading
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hydratron.data.encodings import (
    Encodings,
    cache_key,
    encode_cached,
    make_frame,
    stack_sequences,
    tokenize,
    tokenize_with_offsets,
    truncate_longest_first,
)
from hydratron.data.tokenizer import load_tokenizer


def one_by_one(a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
    """BERT's rule as it is told: drop a token off the longer until it fits."""
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    return a, b


def test_truncation_equals_dropping_one_token_at_a_time_off_the_longer() -> None:
    for len_a in range(9):
        for len_b in range(9):
            for room in range(2, 18):
                a, b = truncate_longest_first(np.arange(len_a), np.arange(len_b), room)
                expected = one_by_one(list(range(len_a)), list(range(len_b)), room)
                assert (a.tolist(), b.tolist()) == expected


def test_a_tokenizer_without_a_frame_gets_that_of_bert(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, types = make_frame(tokenizer, 2).assemble(np.array([7, 8]), np.array([9]))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert ids.tolist() == [cls, 7, 8, sep, 9, sep]
    assert types.tolist() == [0, 0, 0, 0, 1, 1]
    ids, types = make_frame(tokenizer, 1).assemble(np.array([7, 8]))
    assert ids.tolist() == [cls, 7, 8, sep]
    assert types.tolist() == [0] * 4


@pytest.fixture
def other_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """A copy that a test may give another frame."""
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    return load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("template", "expected", "types", "cls_position"),
    [
        ("[CLS] $A [SEP] [SEP] $B [SEP]", "2 7 8 3 3 9 3", [0] * 7, 0),  # RoBERTa
        (
            "$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2",
            "7 8 3 9 3 2",
            [0, 0, 0, 1, 1, 2],
            5,
        ),  # XLNet
    ],
)
def test_a_tokenizer_with_its_own_frame_keeps_it(
    other_tokenizer: PreTrainedTokenizerFast,
    template: str,
    expected: str,
    types: list[int],
    cls_position: int,
) -> None:
    other_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    frame = make_frame(other_tokenizer, 2)
    ids, token_types = frame.assemble(np.array([7, 8]), np.array([9]))
    assert ids.tolist() == [int(i) for i in expected.split()]
    assert token_types.tolist() == types
    assert frame.cls_position(len(ids)) == cls_position


def test_a_tokenizer_without_cls_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="cls_token None .* finetuning needs both"):
        make_frame(bare, 2)


def test_batches_of_text_tokenise_as_single_texts_and_ignore_earlier_truncation(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ["the cat sat on the mat.", "unplayable", ""]
    tokenizer(texts, truncation=True, max_length=3, padding="max_length")
    expected = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]
    assert [ids.tolist() for ids in tokenize(tokenizer, texts)] == expected
    with_offsets = list(tokenize_with_offsets(tokenizer, texts))
    assert [ids.tolist() for ids, _ in with_offsets] == expected
    ids, chars = with_offsets[1]
    assert [texts[1][start:end] for start, end in chars] == ["un", "p", "l", "a", "y", "able"]
    assert with_offsets[2][1].shape == (0, 2)


def small_encodings() -> Encodings:
    arrays = [np.arange(n, dtype=np.int32) for n in (3, 1, 2, 5)]
    types = [np.zeros(len(a), np.uint8) for a in arrays]
    return stack_sequences(
        zip(arrays, types, strict=True), values={"labels": [4, 6]}, num_choices=2
    )


def test_an_item_holds_its_choices_and_values() -> None:
    encodings = small_encodings()
    item = encodings[1]
    assert len(encodings) == 2
    assert encodings.lengths.tolist() == [3, 5]
    assert (item["index"], item["labels"]) == (1, 6)
    assert [ids.tolist() for ids in item["input_ids"]] == [[0, 1], [0, 1, 2, 3, 4]]


def test_the_cache_gives_back_what_was_encoded_without_encoding_again(tmp_path: Path) -> None:
    first = encode_cached(["x"], lambda _: small_encodings(), tmp_path, "key")
    second = encode_cached(["x"], lambda _: pytest.fail("encoded again"), tmp_path, "key")
    for encodings in (first, second):
        assert isinstance(encodings.tokens["input_ids"].base, np.memmap)  # a plain view of it
        assert encodings.num_choices == 2
        for index in range(2):
            for mine, plain in zip(
                encodings[index]["input_ids"], small_encodings()[index]["input_ids"], strict=True
            ):
                assert mine.tolist() == plain.tolist()


def test_without_a_cache_folder_nothing_is_kept() -> None:
    assert len(encode_cached(["x"], lambda _: small_encodings(), None, "key")) == 2


def test_of_many_at_once_one_encodes_and_all_get_the_result(tmp_path: Path) -> None:
    calls: list[int] = []
    results: list[int] = []

    def encode(_: object) -> Encodings:
        calls.append(1)
        return small_encodings()

    def work() -> None:
        results.append(len(encode_cached(["x"], encode, tmp_path, "key")))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), results) == (1, [2] * 6)


def test_an_encoding_that_fails_leaves_no_cache(tmp_path: Path) -> None:
    def fail(_: object) -> Encodings:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        encode_cached(["x"], fail, tmp_path, "key")
    assert not (tmp_path / "key").exists()
    assert len(encode_cached(["x"], lambda _: small_encodings(), tmp_path, "key")) == 2


def test_the_cache_key_changes_with_examples_tokenizer_and_settings(
    tokenizer: PreTrainedTokenizerFast, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"id": "0", "texts": ("a", "b"), "label": 1}]
    key = cache_key(rows, tokenizer, {"max_seq_len": 8})
    tokenizer(["a"], truncation=True, max_length=2)  # a call leaves settings in the tokenizer
    assert cache_key([dict(rows[0])], tokenizer, {"max_seq_len": 8}) == key
    other_tokenizer.add_tokens(["zebra"])
    others = {
        cache_key([{**rows[0], "label": 0}], tokenizer, {"max_seq_len": 8}),
        cache_key(rows, tokenizer, {"max_seq_len": 9}),
        cache_key(rows, other_tokenizer, {"max_seq_len": 8}),
    }
    assert len(others | {key}) == 4
