"""Run as a process of its own: each request forks a victim that trains by a recipe, and may be killed in it.

A request is a line of JSON on standard input, its answer a line on standard output. What ends a victim is a
real SIGKILL: sent by itself where the interpreter's count of calls and returns in training reaches a number,
or where a named function is entered or left for the nth time, on whichever thread; or by the parent after a
time. Other signals can be sent in the same way. torch is imported once, before the forks; every victim is a
whole `relora train`.
"""

import json
import os
import resource
import select
import signal
import sys
import threading
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import relora.cli.train  # here, since a victim of another user may not be able to read the environment
import relora.train.fit
import relora.train.trainer
from relora.cli.main import main as relora_main

_TRAINING = relora.train.trainer.Trainer.run.__code__


class Killer:
    """Counts the interpreter's calls and returns while training runs, and sends signals at some of them.

    Args:
        at_event: The count at which the process is killed.
        at_functions: [function, "call" or "return", how often, signal] each.
        before: [function, signal] sent when the function is first called, before training.
    """

    def __init__(self, *, at_event: int | None, at_functions: list[list[Any]], before: list[str]) -> None:
        self.at_event, self.at_functions, self.before = at_event, at_functions, before
        self.events = count(1)
        self.seen = 0
        self.is_training = False
        self.passes = [0] * len(at_functions)

    def watch(self) -> None:
        threading.setprofile(self)
        sys.setprofile(self)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code is _TRAINING and event in ("call", "return"):
            self.is_training = event == "call"
        if not self.is_training:
            if self.before and event == "call" and frame.f_code.co_name == self.before[0]:
                self.send(self.before.pop(), frame, event)
                self.before.clear()
            return
        self.seen = next(self.events)
        if self.seen == self.at_event:
            self.send("SIGKILL", frame, event)
        for index, (name, wanted, nth, number) in enumerate(self.at_functions):
            if event == wanted and frame.f_code.co_name == name:
                self.passes[index] += 1
                if self.passes[index] == nth:
                    self.send(number, frame, event)

    def send(self, number: str, frame: FrameType, event: str) -> None:
        code = frame.f_code
        where = f"{Path(code.co_filename).stem}.{code.co_qualname} ({event})"
        os.write(2, f"\n{number} IN {where}\n".encode())
        os.kill(os.getpid(), signal.Signals[number])


def act(request: dict[str, Any]) -> int:
    """Train as a request asks."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    os.dup2(log, 1)
    if "file_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    if "memory" in request:  # bytes beyond those that the process has mapped by now
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + request["memory"],) * 2)
    if request.get("user") is not None:
        os.seteuid(request["user"])
    killer = Killer(
        at_event=request.get("at_event"),
        at_functions=request.get("at_functions", []),
        before=request.get("before_training", []),
    )
    if request.get("watched", True):
        killer.watch()
    code = relora_main(["train", request["recipe"], *request.get("words", [])])
    sys.setprofile(None)
    os.write(2, f"\nEVENTS {killer.seen}\n".encode())
    return code


def run_victim(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a victim and wait until it has ended."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(act(request))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(99)
    if "after_s" in request:
        # Nothing is written into this pipe: it only measures the time, and ends early with the victim.
        ended = os.pidfd_open(pid)
        if not select.select([ended], [], [], request["after_s"])[0]:
            os.kill(pid, signal.Signals[request.get("signal", "SIGKILL")])
        os.close(ended)
    _, status = os.waitpid(pid, 0)
    text = Path(request["log"]).read_text(errors="replace")
    return {"code": os.waitstatus_to_exitcode(status), "log": text[-6000:]}


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(run_victim(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
