"""Raw text to an indexed corpus: files, documents, sentences, tokens, in a shared cache."""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from hydratron.data.files import TEXT_ENDINGS, find_files, make_cache_folder, read_text
from hydratron.data.indexed import IndexedCorpus, IndexedWriter
from hydratron.data.tokenizer import (
    TOKENIZER_KINDS,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

_SHIPPED = Path(__file__).parent / "shipped"
_CACHE_FORMAT = 1  # raise it when the same text and settings come to give another corpus
TRAINING_CHARACTERS = 100_000_000  # enough for any vocabulary; the trainers hold them in memory
_DOCUMENTS_AT_ONCE = 64  # a chunk of encode_batch: enough to fill the cores

_RUN_WORDS = 2000  # length of a document in a text without chapters (design section 5)
_FEWEST_WORDS = 20  # fewer after a heading: a title page, or "BOOK I" right above "CHAPTER I"

_UNITS = (
    "one|two|three|four|five|six|seven|eight|nine|first|second|third|fourth|fifth|sixth|seventh|"
    "eighth|ninth"
)
_NUMERAL = (
    rf"(?:[IVXLC]+|\d+|(?:the )?(?:{_UNITS}|ten|eleven|twelve|tenth|last|"
    r"(?:thir|four|fif|six|seven|eigh|nine)teen|twenty|thirty|forty|fifty)"
    rf"(?:[- ](?:{_UNITS}))?)"
)
# "CHAPTER I. A Title", "Chapter 3", "BOOK THE FIRST": a line of its own, and no sentence such as
# "Part one of it was over."
_HEADING = re.compile(
    r"^[ \t]*(?:CHAPTER|BOOK|PART|VOLUME|"
    r"(?i:chapter|book|part|volume)(?=[^\n]{1,20}$|[^\n]{1,80}[^.,;\n]$))"
    rf"[ \t]+(?i:{_NUMERAL})"
    r"(?:[ \t]*(?:[.:—–-][^\n]{0,100})?|[ \t]+[A-Z\"'“‘][^\n]{0,100})$",
    re.MULTILINE,
)

# Rules and a list of abbreviations: 0.03 s a megabyte, where pysbd takes 6 s; punkt and spaCy need
# downloads. On novels they miss little, and a missed boundary costs no more than a longer sentence.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?P<gap>\s+)(?=[\"'“‘(\[—]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s\"'“‘(\[—-])(?:Mr|Mrs|Ms|Messrs|Mme|Mlle|Dr|Prof|Rev|Hon|St|Sr|Esq|Mt|Ft|"
    r"Capt|Col|Gen|Lieut|Lt|Maj|Sgt|Sergt|Gov|Sen|Jan|Feb|Aug|Sept|Oct|Nov|Dec|"
    r"Nos?|[Vv]ol|[Ff]ig|pp?|vs|viz|cf|i\.e|e\.g|[A-HJ-Z])\.$"  # I. ends a sentence, J. a name
)


def split_documents(text: str) -> list[str]:
    """Chapters where there are at least two headings, else runs of about 2,000 words.

    A run ends at a paragraph.
    """
    starts = [match.start() for match in _HEADING.finditer(text)]
    if len(starts) < 2:
        return _runs(text)
    bounds = [0, *[start for start in starts if start > 0], len(text)]
    documents, pending = [], ""
    for start, stop in zip(bounds, bounds[1:], strict=False):
        pending += text[start:stop]
        if len(pending.split()) >= _FEWEST_WORDS:
            documents.append(pending.strip())
            pending = ""
    if pending.strip():
        documents[-1:] = ["".join([*documents[-1:], "\n\n", pending]).strip()]
    return documents


def _runs(text: str) -> list[str]:
    blank_lines = re.findall(r"\n\s*\n", text)
    # texts without blank lines have a paragraph on each line
    paragraphs = re.split(r"\n\s*\n" if blank_lines else r"\n", text)
    runs: list[list[str]] = [[]]
    words = 0
    for paragraph in filter(str.strip, paragraphs):
        if words >= _RUN_WORDS:
            runs.append([])
            words = 0
        runs[-1].append(paragraph.strip())
        words += len(paragraph.split())
    if len(runs) > 1 and words < _RUN_WORDS // 2:
        runs[-2:] = [runs[-2] + runs[-1]]
    return ["\n\n".join(run) for run in runs if run]


def split_sentences(text: str) -> list[str]:
    """Sentences of English prose, white space made single spaces; a paragraph ends a sentence."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        start = 0
        for match in _SENTENCE_END.finditer(paragraph):
            # 12 characters hold the longest abbreviation and what stands before it
            if not _ABBREVIATION.search(
                paragraph[max(start, match.start() - 12) : match.start("gap")]
            ):
                sentences.append(paragraph[start : match.start("gap")])
                start = match.end("gap")
        if paragraph[start:]:
            sentences.append(paragraph[start:])
    return sentences


def read_text_folder(path: str | Path) -> Iterator[tuple[Path, str]]:
    """(file, text) for each text file at or below `path`, or that a pattern matches, sorted.

    ValueError as find_files and read_text.
    """
    files = find_files(path, TEXT_ENDINGS)
    return ((file, read_text(file)) for file in files)


@dataclass(frozen=True)
class PreparedText:
    """A corpus in the cache.

    `prefix` opens with IndexedCorpus, `tokenizer_path` with load_tokenizer.
    """

    prefix: Path
    tokenizer_path: Path
    num_tokens: int
    num_documents: int


def prepare_text_corpus(
    path: Path | None,
    *,
    cache_dir: Path,
    tokenizer: str,
    vocab_size: int,
    lowercase: bool,
    split_into_sentences: bool,
) -> PreparedText:
    """Tokenize the text files at `path`, once for each content and settings.

    `path` None is the novels that the package ships. `tokenizer` is a kind to train (wordpiece,
    bpe, character; `vocab_size` and `lowercase` are for these), or what load_tokenizer takes. A
    sequence of the corpus is a sentence, or else a document. The result is a folder of `cache_dir`,
    written elsewhere and renamed when complete: several processes may prepare it at once, the first
    wins, and it never changes. ValueError for a loaded tokenizer with more than `vocab_size`
    entries, a text without a token, a cache that cannot be written to, and as read_text_folder and
    load_tokenizer.
    """
    path = Path(path) if path is not None else _SHIPPED
    settings = {"format": _CACHE_FORMAT, "split_into_sentences": split_into_sentences}
    if tokenizer in TOKENIZER_KINDS:
        settings |= {"tokenizer": tokenizer, "vocab_size": vocab_size, "lowercase": lowercase}
        texts = first_characters(text for _, text in read_text_folder(path))
        make = partial(
            train_tokenizer, tokenizer, texts, vocab_size=vocab_size, lowercase=lowercase
        )
    else:
        loaded = load_tokenizer(tokenizer)
        if len(loaded) > vocab_size:
            raise ValueError(
                f"vocabulary of {vocab_size} is smaller than the tokenizer's "
                f"{len(loaded)} entries ({tokenizer})"
            )
        settings |= {"tokenizer": tokenizer_hash(loaded)}
        make = partial(load_tokenizer, tokenizer)
    folder = Path(cache_dir) / _content_hash(path, settings)[:16]
    if not folder.is_dir():
        make_cache_folder(folder.parent)
        building = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            _build(path, building, make(), split_into_sentences)
            building.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # if it is one, another process was faster
                raise OSError(error.errno, error.strerror, str(building)) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    corpus = IndexedCorpus(folder / "corpus")
    return PreparedText(
        corpus.prefix, folder / "tokenizer", corpus.num_tokens, corpus.num_documents
    )


def _content_hash(path: Path, settings: dict[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file, text in read_text_folder(path):
        name = file.relative_to(path) if path.is_dir() else file.name
        for part in (str(name), text):  # with lengths, so that no text can pass for a name
            digest.update(len(part).to_bytes(8, "little") + part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _build(
    path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, split_into_sentences: bool
) -> None:
    tokenizer.save_pretrained(folder / "tokenizer")
    documents = (
        split_sentences(document) if split_into_sentences else [document]
        for _, text in read_text_folder(path)
        for document in split_documents(text)
        if document.strip("\0\n ")  # a file that a crash left is NULs, which some tokenizers have
    )
    # Megatron's choice of type: two bytes a token while they can hold the vocabulary
    with IndexedWriter(
        folder / "corpus", np.uint16 if len(tokenizer) < 65_500 else np.int32
    ) as writer:
        num_documents = 0
        for sentences in encode_documents(tokenizer, documents):
            if any(map(len, sentences)):
                writer.add_document(sentences)
                num_documents += 1
        if not num_documents:
            raise ValueError(f"{path}: no document is left of it, there is nothing to tokenise")


def first_characters(texts: Iterable[str], left: int = TRAINING_CHARACTERS) -> Iterator[str]:
    """The texts, cut off after `left` characters together."""
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Iterator[list[str]]
) -> Iterator[list[np.ndarray]]:
    """Token ids of each sentence of each document, 64 documents at a time.

    The space between two sentences belongs to the second.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.encode_special_tokens = True  # a text that says "[MASK]" contains no mask token
    while chunk := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        texts = [" " * (i > 0) + text for sentences in chunk for i, text in enumerate(sentences)]
        ids = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        for sentences in chunk:
            yield [np.array(next(ids).ids, dtype=np.int64) for _ in sentences]
