"""SQuAD 1.1 and 2.0: questions from the official JSON, and windows of tokens with their labels.

Letters: W windows, S tokens of a window. Scores of windows and answers are in `squad_scoring`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hydratron.data.encodings import (
    MODEL_COLUMNS,
    Encodings,
    Frame,
    make_frame,
    stack_sequences,
    tokenize,
    tokenize_with_offsets,
)
from hydratron.data.examples import get_field, load_from_hub, read_json

_HUB_NAMES = {"1.1": "rajpurkar/squad", "2.0": "rajpurkar/squad_v2"}
# Beside the model's columns: the characters of the context that a token came from, [start, end),
# -1 outside the context, and whether no other window shows the token with more context.
_WINDOW_COLUMNS = (*MODEL_COLUMNS, "char_start", "char_end", "is_max_context")


@dataclass(frozen=True)
class Answer:
    """A ground truth: `text` is the context from character `start` on."""

    text: str
    start: int


@dataclass(frozen=True)
class SquadQuestion:
    """A question on a context; no answers when it has none there (2.0)."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


def load_squad(path: Path | None, split: str, *, version: str) -> list[SquadQuestion]:
    """Return the questions of an official file in its order.

    Args:
        path: the JSON file (also `.gz`), or a folder with `<split>-v<version>.json`. None: the
            hub, nothing else.
        split: `train` or `validation`, which is `dev` in SQuAD's files.
        version: `1.1` or `2.0`.

    Raises:
        ValueError: naming the file and the question: a missing field, an answer whose text is not
            in the context at its offset, a question without answer in 1.1, or neither answers nor
            `is_impossible` in 2.0, a repeated id; or no questions, an unknown version.
    """
    if version not in _HUB_NAMES:
        raise ValueError(f"SQuAD version {version!r} is not one of {', '.join(_HUB_NAMES)}")
    if path is None:
        source = f"{_HUB_NAMES[version]}/{split}"
        rows = _read_hub(_HUB_NAMES[version], split)
    else:
        path = Path(path)
        if path.is_dir():
            stem = "dev" if split == "validation" else split
            path = path / f"{stem}-v{version}.json"
        source = str(path)
        rows = _read_file(path)
    questions = [_parse_question(row, context, source, version) for row, context in rows]
    if not questions:
        raise ValueError(f"{source}: no questions")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{source}: question id {question.id} occurs twice")
        seen.add(question.id)
    return questions


def _read_file(path: Path) -> Iterator[tuple[Any, str]]:
    for article in get_field(read_json(path), "data", list, str(path)):
        where = f"{path}: article {article.get('title')!r}" if isinstance(article, dict) else path
        for number, paragraph in enumerate(get_field(article, "paragraphs", list, str(where))):
            place = f"{where}, paragraph {number}"
            context = get_field(paragraph, "context", str, place)
            for row in get_field(paragraph, "qas", list, place):
                yield row, context


def _read_hub(name: str, split: str) -> Iterator[tuple[Any, str]]:
    for row in load_from_hub(name, None, split=split):
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        question = {"id": row["id"], "question": row["question"], "answers": answers}
        yield {**question, "is_impossible": not answers}, row["context"]


def _parse_question(row: Any, context: str, source: str, version: str) -> SquadQuestion:
    question_id = get_field(row, "id", str, f"{source}: a question")
    where = f"{source}: question {question_id}"
    answers: list[Answer] = []
    for entry in get_field(row, "answers", list, where):
        text = get_field(entry, "text", str, where)
        start = get_field(entry, "answer_start", int, where)
        if start < 0 or not text or not context.startswith(text, start):
            raise ValueError(f"{where}: answer {text!r} is not in the context at offset {start}")
        answers.append(Answer(text, start))
    impossible = row.get("is_impossible") is True
    if impossible and version == "1.1":
        raise ValueError(f"{where}: is_impossible in a file read as SQuAD 1.1")
    if impossible == bool(answers):
        raise ValueError(f"{where}: is_impossible is {impossible} with {len(answers)} answers")
    question = get_field(row, "question", str, where).strip()
    return SquadQuestion(question_id, question, context, tuple(answers))


def encode_squad(
    questions: Sequence[SquadQuestion],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_len: int = 384,
    doc_stride: int = 128,
    max_query_len: int = 64,
) -> Encodings:
    """Return windows `[CLS] question [SEP] part of the context [SEP]` (Devlin et al. 2019).

    A window starts `doc_stride` tokens after the one before it, and the last one ends with the
    context. Value columns: `question_index`; `cls_positions`; `start_positions`, `end_positions`
    (inclusive) of the first answer, both the `[CLS]` position in a window that does not hold all
    of it; `answerable`, 1 where the window does.

    Raises:
        ValueError: `max_seq_len` leaves no room for the context, `doc_stride` is below 1.
    """
    frame = make_frame(tokenizer, 2)
    room = max_seq_len - frame.num_special_tokens
    if room <= max_query_len or doc_stride < 1:
        raise ValueError(
            f"max_seq_len {max_seq_len} has no room beside max_query_len {max_query_len},"
            f" or doc_stride {doc_stride} is below 1"
        )
    contexts = list(dict.fromkeys(question.context for question in questions))
    encoded = dict(zip(contexts, tokenize_with_offsets(tokenizer, contexts), strict=True))
    queries = tokenize(tokenizer, [question.question for question in questions])
    windows: list[tuple[np.ndarray, ...]] = []
    values: dict[str, list[int]] = {
        name: []
        for name in (
            "question_index",
            "cls_positions",
            "start_positions",
            "end_positions",
            "answerable",
        )
    }
    for index, (question, query) in enumerate(zip(questions, queries, strict=True)):
        query = query[:max_query_len]
        ids, chars = encoded[question.context]
        bounds = _window_bounds(len(ids), room - len(query), doc_stride)
        owners = _max_context_windows(len(ids), bounds)
        first, last = _answer_tokens(question, chars)
        shift = len(frame.parts[0]) + len(query) + len(frame.parts[1])
        for number, (start, end) in enumerate(bounds):
            is_max_context = owners[start:end] == number
            window = _make_window(frame, query, ids[start:end], chars[start:end], is_max_context)
            windows.append(window)
            holds_answer = start <= first <= last < end
            cls = frame.cls_position(len(window[0]))
            values["question_index"].append(index)
            values["cls_positions"].append(cls)
            values["start_positions"].append(first - start + shift if holds_answer else cls)
            values["end_positions"].append(last - start + shift if holds_answer else cls)
            values["answerable"].append(int(holds_answer))
    return stack_sequences(windows, _WINDOW_COLUMNS, values=values)


def _window_bounds(num_tokens: int, room: int, doc_stride: int) -> list[tuple[int, int]]:
    """Return [start, end) of each window over a context; a stride beyond `room` leaves no gap."""
    last_start = max(num_tokens - room, 0)
    step = min(doc_stride, room)
    num_windows = -(-last_start // step) + 1
    return [(i * step, min(i * step + room, num_tokens)) for i in range(num_windows)]


def _max_context_windows(num_tokens: int, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return for each token the window that shows most of both its sides, the first if equal.

    The score is Devlin's: the shorter side's tokens, plus a hundredth of the window's length.
    """
    if len(bounds) == 1:
        return np.zeros(num_tokens, np.int64)
    position = np.arange(num_tokens)
    scores = np.full((len(bounds), num_tokens), -1.0)
    for number, (start, end) in enumerate(bounds):
        inside = position[start:end]
        sides = np.minimum(inside - start, end - 1 - inside)
        scores[number, start:end] = sides + 0.01 * (end - start)
    return scores.argmax(axis=0)


def _answer_tokens(question: SquadQuestion, chars: np.ndarray) -> tuple[int, int]:
    """Return the first and last token that share a character with the first answer, else -1."""
    if not question.answers:
        return -1, -1
    answer = question.answers[0]
    left = answer.start + len(answer.text) - len(answer.text.lstrip())
    right = answer.start + len(answer.text.rstrip())
    first = int(np.searchsorted(chars[:, 1], left, side="right"))
    last = int(np.searchsorted(chars[:, 0], right, side="left")) - 1
    # An answer of characters that the tokenizer drops has no token.
    return (first, last) if first <= last else (-1, -1)


def _make_window(
    frame: Frame,
    query: np.ndarray,
    context: np.ndarray,
    chars: np.ndarray,
    is_max_context: np.ndarray,
) -> tuple[np.ndarray, ...]:
    ids, types = frame.assemble(query, context)
    begin = len(frame.parts[0]) + len(query) + len(frame.parts[1])
    end = begin + len(context)
    char_start, char_end = (np.full(len(ids), -1, np.int32) for _ in range(2))
    char_start[begin:end], char_end[begin:end] = chars[:, 0], chars[:, 1]
    owned = np.zeros(len(ids), np.bool_)
    owned[begin:end] = is_max_context
    return ids, types, char_start, char_end, owned


def group_windows(windows: Encodings, num_questions: int) -> list[range]:
    """Return the windows of each question, which lie side by side.

    Raises:
        ValueError: the windows are not those of this many questions.
    """
    index = windows.values["question_index"]
    edges = np.searchsorted(index, np.arange(num_questions + 1))
    groups = [range(int(start), int(end)) for start, end in pairwise(edges)]
    if int(edges[-1]) != len(windows) or not all(groups):
        raise ValueError(f"the windows are not those of {num_questions} questions")
    return groups
