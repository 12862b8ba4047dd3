"""Local files: finding them in a fixed order, a fingerprint of their content, and opening compressed ones.

Compression is told by a file's first bytes, not by its name, so that everything about a file that matters is
in its content: a corpus that is renamed or moved keeps its fingerprint.

What a compressed file expands to is bounded as it is read: a few kilobytes can stand for terabytes.
"""

import gzip
import hashlib
import io
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from relora.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK_BYTES = 1 << 17
# A zstd block of 4 bytes can stand for 128 KB: what is fed at once decides how much may come back at once.
_FEED_BYTES = 1 << 11
MAX_EXPANSION = 250
FREE_EXPANSION_BYTES = 64 << 20
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def stdlib_files() -> list[Path]:
    """Return the .py files of the running Python's standard library, sorted by name.

    Test folders are left out: many distributions ship without them, and the text should depend on the
    version of Python more than on who packaged it.

    Raises:
        DataError: if this Python keeps no source files (an embedded or zipped standard library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_STDLIB]  # not even entered: they may be large
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise DataError(
            f"{root} holds no .py files: this Python has no readable standard library; "
            "set data.source = 'text' and data.path to text of your own"
        )
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def find_files(given: str, *, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """Return the files meant by a path, a folder or a glob, sorted by name.

    Args:
        given: A file; a folder, searched at any depth without what is hidden; or a glob ("**" allowed).
        suffixes: Endings of the files that count in a folder; empty counts all. A file or glob that is
            given is taken at its word.

    Raises:
        DataError: if there is no such path, or nothing in it.
    """
    path = Path(given).expanduser()
    with reading(path):
        if path.is_file():
            return [path]
        if path.is_dir():
            found = [file for file in path.rglob("*") if _counts(file, path, suffixes)]
        elif any(character in given for character in "*?["):
            base = Path(path.anchor)
            found = [file for file in base.glob(str(path.relative_to(path.anchor))) if file.is_file()]
        else:
            raise DataError(f"{path} does not exist: check data.path (taken from {Path.cwd()})")
    if not found:
        wanted = f" that ends in {', '.join(suffixes)}" if suffixes and path.is_dir() else ""
        raise DataError(f"{path} holds no file{wanted}: check data.path")
    return sorted(found, key=lambda file: file.parts)


def _counts(file: Path, root: Path, suffixes: tuple[str, ...]) -> bool:
    inside = file.relative_to(root).parts
    hidden = any(part.startswith(".") for part in inside)
    return not hidden and (not suffixes or file.name.lower().endswith(suffixes)) and file.is_file()


def fingerprint_files(files: Sequence[Path]) -> str:
    """Return a hex digest of the files' contents in their order; names and times do not enter.

    Raises:
        DataError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        with reading(file), file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading `path` into one DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path} cannot be read: {reason}") from error


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a plain, gzip or zstd file for reading its (uncompressed) bytes.

    Raises:
        OSError: if it cannot be opened. Reading raises OSError, EOFError or zlib.error if it is damaged.
        DataError: if it is zstd and no zstd module is installed.
    """
    raw = path.open("rb")
    head = raw.read(4)
    raw.seek(0)
    if head.startswith(_GZIP_MAGIC):
        return _bounded(gzip.GzipFile(fileobj=raw), raw, path)
    if head == _ZSTD_MAGIC:
        try:
            return _bounded(_ZstdStream(raw, path), raw, path)
        except DataError:
            raw.close()
            raise
    return raw


def _bounded(expanded: io.RawIOBase | io.BufferedIOBase, raw: BinaryIO, path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Bounded(expanded, raw, path), buffer_size=_CHUNK_BYTES)


class _Bounded(io.RawIOBase):
    """What a compressed file expands to, refused where it is out of all proportion to the file."""

    def __init__(self, expanded: io.RawIOBase | io.BufferedIOBase, raw: BinaryIO, path: Path) -> None:
        super().__init__()
        self._expanded, self._raw, self._path = expanded, raw, path
        self._left = max(path.stat().st_size * MAX_EXPANSION, FREE_EXPANSION_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        count = self._expanded.readinto(buffer) or 0
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"{self._path} expands to more than {MAX_EXPANSION} times its size, which text does not: "
                "if it is no attack, give it decompressed"
            )
        return count

    def close(self) -> None:
        self._expanded.close()
        self._raw.close()
        super().close()


class _ZstdStream(io.RawIOBase):
    """The frames of a zstd file, one after the other; a frame that is cut off is an error, not an end.

    The file objects of the zstd modules differ in both points, so this drives their decompressors, whose
    interface is the same.
    """

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        super().__init__()
        self._new_frame, self._error = _zstd(path)
        self._raw = raw
        self._frame: Any = None
        self._chunk = memoryview(b"")
        self._piece = b""
        self._ready = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not (count := self._ready.readinto(buffer)):
            piece = self._piece or self._next_piece()
            if not piece and self._frame is None:
                return 0
            if not piece:
                raise EOFError("the zstd stream ends inside a frame: the file is cut off")
            self._ready = io.BytesIO(self._decompress(piece))
        return count

    def _next_piece(self) -> bytes:
        if not self._chunk:
            self._chunk = memoryview(self._raw.read(_CHUNK_BYTES))
        piece, self._chunk = bytes(self._chunk[:_FEED_BYTES]), self._chunk[_FEED_BYTES:]
        return piece

    def _decompress(self, piece: bytes) -> bytes:
        """Return what a piece of the file gives; what of it belongs to the next frame is kept for later."""
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            data: bytes = self._frame.decompress(piece)
        except self._error as error:
            raise OSError(f"damaged zstd data: {error}") from error
        self._piece = b""
        if self._frame.eof:
            self._piece = self._frame.unused_data
            self._frame = None
        return data

    def close(self) -> None:
        self._raw.close()
        super().close()


def _zstd(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """Return a maker of decompressors and their error class: Python's own (3.14) or zstandard's."""
    try:
        own: Any = import_module("compression.zstd")
        return own.ZstdDecompressor, own.ZstdError
    except ModuleNotFoundError:
        pass
    try:
        other: Any = import_module("zstandard")
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path} is compressed with zstd, which this Python cannot read: pip install 'relora[zstd]'"
        ) from error
    return (lambda: other.ZstdDecompressor().decompressobj()), other.ZstdError
