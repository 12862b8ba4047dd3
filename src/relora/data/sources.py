"""The sources of text: files, JSON lines, Parquet and `datasets`, each a stream of records with their places.

`datasets` reads what comes from the hub, or lies in folders of that shape. Plain local files are read here,
as it names neither file nor line of what it cannot parse, and cannot count invalid UTF-8. Parquet goes
through pyarrow, the reader inside `datasets`, for the same reason.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal

from relora.data.config import DataConfig
from relora.data.corpus import Record, Source
from relora.data.files import find_files, fingerprint_files, open_bytes, reading, stdlib_files
from relora.data.parquet import ROWS, ParquetFiles, column_bytes, one_line, require_column
from relora.errors import DataError

JSONL_SUFFIXES = tuple(
    kind + packed for kind in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst")
)
MAX_DOCUMENT_BYTES = 1 << 30
_PART_BYTES = 1 << 20
MIN_BLOCK_BYTES = 2 << 10
MAX_BLOCK_BYTES = 16 << 10


def open_source(config: DataConfig) -> Source:
    """Return the source that `config` names; its files are listed, none is read yet.

    Raises:
        DataError: if there are no such files.
    """
    path = config.path or ""
    if config.source == "python-stdlib":
        return TextFiles("the Python standard library", stdlib_files(), "file")
    if config.source == "text":
        files = find_files(path)
        unit = config.document
        if unit == "auto":
            unit = "block" if files == [Path(path).expanduser()] else "file"
        return TextFiles(path, files, unit)
    if config.source == "jsonl":
        return JsonLines(path, find_files(path, suffixes=JSONL_SUFFIXES), config.text_field)
    if config.source == "parquet":
        return ParquetFiles(path, find_files(path, suffixes=(".parquet",)), config.text_field)
    folder = Path(path).expanduser()
    return HubDataset(
        name=str(folder) if folder.is_dir() else path,
        config_name=config.name,
        split=config.split,
        revision=config.revision,
        text_field=config.text_field,
        streaming=config.streaming,
    )


@dataclass(frozen=True)
class TextFiles:
    """Text files, plain or compressed: a document is a file, a line, or a block of lines."""

    name: str
    files: list[Path]
    unit: Literal["file", "block", "line"]

    def key(self) -> dict[str, object]:
        """Return the fingerprint of the files and how they are cut."""
        return {"files": fingerprint_files(self.files), "document": self.unit}

    def records(self) -> Iterator[Record]:
        """Yield the documents, not decoded yet."""
        for file in self.files:
            with reading(file), open_bytes(file) as stream:
                if self.unit == "file":
                    yield Record(_whole(stream, str(file)), str(file))
                elif self.unit == "line":
                    for number, line in _lines(stream, file):
                        yield Record(line.rstrip(b"\r\n"), f"{file}:{number}")
                else:
                    for offset, block in _blocks(stream.read):
                        yield Record(block, f"{file} at byte {offset}")


def _whole(stream: io.BufferedIOBase, place: str) -> bytes:
    parts, size = [], 0
    while part := stream.read(_PART_BYTES):  # asked for all it may be, Python would take the memory at once
        parts.append(part)
        size += len(part)
        if size > MAX_DOCUMENT_BYTES:
            raise _too_long(place)
    return b"".join(parts)


def _lines(stream: io.BufferedIOBase, file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, none longer than a document may be."""
    for number in count(1):
        line = stream.readline(MAX_DOCUMENT_BYTES + 1)
        if len(line) > MAX_DOCUMENT_BYTES:
            raise _too_long(f"{file}:{number}")
        if not line:
            return
        yield number, line


def _too_long(place: str) -> DataError:
    return DataError(
        f"{place} is longer than the {MAX_DOCUMENT_BYTES >> 20} MiB a document may have: cut it, or read it "
        "in blocks with data.document = 'block'"
    )


def _blocks(read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """Cut a byte stream into (offset, block), each MIN to MAX bytes long but the last.

    A block ends after a blank line, failing that after the last line, or space, or whole UTF-8 character
    within reach. Text that is appended changes no block before the last, so none changes sides.
    """
    offset = 0
    buffer = read(MAX_BLOCK_BYTES)
    while buffer:
        end = _block_end(buffer)
        yield offset, buffer[:end]
        offset += end
        buffer = buffer[end:]
        while len(buffer) < MAX_BLOCK_BYTES and (more := read(MAX_BLOCK_BYTES - len(buffer))):
            buffer += more


def _block_end(buffer: bytes) -> int:
    blank = buffer.find(b"\n\n", MIN_BLOCK_BYTES)
    if blank >= 0:
        return blank + 2
    if len(buffer) < MAX_BLOCK_BYTES:
        return len(buffer)
    for end in (b"\n", b" "):
        found = buffer.rfind(end, MIN_BLOCK_BYTES)
        if found >= 0:
            return found + 1
    end_of_character = len(buffer)
    while end_of_character > MIN_BLOCK_BYTES and buffer[end_of_character - 1] & 0xC0 == 0x80:
        end_of_character -= 1
    starts_wide = buffer[end_of_character - 1] >= 0xC0
    return end_of_character - 1 if starts_wide else len(buffer)


@dataclass(frozen=True)
class JsonLines:
    """JSON lines, plain, gzip or zstd: one object a line, its text in one field."""

    name: str
    files: list[Path]
    text_field: str

    def key(self) -> dict[str, object]:
        """Return the fingerprint of the files and the field that is read."""
        return {"files": fingerprint_files(self.files), "text_field": self.text_field}

    def records(self) -> Iterator[Record]:
        """Yield the texts, blank lines passed over."""
        for file in self.files:
            with reading(file), open_bytes(file) as stream:
                for number, line in _lines(stream, file):
                    if line.strip():
                        place = f"{file}:{number}"
                        yield Record(self._text(line, place), place)

    def _text(self, line: bytes, place: str) -> str | None:
        try:
            # Bad bytes travel through the parser as lone surrogates, to meet the policy if the text has them.
            value = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place} is not one JSON object ({error}): each line must be one; mend or remove it"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{place} is not a JSON object but a {type(value).__name__}: mend or remove it")
        return _checked_text(value, self.text_field, place)


def _checked_text(record: dict[str, object], text_field: str, place: str) -> str | None:
    if text_field not in record:
        raise DataError(
            f"{place} has no field {text_field!r}, but {', '.join(record) or 'none'}: set data.text_field, "
            "or mend the line"
        )
    text = record[text_field]
    if text is None or isinstance(text, str):
        return text
    raise DataError(
        f"{place}: field {text_field!r} is a {type(text).__name__}, not text: set data.text_field to another"
    )


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the Hugging Face hub, or a local folder of the same shape, read by `datasets`."""

    name: str
    config_name: str | None
    split: str
    revision: str | None
    text_field: str
    streaming: bool

    def key(self) -> dict[str, object]:
        """Return the names that choose the data; a local folder is known by its content instead."""
        folder = Path(self.name)
        local: dict[str, object] = {"path": self.name}
        if folder.is_dir():
            local = {"files": fingerprint_files(find_files(self.name))}
        chosen = {"name": self.config_name, "split": self.split, "revision": self.revision}
        return {**local, **chosen, "text_field": self.text_field}

    def records(self) -> Iterator[Record]:
        """Yield the texts, row by row."""
        row = 0
        for table in self._tables():
            require_column(table.column_names, self.text_field, self.name)
            for text in column_bytes(table.column(self.text_field), f"{self.name}, {self.text_field!r}"):
                row += 1
                yield Record(text, f"{self.name} row {row}")

    def _tables(self) -> Iterator[Any]:
        # `datasets` lets the errors of every reader and network library it uses through as they are; hence
        # Exception, around its calls only.
        try:
            datasets: Any = import_module("datasets")
            tables = iter(self._dataset(datasets).with_format("arrow").iter(batch_size=ROWS))
        except Exception as error:
            raise DataError(
                f"dataset {self.name!r} (name {self.config_name!r}, split {self.split!r}) cannot be loaded: "
                f"{one_line(error)}: check data.path, data.name, data.split and the network"
            ) from error
        while True:
            try:
                table = next(tables, None)
            except Exception as error:
                raise DataError(
                    f"dataset {self.name!r}, split {self.split!r}, cannot be read on: {one_line(error)}"
                ) from error
            if table is None:
                return
            yield table

    def _dataset(self, datasets: Any) -> Any:
        # What `save_to_disk` wrote is not for `load_dataset`.
        if not any((Path(self.name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(
                self.name,
                self.config_name,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
        saved = datasets.load_from_disk(self.name)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if self.split not in saved:
            raise ValueError(f"no such split; there are {', '.join(saved)}")
        return saved[self.split]
