"""A tokenizer small enough to check by hand, and a real one where the real data is."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hydratron.data.tokenizer import load_tokenizer

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j k l m n o p q r s t u v w x y z"
    " ##a ##b ##c ##d ##e ##f ##g ##h ##i ##j ##k ##l ##m ##n ##o ##p ##q ##r ##s ##t ##u ##v"
    " ##w ##x ##y ##z . , ? ! _ the cat dog sat on mat what who where did do is red blue green un"
    " ##able ##ing play"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tiny_vocab")
    (folder / "vocab.txt").write_text(WORDS.replace(" ", "\n") + "\n", encoding="utf-8")
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def bert_tokenizer(shared_data: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(shared_data / "vocab" / "bert-uncased"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a file under the test's folder and return its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file
