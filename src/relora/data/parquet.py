"""Parquet files and Arrow columns as records: one column read, a few rows at a time, expansion bounded."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from relora.data.corpus import Record
from relora.data.files import FREE_EXPANSION_BYTES, MAX_EXPANSION, fingerprint_files, reading
from relora.errors import DataError

ROWS = 256
"""Rows that are in memory at once."""


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files, one column read, a few rows at a time."""

    name: str
    files: list[Path]
    text_field: str

    def key(self) -> dict[str, object]:
        """Return the fingerprint of the files and the column that is read."""
        return {"files": fingerprint_files(self.files), "text_field": self.text_field}

    def records(self) -> Iterator[Record]:
        """Yield the column's values, row by row."""
        pyarrow: Any = import_module("pyarrow")
        for file in self.files:
            try:
                yield from self._rows(file)
            except pyarrow.ArrowException as error:
                raise DataError(f"{file} is not a readable Parquet file: {one_line(error)}") from error

    def _rows(self, file: Path) -> Iterator[Record]:
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
        with reading(file):
            schema = parquet.read_schema(file)
            require_column(schema.names, self.text_field, str(file))
            kind = schema.field(self.text_field).type
            # Kept as the file has it: one long text that thousands of rows refer to is in memory once.
            plain = pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind)
            as_dictionary = [self.text_field] if plain else None
            row, left = 0, max(file.stat().st_size * MAX_EXPANSION, FREE_EXPANSION_BYTES)
            with parquet.ParquetFile(file, read_dictionary=as_dictionary) as table:
                _refuse_expansion(table.metadata, file)
                for batch in table.iter_batches(batch_size=ROWS, columns=[self.text_field]):
                    for text in column_bytes(batch.column(0), f"{file}, column {self.text_field!r}"):
                        row += 1
                        left -= len(text or b"")
                        if left < 0:
                            raise _expands(file)
                        yield Record(text, f"{file} row {row}")


def _refuse_expansion(metadata: Any, file: Path) -> None:
    """Raise DataError if the pages of a Parquet file say that they expand out of all proportion."""
    sizes = [
        metadata.row_group(group).column(column).total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    allowed = max(file.stat().st_size * MAX_EXPANSION, FREE_EXPANSION_BYTES)
    if min(sizes, default=0) < 0 or sum(sizes) > allowed:
        raise _expands(file)


def _expands(file: Path) -> DataError:
    return DataError(
        f"{file} expands to more than {MAX_EXPANSION} times its size, which text does not: if it is no "
        "attack, write it anew without compression, and repeated rows once"
    )


def require_column(names: list[str], text_field: str, place: str) -> None:
    """Raise DataError if `text_field` is not among the columns of a table."""
    if text_field not in names:
        raise DataError(
            f"{place} has no column {text_field!r}: set data.text_field to one of {', '.join(names)}"
        )


def column_bytes(column: Any, place: str) -> list[bytes | None]:
    """Return an Arrow column of text as bytes, so that invalid UTF-8 meets our policy, not Arrow's.

    Raises:
        DataError: if the column is not text.
    """
    pyarrow: Any = import_module("pyarrow")
    is_dictionary = pyarrow.types.is_dictionary(column.type)
    kind = str(column.type.value_type if is_dictionary else column.type)
    if kind not in {"string", "large_string", "string_view", "binary", "large_binary", "null"}:
        raise DataError(f"{place} is of type {kind}, not text: set data.text_field to another column")
    if is_dictionary:
        return [text for chunk in getattr(column, "chunks", [column]) for text in _referred(chunk)]
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _referred(column: Any) -> Iterator[bytes | None]:
    """Yield the texts of a dictionary column, those that are the same as one object."""
    pyarrow: Any = import_module("pyarrow")
    texts = column.dictionary.cast(pyarrow.large_binary()).to_pylist()
    return (None if index is None else texts[index] for index in column.indices.to_pylist())


def one_line(error: Exception) -> str:
    """Return an error's text for a message: on one line, cut short, and never empty."""
    return " ".join(str(error).split())[:500] or type(error).__name__
