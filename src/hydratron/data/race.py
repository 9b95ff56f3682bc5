"""RACE: passages with questions of four options; encoding, scores (Lai et al. 2017)."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hydratron.data.classification import accuracy
from hydratron.data.encodings import Encodings, make_frame, stack_sequences, tokenize
from hydratron.data.examples import (
    get_field,
    load_from_hub,
    read_json,
    read_json_lines,
    write_text,
)

NUM_OPTIONS = 4
LEVELS = ("middle", "high")
_LETTERS = "ABCD"
_HUB_NAME = "ehovy/race"


@dataclass(frozen=True)
class RaceQuestion:
    """A question on a passage; `label` is the index of the right option, `level` middle or high."""

    id: str
    article: str
    question: str
    options: tuple[str, ...]
    label: int
    level: str


def load_race(path: Path | None, split: str) -> list[RaceQuestion]:
    """Return the questions of one split, in the order of files and lines; ids are `high1.txt-0`.

    Args:
        path: JSON lines (`.jsonl`, also `.gz`), one official `.txt` file (a JSON document), or a
            folder: RACE's own (`<split>/middle/*.txt`, `<split>/high/*.txt`), that of one split,
            of one level, or of JSON lines named `<split>.*`. Both levels are read where both are.
            None: the hub, nothing else.
        split: `train`, `validation` or `test`; `validation` is `dev` in RACE's files.

    Raises:
        ValueError: naming file and line or question: JSON that is not, a missing field, lists of
            different lengths, not four options, an answer that is not A to D, an id of two
            passages; or no questions.
    """
    if path is None:
        source = f"{_HUB_NAME}/all/{split}"
        passages = _read_hub(split, source)
    else:
        source = str(path)
        passages = _read_files(Path(path), "dev" if split == "validation" else split)
    questions = _number_questions(passages)
    if not questions:
        raise ValueError(f"{source}: no questions")
    return questions


def _number_questions(passages: Iterator[tuple[str, Any, str]]) -> list[RaceQuestion]:
    """Number the questions of each passage from 0, on where its id comes again."""
    known: dict[str, tuple[str, str, int]] = {}  # where, article, questions so far
    result: list[RaceQuestion] = []
    for where, row, level in passages:
        questions = _parse_passage(row, where, level)
        passage_id, article = row["id"], row["article"]
        first, known_article, num_known = known.get(passage_id, (where, article, 0))
        if article != known_article:
            raise ValueError(f"{where}: id {passage_id!r} is that of another passage, {first}")
        known[passage_id] = first, article, num_known + len(questions)
        result += [
            replace(question, id=f"{passage_id}-{num_known + i}")
            for i, question in enumerate(questions)
        ]
    return result


def _read_hub(split: str, source: str) -> Iterator[tuple[str, Any, str]]:
    """Gather the hub's rows, one a question, into passages."""
    passages: dict[tuple[str, str], dict[str, Any]] = {}
    for row in load_from_hub(_HUB_NAME, "all", split=split):
        start = {"id": row["example_id"], "article": row["article"]}
        passage = passages.setdefault(
            (row["example_id"], row["article"]),
            {**start, "questions": [], "options": [], "answers": []},
        )
        passage["questions"].append(row["question"])
        passage["options"].append(row["options"])
        passage["answers"].append(row["answer"])
    for (name, _), passage in passages.items():
        yield f"{source}:{name}", passage, ""


def _read_files(path: Path, split: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (where, passage, level by folder or file name) of a file or a folder."""
    for file in _find_files(path, split) if path.is_dir() else [path]:
        names = {file.parent.name, *file.name.split(".")}
        level = next((name for name in LEVELS if name in names), "")
        if {".jsonl", ".json"} & set(file.suffixes):
            for number, row in read_json_lines(file):
                yield f"{file}:{number}", row, level
        elif ".txt" in file.suffixes:
            yield f"{file}:1", read_json(file), level
        else:
            raise ValueError(f"{file}: a RACE file must be .txt, .jsonl or .json")


def _find_files(path: Path, split: str) -> list[Path]:
    if (path / split).is_dir():
        path = path / split
    elif lines := [p for p in sorted(path.glob(f"{split}.*")) if ".jsonl" in p.suffixes]:
        return lines
    # 9.txt before 10.txt
    return sorted(path.rglob("*.txt"), key=lambda p: (p.parent, len(p.name), p.name))


def _parse_passage(row: Any, where: str, level: str) -> list[RaceQuestion]:
    article = get_field(row, "article", str, where)
    passage_id = get_field(row, "id", str, where)
    level = next((name for name in LEVELS if passage_id.startswith(name)), level)
    if not level:
        raise ValueError(f"{where}: neither id {passage_id!r} nor the path says middle or high")
    columns = [get_field(row, name, list, where) for name in ("questions", "options", "answers")]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"{where}: questions, options and answers differ in length")
    result: list[RaceQuestion] = []
    for index, (question, options, answer) in enumerate(zip(*columns, strict=True)):
        place = f"{where}: question {index}"
        if not isinstance(question, str):
            raise ValueError(f"{place}: not a text: {question!r}")
        if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            raise ValueError(f"{place}: options must be a list of texts")
        if len(options) != NUM_OPTIONS:
            raise ValueError(f"{place}: {len(options)} options, {NUM_OPTIONS} expected")
        if answer not in tuple(_LETTERS):
            raise ValueError(f"{place}: answer {answer!r} is not one of A, B, C, D")
        label = _LETTERS.index(answer)
        result.append(
            RaceQuestion(f"{passage_id}-{index}", article, question, tuple(options), label, level)
        )
    return result


def clean_text(text: str) -> str:
    """Return `text` on one line with single spaces and no space before a full stop."""
    text = re.sub(r"\s+", " ", text)
    for _ in range(3):  # neighbours share a space: " . . . " needs a pass each
        text = text.replace(" . ", ". ")
    return text


def join_question(question: str, option: str) -> str:
    """Return the question with the option in its blanks, or after it where it has none."""
    joined = question.replace("_", option) if "_" in question else f"{question} {option}"
    return clean_text(joined)


def encode_race(
    questions: Sequence[RaceQuestion],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_len: int = 512,
    max_question_len: int = 128,
) -> Encodings:
    """Return per question four `[CLS] question-option [SEP] article [SEP]`.

    The question-option keeps its first `max_question_len` tokens, the article what then fits into
    `max_seq_len` (RoBERTa, section 5.3). The value column is `labels`.

    Raises:
        ValueError: `max_seq_len` leaves no room for the article.
    """
    frame = make_frame(tokenizer, 2)
    room = max_seq_len - frame.num_special_tokens
    if room <= max_question_len:
        raise ValueError(
            f"max_seq_len {max_seq_len} has no room beside max_question_len {max_question_len}"
        )
    articles = list(dict.fromkeys(question.article for question in questions))
    article_ids = dict(
        zip(articles, tokenize(tokenizer, [clean_text(a) for a in articles]), strict=True)
    )
    joined = [join_question(q.question, option) for q in questions for option in q.options]
    sequences: list[tuple[np.ndarray, np.ndarray]] = []
    for index, ids in enumerate(tokenize(tokenizer, joined)):
        ids = ids[:max_question_len]
        article = article_ids[questions[index // NUM_OPTIONS].article]
        sequences.append(frame.assemble(ids, article[: room - len(ids)]))
    return stack_sequences(
        sequences, values={"labels": [q.label for q in questions]}, num_choices=NUM_OPTIONS
    )


def race_metrics(
    questions: Sequence[RaceQuestion], predictions: np.ndarray | Sequence[int]
) -> dict[str, float]:
    """Return `accuracy`, and `accuracy_middle`, `accuracy_high` for the levels there are.

    Args:
        predictions: option indices int [E] in the order of `questions`.
    """
    labels = np.array([question.label for question in questions])
    levels = np.array([question.level for question in questions])
    predictions = np.asarray(predictions)
    metrics = {"accuracy": accuracy(predictions, labels)}
    for level in LEVELS:
        if (chosen := levels == level).any():
            metrics[f"accuracy_{level}"] = accuracy(predictions[chosen], labels[chosen])
    return metrics


def write_race_predictions(
    path: Path, questions: Sequence[RaceQuestion], predictions: np.ndarray | Sequence[int]
) -> None:
    """Write a JSON object of question id to the letter chosen."""
    letters = {q.id: _LETTERS[int(p)] for q, p in zip(questions, predictions, strict=True)}
    write_text(path, json.dumps(letters, indent=0) + "\n")
