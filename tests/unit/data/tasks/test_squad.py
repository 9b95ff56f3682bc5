import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from hydratron.data import examples
from hydratron.data.encodings import Encodings, tokenize_with_offsets
from hydratron.data.squad import (
    Answer,
    SquadQuestion,
    encode_squad,
    group_windows,
    load_squad,
)
from hydratron.data.squad_scoring import normalize_answer

Write = Callable[[str, str], Path]
CONTEXT = "The cat sat on the mat. The dog did play."


def document(**changes: Any) -> str:
    question = {
        "id": "q1",
        "question": " where did the cat?",
        "answers": [{"text": "on the mat", "answer_start": 12}],
    }
    paragraph = {"context": CONTEXT, "qas": [question | changes]}
    return json.dumps({"version": "x", "data": [{"title": "Cats", "paragraphs": [paragraph]}]})


def test_questions_are_read_from_the_official_file(write: Write, tmp_path: Path) -> None:
    expected = SquadQuestion("q1", "where did the cat?", CONTEXT, (Answer("on the mat", 12),))
    path = write("dev-v1.1.json", document())
    assert load_squad(path, "validation", version="1.1") == [expected]
    assert load_squad(tmp_path, "validation", version="1.1") == [expected]
    gzipped = tmp_path / "dev.json.gz"
    gzipped.write_bytes(gzip.compress(document(is_impossible=False).encode()))
    assert load_squad(gzipped, "validation", version="2.0") == [expected]
    path = write("two.json", document(answers=[], is_impossible=True))
    assert load_squad(path, "train", version="2.0")[0].answers == ()


def test_the_hub_gives_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"text": ["on the mat"], "answer_start": [12]}
    none = {"text": [], "answer_start": []}
    rows = [
        {"id": name, "question": "where?", "context": CONTEXT, "answers": a}
        for name, a in (("q1", answers), ("q2", none))
    ]
    monkeypatch.setattr(examples.datasets, "load_dataset", lambda *args, **kwargs: rows)
    questions = load_squad(None, "train", version="2.0")
    assert [len(q.answers) for q in questions] == [1, 0]


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (
            "1.1",
            {"answers": [{"text": "on the mat", "answer_start": 13}]},
            r"question q1: answer 'on the mat' is not in the context at offset 13",
        ),
        ("1.1", {"answers": [{"text": "mat", "answer_start": -5}]}, r"'mat' is not .* offset -5"),
        ("1.1", {"answers": [{"text": "", "answer_start": 3}]}, r"answer '' is not in the context"),
        ("1.1", {"answers": [{"text": "mat"}]}, r"q1: missing field 'answer_start'"),
        ("1.1", {"answers": []}, r"q1: is_impossible is False with 0 answers"),
        ("2.0", {"is_impossible": True}, r"q1: is_impossible is True with 1 answers"),
        ("1.1", {"answers": [], "is_impossible": True}, r"is_impossible in a file read as SQuAD 1"),
        ("1.1", {"id": 7}, r"a question: 'id' must be str"),
        ("1.1", {"question": None}, r"q1: 'question' must be str"),
    ],
)
def test_wrong_questions_are_named_by_file_and_id(
    write: Write, version: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"dev\.json: .*{message}"):
        load_squad(write("dev.json", document(**changes)), "validation", version=version)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": []}', "no questions"),
        ('{"data": [{"title": "t"}]}', "article 't': missing field 'paragraphs'"),
        ('{"data": [{"title": "t", "paragraphs": [{}]}]}', "paragraph 0: missing field 'context'"),
        ("[]", "missing field 'data'"),
    ],
)
def test_wrong_files_are_named(write: Write, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"dev\.json: .*{message}|dev\.json.*{message}"):
        load_squad(write("dev.json", text), "validation", version="1.1")


def test_bad_json_repeated_ids_and_unknown_versions_are_refused(write: Write) -> None:
    with pytest.raises(ValueError, match=r"dev\.json:2: not JSON"):
        load_squad(write("dev.json", '{"data":\n]'), "validation", version="1.1")
    twice = json.loads(document())
    twice["data"] *= 2
    with pytest.raises(ValueError, match="question id q1 occurs twice"):
        load_squad(write("dev.json", json.dumps(twice)), "validation", version="1.1")
    with pytest.raises(ValueError, match="version '3' is not one of"):
        load_squad(None, "validation", version="3")


def cats(*answers: Answer, repeat: int = 1) -> SquadQuestion:
    return SquadQuestion("q", "where did the cat", " ".join([CONTEXT] * repeat), answers)


def words(tokenizer: PreTrainedTokenizerFast, windows: Encodings, window: int) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(windows.get("input_ids", window)))


def test_one_window_is_encoded_token_by_token(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = encode_squad([cats(Answer("on the mat", 12))], tokenizer, max_seq_len=99)
    [item] = [windows[i] for i in range(len(windows))]
    assert words(tokenizer, windows, 0) == (
        "[CLS] where did the cat [SEP] the cat sat on the mat . the dog did play . [SEP]"
    )
    assert item["token_type_ids"].tolist() == [0] * 6 + [1] * 13
    assert (item["start_positions"], item["end_positions"], item["answerable"]) == (9, 11, 1)
    starts, ends = windows.get("char_start", 0), windows.get("char_end", 0)
    assert starts.tolist()[:7] == [-1] * 6 + [0]
    assert [CONTEXT[s:e] for s, e in zip(starts, ends, strict=True) if s >= 0] == (
        ["The", "cat", "sat", "on", "the", "mat", ".", "The", "dog", "did", "play", "."]
    )


def test_the_question_is_cut_to_its_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = encode_squad([cats()], tokenizer, max_seq_len=12, max_query_len=2)
    assert words(tokenizer, windows, 0).startswith("[CLS] where did [SEP] the cat")


def test_windows_advance_by_the_stride_and_label_only_whole_answers(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    question = cats(Answer("mat. The dog", 19))  # context tokens 5 to 8 of 12
    windows = encode_squad([question], tokenizer, max_seq_len=15, doc_stride=3, max_query_len=9)
    # 8 of the 15 are for the context: 0-7 cuts the answer, 3-10 and 6-11 (which ends it) follow.
    assert [words(tokenizer, windows, i).split("[SEP]")[1].strip() for i in range(3)] == [
        "the cat sat on the mat . the",
        "on the mat . the dog did play",
        ". the dog did play .",
    ]
    assert windows.values["answerable"].tolist() == [0, 1, 0]
    assert windows.values["start_positions"].tolist() == [0, 6 + 2, 0]
    assert windows.values["end_positions"].tolist() == [0, 6 + 5, 0]


def test_an_impossible_question_points_at_cls(tokenizer: PreTrainedTokenizerFast) -> None:
    item = encode_squad([cats()], tokenizer, max_seq_len=99)[0]
    assert (item["start_positions"], item["end_positions"], item["answerable"]) == (0, 0, 0)
    assert item["cls_positions"] == 0


def test_lengths_that_leave_no_room_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_seq_len 67 has no room beside max_query_len 64"):
        encode_squad([cats()], tokenizer, max_seq_len=67)
    with pytest.raises(ValueError, match="doc_stride 0 is below 1"):
        encode_squad([cats()], tokenizer, doc_stride=0)


@pytest.mark.parametrize("doc_stride", [1, 5, 8, 30])
@pytest.mark.parametrize("repeat", [1, 2, 5])
def test_every_context_token_is_in_some_window_and_has_one_of_maximal_context(
    tokenizer: PreTrainedTokenizerFast, doc_stride: int, repeat: int
) -> None:
    question = cats(repeat=repeat)
    windows = encode_squad(
        [question], tokenizer, max_seq_len=15, doc_stride=doc_stride, max_query_len=9
    )
    spans: list[list[int]] = []
    owned: list[int] = []
    for window in range(len(windows)):
        starts = windows.get("char_start", window)
        spans.append(starts[starts >= 0].tolist())
        owned += starts[windows.get("is_max_context", window)].tolist()
    assert len(set().union(*spans)) == 12 * repeat
    assert sorted(owned) == sorted(set().union(*spans))
    for window in range(len(windows)):  # Devlin's rule, told slowly
        mine = windows.get("char_start", window)[windows.get("is_max_context", window)]
        for start in mine:
            scores = [
                min(s.index(start), len(s) - 1 - s.index(start)) + 0.01 * len(s)
                if start in s
                else -1.0
                for s in spans
            ]
            assert scores.index(max(scores)) == window


def test_windows_of_other_questions_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = [cats(repeat=3), cats()]
    windows = encode_squad(questions, tokenizer, max_seq_len=25, doc_stride=9, max_query_len=9)
    assert [len(group) for group in group_windows(windows, 2)] == [3, 1]
    for wrong in (1, 3):
        with pytest.raises(ValueError, match=f"not those of {wrong} questions"):
            group_windows(windows, wrong)


@pytest.mark.parametrize(
    ("file", "version", "split"),
    [
        ("dev-v1.1.json", "1.1", "validation"),
        ("dev-v2.0.rebuilt.json", "2.0", "validation"),
        ("train-v1.1.subset.json", "1.1", "train"),
    ],
)
def test_every_real_token_and_answer_is_in_some_window(
    shared_data: Path,
    bert_tokenizer: PreTrainedTokenizerFast,
    file: str,
    version: str,
    split: str,
) -> None:
    questions = load_squad(shared_data / "squad" / file, split, version=version)[::4]
    windows = encode_squad(questions, bert_tokenizer)
    assert windows.lengths.max() <= 384
    contexts = list({question.context: None for question in questions})
    token_starts = {
        context: np.unique(chars[:, 0]).tolist()
        for context, (_, chars) in zip(
            contexts, tokenize_with_offsets(bert_tokenizer, contexts), strict=True
        )
    }
    num_equal = num_answers = 0
    for question, group in zip(questions, group_windows(windows, len(questions)), strict=True):
        holding = [w for w in group if windows.values["answerable"][w]]
        assert bool(holding) == bool(question.answers)
        for window in holding:
            start = windows.get("char_start", window)[windows.values["start_positions"][window]]
            end = windows.get("char_end", window)[windows.values["end_positions"][window]]
            text, answer = question.context[start:end], question.answers[0].text
            assert answer.strip() in text  # an annotator may have marked part of a token
            num_answers += 1
            num_equal += normalize_answer(text) == normalize_answer(answer)
        covered = np.unique(np.concatenate([windows.get("char_start", w) for w in group]))
        assert covered.tolist() == [-1, *token_starts[question.context]]
    assert num_equal / num_answers > 0.98
