import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import BertTokenizerFast

from hydratron.data.tokenizer import (
    TOKENIZER_KINDS,
    load_tokenizer,
    special_tokens,
    tokenizer_hash,
    train_tokenizer,
    word_start_table,
)

TEXT = (
    "The furmity woman's tent, it seems, was unfurnished. The unfurnished tent!  She\n\n"
    "said — café.\n" * 20
)
TRAIN = """
import sys
from hydratron.data.tokenizer import tokenizer_hash, train_tokenizer
text, *kinds = sys.argv[1:]
print([tokenizer_hash(train_tokenizer(kind, [text], vocab_size=400)) for kind in kinds])
"""


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_every_kind_serves_both_objectives_and_stays_within_its_size(kind: str) -> None:
    tokenizer = train_tokenizer(kind, [TEXT], vocab_size=300)
    assert 6 < len(tokenizer) <= 300
    special = special_tokens(tokenizer, objective="mlm")
    assert special == special_tokens(tokenizer, objective="clm")
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]
    found = [special.pad, special.cls, special.sep, special.mask, special.eod]
    assert tokenizer.convert_ids_to_tokens(found) == names
    assert set(special.all_ids) == {*found, tokenizer.unk_token_id}


def test_training_gives_the_same_tokenizer_in_every_process() -> None:
    # wordpiece's trainer alone does not: it iterates over a randomly seeded hash map
    runs = [
        subprocess.run(
            [sys.executable, "-c", TRAIN, TEXT, *TOKENIZER_KINDS],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    here = [tokenizer_hash(train_tokenizer(k, [TEXT], vocab_size=400)) for k in TOKENIZER_KINDS]
    assert runs == [str(here), str(here)]


def test_characters_decode_to_the_text_without_inserted_spaces() -> None:
    tokenizer = train_tokenizer("character", [TEXT], vocab_size=100, lowercase=False)
    encoded = ids(tokenizer, "The  tent,\n\t it seems")
    assert tokenizer.decode(encoded) == "The tent, it seems"
    assert len(encoded) == len("The tent, it seems")
    assert tokenizer.unk_token_id in ids(tokenizer, "Ω")


def test_a_small_character_vocabulary_keeps_the_most_frequent() -> None:
    tokenizer = train_tokenizer("character", ["aaaa bbb cc d"], vocab_size=9)
    assert tokenizer.convert_ids_to_tokens([6, 7, 8]) == ["a", " ", "b"]


def test_byte_level_tokens_decode_to_the_exact_text() -> None:
    tokenizer = train_tokenizer("bpe", [TEXT], vocab_size=300, lowercase=False)
    text = "A new  line:\n\n“Ω”, she said."
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_lowercase_is_a_choice() -> None:
    for kind in TOKENIZER_KINDS:
        lower, cased = (
            train_tokenizer(kind, [TEXT], vocab_size=300, lowercase=choice)
            for choice in (True, False)
        )
        assert ids(lower, "THE") == ids(lower, "the")
        assert ids(cased, "The") != ids(cased, "the")


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_a_saved_tokenizer_loads_as_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(kind, [TEXT], vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(spec))
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        assert special_tokens(loaded) == special_tokens(tokenizer)
        assert ids(loaded, TEXT) == ids(tokenizer, TEXT)


def test_a_call_with_truncation_does_not_change_the_hash() -> None:
    tokenizer = train_tokenizer("wordpiece", [TEXT], vocab_size=300)
    before = tokenizer_hash(tokenizer)
    tokenizer("the tent", truncation=True, max_length=4, padding="max_length")
    assert tokenizer_hash(tokenizer) == before


def test_different_tokenizers_have_different_hashes() -> None:
    hashes = {
        tokenizer_hash(train_tokenizer(kind, [TEXT], vocab_size=300, lowercase=lowercase))
        for kind in TOKENIZER_KINDS
        for lowercase in (True, False)
    }
    assert len(hashes) == 6


def test_a_bert_vocabulary_loads_cased_or_uncased_as_it_is(tmp_path: Path) -> None:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tent", "##s", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    uncased = load_tokenizer(str(tmp_path))
    assert ids(uncased, "The tents") == [7, 5, 6]
    assert special_tokens(uncased).eod == -1
    with pytest.raises(ValueError, match="no eod token, which the objective clm needs"):
        special_tokens(uncased, objective="clm")
    (tmp_path / "vocab.txt").write_text("\n".join([*entries, "The"]) + "\n")
    assert ids(load_tokenizer(str(tmp_path)), "The tents") == [8, 5, 6]


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_a_gpt2_vocabulary_loads_under_both_pairs_of_names(
    names: tuple[str, str], tmp_path: Path
) -> None:
    trained = train_tokenizer("bpe", [TEXT], vocab_size=300, lowercase=False)
    state = json.loads(trained.backend_tokenizer.to_str())["model"]
    vocab = {token: i for token, i in state["vocab"].items() if not token.startswith("[")}
    (tmp_path / names[0]).write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair in state["merges"]]
    (tmp_path / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]))
    loaded = load_tokenizer(str(tmp_path))
    assert ids(loaded, TEXT) == ids(trained, TEXT)
    special = special_tokens(loaded, objective="clm")
    assert (special.eod, special.pad, special.mask) == (
        vocab["<|endoftext|>"],
        vocab["<|endoftext|>"],
        -1,
    )
    with pytest.raises(ValueError, match="no pad token, which the objective mlm needs"):
        special_tokens(loaded)


def test_word_starts_of_wordpiece_are_all_but_continuations() -> None:
    tokenizer = train_tokenizer("wordpiece", [TEXT], vocab_size=300)
    starts = word_start_table(tokenizer)
    assert starts.shape == (len(tokenizer),)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert [not token.startswith("##") for token in tokens] == starts.tolist()
    assert not starts.all()


def test_word_starts_of_byte_level_bpe_have_the_leading_space() -> None:
    tokenizer = train_tokenizer("bpe", [TEXT], vocab_size=400)
    starts = word_start_table(tokenizer)
    encoded = ids(tokenizer, "the tent, it seems")
    words, current = [], []
    for token in encoded:
        if starts[token] and current:
            words.append(tokenizer.decode(current))
            current = []
        current.append(token)
    assert [*words, tokenizer.decode(current)] == ["the", " tent,", " it", " seems"]


def test_every_character_starts_a_word() -> None:
    assert word_start_table(train_tokenizer("character", [TEXT], vocab_size=100)).all()


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("words", 300, "'words' is not one of wordpiece, bpe, character"),
        ("bpe", 128, "vocab_size 128 is less than the 262 entries"),
        ("wordpiece", 20, "vocab_size 20 is less than the"),
        ("character", 6, "vocab_size 6 leaves no room"),
    ],
)
def test_a_size_too_small_for_the_kind_is_refused(kind: str, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(kind, [TEXT], vocab_size=vocab_size)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "vocab.txt").write_text("a\nb\n")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("cannot connect\nand much more")

    monkeypatch.setattr("hydratron.data.tokenizer.AutoTokenizer.from_pretrained", unreachable)
    specs = {
        str(tmp_path / "absent"): "no such file or folder",
        str(tmp_path): "neither tokenizer.json, nor vocab.txt",
        str(tmp_path / "bad.json"): "bad.json: not a tokenizer.json",
        str(tmp_path / "other.json"): "it describes no model",
        str(tmp_path / "folder"): r"vocab.txt: no \[UNK\]",
        "nobody/nothing": "'nobody/nothing' is no file, no folder, .* Hub: cannot connect$",
    }
    for spec, message in specs.items():
        with pytest.raises(ValueError, match=message) as raised:
            load_tokenizer(spec)
        assert "\n" not in str(raised.value)


def test_a_tokenizer_json_alone_finds_its_special_tokens(tmp_path: Path) -> None:
    trained = train_tokenizer("wordpiece", [TEXT], vocab_size=300)
    Tokenizer.from_str(trained.backend_tokenizer.to_str()).save(str(tmp_path / "tokenizer.json"))
    assert special_tokens(load_tokenizer(str(tmp_path))) == special_tokens(trained)


BERT = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "für",
    "fur",
    "東",
    "京",
    "東京",
]


@pytest.mark.parametrize(
    "name", ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", None]
)
@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"do_lower_case": False}, []),
        ({"strip_accents": False}, []),
        ({"tokenize_chinese_chars": False}, []),
        ({"do_lower_case": True}, ["covid19"]),
        ({"do_lower_case": True}, ["Capital"]),
    ],
)
def test_a_configuration_beside_a_vocabulary_is_read_as_transformers_reads_it(
    tmp_path: Path, name: str | None, config: dict, added: list[str]
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    named = {"tokenizer_class": name} if name else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | named))
    entries = {token: len(BERT) + i for i, token in enumerate(added)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(entries))
    loaded = load_tokenizer(str(tmp_path))
    text = "The cat für 東京 covid19 Capital the"
    assert ids(loaded, text) == ids(BertTokenizerFast.from_pretrained(str(tmp_path)), text)
    loaded.save_pretrained(tmp_path / "saved")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "saved"))) == tokenizer_hash(loaded)


def test_a_gpt2_configuration_is_read_too(tmp_path: Path) -> None:
    state = json.loads(train_tokenizer("bpe", [TEXT], vocab_size=300).backend_tokenizer.to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    bare = load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert ids(load_tokenizer(str(tmp_path)), "tent") == ids(bare, " tent") != ids(bare, "tent")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "tokenizer_config.json: not JSON"),
        ("[]", "tokenizer_config.json: not a JSON object"),
        ('{"tokenizer_class": "NoSuchTokenizer"}', "cannot be read"),
        (
            '{"tokenizer_class": "BertJapaneseTokenizer"}',
            "tokenizer ",
        ),
    ],
)
def test_a_configuration_that_nobody_can_follow_is_refused(
    tmp_path: Path, config: str, message: str
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("separator", "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e")
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_only_a_line_feed_ends_an_entry_of_a_vocabulary(
    tmp_path: Path, separator: str, line_end: str
) -> None:
    entries = [*BERT[:5], separator, *BERT[5:]]
    (tmp_path / "vocab.txt").write_bytes(line_end.join([*entries, ""]).encode())
    loaded = load_tokenizer(str(tmp_path))
    assert len(loaded) == len(entries)
    assert ids(loaded, "the cat") == [6, 7]
