"""A whole preparation in this process, and the recipes that ship."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydratron.data.config import DataConfig
from hydratron.data.deduplication import NearDuplicates
from hydratron.data.indexed import IndexedCorpus
from hydratron.data.manifest import Manifest
from hydratron.data.prepare import ExecutorConfig, check_preparation, prepare_corpus
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


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "x.bin") as stream:
            stream.write(b"abc")
            stream.flush()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="x.bin: No space left on device after byte 3"):
        fail()
    assert not list(tmp_path.iterdir())


def test_weights_of_now_go_before_those_of_the_manifest(tmp_path: Path) -> None:
    sources = {n: {"tokens": t, "weight": w} for n, t, w in [("a", 30, 0.5), ("b", 10, 0.5)]}
    manifest = Manifest({}, "", sources, {})
    assert manifest.weights({}, tmp_path) == {"a": 0.5, "b": 0.5}
    assert manifest.weights({"a": 0.9, "b": None}, tmp_path) == {"a": 0.9, "b": 0.5}
    sources["b"]["weight"] = None
    assert manifest.weights({}, tmp_path) == {"a": 30.0, "b": 10.0}
    with pytest.raises(ValueError, match="holds the sources a, b, not c"):
        manifest.weights({"c": 1.0}, tmp_path)


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
