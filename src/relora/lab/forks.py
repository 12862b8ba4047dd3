"""Our side of `relora.cli.fork_server`: ask for forks of a process, and hear how each ends."""

import json
import os
import socket
from contextlib import suppress
from typing import Protocol


class Server(Protocol):
    """The process that forks."""

    def wait(self) -> int:
        """Wait until it has ended."""


class Interpreter(Protocol):
    """Starts a Python module as a process."""

    def __call__(self, module: list[str], *, log: int, descriptors: tuple[int, ...]) -> Server:
        """Start it with its words, its output in a log, and descriptors that it inherits."""


class Fork:
    """A process that the server forked.

    Args:
        notices: End of a pipe from which lines come that the server and the process write.
    """

    def __init__(self, notices: int) -> None:
        os.set_blocking(notices, False)
        self._notices = notices
        self._heard = b""
        self._asked: list[int] = []
        self.pid: int | None = None
        """Of the process; None while it has not been heard of."""
        self._code: int | None = None
        self._code_without_server = 1

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number where one ended it; None while it runs.

        Where the server ended first, it is what the process said last, or else 1.
        """
        if self._code is None:
            self._listen()
            if self._code is not None:
                os.close(self._notices)
        return self._code

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, once it has been forked; one that has ended is left alone."""
        self._asked.append(number)
        self.poll()

    def _listen(self) -> None:
        """Hear what there is, and pass on the signals that were waiting."""
        is_closed = False
        with suppress(BlockingIOError):  # no more for now
            while piece := os.read(self._notices, 4096):
                self._heard += piece
            is_closed = True  # neither the server nor the process holds the pipe any more
        for line in self._heard.decode().splitlines():
            what, number = line.split()
            match what:
                case "started":
                    self.pid = int(number)
                case "leaves":
                    self._code_without_server = int(number)
                case "ended":
                    self._code = int(number)
        if is_closed and self._code is None:
            self._code = self._code_without_server
        if self._code is None and self.pid is not None:
            while self._asked:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(self.pid, self._asked.pop(0))


class ForkServer:
    """A process that forks on request, begun with the first one.

    Args:
        interpreter: Starts it.
    """

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter
        self._running: tuple[socket.socket, Server] | None = None

    def start(self, words: list[str], *, log: int, lock: int) -> Fork:
        """Ask for a fork that runs a `relora` command; return at once, even while the server imports.

        Args:
            words: Verb and arguments.
            log: Descriptor for what it says; the server's own, too, if it begins with this one.
            lock: Descriptor that the fork keeps.
        """
        reader, writer = os.pipe()
        message = json.dumps(words).encode()
        try:
            for _ in range(2):
                requests = self._requests(log)
                try:
                    socket.send_fds(requests, [message], [log, lock, writer])
                except (
                    BrokenPipeError,
                    ConnectionResetError,
                ):  # it ended, for want of memory, say: once more
                    self.close()
                else:
                    break
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return Fork(reader)

    def close(self) -> None:
        """End the server; its forks run on."""
        if self._running is not None:
            requests, server = self._running
            self._running = None
            requests.close()
            server.wait()

    def _requests(self, log: int) -> socket.socket:
        if self._running is None:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with its:
                module = ["relora.cli.fork_server", str(its.fileno())]
                try:
                    self._running = ours, self._interpreter(module, log=log, descriptors=(its.fileno(),))
                except BaseException:
                    ours.close()
                    raise
        return self._running[0]
