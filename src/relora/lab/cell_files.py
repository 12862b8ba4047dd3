"""The files of a study's cells: run folders, their recipes and logs, locks, failures, shared warm starts.

    STUDY/cells/NAME/             the run folder that `relora train` makes
    STUDY/cells/NAME.toml, .log   what it was given, what it said
    STUDY/cells/NAME.lock         held by the process that trains it, and by its children
    STUDY/cells/NAME.ended.json   how a run ended that did not finish
    STUDY/cells/NAME.shared.json  whose warm start it began from

A lock is inherited by the training process: if the study is killed, the process that goes on training still
holds it, and a study that is started again waits for it instead of training beside it.
"""

import json
import math
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from relora.lab.plan import Outcome
from relora.lab.study import Cell
from relora.train.recipe_io import write_recipe
from relora.train.run_folder import METRICS, NONFINITE, SUMMARY, note_origin
from relora.train.saved import CHECKPOINTS, MODEL_CONFIG, TOKENIZER

NON_FINITE_CODE = 5
_OWN = "relora: "
_WARNING = "relora: warning: "


class CellFiles:
    """Where one cell keeps what."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.run = cell.recipe.run.folder

    def beside(self, suffix: str) -> Path:
        """Return the file of this cell with a suffix, such as ".log"."""
        return self.run.with_name(self.run.name + suffix)

    @property
    def switch_checkpoint(self) -> Path:
        """The checkpoint at the end of the warm start."""
        return self.run / CHECKPOINTS / f"step-{self.cell.recipe.switch_step or 0:08d}"

    def write_recipe(self) -> Path:
        """Write the recipe that the training process is given."""
        path = self.beside(".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_recipe(self.cell.recipe, path)
        return path

    def summary(self) -> dict[str, Any] | None:
        """Return what came out, or None while it has not finished."""
        path = self.run / SUMMARY
        if not path.is_file():
            return None
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    def outcome(self) -> Outcome | None:
        """Return how the cell ended; None if it has not, or deserves another try."""
        summary = self.summary()
        if summary is not None:
            loss = summary.get("eval/loss")
            if isinstance(loss, float) and math.isfinite(loss):
                return Outcome(loss=loss)
            return Outcome(loss=math.inf, failure="diverged: its evaluated loss is not finite")
        ended = read_json(self.beside(".ended.json"))
        if ended is None or ended["exit_code"] != NON_FINITE_CODE:
            return None
        return Outcome(loss=math.inf, failure=f"diverged: {ended['message']}")

    def note_end(self, exit_code: int, *, log_start: int = 0) -> Outcome:
        """Record that the training process ended before the run did; return that as the outcome.

        Args:
            exit_code: Of the process; minus the signal's number where one ended it.
            log_start: Bytes that the log held when the process began: what earlier attempts said.
        """
        message = _last_words(self.beside(".log"), start=log_start)
        if exit_code < 0:
            message = f"ended by {_signal_name(-exit_code)}; last in its log: {message}"
        write_json(self.beside(".ended.json"), {"exit_code": exit_code, "message": message})
        found = self.outcome()
        if found is not None:
            return found
        return Outcome(loss=math.inf, failure=f"exit code {exit_code}: {message}", is_final=False)

    def share_warm_start(self, donors: Iterable["CellFiles"]) -> str | None:
        """Begin from the warm start of another cell, if there is one; return its name.

        The folder appears as a whole: the resolved recipe, the checkpoint at the switch, and what a run needs
        to go on from it. Going on gives the bits that training the warm start again would.
        """
        if self.run.exists():
            return None
        for donor in donors:
            if donor.run == self.run or not donor.switch_checkpoint.is_dir():
                continue
            part = self.beside(".partial")
            shutil.rmtree(part, ignore_errors=True)
            name = self.switch_checkpoint.name
            for source in (MODEL_CONFIG, TOKENIZER, f"{CHECKPOINTS}/{name}"):
                shutil.copytree(donor.run / source, part / source)
            for log in (METRICS, NONFINITE):
                if (donor.run / log).is_file():
                    shutil.copy2(donor.run / log, part / log)
            note_origin(part, donor.run, name)
            write_recipe(self.cell.recipe, part / "recipe.toml")
            write_json(self.beside(".shared.json"), {"donor": donor.cell.name})
            part.rename(self.run)
            return donor.cell.name
        return None

    def shared_from(self) -> str | None:
        """Return whose warm start this cell began from."""
        shared = read_json(self.beside(".shared.json"))
        return None if shared is None else str(shared["donor"])

    def drop_checkpoints(self, *, keep_switch: bool) -> None:
        """Remove the checkpoints of a finished cell; its summary, logs and recipe stay."""
        root = self.run / CHECKPOINTS
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if not (keep_switch and path == self.switch_checkpoint):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def try_lock(path: Path) -> int | None:
    """Return a descriptor that holds a file's lock until it and all its copies are closed; None if taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl
    except ImportError:  # no POSIX: nothing guards against two studies in one folder
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def write_json(path: Path, value: object) -> None:
    """Write a small JSON file, which appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a small JSON file holds; None if it is not there."""
    if not path.is_file():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _last_words(log: Path, *, start: int) -> str:
    """Return our own error from a log behind so many bytes, or the last line that is no warning of ours."""
    said = log.read_bytes()[start:] if log.is_file() else b""
    lines = [line for line in said.decode("utf-8", errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_WARNING)]
    own = [line for line in lines if line.startswith(_OWN)]
    return (own or lines or ["nothing was said"])[-1].removeprefix(_OWN)[:500]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
