"""`hydratron prepare` as a user calls it: kills, broken input, full disks, training after it."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydratron.data.indexed import IndexedCorpus
from tests.end_to_end.conftest import SCRIPT, TINY, result
from tests.slurm import running_slurm

QUICK = ["steps.shard_megabytes=1", "executor.workers=1", "model.vocab_size=1000"]


def arguments(root: Path, output: str, *more: str) -> list[str]:
    return ["prepare", "data=novels", f"data.root={root}", f"output={output}", *QUICK, *more]


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_novels_are_prepared_once_and_train(
    hydratron: Callable, in_process: Callable, tmp_path: Path, texts: Path
) -> None:
    done = hydratron(*arguments(texts, "corpus", "hydra.run.dir=first"))
    assert done.returncode == 0, done.stderr
    assert "MB/s a core" in done.stdout
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    assert manifest["sources"]["race"]["documents"] == 40
    steps = manifest["steps"]["race"]
    assert steps["read"]["documents_in"] == 46
    assert steps["min_tokens"]["documents_out"] == 45
    assert steps["exact_duplicates"]["documents_out"] == 40
    assert manifest["sources"]["race"]["licence"] == "non-commercial research"
    assert len(manifest["tokenizer_sha256"]) == 64
    corpus = IndexedCorpus(tmp_path / "corpus/novels")
    assert (
        result(tmp_path / "first")["tokens"]
        == corpus.num_tokens + IndexedCorpus(tmp_path / "corpus/race").num_tokens
    )
    assert not (tmp_path / "corpus/.work").exists()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    again = in_process(*arguments(texts, "corpus", "executor.workers=2"))
    assert again.returncode == 0, again.stderr
    assert "holds this corpus already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = in_process(*arguments(texts, "corpus", "steps.min_tokens=64"))
    assert other.returncode == 2
    assert "other settings (steps.min_tokens); it is never rewritten" in other.stderr

    trained = in_process(
        "pretrain", "data=novels", "data.path=corpus", "model.vocab_size=1000",
        "trainer.max_steps=2", "trainer.log_every=1",
        "model.max_seq_len=32", "data.validation_samples=8", "data.sources.race.weight=0.5",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert result(tmp_path / "run")["status"] == "ok"


def test_pretraining_names_what_is_not_prepared(in_process: Callable) -> None:
    done = in_process("pretrain", "data=novels")
    assert done.returncode == 2
    assert "no prepared corpus in it (no manifest.json)" in done.stderr
    assert done.stderr.count("\n") == 1


TRAIN = ["pretrain", *TINY]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([*TRAIN, "data.path=''"], "data.path '' is empty"),
        ([*TRAIN, "data.path=empty.txt"], "empty.txt: no document is left of it"),
        ([*TRAIN, "data.path=nuls.txt"], "nuls.txt: no document is left of it"),
        ([*TRAIN, "data.cache_dir=/proc/nope"], "data.cache_dir '/proc/nope': No such file"),
        ([*TRAIN, "data.cache_dir=''"], "data.cache_dir '' is empty"),
        (["prepare", "data=blend", "data.path=null"], "a blend needs data.path"),
        (["prepare", "data=blend", "output=''"], "output '' is empty"),
        # output= is enough, and what is missing is something else
        (["prepare", "data=blend", "output=out"], "data.sources names no source of text"),
        (["prepare", "data=blend", "data.path=null", "output=out"], "names no source of text"),
    ],
)
def test_where_text_comes_from_and_goes_to_is_named(
    in_process: Callable, tmp_path: Path, given: list[str], line: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nuls.txt").write_bytes(b"\0" * 4096)
    done = in_process(*given)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_byte(
    hydratron: Callable, tmp_path: Path, texts: Path
) -> None:
    for workers in ("1", "2"):
        done = hydratron(*arguments(texts, f"c{workers}", f"executor.workers={workers}"))
        assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "c1") == digest(tmp_path / "c2")


def kill_and_rerun(hydratron: Callable, tmp_path: Path, texts: Path, moments: list[float]) -> None:
    started = time.monotonic()
    assert hydratron(*arguments(texts, "whole")).returncode == 0
    duration = time.monotonic() - started
    reference = digest(tmp_path / "whole")
    for moment in moments:
        process = subprocess.Popen(
            [SCRIPT, *arguments(texts, "killed")],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(moment * duration)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = hydratron(*arguments(texts, "killed"))
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "killed") == reference


@pytest.mark.slow
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    hydratron: Callable, tmp_path: Path, texts: Path
) -> None:
    kill_and_rerun(hydratron, tmp_path, texts, [0.8])


@pytest.mark.slow
def test_three_kills_at_random_moments(hydratron: Callable, tmp_path: Path, texts: Path) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    rng = random.Random(seed)
    kill_and_rerun(hydratron, tmp_path, texts, sorted(rng.uniform(0.3, 1.0) for _ in range(3)))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "race/train.x.jsonl",
            b'{"article": "a"}\n{"article": \n',
            "train.x.jsonl: line 2, column",
        ),
        pytest.param(
            "novels/x.txt",
            b"text\xff",
            "x.txt: not UTF-8 at byte 4 (line 1)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "novels/x.txt.gz",
            gzip.compress(b"words " * 99)[:-9],
            "x.txt.gz: broken after byte",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_broken_input_is_one_line_and_leaves_nothing_under_the_final_name(
    hydratron: Callable, tmp_path: Path, texts: Path, name: str, content: bytes, line: str
) -> None:  # fmt: skip
    (texts / name).write_bytes(content)
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b")
    # a given tokenizer, so that the workers meet the file and not the training of one
    given = [f"data.tokenizer={vocabulary}", "executor.workers=2"]
    done = hydratron(*arguments(texts, "corpus", *given))
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == [".work"]


def test_a_full_disk_names_file_and_position(
    hydratron: Callable, tmp_path: Path, texts: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        done = hydratron(*arguments(texts, str(disk / "corpus")))
        assert done.returncode == 1, done.stderr
        assert "No space left on device after byte" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert [path.name for path in (disk / "corpus").iterdir()] == [".work"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_target_that_cannot_be_written_is_named(
    hydratron: Callable, tmp_path: Path, texts: Path
) -> None:
    (tmp_path / "file").touch()
    done = hydratron(*arguments(texts, "file/corpus"))
    assert done.returncode == 2
    assert "file/corpus: cannot be written to: Not a directory" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/novels.bin").touch()
    done = hydratron(*arguments(texts, "mine"))
    assert done.returncode == 2
    assert "mine holds other files" in done.stderr


@pytest.mark.slow
@pytest.mark.slurm
def test_slurm_gives_the_same_bytes(
    hydratron: Callable,
    tmp_path: Path,
    texts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert hydratron(*arguments(texts, "here")).returncode == 0
    cluster = ["executor.kind=slurm", "executor.partition=debug", "executor.memory_gb=2"]
    with running_slurm(tmp_path_factory.mktemp("slurm")):
        done = hydratron(*arguments(texts, "there", *cluster, "executor.workers=2"))
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "there") == digest(tmp_path / "here")
