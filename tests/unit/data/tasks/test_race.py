import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics
from transformers import PreTrainedTokenizerFast

from hydratron.data import examples
from hydratron.data.race import (
    RaceQuestion,
    clean_text,
    encode_race,
    join_question,
    load_race,
    race_metrics,
    write_race_predictions,
)

Write = Callable[[str, str], Path]


def passage(name: str, **changes: Any) -> str:
    row = {
        "id": name,
        "article": "The cat sat .\nThe dog  did .",
        "questions": ["Where did the cat sat?", "The dog is _ ."],
        "options": [["on a mat", "b", "c", "d"], ["red", "blue", "green", "d"]],
        "answers": ["A", "C"],
    }
    return json.dumps(row | changes)


@pytest.fixture
def official(write: Write, tmp_path: Path) -> Path:
    """RACE as it is downloaded: a folder a split, a folder a level, a JSON document a file."""
    write("RACE/train/high/10.txt", passage("high10.txt"))
    write("RACE/train/high/9.txt", passage("high9.txt"))
    write("RACE/train/middle/1.txt", passage("middle1.txt"))
    write("RACE/dev/middle/2.txt", passage("middle2.txt"))
    return tmp_path / "RACE"


def test_the_official_folders_give_both_levels_in_order(official: Path) -> None:
    questions = load_race(official, "train")
    names = ["high9.txt", "high10.txt", "middle1.txt"]
    assert [q.id for q in questions] == [f"{name}-{i}" for name in names for i in range(2)]
    assert [q.level for q in questions] == ["high"] * 4 + ["middle"] * 2
    assert [q.label for q in questions[:2]] == [0, 2]
    assert questions[0].options == ("on a mat", "b", "c", "d")


def test_a_split_or_a_level_or_a_file_of_the_official_folders_can_be_named(official: Path) -> None:
    assert [q.id for q in load_race(official, "validation")] == ["middle2.txt-0", "middle2.txt-1"]
    assert len(load_race(official / "train", "train")) == 6
    assert len(load_race(official / "train" / "high", "train")) == 4
    assert len(load_race(official / "train" / "middle" / "1.txt", "train")) == 2


def test_json_lines_plain_and_gzipped_give_both_levels(write: Write) -> None:
    folder = write("dev.middle.jsonl", passage("middle1.txt") + "\n").parent
    lines = passage("high3.txt") + "\n" + passage("high4.txt") + "\n"
    (folder / "dev.high.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write("train.high.jsonl", passage("high9.txt") + "\n")
    assert [q.level for q in load_race(folder, "validation")] == ["high"] * 4 + ["middle"] * 2
    assert len(load_race(folder / "dev.high.jsonl.gz", "validation")) == 4


def test_the_path_tells_the_level_where_the_id_does_not(write: Write) -> None:
    assert load_race(write("dev.high.jsonl", passage("7") + "\n"), "train")[0].level == "high"
    assert load_race(write("x/middle/7.txt", passage("7")), "train")[0].level == "middle"
    with pytest.raises(ValueError, match=r"x\.jsonl:1: neither id '7' nor the path"):
        load_race(write("x.jsonl", passage("7") + "\n"), "train")


def test_the_rows_of_the_hub_become_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"article": "a", "options": list("abcd"), "question": "q", "answer": "B"}
    rows = [row | {"example_id": name} for name in ("high1.txt", "middle2.txt", "high1.txt")]
    monkeypatch.setattr(examples.datasets, "load_dataset", lambda *args, **kwargs: rows)
    questions = load_race(None, "validation")
    assert [q.id for q in questions] == ["high1.txt-0", "high1.txt-1", "middle2.txt-0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ["A"]}, "questions, options and answers differ in length"),
        ({"answers": ["A", "E"]}, "question 1: answer 'E' is not one of A, B, C, D"),
        ({"answers": ["A", "AB"]}, "question 1: answer 'AB'"),
        ({"options": [["a", "b", "c", "d"], ["a"]]}, "question 1: 1 options, 4 expected"),
        ({"questions": ["a", 3]}, "question 1: not a text"),
        ({"options": [["a", "b", "c", "d"], "abcd"]}, "question 1: options must be a list"),
        ({"article": None}, "'article' must be str"),
    ],
)
def test_wrong_passages_are_named_by_file_line_and_question(
    write: Write, changes: dict[str, Any], message: str
) -> None:
    text = passage("high1.txt") + "\n" + passage("high2.txt", **changes) + "\n"
    with pytest.raises(ValueError, match=rf"dev\.jsonl:2: {message}"):
        load_race(write("dev.jsonl", text), "validation")


def test_an_id_is_that_of_one_passage_whose_questions_may_stand_apart(write: Write) -> None:
    lines = [passage("high1.txt"), passage("high2.txt", article="x"), passage("high1.txt")]
    questions = load_race(write("a.jsonl", "\n".join(lines)), "test")
    names = ["high1.txt", "high2.txt", "high1.txt"]
    numbers = [0, 1, 0, 1, 2, 3]
    assert [q.id for q in questions] == [f"{names[i // 2]}-{n}" for i, n in enumerate(numbers)]
    lines[2] = passage("high1.txt", article="The cat sat elsewhere.")
    with pytest.raises(ValueError, match=r"b.jsonl:3: id 'high1.txt' .* another .*b.jsonl:1$"):
        load_race(write("b.jsonl", "\n".join(lines)), "test")


def test_wrong_files_are_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl: no questions"):
        load_race(write("a.jsonl", ""), "train")
    with pytest.raises(ValueError, match=r"missing field 'article'"):
        load_race(write("a.jsonl", '{"id": "high1"}\n'), "train")
    with pytest.raises(ValueError, match=r"high/1\.txt:1: not JSON"):
        load_race(write("train/high/1.txt", "{"), "train")
    with pytest.raises(ValueError, match=r"a\.csv: a RACE file must be"):
        load_race(write("a.csv", ""), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no questions"):
        load_race(tmp_path / "empty", "train")


def test_text_is_cleaned_and_the_option_takes_the_blank() -> None:
    assert clean_text("One .\nTwo   three . . . end . ") == "One. Two three. .. end. "
    assert join_question("The dog is   _  .", "red") == "The dog is red ."
    assert join_question("A _ and a _ .", "cat") == "A cat and a cat ."
    assert join_question("Where?", "on a mat") == "Where? on a mat"


def test_a_question_is_encoded_token_by_token(tokenizer: PreTrainedTokenizerFast) -> None:
    question = RaceQuestion(
        "high1.txt-0",
        "the cat sat .\n the dog did what ?",
        "the dog is _ .",
        ("red", "blue", "green", "on the mat"),
        3,
        "high",
    )

    def tokens(**limits: int) -> list[str]:
        item = encode_race([question], tokenizer, **limits)[0]
        assert item["labels"] == 3
        for ids, types in zip(item["input_ids"], item["token_type_ids"], strict=True):
            first = ids.tolist().index(tokenizer.sep_token_id) + 1
            assert types.tolist() == [0] * first + [1] * (len(ids) - first)
        return [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in item["input_ids"]]

    article = "the cat sat . the dog did what ?"
    whole = tokens(max_seq_len=64, max_question_len=32)
    assert whole[0] == f"[CLS] the dog is red . [SEP] {article} [SEP]"
    assert whole[3] == f"[CLS] the dog is on the mat . [SEP] {article} [SEP]"
    cut = tokens(max_seq_len=12, max_question_len=6)
    assert cut[0] == "[CLS] the dog is red . [SEP] the cat sat . [SEP]"
    assert cut[3] == "[CLS] the dog is on the mat [SEP] the cat sat [SEP]"
    with pytest.raises(ValueError, match="max_seq_len 9 has no room beside max_question_len 6"):
        tokens(max_seq_len=9, max_question_len=6)


def some_questions(size: int) -> list[RaceQuestion]:
    rng = np.random.default_rng(0)
    levels = rng.choice(["middle", "high"], size)
    labels = rng.integers(0, 4, size)
    return [
        RaceQuestion(f"{level}{i}.txt-0", "", "", (), int(label), str(level))
        for i, (level, label) in enumerate(zip(levels, labels, strict=True))
    ]


def test_accuracies_match_scikit_learn() -> None:
    questions = some_questions(500)
    predictions = np.random.default_rng(1).integers(0, 4, 500)
    scores = race_metrics(questions, predictions)
    labels = np.array([q.label for q in questions])
    levels = np.array([q.level for q in questions])
    assert scores["accuracy"] == metrics.accuracy_score(labels, predictions)
    for level in ("middle", "high"):
        at = levels == level
        expected = metrics.accuracy_score(labels[at], predictions[at])
        assert scores[f"accuracy_{level}"] == expected
    middle = [q for q in questions if q.level == "middle"]
    assert set(race_metrics(middle, [0] * len(middle))) == {"accuracy", "accuracy_middle"}


def test_predictions_are_written_as_letters(tmp_path: Path) -> None:
    questions = some_questions(2)
    write_race_predictions(tmp_path / "p.json", questions, np.array([3, 0]))
    written = json.loads((tmp_path / "p.json").read_text())
    assert written == {questions[0].id: "D", questions[1].id: "A"}


def test_all_real_questions_fit_and_keep_their_labels(
    shared_data: Path, bert_tokenizer: PreTrainedTokenizerFast
) -> None:
    questions = load_race(shared_data / "race", "validation")
    assert len(questions) == 3451 + 1436
    assert sum(q.level == "middle" for q in questions) == 1436
    chosen = questions[::40]
    encodings = encode_race(chosen, bert_tokenizer)
    assert encodings.lengths.max() <= 512
    assert encodings.values["labels"].tolist() == [q.label for q in chosen]
