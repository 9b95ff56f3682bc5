"""Clean text and decide which documents stay: the filters of Shoeybi et al. 2019, section 4.1."""

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import py3langid
from tokenizers import Tokenizer

from hydratron.data.files import JSON_ENDINGS, has_ending, read_json_lines, read_text
from hydratron.data.readers import wikitext_titles
from hydratron.data.tokenizer import load_tokenizer

_PLAIN = re.compile(r"[ -%'-~]*")  # printable ASCII without &
_SPACES = re.compile(r"[^\S\n]+")
_SPACE_AT_LINE_END = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")
_NEWLINE_IN_PARAGRAPH = re.compile(r"(?<!\n)\n(?!\n)")
# a line that ends a sentence is followed by one that begins another: that newline is meant
_NEWLINE_IN_SENTENCE = re.compile(r"(?<![.!?:;\"'”’)\]…\n])\n(?!\n)|\n(?=[a-z])")
_WORD = re.compile(r"[^\W_]+")
_NOT_LETTERS = re.compile(r"[\W_]+")
_LANGUAGE_CHARACTERS = 4000  # enough to tell a language from another
_FEWEST_NGRAM = 8  # shorter evaluation texts would match by chance (Brown et al. 2020, appendix C)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def clean_text(text: str, *, fix: bool, join_lines: bool) -> str:
    """White space made regular; `fix`: mojibake and the like by ftfy; `join_lines`: below."""
    if fix:
        text = _fix(text)
    text = _SPACE_AT_LINE_END.sub("\n", _SPACES.sub(" ", text))
    if join_lines:
        text = join_broken_lines(text)
    return _BLANK_LINES.sub("\n\n", text).strip()


def _fix(text: str) -> str:
    """ftfy.fix_text, without a look at lines that it would leave alone."""
    config = ftfy.TextFixerConfig()
    lines = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if "<" in line:  # ftfy takes the rest for HTML, whose entities are meant
            config = config._replace(unescape_html=False)
        lines.append(line if _PLAIN.fullmatch(line) else ftfy.fix_text(line, config))
    return "\n".join(lines)


def join_broken_lines(text: str) -> str:
    """Undo newlines that end no paragraph, as CC-Stories has them (Shoeybi et al. 2019, 4.1).

    Where blank lines part the paragraphs every other newline goes, else those inside a sentence.
    """
    pattern = _NEWLINE_IN_PARAGRAPH if "\n\n" in text else _NEWLINE_IN_SENTENCE
    return pattern.sub(" ", text)


@dataclass(frozen=True)
class LanguageFilter:
    """Whether a text is in `language` (ISO 639-1), by a model that py3langid carries."""

    language: str

    def __call__(self, text: str) -> bool:
        return py3langid.classify(text[:_LANGUAGE_CHARACTERS])[0] == self.language


@dataclass(frozen=True)
class LengthFilter:
    """Whether a text has at least `min_tokens` tokens."""

    min_tokens: int
    tokenizer_path: str

    @cached_property
    def _backend(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_path).backend_tokenizer

    def __call__(self, text: str) -> bool:
        if len(text.split()) >= self.min_tokens:  # a word is a token at least
            return True
        encoding = self._backend.encode(text, add_special_tokens=False)
        return len(encoding.ids) >= self.min_tokens


def normalise_title(title: str) -> str:
    """Letters and digits only: WikiText separates punctuation, and spells hyphens ` @-@ `."""
    return _NOT_LETTERS.sub("", title).lower()


@dataclass(frozen=True)
class TitleFilter:
    """Whether a document is none of the articles of a WikiText file.

    Its title is the given one, else its first line.
    """

    path: str

    @cached_property
    def _titles(self) -> frozenset[str]:
        titles = frozenset(map(normalise_title, wikitext_titles(Path(self.path))))
        if not titles:
            raise ValueError(f"{self.path}: not WikiText, it has no line ' = Title = '")
        return titles

    def __call__(self, text: str, title: str) -> bool:
        title = title or text.lstrip().partition("\n")[0]
        return normalise_title(title) not in self._titles


def word_ngrams(text: str, n: int) -> np.ndarray:
    """uint64 [words - n + 1]: a hash of every n words in a row, case and punctuation left out."""
    words = _WORD.findall(text.lower())
    if len(words) < n:
        return np.empty(0, np.uint64)
    codes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words])
    codes = codes.astype(np.uint64) * _MIX
    hashes = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        hashes = (hashes ^ (hashes >> np.uint64(29))) * _MIX + codes[i : len(words) - n + 1 + i]
    return hashes


@dataclass(frozen=True)
class OverlapFilter:
    """Whether a text shares no run of `n` words with the evaluation sets in `files`.

    An evaluation text is a line of a text file, or any string in a .json or .jsonl file; one of
    fewer than n words counts whole down to 8 words, and not at all below.
    """

    files: tuple[str, ...]
    n: int

    @cached_property
    def _tables(self) -> dict[int, np.ndarray]:
        found: dict[int, list[np.ndarray]] = {}
        for file in self.files:
            for text in evaluation_texts(Path(file)):
                length = min(self.n, len(_WORD.findall(text)))
                if length >= _FEWEST_NGRAM:
                    found.setdefault(length, []).append(word_ngrams(text, length))
        if not found:
            raise ValueError(f"no text of {_FEWEST_NGRAM} words in {', '.join(self.files)}")
        return {length: np.unique(np.concatenate(hashes)) for length, hashes in found.items()}

    def __call__(self, text: str) -> bool:
        for length, table in self._tables.items():
            hashes = word_ngrams(text, length)
            places = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            if (table[places] == hashes).any():
                return False
        return True


def evaluation_texts(file: Path) -> Iterable[str]:
    """The texts of an evaluation set; ValueError for a file that is missing or broken."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if not has_ending(file, JSON_ENDINGS):
        return read_text(file).split("\n")
    try:
        rows = [json.loads(read_text(file))]
    except (json.JSONDecodeError, RecursionError):  # not one document, so one on each line
        rows = [row for _, row in read_json_lines(file)]
    return _strings(rows)


def _strings(values: list[Any]) -> Iterator[str]:
    """Every string in decoded JSON, whatever the format's keys are."""
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list):
            values += value
