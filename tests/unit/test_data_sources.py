"""Sources: which files, in which order, cut how, and the same text from every container."""

import gzip
import io
import json
import os
import sysconfig
from pathlib import Path

import data_samples as samples
import pytest

from relora import DataError
from relora.data.config import DataConfig
from relora.data.files import find_files, fingerprint_files, open_bytes, stdlib_files
from relora.data.sources import MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, open_source

zstandard = pytest.importorskip("zstandard")
TEXTS = [samples.text(seed, num_words=30) for seed in range(7)]


def texts_of(**settings):
    return [record.text for record in open_source(DataConfig(**settings)).records()]


def lines_of(texts, field="text"):
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)).encode()


# Which files


def test_the_standard_library_is_its_own_sorted_python_files_without_tests_and_packages():
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in stdlib_files()]
    assert {"os.py", "json/decoder.py", "collections/__init__.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    parts = [set(name.split("/")[:-1]) for name in names]
    assert not any(folder & {"site-packages", "dist-packages", "test", "tests"} for folder in parts)
    assert names == sorted(names, key=lambda name: name.split("/"))


def test_a_python_without_source_files_is_told_to_bring_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(DataError, match=r"data\.source = 'text'"):
        stdlib_files()


def test_a_folder_is_searched_at_any_depth_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/c/y", ".git/config", "a/.hidden", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [file.relative_to(tmp_path).as_posix() for file in find_files(str(tmp_path))]
    assert found == ["a/c/y", "a/z.md", "b.txt", "c.txt"]


def test_a_glob_takes_what_matches(tmp_path, monkeypatch):
    for name in ("a/1.txt", "a/2.md", "b/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.name for file in find_files(str(tmp_path / "**/*.txt"))] == ["1.txt", "3.txt"]
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_files("a/*")] == ["1.txt", "2.md"]


def test_a_folder_of_json_lines_is_read_by_its_endings_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one"]))
    (tmp_path / "b.JSON").write_bytes(lines_of(["two"]))
    (tmp_path / "README.md").write_text("not data")
    assert texts_of(source="jsonl", path=str(tmp_path)) == ["one", "two"]


def test_the_fingerprint_knows_content_and_order_but_neither_names_nor_times(tmp_path):
    here = samples.write_texts(tmp_path / "here", TEXTS)
    there = samples.write_texts(tmp_path / "there" / "deeper", TEXTS)
    os.utime(there / "0003.txt", (1, 1))
    (there / "0006.txt").rename(there / "last.txt")
    fingerprint = fingerprint_files(find_files(str(here)))
    assert fingerprint_files(find_files(str(there))) == fingerprint
    assert fingerprint_files(list(reversed(find_files(str(here))))) != fingerprint
    (here / "0003.txt").write_text("changed")
    assert fingerprint_files(find_files(str(here))) != fingerprint


# Documents of text files


def test_a_folder_gives_a_document_a_file_and_a_single_file_gives_blocks(tmp_path):
    folder = samples.write_texts(tmp_path / "texts", ["one\n\ntwo", "x" * (2 * MAX_BLOCK_BYTES)])
    assert texts_of(source="text", path=str(folder)) == [b"one\n\ntwo", b"x" * (2 * MAX_BLOCK_BYTES)]
    single = str(folder / "0001.txt")
    assert texts_of(source="text", path=single) == [b"x" * MAX_BLOCK_BYTES] * 2
    assert texts_of(source="text", path=single, document="file") == [b"x" * (2 * MAX_BLOCK_BYTES)]


def test_lines_can_be_documents_whatever_ends_them(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"one\r\ntwo\n\nthree")
    found = texts_of(source="text", path=str(tmp_path / "lines.txt"), document="line")
    assert found == [b"one", b"two", b"", b"three"]


@pytest.mark.parametrize(("separator", "ends"), [("\n\n", b"\n\n"), ("\n", b"\n"), (" ", b" ")])
def test_blocks_end_at_blank_lines_else_lines_else_spaces_and_lose_nothing(tmp_path, separator, ends):
    content = separator.join("w" * (n % 90 + 1) for n in range(1500)).encode()
    (tmp_path / "book.txt").write_bytes(content)
    blocks = texts_of(source="text", path=str(tmp_path / "book.txt"))
    assert b"".join(blocks) == content
    assert len(blocks) > 3
    assert all(MIN_BLOCK_BYTES <= len(block) <= MAX_BLOCK_BYTES for block in blocks[:-1])
    assert all(block.endswith(ends) for block in blocks[:-1])


@pytest.mark.parametrize("character", ["\u00e9", "\u20ac", "\U0001f600"])
@pytest.mark.parametrize("shift", range(4))
def test_a_text_without_any_space_is_cut_between_characters(tmp_path, character, shift):
    content = "a" * shift + character * (3 * MAX_BLOCK_BYTES // len(character.encode()))
    (tmp_path / "line.txt").write_bytes(content.encode())
    blocks = texts_of(source="text", path=str(tmp_path / "line.txt"))
    assert "".join(block.decode() for block in blocks) == content
    assert max(map(len, blocks)) <= MAX_BLOCK_BYTES


def test_records_name_their_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines_of(["one", "two"]))
    places = [r.place for r in open_source(DataConfig(source="jsonl", path=str(tmp_path))).records()]
    assert places == [f"{tmp_path / 'a.jsonl'}:2", f"{tmp_path / 'a.jsonl'}:3"]


# Containers


def containers(data):
    frames = [data[: len(data) // 2], data[len(data) // 2 :]]
    return {
        "plain.jsonl": data,
        "packed.jsonl.gz": gzip.compress(data),
        "members.jsonl.gz": b"".join(map(gzip.compress, frames)),
        "packed.jsonl.zst": zstandard.compress(data),
        "frames.jsonl.zst": b"".join(map(zstandard.compress, frames)),
    }


@pytest.mark.parametrize("name", containers(b""))
def test_json_lines_are_the_same_in_every_container(tmp_path, name):
    (tmp_path / name).write_bytes(containers(lines_of(TEXTS, "body"))[name])
    assert texts_of(source="jsonl", path=str(tmp_path), text_field="body") == TEXTS


@pytest.mark.parametrize("name", containers(b""))
def test_compression_is_told_by_content_not_by_name(tmp_path, name):
    (tmp_path / "corpus").write_bytes(containers(b"some text\n")[name])
    assert texts_of(source="text", path=str(tmp_path / "corpus")) == [b"some text\n"]


def test_a_zstd_stream_much_larger_than_its_buffers_comes_out_whole(tmp_path):
    content = os.urandom(1 << 20) + bytes(5 << 20) + os.urandom(1000)
    (tmp_path / "big.zst").write_bytes(zstandard.compress(content))
    with open_bytes(tmp_path / "big.zst") as stream:
        assert stream.read() == content


def test_json_lines_with_a_byte_order_mark_and_line_separators_in_strings(tmp_path):
    value = "one\u2028two\u0085three\rfour"
    line = json.dumps({"text": value}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert texts_of(source="jsonl", path=str(tmp_path)) == [value]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet_gives_the_text_column_whatever_its_encoding(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kinds = {"string": pyarrow.string(), "large_string": pyarrow.large_string(), "binary": pyarrow.binary()}
    values = [*TEXTS, None, ""]
    column = pyarrow.array(values, type=kinds.get(kind, pyarrow.string()))
    column = column.dictionary_encode() if kind == "dictionary" else column
    parquet.write_table(
        pyarrow.table({"id": list(range(9)), "text": column}), tmp_path / "a.parquet", row_group_size=4
    )
    found = texts_of(source="parquet", path=str(tmp_path))
    assert found == [None if value is None else value.encode() for value in values]


def test_reading_stops_where_the_reader_stops(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one"]) + b"not JSON\n")
    records = open_source(DataConfig(source="jsonl", path=str(tmp_path))).records()
    assert next(records).text == "one"
    records.close()


def test_open_bytes_gives_a_plain_file_as_it_is(tmp_path):
    (tmp_path / "plain").write_bytes(b"\x1f")
    with open_bytes(tmp_path / "plain") as stream:
        assert isinstance(stream, io.BufferedIOBase)
        assert stream.read() == b"\x1f"
