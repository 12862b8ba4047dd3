"""One writer in a checkpoint folder at a time, by a lock that dies with the process that holds it.

Whoever holds the lock knows that every temporary folder it finds was left by a writer that is dead, on
whichever machine it ran: process ids, which are given out again and differ between containers, are not asked.
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


@contextlib.contextmanager
def writer_lock(root: Path) -> Iterator[bool]:
    """Hold a folder's writer lock inside the block.

    Args:
        root: The folder; it exists.

    Yields:
        Whether the lock is held; False on a file system that has no locks.

    Raises:
        CheckpointError: naming the other writer, if there is one.
    """
    path = root / LOCK_NAME
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    with disk_errors("lock", path):
        handle = os.open(path, flags, 0o666)
    try:
        with disk_errors("lock", path):
            held = _take(handle, root)
        if held:
            # The name only serves the message; on a full disk there may be no room for it.
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield held
        finally:
            if held and fcntl is not None:
                # Said in words: processes forked while it was held have the file open too, and would keep it.
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _take(handle: int, root: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(handle, 200, 0).decode("utf-8", errors="replace") or "another process"
        raise CheckpointError(
            f"cannot write in {root}: {owner!r} is writing a checkpoint there; wait for it, or stop it"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
