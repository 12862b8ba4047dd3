"""Requests from outside: stop after this step, or save after it.

The first SIGINT or SIGTERM lets the step end and be saved; the second ends the process at once, as it would
have without us. SIGUSR1 saves and goes on.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

STOPS = (signal.SIGINT, signal.SIGTERM)


class Requests:
    """What this process was asked for by signals."""

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        self.save_asked = False

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal that asks to stop, as shells count."""
        assert self.stop_signal is not None
        return 128 + self.stop_signal

    def take(self) -> tuple[bool, ...]:
        """Return which requests stand, one flag for each of STOPS and one for a save, which it ends."""
        save_asked, self.save_asked = self.save_asked, False
        return (*(self.stop_signal == number for number in STOPS), save_asked)


def stop_signal(flags: tuple[bool, ...]) -> int | None:
    """Return the signal among the flags of `take` that stops the run, if any; SIGTERM outdoes SIGINT."""
    asked = [number for number, is_set in zip(STOPS, flags, strict=False) if is_set]
    return max(asked, default=None)


@contextmanager
def saving_on_signal(requests: Requests) -> Iterator[None]:
    """Turn SIGUSR1 into a request to save while the body runs."""

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        requests.save_asked = True

    wanted = getattr(signal, "SIGUSR1", None)  # Windows has none
    with _handling({} if wanted is None else {wanted: note}):
        yield


@contextmanager
def stopping_on_signals(requests: Requests) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request to stop while the body runs."""

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        requests.stop_signal = number
        for each in STOPS:
            signal.signal(each, signal.SIG_DFL)

    with _handling(dict.fromkeys(STOPS, note)):
        yield


@contextmanager
def _handling(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    """Handle signals while the body runs; the handlers of before come back after."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone, which is not ours here
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            # None: installed by a library from C, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler_before is None else handler_before)
