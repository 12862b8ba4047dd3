"""One cell's training as a process of its own: a `relora train` like any other, with so many threads."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Protocol

from relora.lab.cell_files import CellFiles, try_lock
from relora.lab.plan import Outcome
from relora.lab.study import Cell

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class RunningCell(Protocol):
    """A cell that is being trained."""

    files: CellFiles
    is_ours: bool
    """Whether this study started it, and so may call what it left a failure."""

    def poll(self) -> Outcome | None:
        """Return how it ended, or None while it trains."""

    def stop(self) -> None:
        """Ask it to save and stop; asked again, end it at once."""


class TrainingProcess:
    """A cell that this study trains.

    Args:
        files: The cell's.
        lock: Descriptor of its lock, which the process inherits.
        threads: For its arithmetic.
        environment: Of the process, threads aside.
    """

    is_ours = True

    def __init__(self, files: CellFiles, *, lock: int, threads: int, environment: Mapping[str, str]) -> None:
        self.files = files
        self._lock = lock
        self._asked = False
        command = [sys.executable, "-m", "relora", "train", str(files.write_recipe())]
        with files.beside(".log").open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C reaches the study alone, which asks each process once.
            self._process = subprocess.Popen(
                command,
                env={**environment, **dict.fromkeys(_THREADS, str(threads))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock,) if os.name == "posix" else (),
            )

    def poll(self) -> Outcome | None:
        """Return how it ended, or None while it trains."""
        code = self._process.poll()
        if code is None:
            return None
        os.close(self._lock)
        return self.files.outcome() or self.files.note_end(code, log_start=self._log_start)

    def stop(self) -> None:
        """Send SIGTERM, which lets it save; the second time SIGKILL."""
        self._process.send_signal(signal.SIGKILL if self._asked else signal.SIGTERM)
        self._asked = True


class ForeignCell:
    """A cell that a process of another study trains, or one whose study was killed."""

    is_ours = False

    def __init__(self, files: CellFiles) -> None:
        self.files = files

    def poll(self) -> Outcome | None:
        """Return how it ended once its lock is free; a run that was left unfinished may be tried again."""
        lock = try_lock(self.files.beside(".lock"))
        if lock is None:
            return None
        os.close(lock)
        left = Outcome(loss=float("inf"), failure="left unfinished by another process", is_final=False)
        return self.files.outcome() or left

    def stop(self) -> None:
        """Leave it alone: it is not ours."""


def start(
    cell: Cell, *, threads: int, environment: Mapping[str, str], donors: Iterable[CellFiles]
) -> RunningCell:
    """Train a cell, or watch the process that already does; one that has ended meanwhile is not run again.

    Args:
        cell: To train.
        threads: For its arithmetic.
        environment: Of the process, threads aside.
        donors: Cells whose warm start it may begin from.
    """
    files = CellFiles(cell)
    lock = try_lock(files.beside(".lock"))
    if lock is None:
        return ForeignCell(files)
    if files.outcome() is not None:  # another study ended it between our last look and the lock
        os.close(lock)
        return ForeignCell(files)
    files.share_warm_start(donors)
    return TrainingProcess(files, lock=lock, threads=threads, environment=environment)
