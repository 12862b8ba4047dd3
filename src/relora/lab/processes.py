"""One cell's training as a process of its own: what `relora train` is, with so many threads."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Protocol

from relora.lab.cell_files import CellFiles, try_lock
from relora.lab.forks import ForkServer
from relora.lab.plan import Outcome
from relora.lab.study import Cell

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
_SINGLE = {"OPENBLAS_NUM_THREADS": "1"}
"""NumPy's, which would start its threads as it is imported, and so before a fork."""


class Started(Protocol):
    """A process: one of `subprocess`, or a fork of another."""

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number where one ended it; None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal; one that has ended is left alone."""


class Launcher:
    """Starts `relora` commands.

    On Linux they are forks of one process that has imported what they need (`relora.cli.fork_server`);
    elsewhere each begins by itself. They do not end with us: a study that is killed leaves them running.

    Args:
        threads: For the arithmetic of each.
        environment: Of the processes, threads aside.
    """

    def __init__(self, *, threads: int, environment: Mapping[str, str]) -> None:
        self._environment = {**environment, **dict.fromkeys(_THREADS, str(threads)), **_SINGLE}
        self._forks = ForkServer(self._interpreter) if sys.platform == "linux" else None

    def start(self, words: list[str], *, log: int, lock: int) -> Started:
        """Start a command in a session of its own.

        Args:
            words: Verb and arguments.
            log: Descriptor of a file that takes what it says.
            lock: Descriptor that it holds as long as it or a child of it runs.
        """
        if self._forks is not None:
            return self._forks.start(words, log=log, lock=lock)
        return self._interpreter(["relora", *words], log=log, descriptors=(lock,))

    def close(self) -> None:
        """Start nothing more; what runs, runs on."""
        if self._forks is not None:
            self._forks.close()

    def _interpreter(
        self, module: list[str], *, log: int, descriptors: tuple[int, ...]
    ) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C reaches the study alone, which asks each process once.
            start_new_session=True,
            pass_fds=descriptors if os.name == "posix" else (),
        )


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
        launcher: Starts it.
    """

    is_ours = True

    def __init__(self, files: CellFiles, *, lock: int, launcher: Launcher) -> None:
        self.files = files
        self._lock = lock
        self._asked = False
        words = ["train", str(files.write_recipe())]
        with files.beside(".log").open("ab") as log:
            self._log_start = log.tell()
            self._process = launcher.start(words, log=log.fileno(), lock=lock)

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


def start(cell: Cell, *, launcher: Launcher, donors: Iterable[CellFiles]) -> RunningCell:
    """Train a cell, or watch the process that already does; one that has ended meanwhile is not run again.

    Args:
        cell: To train.
        launcher: Starts its process.
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
    return TrainingProcess(files, lock=lock, launcher=launcher)
