"""Replace a file as a whole or not at all: temp sibling, fsync, rename, fsync of the folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from relora.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` that takes its place when the block ends without an error.

    Raises:
        CheckpointError: if the disk refuses; `path` then holds what it held before.
    """
    # The process id keeps two writers of one report from sharing a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """Word a refusal of the disk: cause, place and remedy."""
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}. What was there before is intact: free space, or "
        "make the folder writable, and run the same command again"
    )


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle for a folder; its rename is journaled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
