"""Run a study: as many cells side by side as the cores allow, until the plan has nothing left to do."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from relora.errors import DataError
from relora.lab.cell_files import CellFiles
from relora.lab.gather import earlier_outcomes, ended
from relora.lab.plan import Outcome, Planner, WorkPlan, predicted
from relora.lab.processes import Launcher, RunningCell, start
from relora.lab.study import Cell, Study
from relora.lab.texts import StudyTexts
from relora.report.run import last_record
from relora.train.signals import Requests

_POLL_S = 0.1
_LOOK_S = 1.0


class Observer(Protocol):
    """Who is told how a study goes."""

    def begin(self, *, total_tokens: int, num_cells: int) -> None:
        """Hear how much there will be, as far as it is known."""

    def grown(self, *, total_tokens: int, num_cells: int) -> None:
        """Hear how much there is, where it may be more than was known."""

    def say(self, text: str) -> None:
        """Hear something that should stay on the screen."""

    def started(self, cell: Cell) -> None:
        """Hear that a cell trains."""

    def progressed(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Hear a cell's last line of metrics."""

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """Hear how a cell ended, in this start of the study or in an earlier one."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """How a start of a study ended."""

    plan: WorkPlan
    outcomes: Mapping[str, Outcome]
    data: list[dict[str, Any]]
    """What was prepared, for each different [data] section of the plan."""
    exit_code: int
    """0 if all that could finish has, 1 if a cell failed (diverging is a result), 130 or 143 if stopped."""


class Runner:
    """One start of a study.

    Args:
        study: What to run.
        folder: Of the study: cells and results.
        num_slots: Cells that train at once.
        threads: Of each.
        environment: For the training processes.
        observer: Told of everything.
        requests: Ask to stop.
        is_wanted: Tells which cells may train now; the plan and the results are of all of them.
        earlier: What study.json held: cells that ended in it are not run again.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        *,
        num_slots: int,
        threads: int,
        environment: Mapping[str, str],
        observer: Observer,
        requests: Requests,
        is_wanted: Callable[[Cell], bool],
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        self._study, self._folder = study, folder
        self._num_slots = num_slots
        self._launcher = Launcher(threads=threads, environment=environment)
        self._observer, self._requests = observer, requests
        self._is_wanted = is_wanted
        self._planner = Planner(study, folder / "cells")
        self._texts = StudyTexts(folder, earlier)
        self._kept = earlier_outcomes(earlier or {})
        self._outcomes: dict[str, Outcome] = {}
        self._running: dict[str, RunningCell] = {}
        self._looked = 0.0

    def run(self) -> StudyRun:
        """Train until nothing is left, or until asked to stop.

        Raises:
            ConfigError: if cells of the study were trained on another text.
            DataError: if a text of the study cannot be prepared.
        """
        with closing(self._launcher):
            return self._run()

    def _run(self) -> StudyRun:
        cells = self._wanted(predicted(self._study, self._folder / "cells"))
        self._observer.begin(**_amount(cells))
        # Once, instead of by each process, all but one of them waiting.
        self._texts.check(cells)
        stopping = False
        plan = self._look()
        while True:
            if self._requests.stop_signal is not None and not stopping:
                stopping = True
                self._observer.say("stopping: each running cell saves first; the same command goes on")
                for running in self._running.values():
                    running.stop()
            if not stopping:
                self._start_what_can(plan)
            if not self._ours_are_running(stopping):
                break
            time.sleep(_POLL_S)
            if self._collect(stopping=stopping):
                plan = self._look()
            self._tell_progress()
        data = self._texts.facts(plan.cells)
        return StudyRun(plan=plan, outcomes=self._outcomes, data=data, exit_code=self._exit_code(stopping))

    def _look(self) -> WorkPlan:
        """Plan again until finished cells tell nothing new."""
        while True:
            plan = self._planner.plan(self._outcomes)
            for cell in self._wanted(plan.cells):  # what won may bring texts that were not foreseen
                with suppress(DataError):  # which its own process tells, while the others go on
                    self._texts.check([cell])
            unknown = [cell for cell in plan.cells if cell.name not in self._outcomes]
            found = [
                (cell, outcome)
                for cell in unknown
                if cell.name not in self._running and (outcome := ended(cell, self._kept)) is not None
            ]
            for cell, outcome in found:
                self._note(cell, outcome)
            if not found:
                self._observer.grown(**_amount(self._wanted(plan.cells)))
                self._drop_checkpoints(plan)
                return plan

    def _wanted(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if self._is_wanted(cell)]

    def _note(self, cell: Cell, outcome: Outcome) -> None:
        self._outcomes[cell.name] = outcome
        if self._is_wanted(cell):
            self._observer.ended(cell, outcome)

    def _start_what_can(self, plan: WorkPlan) -> None:
        for cell in self._wanted(plan.cells):
            if len(self._running) >= self._num_slots:
                return
            if cell.name in self._outcomes or cell.name in self._running or not self._may_begin(cell, plan):
                continue
            donors = self._kin(cell, plan)
            self._running[cell.name] = start(cell, launcher=self._launcher, donors=donors)
            self._observer.started(cell)

    def _may_begin(self, cell: Cell, plan: WorkPlan) -> bool:
        """Tell whether no other running cell is about to finish the warm start that this one needs."""
        if cell.warm_start is None or CellFiles(cell).run.exists():
            return True
        kin = self._kin(cell, plan)
        has_donor = any(files.switch_checkpoint.is_dir() for files in kin)
        return has_donor or not any(files.cell.name in self._running for files in kin)

    def _kin(self, cell: Cell, plan: WorkPlan) -> list[CellFiles]:
        """Return the other cells with the same warm start."""
        if cell.warm_start is None:
            return []
        others = [other for other in plan.cells if other.name != cell.name]
        return [CellFiles(other) for other in others if other.warm_start == cell.warm_start]

    def _ours_are_running(self, stopping: bool) -> bool:
        return any(running.is_ours or not stopping for running in self._running.values())

    def _collect(self, *, stopping: bool) -> bool:
        """Note what has ended; tell whether anything has."""
        ended = False
        for name, running in list(self._running.items()):
            outcome = running.poll()
            if outcome is None:
                continue
            ended = True
            del self._running[name]
            cell = running.files.cell
            if outcome.is_final or (running.is_ours and not stopping):
                self._note(cell, outcome)
        return ended

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for running in self._running.values():
            record = last_record(running.files.run)
            if record is not None:
                self._observer.progressed(running.files.cell, record)

    def _drop_checkpoints(self, plan: WorkPlan) -> None:
        """Free the disk of what no cell to come needs; of warm starts only once all cells are known."""
        if self._study.keep_checkpoints:
            return
        wanted = {cell.warm_start for cell in plan.cells if cell.name not in self._outcomes}
        for cell in plan.cells:
            outcome = self._outcomes.get(cell.name)
            if outcome is not None and outcome.failure is None:
                may_be_wanted = bool(plan.waiting) or cell.warm_start in wanted
                CellFiles(cell).drop_checkpoints(keep_switch=may_be_wanted)

    def _exit_code(self, stopping: bool) -> int:
        if stopping:
            return self._requests.exit_code
        return int(any(not outcome.is_final for outcome in self._outcomes.values()))


def _amount(cells: Sequence[Cell]) -> dict[str, int]:
    return {"total_tokens": sum(cell.tokens for cell in cells), "num_cells": len(cells)}
