"""Corpus preparation: raw text of several sources to a folder of indexed corpora and a manifest.

The stages run as datatrove pipelines, on this machine or on a SLURM cluster. Each shard of a stage
is done once: a preparation that was killed goes on where it stood, to the same bytes.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hydratron.data.executors import ExecutorConfig, Stages, run_stages
from hydratron.data.files import file_hash, name_some
from hydratron.data.indexed import IndexedCorpus, concatenate_corpora
from hydratron.data.inputs import read_inputs
from hydratron.data.manifest import MANIFEST, TOKENIZER, Manifest, differing_keys
from hydratron.data.readers import Shard, plan_shards
from hydratron.data.sources import CorpusConfig
from hydratron.data.stages import (
    DUPLICATES,
    Deduplicate,
    MakeTokenizer,
    ReadShard,
    StoreDocuments,
    TextStep,
    Tokenize,
    Workspace,
    atomic_file,
    text_step_names,
)
from hydratron.data.tokenizer import load_tokenizer, tokenizer_hash

WORK = ".work"
_PLAN = "plan.json"
_SHARD_ROWS = 50_000
_NOT_CONTENT = ("weight", "home", "licence")  # of a source: what does not change its tokens


@dataclass(frozen=True)
class Preparation:
    """A checked preparation; `is_done` where the folder holds this corpus already."""

    corpus: CorpusConfig
    output: Path
    executor: ExecutorConfig
    is_done: bool


def check_preparation(corpus: CorpusConfig, output: Path, executor: ExecutorConfig) -> Preparation:
    """ValueError for sources that are not there and a target that is taken or not writable."""
    if not corpus.sources:
        raise ValueError("data.sources names no source of text; data=novels has two")
    for name in corpus.sources:
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"the name of source {name!r} is not made of letters, digits, _ and -")
    if (output / MANIFEST).is_file():
        _check_finished(Manifest.read(output), corpus, output)
        return Preparation(corpus, output, executor, is_done=True)
    if not (output / WORK).is_dir() and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} holds other files; name an empty or new folder as output")
    try:
        (output / WORK).mkdir(parents=True, exist_ok=True)
        (output / WORK / "writable").touch()
    except OSError as error:
        raise ValueError(f"{output}: cannot be written to: {error.strerror}") from error
    return Preparation(corpus, output, executor, is_done=False)


def _check_finished(manifest: Manifest, corpus: CorpusConfig, output: Path) -> None:
    """ValueError where a finished folder is not of this preparation."""
    settings = differing_keys(manifest.settings, settings_of(corpus))
    if settings:
        problem = f"holds a corpus of other settings ({', '.join(settings)})"
    elif not manifest.inputs:
        problem = "holds a corpus whose manifest does not say which texts it was made of"
    elif inputs := differing_keys(manifest.inputs, read_inputs(corpus)):
        problem = f"holds a corpus whose inputs have changed since ({name_some(inputs)})"
    else:
        return
    raise ValueError(f"{output} {problem}; it is never rewritten: name another output")


def settings_of(corpus: CorpusConfig) -> dict[str, Any]:
    """What decides the tokens, as the manifest has it."""
    settings = json.loads(json.dumps(asdict(corpus)))
    for source in settings["sources"].values():
        for key in _NOT_CONTENT:
            del source[key]
    return settings


def prepare_corpus(preparation: Preparation, say: Callable[[str], None]) -> Manifest:
    """Run what is left of a preparation and return its manifest; `say` gets a line a stage.

    ValueError and OSError name the file and the position of what went wrong.
    """
    output = preparation.output
    if preparation.is_done:
        say(f"{output} holds this corpus already")
        manifest, sources = Manifest.read(output), preparation.corpus.sources
        if any(source.weight != manifest.sources[n]["weight"] for n, source in sources.items()):
            say("it keeps the weights of its manifest; pretrain uses data.sources.NAME.weight")
        return manifest
    with _locked(output / WORK / "lock"):
        workspace = _plan(preparation, say)
        logs = workspace.folder / "logs"
        run_stages(_stages(workspace), preparation.executor, logs=logs, say=say)
        manifest = _finish(workspace, output)
        say_steps(workspace, say)
        shutil.rmtree(output / WORK)
    return manifest


def _plan(preparation: Preparation, say: Callable[[str], None]) -> Workspace:
    """The shards; work of other settings or of files that have changed since is thrown away."""
    corpus, folder = preparation.corpus, preparation.output / WORK
    shards: list[Shard] = []
    for name, source in corpus.sources.items():
        size = corpus.steps.shard_megabytes << 20
        shards += plan_shards(name, source, shard_bytes=size, shard_rows=_SHARD_ROWS)
    inputs = read_inputs(corpus)
    plan = json.dumps({"settings": settings_of(corpus), "shards": shards, "inputs": inputs})
    path = folder / _PLAN
    if path.is_file() and path.read_text() != plan:
        say("settings or sources have changed since: starting again")
        for entry in folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not path.is_file():
        with atomic_file(path) as stream:
            stream.write(plan.encode())
    return Workspace(corpus, tuple(shards), folder)


def _stages(workspace: Workspace) -> Stages:
    """The steps of each stage and the number of its tasks."""
    num_shards = len(workspace.shards)
    texts = [TextStep(workspace, name) for name in text_step_names(workspace.corpus)]
    return {
        "tokenizer": ([MakeTokenizer(workspace, "tokenizer")], 1),
        "documents": (
            [ReadShard(workspace, "read"), *texts, StoreDocuments(workspace, "minhash")],
            num_shards,
        ),
        "duplicates": ([Deduplicate(workspace, "duplicates")], 1),
        "tokens": ([Tokenize(workspace, "tokenize")], num_shards),
    }


def _finish(workspace: Workspace, output: Path) -> Manifest:
    """Join the shards of each source, and write the manifest last."""
    corpus = workspace.corpus
    tokenizer = load_tokenizer(str(workspace.tokenizer))
    sources: dict[str, dict[str, Any]] = {}
    for name, source in corpus.sources.items():
        parts = [
            workspace.tokens(i)
            for i, shard in enumerate(workspace.shards)
            if shard.source == name and workspace.tokens(i).with_suffix(".idx").is_file()
        ]
        if not parts:
            raise ValueError(f"source {name}: no document is left of {source.path}")
        try:
            concatenate_corpora(output / name, parts)
        except OSError as error:
            raise OSError(f"{output / name}.bin: {error.strerror or error}") from error
        made = IndexedCorpus(output / name)
        sources[name] = {
            "documents": made.num_documents,
            "sequences": made.num_sequences,
            "tokens": made.num_tokens,
            "sha256": [file_hash(path) for path in made.files],
            "weight": source.weight,
            "home": source.home,
            "licence": source.licence,
        }
    with atomic_file(output / DUPLICATES) as stream:
        stream.write((workspace.folder / DUPLICATES).read_bytes())
    shutil.copytree(workspace.tokenizer, output / TOKENIZER, dirs_exist_ok=True)
    steps = {name: step_counts(workspace, name) for name in corpus.sources}
    manifest = Manifest(
        settings=settings_of(corpus),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        sources=sources,
        steps=steps,
        inputs=json.loads((workspace.folder / _PLAN).read_bytes())["inputs"],
    )
    manifest.write(output)
    return manifest


def step_counts(workspace: Workspace, source: str) -> dict[str, dict[str, int]]:
    """Documents and bytes in and out of each step of a source."""
    tasks = [i for i, shard in enumerate(workspace.shards) if shard.source == source]
    counts: dict[str, dict[str, int]] = {}
    for i in tasks:
        for step, values, _ in _task_stats(workspace, "documents", i):
            if step == "minhash":
                continue
            into = counts.setdefault(step, {})
            for side in ("documents_in", "bytes_in", "documents_out", "bytes_out"):
                into[side] = into.get(side, 0) + values.get(side, 0)
    left = dict(list(counts.values())[-1])
    lines = (workspace.folder / DUPLICATES).read_text().splitlines()
    removed = [row for row in map(json.loads, lines) if row["source"] == source]
    switched = workspace.corpus.steps
    for step in ("exact_duplicates", "near_duplicates"):
        if not getattr(switched, step):
            continue
        before = {"documents_in": left["documents_out"], "bytes_in": left["bytes_out"]}
        gone = [row["bytes"] for row in removed if row["step"] == step]
        left = before | {
            "documents_out": before["documents_in"] - len(gone),
            "bytes_out": before["bytes_in"] - sum(gone),
        }
        counts[step] = left
    return counts


def _task_stats(
    workspace: Workspace, stage: str, task: int
) -> Iterator[tuple[str, dict[str, int], float]]:
    """Step, counts and seconds, as datatrove wrote them for a task."""
    for step in json.loads((workspace.stats(stage) / f"{task:05d}.json").read_text()):
        values = {key: int(_total(value)) for key, value in step["stats"].items()}
        yield step["name"].partition(": ")[2], values, float(_total(step["time_stats"]))


def _total(value: Any) -> float:
    return value["total"] if isinstance(value, dict) else value


def say_steps(workspace: Workspace, say: Callable[[str], None]) -> None:
    """A line a step: what went in, what came out, how fast one core did it."""
    for stage, (_, tasks) in _stages(workspace).items():
        counts: dict[str, np.ndarray] = {}
        for task in range(tasks):
            for step, values, seconds in _task_stats(workspace, stage, task):
                sides = [values.get(f"documents_{side}", 0) for side in ("in", "out")]
                row = np.array([*sides, values.get("bytes_in", 0), seconds])
                counts[step] = counts.get(step, 0) + row
        for step, (came, left, size, seconds) in counts.items():
            rate = f"{size / 1e6 / seconds:8.1f} MB/s a core" if size and seconds else ""
            dropped = f"{came - left:.0f} dropped" if left else ""
            say(f"{step:16} {came:9.0f} documents {size / 1e6:9.1f} MB {rate} {dropped}".rstrip())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One preparation at a time writes to a folder; the lock goes with the process.

    It is POSIX's, which a fork does not inherit: flock's would stay with a child that is left.
    """
    with path.open("w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{path.parent.parent}: another preparation writes to it") from error
        yield
