"""One process at work in a folder at a time, by a lock that dies with the process that holds it.

Whoever holds the lock of a checkpoint folder knows that every temporary folder it finds was left by a writer
that is dead, on whichever machine it ran: process ids, which are given out again and differ between
containers, are not asked. A lock file that is merely there, with the name of a process that is gone, locks
nothing.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from relora.checkpoint.files import disk_errors
from relora.errors import CheckpointError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".lock"

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}

_open_here: set[int] = set()
"""Handles of the locks this process is in."""


def _give_up_in_child() -> None:
    # A forked worker shares the open file: left open there, it would outlive a parent that was killed, and
    # hold a lock in the name of a process that is gone.
    for handle in _open_here:
        os.close(handle)
    _open_here.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_up_in_child)


@contextlib.contextmanager
def writer_lock(root: Path) -> Iterator[bool]:
    """Hold the lock of a folder of checkpoints inside the block; as `folder_lock`."""
    with folder_lock(root, doing="writing a checkpoint") as held:
        yield held


@contextlib.contextmanager
def folder_lock(folder: Path, *, doing: str) -> Iterator[bool]:
    """Hold a folder's lock inside the block.

    Args:
        folder: The folder; it exists.
        doing: What the holder does there, for the message of whoever comes second.

    Yields:
        Whether the lock is held; False on a file system that has no locks.

    Raises:
        CheckpointError: naming the process that holds it, if there is one.
    """
    path = folder / LOCK_NAME
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    with disk_errors("lock", path):
        handle = os.open(path, flags, 0o666)
    _open_here.add(handle)
    held = False
    try:
        with disk_errors("lock", path):
            held = _take(handle, folder, doing)
        if held:
            # The name only serves the message; on a full disk there may be no room for it.
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield held
    finally:
        if handle in _open_here:  # not in a forked child, which has given it up
            if held and fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_UN)  # said in words: a library may have forked past our hook
            _open_here.discard(handle)
            os.close(handle)


def lock_holder(folder: Path) -> str | None:
    """Return who holds a folder's lock, such as "process 12 on host"; None where nobody is known to."""
    try:
        handle = os.open(folder / LOCK_NAME, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        _take(handle, folder, "at work")
    except CheckpointError:
        return _owner(handle)
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


def _owner(handle: int) -> str:
    return os.pread(handle, 200, 0).decode("utf-8", errors="replace") or "another process"


def _take(handle: int, folder: Path, doing: str) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"cannot write in {folder}: {_owner(handle)!r} is {doing} there; wait for it, or stop it"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
