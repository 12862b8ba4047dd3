"""Durable writes and distrustful reads: the only places where this package touches the disk.

A write is create, write, fsync, and at the end a rename and an fsync of the parent: a kill or a power cut
leaves either the old name or the new one with all of its content. A read refuses links and devices, and knows
how much it may take into memory before it takes it. What the disk refuses is said in words (`disk_errors`).
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from safetensors import SafetensorError

from relora.errors import CheckpointError

Observer = Callable[[str, Path], None]

_CAUSES = {
    errno.ENOSPC: "the disk is full: free space, keep fewer checkpoints, or use another disk",
    errno.EDQUOT: "the disk quota is used up: free space, keep fewer checkpoints, or use another disk",
    errno.EFBIG: "the file would be larger than this disk or this process allows (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only: mount it for writing, or choose another folder",
    errno.EACCES: "permission denied: make it accessible to this user, or choose another folder",
    errno.EPERM: "permission denied: make it accessible to this user, or choose another folder",
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "a part of its path is a file where a folder is needed: choose another folder",
    errno.ENOTEMPTY: "something of that name is there already",
    errno.EEXIST: "something of that name is there already",
    errno.ELOOP: "it is a link, and links are not followed in a checkpoint",
    errno.EIO: "the disk reports an input/output error: check it, or use another disk",
    errno.ENAMETOOLONG: "its name is too long",
    errno.EMFILE: "this process has too many files open (see `ulimit -n`)",
}


@contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into a CheckpointError: cause, place and remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {action} {path}: {_cause(error.errno, str(error))}") from error
    except SafetensorError as error:
        # The library reports the system's error number in its text only.
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
        raise CheckpointError(f"cannot {action} {path}: {_cause(number, str(error))}") from error


def _cause(number: int | None, text: str) -> str:
    return text if number is None else _CAUSES.get(number, text)


class FileOperations:
    """The durable operations of a save, told one by one to an observer before each is done.

    Args:
        observer: Called with an operation's name and its path; an exception it raises stops the save there.
    """

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer

    def make_folder(self, path: Path) -> None:
        """Create one folder, which must not exist."""
        with self.step("create", path):
            path.mkdir()

    def write(self, path: Path, data: bytes) -> None:
        """Create a file with this content; the file must not exist."""
        with self.step("write", path), path.open("xb") as file:
            file.write(data)

    def sync_file(self, path: Path) -> None:
        """Force a file's content onto the disk."""
        with self.step("fsync", path), path.open("r+b") as file:
            os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Force a folder's names onto the disk."""
        with self.step("fsync", path):
            sync_folder(path)

    def rename(self, path: Path, target: Path) -> None:
        """Give a folder its new name; a folder there that holds something is an error."""
        with self.step("rename", target):
            path.rename(target)

    def remove(self, path: Path) -> None:
        """Remove a file, a link (not what it points to), or a folder with all it holds."""
        with self.step("remove", path):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)

    @contextmanager
    def step(self, action: str, path: Path) -> Iterator[None]:
        """Tell the observer, then run the block with the disk's errors in words."""
        with disk_errors(action, path):
            if self._observer is not None:
                self._observer(action, path)
            yield


def sync_folder(path: Path) -> None:
    """Force a folder's names onto the disk."""
    if os.name == "nt":  # Windows has no handle for a folder; its rename is journaled
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder as a whole, durably, in place of what is there; for folders that can be made again.

    Args:
        target: The folder; its parent exists.
        fill: Writes into the empty folder that it is given.

    Raises:
        CheckpointError: if the disk refuses.
    """
    files = FileOperations()
    temporary = target.with_name(f".{target.name}.new")
    with disk_errors("write", target):
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that died here: the run's lock says so
        temporary.mkdir()
        fill(temporary)
        for path in sorted(temporary.rglob("*")):
            if path.is_dir():
                files.sync_folder(path)
            else:
                files.sync_file(path)
        files.sync_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        files.sync_folder(target.parent)


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; links, folders and devices are refused before a byte is read.

    Raises:
        CheckpointError: if it is missing, unreadable, or no regular file.
    """
    # Without O_NONBLOCK a named pipe would block the open itself, before its kind can be asked.
    kinds = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
    flags = os.O_RDONLY | sum(getattr(os, kind, 0) for kind in kinds)
    with disk_errors("read", path):
        handle = os.open(path, flags)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise CheckpointError(f"cannot read {path}: it is a folder or a device, not a regular file")
            yield file


def read_bounded(path: Path, *, limit: int) -> bytes:
    """Return a regular file's content, which may be `limit` bytes long at most.

    Raises:
        CheckpointError: as `open_regular`, or if the file is longer.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"cannot read {path}: it has {size} bytes, at most {limit} are allowed")
        return file.read(limit)


def file_digest(path: Path) -> str:
    """Return the sha256 of a regular file's content, read in pieces.

    Raises:
        CheckpointError: as `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
