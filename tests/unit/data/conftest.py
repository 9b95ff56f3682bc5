"""The shipped text as corpora, prepared once a session, and settings of BERT samples over them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hydratron.data.bert import BertSampleSettings
from hydratron.data.indexed import IndexedCorpus, IndexedWriter
from hydratron.data.text import prepare_text_corpus
from hydratron.data.tokenizer import load_tokenizer, special_tokens, word_start_table


@dataclass(frozen=True)
class ShippedText:
    """The shipped text under one tokenizer."""

    corpus: IndexedCorpus
    settings: Callable[..., BertSampleSettings]

    @property
    def documents(self) -> np.ndarray:
        return np.arange(self.corpus.num_documents)


def _shipped(cache_dir: Path, tokenizer: str, vocab_size: int) -> ShippedText:
    prepared = prepare_text_corpus(
        None,
        cache_dir=cache_dir,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        lowercase=True,
        split_into_sentences=True,
    )
    loaded = load_tokenizer(str(prepared.tokenizer_path))

    def settings(*, seq_len: int, seed: int = 1, **other: float) -> BertSampleSettings:
        return BertSampleSettings(
            seq_len=seq_len,
            seed=seed,
            vocab_size=len(loaded),
            special_tokens=special_tokens(loaded),
            word_start=word_start_table(loaded),
            **other,
        )

    return ShippedText(IndexedCorpus(prepared.prefix), settings)


@pytest.fixture(scope="session")
def shipped_words(tmp_path_factory: pytest.TempPathFactory) -> ShippedText:
    return _shipped(tmp_path_factory.mktemp("words"), "wordpiece", 2048)


@pytest.fixture(scope="session")
def shipped_characters(tmp_path_factory: pytest.TempPathFactory) -> ShippedText:
    return _shipped(tmp_path_factory.mktemp("characters"), "character", 128)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[[list[list[list[int]]]], IndexedCorpus]:
    """A corpus of these documents of sentences of tokens."""

    def write(documents: list[list[list[int]]]) -> IndexedCorpus:
        with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
            for sentences in documents:
                writer.add_document([np.array(sentence) for sentence in sentences])
        return IndexedCorpus(tmp_path / "corpus")

    return write
