"""Run as a process of its own: each request forks a victim, which saves or retires and dies on the way.

A request is a line of JSON on standard input, its answer a line on standard output: the victim's exit code
(negative: the signal that ended it), whether it was stopped, and what it complained of. torch is imported
once, before the forks.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from relora.checkpoint.store import retire, save_checkpoint
from relora.errors import CheckpointError

REFUSED = 4


def content(step: int) -> dict[str, Any]:
    """Return what the checkpoint of a step holds."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(96, 80, generator=generator)
    return {
        "tensors": {
            "model": {
                "embed": weight,
                "head": weight,
                "norm": torch.randn(80, generator=generator).bfloat16(),
            },
            "optimizer": {"embed/exp_avg": torch.randn(96, 80, generator=generator)},
        },
        "state": {"position": step * 1000, "loss": step / 7},
    }


def act(request: dict[str, Any]) -> None:
    """Do what a request asks, up to the operation where it ends."""
    left = request.get("operations")

    def observer(action: str, path: Path) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.Signals[request["signal"]])
        left = None if left is None else left - 1

    if request.get("user") is not None:
        os.seteuid(request["user"])
    if "file_limit" in request:
        if request["signal"] == "SIGXFSZ":  # which Python ignores, to get an OSError instead
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    root = Path(request["root"])
    if request["do"] == "retire":
        retire(root, keep_last=1, observer=observer)
    else:
        step = request["step"]
        save_checkpoint(
            root, step=step, **content(step), description={"restart_index": step}, observer=observer
        )


def main() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "end":
            os.kill(request["pid"], signal.SIGKILL)
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])}
        else:
            answer = run_victim(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def run_victim(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a victim and wait until it has ended or stopped."""
    complaints, complain = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act(request)
        except CheckpointError as error:
            os.write(complain, str(error).encode())
            os._exit(REFUSED)
        os._exit(0)
    os.close(complain)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        answer = {"pid": pid, "stopped": True}
    else:
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "complaint": os.read(complaints, 10_000).decode(),
        }
    os.close(complaints)
    return answer


if __name__ == "__main__":
    main()
