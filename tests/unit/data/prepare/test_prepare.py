"""A whole preparation in this process, and the recipes that ship."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydratron.data import readers, stages
from hydratron.data.config import DataConfig
from hydratron.data.deduplication import NearDuplicates
from hydratron.data.executors import ExecutorConfig
from hydratron.data.indexed import IndexedCorpus
from hydratron.data.inputs import read_inputs
from hydratron.data.manifest import Manifest
from hydratron.data.prepare import check_preparation, prepare_corpus
from hydratron.data.readers import Shard
from hydratron.data.sources import CorpusConfig, Source, StepsConfig
from hydratron.data.stages import atomic_file
from hydratron.data.text import read_text_folder
from hydratron.data.tokenizer import load_tokenizer
from hydratron.launch import configuration_directory
from hydratron.settings import build

SHIPPED = Path(__file__).parents[4] / "src/hydratron/data/shipped"
ONE = ExecutorConfig(workers=1)
EVALUATION = "one evening of late summer before the nineteenth century had reached a third of it"


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    """A Wikipedia-like source with one article of a test set, one leak and one near duplicate."""
    words = " ".join(text for _, text in read_text_folder(SHIPPED)).split()
    articles = [" ".join(words[i : i + 200]) for i in range(0, 4000, 200)]
    rows = [{"title": f"Article {i}", "text": text} for i, text in enumerate(articles)]
    rows[3]["title"] = "Valkyria Chronicles III (video game)"
    rows[5]["text"] += " " + EVALUATION
    rows.append({"title": "Copy", "text": articles[7] + " with a few more words"})
    rows.append({"title": "Short", "text": "too short"})
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.tokens").write_text(" = Valkyria Chronicles III ( video game ) = \n \n x \n")
    (tmp_path / "lambada.txt").write_text(EVALUATION + "\n")
    source = Source(
        "jsonl", str(tmp_path / "wiki.jsonl"), exclude_titles=str(tmp_path / "test.tokens")
    )
    steps = StepsConfig(
        near_duplicates=NearDuplicates(), decontaminate=(str(tmp_path / "lambada.txt"),)
    )
    return CorpusConfig({"wiki": source}, "wordpiece", 600, True, True, steps)


def test_every_step_drops_what_it_should_and_the_manifest_says_so(
    corpus: CorpusConfig, tmp_path: Path
) -> None:
    said: list[str] = []
    manifest = prepare_corpus(check_preparation(corpus, tmp_path / "out", ONE), said.append)
    dropped = {
        step: counts["documents_in"] - counts["documents_out"]
        for step, counts in manifest.steps["wiki"].items()
    }
    assert dropped == {
        "read": 0,
        "exclude_titles": 1,
        "clean": 0,
        "min_tokens": 1,
        "decontaminate": 1,
        "exact_duplicates": 0,
        "near_duplicates": 1,
    }
    [removed] = (tmp_path / "out/duplicates.jsonl").read_text().splitlines()
    row = json.loads(removed)
    assert row["jaccard"] > 0.7
    assert row["kept"].endswith("wiki.jsonl:8")  # counted from one: the eighth line
    made = IndexedCorpus(tmp_path / "out/wiki")
    assert made.num_documents == 18 == manifest.sources["wiki"]["documents"]
    assert Manifest.read(tmp_path / "out") == manifest
    tokenizer = load_tokenizer(str(tmp_path / "out/tokenizer"))
    assert "summer" in tokenizer.decode(made.tokens(0, 60).tolist())


def test_steps_can_be_switched_off(corpus: CorpusConfig, tmp_path: Path) -> None:
    bare = replace(
        corpus,
        split_into_sentences=False,
        sources={"wiki": replace(corpus.sources["wiki"], exclude_titles=None)},
        steps=StepsConfig(fix_text=False, min_tokens=0, exact_duplicates=False),
    )
    manifest = prepare_corpus(check_preparation(bare, tmp_path / "out", ONE), lambda _: None)
    assert list(manifest.steps["wiki"]) == ["read", "clean"]
    assert manifest.sources["wiki"]["documents"] == manifest.sources["wiki"]["sequences"] == 22


def test_changed_sources_start_again(corpus: CorpusConfig, tmp_path: Path) -> None:
    said: list[str] = []
    broken = tmp_path / "wiki.jsonl"
    whole = broken.read_text()
    broken.write_text(whole + "{\n")
    with pytest.raises(ValueError, match="wiki.jsonl: line 23"):
        prepare_corpus(check_preparation(corpus, tmp_path / "out", ONE), said.append)
    broken.write_text(whole)
    prepare_corpus(check_preparation(corpus, tmp_path / "out", ONE), said.append)
    assert "settings or sources have changed since: starting again" in said


def finished(corpus: CorpusConfig, output: Path) -> bool:
    return check_preparation(corpus, output, ONE).is_done


def test_a_finished_corpus_knows_everything_that_it_was_made_of(
    corpus: CorpusConfig, tmp_path: Path
) -> None:
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nthe\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.txt").write_text("a text that is none of the others " * 30)
    corpus = replace(
        corpus,
        sources=corpus.sources | {"more": Source("text", str(tmp_path / "more"))},
        tokenizer=str(vocabulary),
    )
    output = tmp_path / "out"
    manifest = prepare_corpus(check_preparation(corpus, output, ONE), lambda _: None)
    assert list(manifest.inputs) == ["sources", "exclude_titles", "decontaminate", "tokenizer"]
    assert manifest.sources["wiki"]["sha256"] == [
        hashlib.sha256((output / name).read_bytes()).hexdigest()
        for name in ("wiki.bin", "wiki.idx")
    ]
    assert finished(corpus, output)
    for file in ("wiki.jsonl", "test.tokens", "lambada.txt", "more/a.txt", "vocabulary/vocab.txt"):
        path = tmp_path / file
        before = path.read_bytes(), path.stat()
        path.write_bytes(before[0].replace(b"a", b"b", 1))  # of the same size
        os.utime(path, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))  # and time
        name = "tokenizer" if "vocab" in file else str(path)
        with pytest.raises(
            ValueError, match=f"whose inputs have changed since .*{name}.*name another output"
        ):
            finished(corpus, output)
        path.write_bytes(before[0])
        os.utime(path)  # a touch changes nothing
        assert finished(corpus, output)
    (tmp_path / "more/b.txt").write_text("new")
    with pytest.raises(
        ValueError, match=r"whose inputs have changed since \(sources\.more\..*/more/b\.txt\)"
    ):
        finished(corpus, output)
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(ValueError, match="more: no such file or folder"):
        finished(corpus, output)


def test_other_weights_and_old_manifests_are_told_of(corpus: CorpusConfig, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = prepare_corpus(check_preparation(corpus, tmp_path / "out", ONE), said.append)
    weighted = replace(corpus, sources={"wiki": replace(corpus.sources["wiki"], weight=0.5)})
    prepare_corpus(check_preparation(weighted, tmp_path / "out", ONE), said.append)
    assert "holds this corpus already" in said[-2]
    assert "keeps the weights of its manifest" in said[-1]
    replace(manifest, inputs={}).write(tmp_path / "out")
    with pytest.raises(ValueError, match="manifest does not say which texts it was made of"):
        finished(corpus, tmp_path / "out")


def test_a_dataset_is_known_by_its_files_or_its_fingerprint(
    corpus: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "d"))
    corpus = replace(corpus, sources={"d": Source("huggingface", str(tmp_path / "d"))})
    known = read_inputs(corpus)["sources"]["d"]
    assert {Path(name).suffix for name in known} == {".arrow", ".json"}
    loaded = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    monkeypatch.setattr(readers, "load_dataset", lambda *_, **__: loaded)
    corpus = replace(corpus, sources={"d": Source("huggingface", "someone/something")})
    assert read_inputs(corpus)["sources"]["d"] == {"someone/something": [2, loaded._fingerprint]}


@pytest.mark.parametrize("text", ["too short", ""])
def test_a_corpus_of_which_nothing_is_left_says_so(
    corpus: CorpusConfig, tmp_path: Path, text: str
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(text)
    source = Source("text", str(tmp_path / "texts"))
    corpus = replace(corpus, sources={"s": source}, tokenizer="character", vocab_size=128)
    with pytest.raises(ValueError, match="source s: no document is left of .*texts$"):
        prepare_corpus(check_preparation(corpus, tmp_path / "out", ONE), lambda _: None)


def test_the_tokenizer_is_trained_on_the_first_characters_before_the_rest_is_cleaned(
    corpus: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned: list[int] = []

    def clean(text: str, **_: bool) -> str:
        cleaned.append(len(text))
        return text

    monkeypatch.setattr(stages, "clean_text", clean)
    monkeypatch.setattr(stages, "TRAINING_CHARACTERS", 5000)
    (tmp_path / "line.txt").write_text("word " * 100_000)
    source = Source("text", str(tmp_path / "line.txt"))
    shards = (Shard("s", [source.path]), Shard("s", [source.path]))
    workspace = stages.Workspace(replace(corpus, sources={"s": source}), shards, tmp_path / "w")
    stages.MakeTokenizer(workspace, "tokenizer").run()
    assert cleaned == [5000]


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "x.bin") as stream:
            stream.write(b"abc")
            stream.flush()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="x.bin: No space left on device after byte 3"):
        fail()
    assert not list(tmp_path.iterdir())


def weigh(a: float | None, b: float | None, wanted: dict[str, Any]) -> dict[str, float]:
    sources = {"a": {"tokens": 30, "weight": a}, "b": {"tokens": 10, "weight": b}}
    return Manifest({}, "", sources, {}).weights(wanted, Path("folder"))


def test_weights_of_now_go_before_those_of_the_manifest() -> None:
    assert weigh(0.5, 0.5, {}) == {"a": 0.5, "b": 0.5}
    assert weigh(0.5, 0.5, {"a": 0.9, "b": None}) == {"a": 0.9, "b": 0.5}
    assert weigh(None, None, {"a": 0.9, "b": 1}) == {"a": 0.9, "b": 1.0}
    assert weigh(None, None, {}) == {"a": 30.0, "b": 10.0}


def test_a_source_of_weight_0_is_left_out() -> None:
    assert weigh(0.7, 0.3, {"a": None, "b": 0}) == {"a": 0.7}
    assert weigh(None, None, {"a": 0.0, "b": None}) == {"b": 10.0}


@pytest.mark.parametrize(
    ("prepared", "wanted", "message"),
    [
        ((0.7, None), {}, "data.sources.b.weight is missing where a has one: each source has"),
        ((None, None), {"a": None, "b": 0.1}, "data.sources.a.weight is missing where b has"),
        ((0.7, 0.3), {"a": "abc", "b": None}, "data.sources.a.weight 'abc' is not a number"),
        ((0.7, 0.3), {"a": -1, "b": None}, "data.sources.a.weight -1 is not a number from 0 up"),
        ((0.7, 0.3), {"a": None, "b": float("nan")}, "data.sources.b.weight nan is not a number"),
        ((0.7, 0.3), {"a": float("inf"), "b": 1}, "data.sources.a.weight inf is not a number"),
        ((0.7, 0.3), {"a": True, "b": 1}, "data.sources.a.weight True is not a number"),
        ((0.7, 0.3), {"a": 0, "b": 0}, "folder: each of its sources has the weight 0"),
        ((0.7, 0.3), {"c": 1.0}, "holds the sources a, b, not c"),
    ],
)
def test_a_weight_that_says_nothing_is_refused(
    prepared: tuple[float | None, float | None], wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weigh(*prepared, wanted)


def test_a_preparation_with_one_weight_of_two_is_refused(corpus: CorpusConfig) -> None:
    wiki = corpus.sources["wiki"]
    with pytest.raises(ValueError, match="data.sources.b.weight is missing where a has one"):
        replace(corpus, sources={"a": replace(wiki, weight=0.7), "b": wiki})
    with pytest.raises(ValueError, match="source.weight inf is not finite"):
        replace(wiki, weight=float("inf"))


@pytest.mark.parametrize("command", ["prepare", "pretrain"])
@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("novels", {"novels", "race"}),
        ("megatron_bert", {"wikipedia", "openwebtext", "realnews", "cc_stories", "bookscorpus"}),
        ("megatron_gpt2", {"wikipedia", "openwebtext", "realnews", "cc_stories"}),
    ],
)
def test_every_recipe_composes(command: str, recipe: str, names: set[str]) -> None:
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        config = compose(command, [f"data={recipe}", "data.root=raw"])
        OmegaConf.resolve(config)
    data = build(DataConfig, OmegaConf.to_container(config.data), name="data")
    assert set(data.sources) == names
    for name, node in data.sources.items():
        assert build(Source, node, name=name).home
    if recipe.startswith("megatron"):
        assert data.sources["wikipedia"]["exclude_titles"].startswith("raw/wikitext-103")
        assert data.sources["cc_stories"]["join_lines"]
