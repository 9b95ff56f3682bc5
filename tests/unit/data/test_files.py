"""Pretraining and preparation read the same files of a folder, and name those that they do not."""

import gzip
import re
from pathlib import Path

import pytest
import zstandard

from hydratron.data.files import file_hash, find_files, read_json_lines
from hydratron.data.readers import plan_shards
from hydratron.data.sources import Source
from hydratron.data.text import read_text_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*left out")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that are text, JSON or neither; a linked folder, a cycle, copies of editors."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/s.txt").write_text("linked")
    folder = tmp_path / "folder"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "deep/er").mkdir(parents=True)
    for name in (
        "a.txt",
        "B.TXT",
        "deep/er/d.txt",
        "._i.txt",
        ".ipynb_checkpoints/a.txt",
        "a.txt~",
    ):
        (folder / name).write_text(name)
    (folder / "g.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"zstandard"))
    (folder / "H.TXT.GZ").write_bytes(gzip.compress(b"gzip"))
    for name in ("a.jsonl", "b.json", "C.JSONL", "f.ndjson"):
        (folder / name).write_text('{"text": "x"}\n')
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    (folder / "deep/cycle").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    return folder


TEXTS = ["B.TXT", "H.TXT.GZ", "a.txt", "d.txt", "g.txt.zst", "s.txt"]


def test_pretraining_and_preparation_read_the_same_texts(folder: Path) -> None:
    found = list(read_text_folder(folder))
    assert [file.name for file, _ in found] == TEXTS
    assert [text for _, text in found][1::4] == ["gzip", "linked"]
    [shard] = plan_shards("s", Source("text", str(folder)), shard_bytes=1 << 20, shard_rows=1)
    assert shard.files == [str(file) for file, _ in found]


def test_json_lines_have_three_endings_in_any_case(folder: Path) -> None:
    [shard] = plan_shards("s", Source("jsonl", str(folder)), shard_bytes=1 << 20, shard_rows=1)
    assert [Path(f).name for f in shard.files] == ["C.JSONL", "a.jsonl", "b.json", "f.ndjson"]


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "._i.txt", "~$b.txt", "c.csv"):
        (tmp_path / name).touch()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    names = [str(tmp_path / name) for name in ("._i.txt", "c.csv", "gone.txt", "~$b.txt")]
    line = f"1 files are read, left out: {', '.join(names)}"
    with pytest.warns(UserWarning, match=f"{re.escape(line)}$"):
        find_files(tmp_path, [".txt"])
    for i in range(3):
        (tmp_path / f"d{i}").touch()
    with pytest.warns(UserWarning, match="/d0, .*/d2 and 2 more$"):
        find_files(tmp_path, [".txt"])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("folder/**/*.txt", ["a.txt", "d.txt", "s.txt"]),
        ("folder/**", TEXTS),
        ("folder/*", TEXTS),
        ("fold*/deep", ["a.txt", "d.txt"]),
        ("folder/a.*~", ["a.txt~"]),
    ],
)
def test_patterns_reach_below_and_read_nothing_twice(
    folder: Path, pattern: str, names: list[str]
) -> None:
    found = find_files(folder.parent / pattern, [".txt"])
    assert set(names) <= {file.name for file in found}
    assert len({file.resolve() for file in found}) == len(found)
    if "deep" not in pattern:  # the cycle leads back to the folder
        assert sorted(file.name for file in found) == names


def test_json_is_not_read_as_text(folder: Path) -> None:
    with pytest.raises(ValueError, match="a.jsonl: JSON, not text"):
        find_files(folder / "a.jsonl", [".txt"])


def test_json_lines_that_cannot_be_read_are_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\n\n{"b": "' + b"long " * 500_000 + b'"}\n' + b"[" * 99_999
    )
    rows = read_json_lines(file)
    assert next(rows) == (1, {"a": 1})
    number, row = next(rows)
    assert number == 3
    assert len(row["b"]) == 2_500_000
    with pytest.raises(ValueError, match="x.jsonl: line 4: JSON nested too deeply"):
        next(rows)


def test_a_file_that_cannot_be_hashed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: cannot be read: No such file"):
        file_hash(tmp_path / "nowhere")
