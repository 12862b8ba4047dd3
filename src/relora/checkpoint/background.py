"""Saving while training goes on: a copy of what is saved, and a thread that writes it.

The copy is made where training stands still, so that a checkpoint is of one step and no later one; writing,
syncing and verifying then take none of training's time but what they take of the machine. One save is in
flight at a time. What goes wrong in it is raised at the next question after it, on the thread that asks.
"""

import threading
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from relora.errors import CheckpointError

_PATIENCE_S = 5.0


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU that nothing else writes to; names of one tensor share one copy."""
    copies: dict[tuple[object, ...], Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        # A tensor without elements has no memory to share.
        key = (tensor.device, tensor.data_ptr(), *view) if tensor.numel() else (name,)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        found[name] = copies[key]
    return found


class BackgroundWriter:
    """Does one job at a time on a thread of its own.

    Args:
        timeout_s: Seconds that a job may be waited for; a disk that hangs must not hang the run.
        notice: Told, in words, when a wait becomes long.
    """

    def __init__(self, *, timeout_s: float, notice: Callable[[str], None]) -> None:
        self._timeout_s, self._notice = timeout_s, notice
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._what = ""

    def submit(self, what: str, job: Callable[[], object]) -> None:
        """Begin a job, after the one before it has ended.

        Args:
            what: What it does, for messages.
            job: Called on the thread.

        Raises:
            CheckpointError: what the job before it raised, or that it does not end.
        """
        self.wait()
        self._what = what
        # A daemon: a write that the disk never takes must not keep the process, which has waited for it.
        self._thread = threading.Thread(target=self._run, args=(job,), name=what, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the last job raised, if it has ended; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the job in flight, and raise what it raised.

        Raises:
            CheckpointError: among others, if it does not end in time.
        """
        if self._thread is None:
            return
        self._join(self._thread)
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self, thread: threading.Thread) -> None:
        begun = time.monotonic()
        thread.join(min(_PATIENCE_S, self._timeout_s))
        if thread.is_alive():
            self._notice(f"waiting for the disk: {self._what}")
            thread.join(max(self._timeout_s - (time.monotonic() - begun), 0.0))
        if thread.is_alive():
            raise CheckpointError(
                f"{self._what}: the disk has not taken it within {self._timeout_s:g} s. What was saved "
                "before is intact; check the disk, or allow more with checkpoint.timeout_s"
            )

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # handed to the thread that trains, which alone can end the run
            self._error = error
