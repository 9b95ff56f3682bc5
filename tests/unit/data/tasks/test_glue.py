import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn import metrics
from transformers import PreTrainedTokenizerFast

from hydratron.data import examples
from hydratron.data.glue import (
    GlueTask,
    encode_glue,
    glue_metrics,
    load_glue,
    write_glue_predictions,
)

Write = Callable[[str, str], Path]

MNLI = GlueTask(
    name="mnli",
    text_columns=("premise", "hypothesis"),
    labels=("contradiction", "entailment", "neutral"),
    integer_labels=("entailment", "neutral", "contradiction"),
    tsv_text_columns=("sentence1", "sentence2"),
    tsv_label_column="gold_label",
    validation_splits=("validation_matched", "validation_mismatched"),
)
QQP = GlueTask(
    name="qqp",
    text_columns=("question1", "question2"),
    labels=("0", "1"),
    tsv_label_column="is_duplicate",
    metrics=("accuracy", "f1"),
)
COLA = """
name: cola
text_columns: [sentence]
labels: [0, 1]
tsv_header: [source, label, mark, sentence]
metrics: [matthews, accuracy]
"""
MNLI_TSV = (
    "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
    '0\tfiction\tThe cat sat "on\tThe dog sat\tneutral\tcontradiction\n'
    "1\tfiction\tA mat\u2028is red\tA mat\tneutral\tentailment\n"
)


def test_quotation_marks_in_a_tsv_are_text_and_labels_take_the_fixed_order(write: Write) -> None:
    rows = load_glue(MNLI, write("dev_matched.tsv", MNLI_TSV), "validation_matched")
    assert rows == [
        {"id": "0", "texts": ('The cat sat "on', "The dog sat"), "label": 0},
        {"id": "1", "texts": ("A mat\u2028is red", "A mat"), "label": 1},
    ]


def test_a_folder_of_the_download_is_read_by_split(write: Write) -> None:
    path = write("MNLI/dev_matched.tsv", MNLI_TSV)
    write("MNLI/train.jsonl", '{"premise": "a", "hypothesis": "b", "label": "neutral"}\n')
    assert len(load_glue(MNLI, path.parent, "validation_matched")) == 2
    assert len(load_glue(MNLI, path.parent, "train")) == 1
    with pytest.raises(ValueError, match=r"no file for split validation_mismatched"):
        load_glue(MNLI, path.parent, "validation_mismatched")


def test_json_lines_take_label_words_and_the_integers_of_the_hub(write: Write) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": x} for x in ("neutral", 0, 1, 2)]
    path = write("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [row["label"] for row in load_glue(MNLI, path, "train")] == [2, 1, 2, 0]


def test_the_hub_is_asked_only_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"premise": "a", "hypothesis": "b", "label": 0, "idx": 7}]

    monkeypatch.setattr(examples.datasets, "load_dataset", load_dataset)
    [row] = load_glue(MNLI, None, "train")
    assert asked == [("nyu-mll/glue", "mnli", "train")]
    assert row == {"id": "0", "texts": ("a", "b"), "label": 1}


def test_a_test_split_needs_no_labels_and_other_splits_do(write: Write) -> None:
    text = "index\tsentence1\tsentence2\n0\ta\tb\n"
    assert load_glue(MNLI, write("test_matched.tsv", text), "test_matched")[0]["label"] == -1
    with pytest.raises(ValueError, match=r"dev\.tsv:1: missing column 'gold_label'"):
        load_glue(MNLI, write("dev.tsv", text), "validation_matched")
    path = write("test.jsonl", '{"premise": "a", "hypothesis": "b", "label": -1}\n')
    assert load_glue(MNLI, path, "test")[0]["label"] == -1
    with pytest.raises(ValueError, match="label -1 is not one of"):
        load_glue(MNLI, path, "train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "index\tsentence1\tgold_label\n", r"a\.tsv:1: missing column 'sentence2'"),
        ("a.tsv", MNLI_TSV + "2\tx\ta\tb\tneutral\tmaybe\n", r"a\.tsv:4: label 'maybe' is not"),
        ("a.tsv", MNLI_TSV + "2\tx\ta\n", r"a\.tsv:4: not 6 columns, as in 1 of 4 lines"),
        ("a.tsv", MNLI_TSV.splitlines()[0] + "\n", r"a\.tsv: no rows"),
        ("a.tsv", "", r"a\.tsv: no rows"),
        ("a.jsonl", "", r"a\.jsonl: no rows"),
        ("a.jsonl", '{"premise": "a", "label": 0}\n', r"a\.jsonl:1: missing field 'hypothesis'"),
        ("a.jsonl", '{"premise": "a", "hypothesis": "b"}\n', r":1: missing field 'label'"),
        ("a.jsonl", '{"premise": 1, "hypothesis": "b", "label": 0}\n', r":1: 'premise' must be"),
        ("a.jsonl", '{"premise": "a", "hypothesis": "b", "label": 3}\n', r":1: label 3 is not"),
        ("a.jsonl", '{"premise": "a", "hypothesis": "b", "label": "1"}\n', r":1: label '1' is not"),
        ("a.jsonl", '{"premise": "a", "hypothesis": "b", "label": true}\n', r"label True is not"),
        ("a.jsonl", '\n{"premise"\n', r"a\.jsonl:2: not JSON"),
        ("a.csv", "", r"a\.csv: a mnli file must be \.tsv, \.jsonl or \.json"),
    ],
)
def test_wrong_files_are_named_with_line_and_rule(
    write: Write, name: str, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_glue(MNLI, write(name, text), "train")


def test_the_few_malformed_rows_of_a_large_file_are_left_out_and_named(write: Write) -> None:
    rows = [f"{i}\t1\t2\ta\tb\t{i % 2}" for i in range(1999)]
    text = "\n".join(["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", *rows, "7\t1\t2\ta"])
    with pytest.warns(UserWarning, match=r"left out malformed lines \[2001\]"):
        assert len(load_glue(QQP, write("train.tsv", text), "train")) == 1999
    # in a test file it would shift the index of every prediction after it
    with pytest.raises(ValueError, match=r"test\.tsv:2001: not 6 columns: .* must be whole"):
        load_glue(QQP, write("test.tsv", text), "test")


def test_blank_lines_of_a_tsv_are_no_rows(write: Write) -> None:
    text = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n\n0\t1\t2\ta\tb\t1\r\n\r\n \n"
    for split in ("validation", "test"):
        [row] = load_glue(QQP, write("dev.tsv", text), split)
        assert row["texts"] == ("a", "b")


def test_another_task_is_one_yaml_file(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    task = GlueTask(**yaml.safe_load(COLA))
    assert (task.labels, task.hub_config, task.validation_splits) == (
        ("0", "1"),
        "cola",
        ("validation",),
    )
    rows = load_glue(task, write("train.tsv", "gj04\t1\t\tthe cat sat\n"), "train")
    assert rows == [{"id": "0", "texts": ("the cat sat",), "label": 1}]
    item = encode_glue(rows, tokenizer, max_seq_len=4)[0]
    assert tokenizer.convert_ids_to_tokens(item["input_ids"]) == ["[CLS]", "the", "cat", "[SEP]"]
    scores = glue_metrics(task, np.array([1, 0, 1]), np.array([1, 0, 0]))
    assert list(scores) == ["matthews", "accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_columns": ()}, "text_columns must be one or two"),
        ({"labels": ("a",)}, "must be two or more"),
        ({"labels": ("a", "a")}, "must be two or more"),
        ({"integer_labels": ("0", "2")}, "not a reordering"),
        ({"metrics": ("bleu",)}, "no metric 'bleu'"),
        ({"labels": ("0", "1", "2"), "metrics": ("f1",)}, "no metric 'f1'"),
    ],
)
def test_a_wrong_task_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"task x: .*{message}"):
        GlueTask(**{"name": "x", "text_columns": ("s",), "labels": ("0", "1"), **change})


def test_pairs_are_encoded_token_by_token_and_cut_longest_first(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows: Any = [{"id": "0", "texts": ("the cat sat on the mat .", "what did do"), "label": 2}]

    def tokens(max_seq_len: int) -> tuple[str, list[int]]:
        item = encode_glue(rows, tokenizer, max_seq_len=max_seq_len)[0]
        assert item["labels"] == 2
        words = " ".join(tokenizer.convert_ids_to_tokens(item["input_ids"]))
        return words, item["token_type_ids"].tolist()

    assert tokens(64) == (
        "[CLS] the cat sat on the mat . [SEP] what did do [SEP]",
        [0] * 9 + [1] * 4,
    )
    assert tokens(10) == ("[CLS] the cat sat on [SEP] what did do [SEP]", [0] * 6 + [1] * 4)
    assert tokens(8) == ("[CLS] the cat sat [SEP] what did [SEP]", [0] * 5 + [1] * 3)
    with pytest.raises(ValueError, match="max_seq_len 4 has no room"):
        tokens(4)


def test_scores_match_scikit_learn_and_name_the_split() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, 400), rng.integers(0, 3, 400)
    expected = metrics.accuracy_score(labels, predictions)
    for kind in ("matched", "mismatched"):
        scores = glue_metrics(MNLI, predictions, labels, split=f"validation_{kind}")
        assert scores == {f"accuracy_{kind}": expected}
    labels, predictions = labels % 2, predictions % 2
    assert glue_metrics(QQP, predictions, labels) == {
        "accuracy": metrics.accuracy_score(labels, predictions),
        "f1": metrics.f1_score(labels, predictions),
    }


def test_predictions_are_written_as_the_glue_site_takes_them(tmp_path: Path) -> None:
    write_glue_predictions(tmp_path / "MNLI-m.tsv", MNLI, np.array([2, 0]))
    assert (
        tmp_path / "MNLI-m.tsv"
    ).read_text() == "index\tprediction\n0\tneutral\n1\tcontradiction\n"


@pytest.mark.parametrize(
    ("task", "file", "num_rows"),
    [
        (MNLI, "mnli/mnli_dev_matched.jsonl", 9815),
        (MNLI, "mnli/mnli_glue_16shot.train.tsv", 48),
        (MNLI, "mnli/mnli_glue_16shot.dev_matched.tsv", 48),
        (QQP, "qqp/qqp_train.jsonl", 8999),
        (QQP, "qqp/qqp_dev.jsonl", 1000),
        (QQP, "qqp/qqp_glue_16shot.dev.tsv", 32),
    ],
)
def test_real_files_are_read_whole(
    shared_data: Path, task: GlueTask, file: str, num_rows: int
) -> None:
    rows = load_glue(task, shared_data / file, "train")
    assert len(rows) == num_rows
    assert {row["label"] for row in rows} == set(range(len(task.labels)))
