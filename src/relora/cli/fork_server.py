"""`python -m relora.cli.fork_server FD`: `relora` commands as forks of a process that has what they import.

Cells of small studies train for seconds, and importing torch and transformers takes as long. This process
imports them once, computes nothing and touches no GPU, so that a fork of it begins where a new interpreter
would after its imports. Linux alone: the libraries of other systems do not bear being forked.

Over the socket FD comes one message for each command: its words as JSON, and the descriptors of its log, of a
lock and of a pipe, both of which it keeps. To the pipe go the lines "started PID" and "ended CODE" (minus a
signal's number where one ended it).
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from relora.cli.main import main as run

_POLL_S = 0.05
_MESSAGE_BYTES = 1 << 16
_NEEDED = (
    "relora.cli.train",
    "relora.lab.methods",
    "relora.report.page",
    "relora.train.fit",
    "relora.train.reporting",
)


def serve(requests: socket.socket) -> list[str] | None:
    """Fork for each request until there are no more.

    Returns:
        In each fork the words of its command; in the server None.
    """
    notices: dict[int, int] = {}
    requests.settimeout(_POLL_S)
    while True:
        _tell_ends(notices)
        try:
            message, descriptors, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 3)
        except TimeoutError:
            continue
        if not message:
            return None
        log, lock, notice = descriptors
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            for descriptor in (log, *notices.values()):
                os.close(descriptor)
            os.set_inheritable(lock, True)
            words: list[str] = json.loads(message)
            return words
        os.close(log)
        os.close(lock)
        notices[pid] = notice
        _tell(notice, f"started {pid}")


def _tell_ends(notices: dict[int, int]) -> None:
    while notices:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        notice = notices.pop(pid)
        _tell(notice, f"ended {os.waitstatus_to_exitcode(status)}")
        os.close(notice)


def _tell(notice: int, line: str) -> None:
    with suppress(
        BrokenPipeError
    ):  # a study that was killed hears nothing more; its next start reads the files
        os.write(notice, f"{line}\n".encode())


def main(words: Sequence[str]) -> int:
    """Serve, or be one of the commands; return the exit code."""
    with socket.socket(fileno=int(words[0])) as requests:
        for module in _NEEDED:
            import_module(module)
        command = serve(requests)
    if command is None:
        return 0
    return run(command)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
