"""What a study has to run, as a pure function of what has been run: nothing else decides.

Each arm is tuned first, then trained with every seed at what won; an arm that inherits waits for the other's
winner. Seeds come one after the other, so that a study which was stopped has whole comparisons. Asked again
after every finished cell, the answer grows until nothing in it is left to do. So a study that was killed, or
whose file has got another seed, goes on where it stands.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from relora.errors import ConfigError
from relora.lab.choice import Settings, Tried, beyond, choose
from relora.lab.study import Arm, Budget, Cell, Stage, Study, arm_named
from relora.train.recipe_io import nearest


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended."""

    loss: float
    """Evaluated loss; infinite where the run diverged, or failed in another way."""
    failure: str | None = None
    """What went wrong, in words; None if it finished."""
    is_final: bool = True
    """Whether running it again would end the same."""


Outcomes = Mapping[str, Outcome]
"""By the name of the cell."""


@dataclass(kw_only=True)
class WorkPlan:
    """What there is to run, as far as it is known."""

    cells: list[Cell] = field(default_factory=list)
    """Finished ones included, in the order to run them."""
    notes: list[str] = field(default_factory=list)
    """What cannot be run, and why."""
    waiting: list[tuple[Arm, Budget]] = field(default_factory=list)
    """Arms whose final cells await a winner."""


class Planner:
    """Plans of one study; recipes that were resolved for one plan serve the next.

    Args:
        study: The study.
        out: Folder of the run folders.
    """

    def __init__(self, study: Study, out: Path) -> None:
        self._study, self._out = study, out
        self._cells: dict[str, Cell] = {}

    def plan_with(self, known: Callable[[Cell], Outcome | None]) -> tuple[WorkPlan, dict[str, Outcome]]:
        """Plan until what is known of the plan's cells tells nothing new.

        Args:
            known: How a cell ended; None where it has not.

        Returns:
            The plan, and how those of its cells ended that have.
        """
        outcomes: dict[str, Outcome] = {}
        while True:
            plan = self.plan(outcomes)
            unknown = [cell for cell in plan.cells if cell.name not in outcomes]
            new = {cell.name: outcome for cell in unknown if (outcome := known(cell)) is not None}
            if not new:
                return plan, outcomes
            outcomes |= new

    def plan(self, outcomes: Outcomes) -> WorkPlan:
        """Return every cell that is known to be needed."""
        plan = WorkPlan()
        finals: list[Cell] = []
        winners: dict[tuple[str, Budget], Settings | None] = {}
        for arm in self._study.arms:
            for budget in self._study.budgets:
                key = (arm.name, budget)
                parent = (arm.inherit, budget)
                if arm.inherit is not None and parent not in winners:
                    plan.waiting.append((arm, budget))
                    continue
                inherited = {} if arm.inherit is None else winners[arm.inherit, budget]
                if inherited is None:
                    plan.notes.append(f"{arm.name}: not run, since no run of {arm.inherit} succeeded")
                    winners[key] = None
                    continue
                begun = arm.begins_with(inherited)
                won, is_known = self._sweep(arm, budget, begun, outcomes=outcomes, plan=plan)
                if not is_known:
                    plan.waiting.append((arm, budget))
                    continue
                winners[key] = won
                if won is None:
                    plan.notes.append(f"{arm.name}: every run of its grid failed, so it has no final runs")
                else:
                    finals += self.finals(arm, budget, won)
        seeds = self._study.seeds
        plan.cells += sorted(finals, key=lambda cell: seeds.index(cell.seed))
        return plan

    def finals(self, arm: Arm, budget: Budget, swept: Settings) -> list[Cell]:
        """Return an arm's runs with every seed at settings that won."""
        return [self._cell(arm, "final", budget, seed=seed, swept=swept) for seed in self._study.seeds]

    def _sweep(
        self, arm: Arm, budget: Budget, begun: Settings, *, outcomes: Outcomes, plan: WorkPlan
    ) -> tuple[Settings | None, bool]:
        """Return what an arm trains with (None where every run of a sweep failed), and whether that is known.

        The cells of its sweeps join the plan.
        """
        tried: list[Tried] = []
        won: Settings = {**begun, **arm.fixed}
        for points in arm.sweeps(self._study.search):
            axes = set(points[0])
            to_try: Sequence[Settings] = points
            for _ in range(1 + self._study.extend):
                cells = self._tuning_cells(arm, budget, [{**won, **point} for point in to_try], plan=plan)
                if any(cell.name not in outcomes for cell in cells):
                    return None, False
                tried += [
                    Tried(settings=arm.own(cell.swept), loss=outcomes[cell.name].loss) for cell in cells
                ]
                choice = choose(tried)
                if choice is None:
                    return None, True
                won = {**won, **choice.winner.settings}
                to_try = beyond(choice, tried, axes=axes)
        return won, True

    def _tuning_cells(
        self, arm: Arm, budget: Budget, points: Sequence[Settings], *, plan: WorkPlan
    ) -> list[Cell]:
        """Return the cells that try some points, with what comes before them; they join the plan."""
        seed, length = self._study.tuning_seed, self._study.tuning_budget or budget
        cells = []
        for point in points:
            try:
                cells.append(self._cell(arm, "tuning", length, seed=seed, swept=point))
            except ConfigError as error:  # only beyond the grid of the file, which has been checked
                plan.notes.append(f"{arm.name}: the grid ends here: {error}")
        known = {cell.name for cell in plan.cells}
        plan.cells += [cell for cell in cells if cell.name not in known]
        return cells

    def _cell(self, arm: Arm, stage: Stage, budget: Budget, *, seed: int, swept: Settings) -> Cell:
        key = json.dumps([arm.name, stage, budget.label, seed, swept], sort_keys=True)
        if key not in self._cells:
            self._cells[key] = self._study.cell(arm, stage, budget, seed=seed, swept=swept, out=self._out)
        return self._cells[key]


def wanted_cells(study: Study, names: Sequence[str]) -> Callable[[Cell], bool]:
    """Return what tells the cells of some arms, and the tuning of those they inherit from; all without names.

    Args:
        study: The study.
        names: Arms, or what arms that `vary` makes are named after.

    Raises:
        ConfigError: for a name that no arm has.
    """
    varied: dict[str, Settings] = {arm.name: {} for arm in study.arms}
    meant = {name: arm_named(varied, name, {}) for name in names}
    known = {*varied, *(name.partition(" ")[0] for name in varied)}
    unknown = [f"{name!r}{nearest(name, known)}" for name, arms in meant.items() if not arms]
    if unknown:
        raise ConfigError(f"study {study.name} has no arm {', '.join(unknown)}")
    trained = {arm for arms in meant.values() for arm in arms} or set(varied)
    tuned = set(trained)
    for arm in reversed(study.arms):  # every arm follows the one it inherits from
        if arm.name in tuned and arm.inherit is not None:
            tuned.add(arm.inherit)
    return lambda cell: cell.arm in (tuned if cell.stage == "tuning" else trained)


def predicted(study: Study, out: Path) -> list[Cell]:
    """Return all cells of a study before any has run, final ones as if the first point of each grid won."""
    planner = Planner(replace(study, extend=0), out)
    # Every sweep "finishes" at once, its first point the best; no grid is extended.
    cells: dict[str, Cell] = {}
    outcomes: dict[str, Outcome] = {}
    while True:
        plan = planner.plan(outcomes)
        new = [cell for cell in plan.cells if cell.name not in cells]
        if not new:
            return list(cells.values())
        for cell in new:
            cells[cell.name] = cell
            outcomes[cell.name] = Outcome(loss=0.0)
