"""Every source kind is read, and what is broken is named with its position."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from datasets import Dataset

from hydratron.data.readers import Shard, plan_shards, read_shard
from hydratron.data.sources import Source

ROWS = [{"text": f"Document number {i}.", "title": f"T{i}"} for i in range(2000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(source: Source) -> list[str]:
    shards = plan_shards("s", source, shard_bytes=1 << 20, shard_rows=300)
    return [document.text for shard in shards for document in read_shard(source, shard)]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_are_read_packed_or_not(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
    half = len(LINES) // 2
    if ending == "jsonl":
        path.write_bytes(LINES)
    else:  # in two members, as pigz and zstd -T write them
        pack_one = pack[ending.rpartition(".")[2]]
        path.write_bytes(pack_one(LINES[:half]) + pack_one(LINES[half:]))
    assert read(Source("jsonl", str(tmp_path))) == [row["text"] for row in ROWS]


def test_text_folders_are_read_in_order_and_split_into_chapters(tmp_path: Path) -> None:
    words = "word " * 40
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2.txt.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "1.txt").write_text(f"CHAPTER I\n\n{words}\n\nCHAPTER II\n\n{words}")
    assert len(read(Source("text", str(tmp_path)))) == 2
    split = read(Source("text", str(tmp_path), split_files=True))
    assert [text[:10].strip() for text in split] == ["CHAPTER I", "CHAPTER II", "second"]


def test_wikitext_gives_articles_with_titles(tmp_path: Path) -> None:
    path = tmp_path / "wiki.tokens"
    path.write_text(
        " \n = A title = \n \n It is 3 @.@ 5 . \n \n = = Part = = \n \n x \n = B = \n y \n"
    )
    source = Source("wikitext", str(path))
    documents = list(read_shard(source, Shard("s", [str(path)])))
    assert [document.title for document in documents] == ["A title", "B"]
    assert "It is 3.5." in documents[0].text


def test_hugging_face_datasets_are_read_in_shards_of_rows(tmp_path: Path) -> None:
    Dataset.from_list(ROWS[:700]).save_to_disk(str(tmp_path / "d"))
    source = Source("huggingface", str(tmp_path / "d"))
    shards = plan_shards("s", source, shard_bytes=1, shard_rows=300)
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 300), (300, 600), (600, 700)]
    assert read(source) == [row["text"] for row in ROWS[:700]]
    with pytest.raises(ValueError, match="has no column 'body': text, title"):
        read(Source("huggingface", str(tmp_path / "d"), text_key="body"))


def test_shards_depend_on_names_and_sizes_only(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 400)
    shards = plan_shards("s", Source("text", str(tmp_path)), shard_bytes=1000, shard_rows=1)
    assert [len(shard.files) for shard in shards] == [2] * 5


BROKEN = {
    "bad.jsonl": (LINES[:100] + b"{broken\n" + LINES, r"bad.jsonl: line 3, column \d+: not JSON"),
    "key.jsonl": (b'{"body": "x"}\n', "key.jsonl: line 1: no text under 'text'"),
    "utf8.jsonl": (
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "utf8.jsonl: line 2: not UTF-8 at byte 10",
    ),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-200], "cut.jsonl.gz: broken after byte .* truncated"),
    "cut.jsonl.zst": (
        zstandard.ZstdCompressor().compress(LINES)[:-50],
        "cut.jsonl.zst: broken after byte .* truncated",
    ),
    "bad.jsonl.gz": (b"no gzip at all", "bad.jsonl.gz: broken after byte 0"),
    "utf8.txt": (b"fine\nline\xff", r"utf8.txt: not UTF-8 at byte 9 \(line 2\)"),
    "cut.txt.gz": (gzip.compress(b"words " * 999)[:-9], "cut.txt.gz: broken after byte"),
    "plain.tokens": (b"no heading", "plain.tokens: not WikiText"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_named_with_its_position(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    kind = "text" if ".txt" in name else "wikitext" if ".tokens" in name else "jsonl"
    with pytest.raises(ValueError, match=message):
        read(Source(kind, str(tmp_path / name)))


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        read(Source("text", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"no file ending in .jsonl"):
        read(Source("jsonl", str(tmp_path)))
    with pytest.raises(ValueError, match="source.kind 'csv' is not one of text, jsonl"):
        Source("csv", "x")
