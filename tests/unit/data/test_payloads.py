"""No file that data is read from runs code: no pickle, no YAML tag, no script beside it."""

import ast
import contextlib
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydratron.data import encodings, stages
from hydratron.data.cleaning import OverlapFilter, TitleFilter
from hydratron.data.examples import read_json, read_json_lines
from hydratron.data.glue import GlueTask, load_glue
from hydratron.data.identity import corpus_identity
from hydratron.data.indexed import IndexedCorpus
from hydratron.data.manifest import MANIFEST, Manifest
from hydratron.data.race import load_race
from hydratron.data.readers import Shard, load_rows, read_shard
from hydratron.data.sources import CorpusConfig, Source, StepsConfig
from hydratron.data.squad import load_squad
from hydratron.data.text import read_text_folder
from hydratron.data.tokenizer import load_tokenizer, train_tokenizer
from hydratron.data.zeroshot import load_lambada, load_wikitext

DATA = Path(encodings.__file__).parent
QQP = GlueTask("qqp", ("question1", "question2"), ("0", "1"))


def shard(kind: str) -> Callable[[Path], Any]:
    return lambda path: list(read_shard(Source(kind, str(path)), Shard("s", [str(path)])))


def dataset(path: Path) -> Any:
    return list(load_rows(Source("huggingface", str(path.parent))))


def stored(path: Path) -> stages.StoredDocuments:
    (path.parent / "00000.txt").touch()
    corpus = CorpusConfig({}, "bpe", 300, True, True, StepsConfig())
    return stages.StoredDocuments(stages.Workspace(corpus, (), path.parents[1]), 0)


def beside(path: Path, name: str, content: str) -> Path:
    (path.parent / name).write_text(content)
    return path.parent


REMOTE = '{"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["script.T", null]}}'
# what is read -> (the file that an attacker wrote, its reader)
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("a.txt", lambda path: list(read_text_folder(path))),
    "packed text": ("a.txt.gz", lambda path: list(read_text_folder(path.parent))),
    "packed text 2": ("a.txt.zst", lambda path: list(read_text_folder(path.parent))),
    "source of text": ("a.txt", shard("text")),
    "source of JSON lines": ("a.jsonl", shard("jsonl")),
    "source of WikiText": ("a.tokens", shard("wikitext")),
    "titles": ("a.tokens", lambda path: TitleFilter(str(path))("a", "b")),
    "evaluation set": ("a.json", lambda path: OverlapFilter((str(path),), 13)("a")),
    "indexed corpus": ("c.idx", lambda path: IndexedCorpus(path.with_suffix(""))),
    "identity": ("c.bin", lambda path: corpus_identity({path.with_suffix(""): 1.0})),
    "manifest": (MANIFEST, lambda path: Manifest.read(path.parent)),
    "work of a preparation": ("documents/00000.offsets.npy", stored),
    "cache of encodings": ("offsets.npy", lambda path: encodings._load(path.parent)),
    "tokenizer.json": ("tokenizer.json", lambda path: load_tokenizer(str(path))),
    "vocab.txt": ("vocab.txt", lambda path: load_tokenizer(str(path.parent))),
    "tokenizer's configuration": (
        "tokenizer_config.json",
        lambda path: load_tokenizer(str(beside(path, "vocab.txt", "[UNK]\na\n"))),
    ),
    "tokenizer's script": (
        "script.py",
        lambda path: load_tokenizer(
            str(beside(beside(path, "vocab.txt", "[UNK]\n") / "x", "tokenizer_config.json", REMOTE))
        ),
    ),
    "GLUE": ("dev.tsv", lambda path: load_glue(QQP, path, "validation")),
    "GLUE's JSON lines": ("dev.jsonl", lambda path: load_glue(QQP, path, "validation")),
    "RACE": ("1.txt", lambda path: load_race(path, "validation")),
    "SQuAD": ("dev.json", lambda path: load_squad(path, "validation", version="1.1")),
    "WikiText": (
        "a.tokens",
        lambda path: load_wikitext(path, train_tokenizer("bpe", ["a"], vocab_size=300)),
    ),
    "LAMBADA": ("a.jsonl", load_lambada),
    "JSON": ("a.json", read_json),
    "JSON lines": ("a.jsonl", lambda path: list(read_json_lines(path))),
}
DATASETS = (
    "train.csv", "train.jsonl", "train.parquet", "train.arrow", "train.pkl", "train.txt",
    "state.json", "dataset_info.json", "dataset_dict.json", "README.md", "script.py", "payload.tar",
)  # fmt: skip
READERS |= {f"dataset of {name}": (name, dataset) for name in DATASETS}


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def payload(kind: str, target: Path) -> bytes:
    """Return a file that makes the directory `target` in a reader that lets it."""
    stream = io.BytesIO()
    if kind == "numpy":
        np.save(stream, np.array([Payload(target)], dtype=object), allow_pickle=True)
    elif kind == "tar":
        members = {"0.pyd": pickle.dumps(Payload(target)), "0.npy": payload("numpy", target)}
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return {
        "pickle": pickle.dumps(Payload(target)),
        "pickle of ASCII": pickle.dumps(Payload(target), protocol=0),
        "YAML": f'---\nx: !!python/object/apply:os.mkdir ["{target}"]\n---\n'.encode(),
        "Python": f'import os\nos.mkdir("{target}")\n'.encode(),
    }.get(kind, stream.getvalue())


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(f"datasets.config.{name}", tmp_path / "cache")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_file_runs_no_code_and_what_is_wrong_with_it_is_said(tmp_path: Path, name: str) -> None:
    file, read = READERS[name]
    for kind in ("pickle", "pickle of ASCII", "numpy", "YAML", "Python", "tar"):
        path = tmp_path / kind / file
        path.parent.mkdir(parents=True)
        path.write_bytes(payload(kind, tmp_path / "ran"))
        with contextlib.suppress(ValueError):
            read(path)
        assert not (tmp_path / "ran").exists(), kind


def test_the_payloads_run_where_they_may(tmp_path: Path) -> None:
    for kind in ("pickle", "pickle of ASCII", "numpy"):
        stream = io.BytesIO(payload(kind, tmp_path / kind))
        with contextlib.suppress(ValueError, TypeError):
            np.load(stream, allow_pickle=True)
        assert (tmp_path / kind).is_dir()


def calls(path: Path) -> set[str]:
    """The last names of all that a module calls, with keywords that permit code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found.add(name)
            for word in node.keywords:
                if word.arg in ("allow_pickle", "trust_remote_code"):
                    assert ast.unparse(word.value) == "False", f"{path.name}:{node.lineno}"
    return found


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(DATA.glob("*.py")), ids=lambda path: path.name)
def test_no_module_of_data_has_the_means_to_run_code(path: Path) -> None:
    assert not imports(path) & {"pickle", "dill", "marshal", "shelve", "joblib", "runpy"}
    assert not calls(path) & {"eval", "exec", "read_pickle", "__import__", "import_module"}
    if "load" in calls(path):  # numpy's is all that is called so, and refuses pickles by default
        assert not set(re.findall(r"(\w+)\.load\(", path.read_text())) - {"np"}
