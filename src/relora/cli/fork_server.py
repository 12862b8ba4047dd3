"""`python -m relora.cli.fork_server FD`: `relora` commands as forks of a process that has what they import.

Cells of small studies train for seconds, and importing torch and transformers takes as long. This process
imports them once, computes nothing and touches no GPU, so that a fork of it begins where a new interpreter
would after its imports. Linux alone: the libraries of other systems do not bear being forked.

Over the socket FD comes one message for each command: its words as JSON, and the descriptors of its log, of a
lock and of a pipe, both of which it keeps. Into the pipe it writes "started PID" and, at its end, "leaves
CODE"; once it has gone, the server writes "ended CODE" (minus a signal's number where one ended it).

Forks share the state of all global random generators, as new interpreters do not; a training seeds its own.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

import torch

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


def serve(requests: socket.socket) -> tuple[list[str], int] | None:
    """Fork for each request until there are no more.

    Returns:
        In each fork the words of its command and its pipe; in the server None.
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
        try:
            pid = os.fork()
        except OSError as error:
            # No memory, or too many processes: this command fails, those to come may not.
            os.write(log, f"relora: no process could be forked: {error}\n".encode())
            _tell(notice, "ended 1")
            pid = -1
        if pid == 0:
            os.setsid()
            _tell(notice, f"started {os.getpid()}")
            os.dup2(log, 1)
            os.dup2(log, 2)
            for descriptor in (log, *notices.values()):
                os.close(descriptor)
            os.set_inheritable(lock, True)
            os.set_inheritable(notice, False)
            return json.loads(message), notice
        os.close(log)
        os.close(lock)
        if pid > 0:
            notices[pid] = notice
        else:
            os.close(notice)


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
    """Serve, or be one of the commands; return the exit code.

    Raises:
        RuntimeError: if an import has begun to use a GPU, which no fork could go on with.
    """
    # Ignored, as it may be inherited, nobody could wait for forks.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=int(words[0])) as requests:
        for module in _NEEDED:
            import_module(module)
        if torch.cuda.is_initialized():
            raise RuntimeError("importing what a training needs has initialised CUDA")
        sys.stdout.flush()
        sys.stderr.flush()
        forked = serve(requests)
    if forked is None:
        return 0
    command, notice = forked
    code = run(command)
    _tell(notice, f"leaves {code}")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
