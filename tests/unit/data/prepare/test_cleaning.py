"""The seed's filters, one by one."""

import json
from pathlib import Path

import ftfy
import pytest

from hydratron.data.cleaning import (
    LanguageFilter,
    LengthFilter,
    OverlapFilter,
    TitleFilter,
    clean_text,
    join_broken_lines,
)
from hydratron.data.tokenizer import load_tokenizer, train_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix potions"


@pytest.mark.parametrize(
    "text",
    [
        "schÃ¶n & gut\nplain line\nMr &amp; Mrs",
        "a &lt; b\n<p>&amp;</p>\n&amp; stays",
        "“curly” ‘quotes’ — and dashes\r\nnext\ttab",
        "",
    ],
)
def test_the_fast_path_gives_what_ftfy_gives(text: str) -> None:
    ours = clean_text(text, fix=True, join_lines=False)
    theirs = clean_text(ftfy.fix_text(text), fix=False, join_lines=False)
    assert ours == theirs


def test_white_space_becomes_regular() -> None:
    text = " one\u00a0 two \t three \n\n\n\n four  \n"
    assert clean_text(text, fix=False, join_lines=False) == "one two three\n\nfour"


def test_newlines_inside_paragraphs_go_and_paragraphs_stay() -> None:
    assert join_broken_lines("She went\nhome.\n\nHe did\nnot.") == "She went home.\n\nHe did not."


def test_without_blank_lines_only_newlines_inside_sentences_go() -> None:
    assert join_broken_lines("She went\nhome.\nHe did not.") == "She went home.\nHe did not."


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> str:
    made = train_tokenizer("wordpiece", [f"{WORDS} {WORDS.title()}"], vocab_size=120)
    made.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_documents_under_128_tokens_go(tokenizer_path: str) -> None:
    backend = load_tokenizer(tokenizer_path).backend_tokenizer
    keep = LengthFilter(128, tokenizer_path)
    for num_words in range(1, 140):
        text = " ".join((WORDS.split() * 10)[:num_words])
        num_tokens = len(backend.encode(text, add_special_tokens=False).ids)
        assert keep(text) == (num_tokens >= 128)


def test_the_articles_of_a_test_set_go_by_title_and_by_first_line(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.tokens"
    path.write_text(
        " \n = Robert <unk> = \n \n He is . \n \n = = Career = = \n \n x \n"
        " = Semi @-@ automatic rifle ( 1941 ) = \n \n y \n"
    )
    keep = TitleFilter(str(path))
    assert not keep("anything", "Semi-automatic rifle (1941)")
    assert not keep("Semi-automatic rifle (1941)\n\nIt is a rifle.", "")
    assert keep("anything", "Career")
    assert keep("anything", "Automatic rifle")


def test_documents_that_share_thirteen_words_with_an_evaluation_set_go(tmp_path: Path) -> None:
    lambada = tmp_path / "lambada.jsonl"
    lambada.write_text(json.dumps({"text": f'He said:\n"{WORDS}" again and again'}) + "\n")
    keep = OverlapFilter((str(lambada),), 13)
    words = WORDS.split()
    assert not keep("Before. " + " ".join(words[:13]).upper() + "! After.")
    assert not keep(f"x, {', '.join(words[1:14])}; y")
    assert keep("x " + " ".join(words[:12]) + " y")


def test_short_evaluation_texts_count_whole_down_to_eight_words(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("one two three four five six seven eight\nnine ten\n")
    keep = OverlapFilter((str(tmp_path / "set.txt"),), 13)
    assert not keep("zero one two three four five six seven eight nine")
    assert keep("one two three four five six seven nine ten")


def test_the_language_filter_needs_no_network() -> None:
    keep = LanguageFilter("en")
    assert keep("It was the best of times, it was the worst of times, it was the age of wisdom.")
    assert not keep("Es war einmal mitten im Winter, und die Schneeflocken fielen wie Federn.")


@pytest.mark.parametrize("name", ["eval.json", "eval.jsonl", "EVAL.JSONL"])
def test_evaluation_texts_are_those_that_the_json_means(tmp_path: Path, name: str) -> None:
    text = "The café’s naïve owner said that people would never again buy bread of his"
    document = {"data": [{"paragraphs": [{"context": text, "id": 3}]}]}
    rows = [json.dumps(document), json.dumps({"text": "of no weight"})]
    assert "\\u00e9" in rows[0]
    (tmp_path / name).write_text("\n".join(rows[: 1 if name == "eval.json" else 2]))
    is_kept = OverlapFilter((str(tmp_path / name),), 13)
    assert not is_kept(f"Before. {text}. After.")
    assert is_kept("The cafe owner said that other people would never again buy bread of his")
