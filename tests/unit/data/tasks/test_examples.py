import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from hydratron.data.examples import (
    get_field,
    load_from_hub,
    read_json,
    read_json_lines,
    read_lines,
    write_text,
)

Write = Callable[[str, str], Path]


def test_only_line_feeds_end_lines_and_a_byte_order_mark_is_no_text(write: Write) -> None:
    path = write("a.txt", "\ufeffone\u2028still one\x85\r\ntwo\rstill two\n")
    assert list(read_lines(path)) == [(1, "one\u2028still one\x85"), (2, "two\rstill two")]


def test_gzipped_lines_read_like_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 9)[:-12])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: damaged gzip"):
        list(read_json_lines(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        list(read_lines(tmp_path / "none.txt"))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"plain\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8"):
        list(read_lines(path))


def test_bad_json_is_named_by_line(write: Write) -> None:
    with pytest.raises(ValueError, match=r"a\.json:3: not JSON"):
        read_json(write("a.json", '{\n"a": 1,\n"b" 2}\n'))
    with pytest.raises(ValueError, match=r"b\.jsonl:2: not JSON"):
        list(read_json_lines(write("b.jsonl", '{"a": 1}\n{"a": \n')))
    with pytest.raises(ValueError, match=r"c\.jsonl:1: expected a JSON object"):
        list(read_json_lines(write("c.jsonl", "[1]\n")))


def test_a_field_must_be_there_and_of_its_type() -> None:
    assert get_field({"a": "x"}, "a", str, "here") == "x"
    with pytest.raises(ValueError, match="here: missing field 'b'"):
        get_field({"a": "x"}, "b", str, "here")
    with pytest.raises(ValueError, match="here: 'a' must be int, got 'True'"):
        get_field({"a": True}, "a", int, "here")


def test_without_network_the_hub_gives_one_line_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="cannot load nyu-mll/glue .* give a path") as caught:
        load_from_hub("nyu-mll/glue", "mnli", split="train")
    assert "\n" not in str(caught.value)


def test_writing_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.json", "é\n")
    assert (tmp_path / "new" / "a.json").read_text(encoding="utf-8") == "é\n"
    assert len(list((tmp_path / "new").iterdir())) == 1
