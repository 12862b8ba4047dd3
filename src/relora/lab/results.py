"""What study.json says of each arm: recomputed from its cells alone, by whoever has the file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relora.lab.choice import Choice, Tried, choose
from relora.lab.statistics import Difference, Spread, paired_difference, spread

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One line of the table."""

    arm: str
    method: str
    budget: str
    cells: tuple[Row, ...]
    """Its finished final runs."""
    failures: tuple[str, ...]
    """Final runs that did not finish, and why."""
    num_missing: int
    tried: tuple[Tried, ...]
    choice: Choice | None
    """What won the sweep; None where nothing was swept, or nothing has won yet."""
    differences: Mapping[str, Difference | None]
    """Of the loss, by reference; None where no seed is shared."""
    references: Mapping[str, str]
    """The arm that each reference means for this one."""

    @property
    def stands_for(self) -> tuple[str, ...]:
        """The references that this arm itself is."""
        return tuple(label for label, other in self.references.items() if other == self.arm)

    @property
    def axes(self) -> list[str]:
        """What was swept, in the order of the grid."""
        return list(dict.fromkeys(axis for point in self.tried for axis in point.settings))

    @property
    def loss(self) -> Spread | None:
        """The final held-out loss over seeds."""
        return self.over("loss")

    def over(self, key: str) -> Spread | None:
        """Return the spread of a figure over the finished runs that tell it."""
        values = [cell[key] for cell in self.cells if isinstance(cell.get(key), int | float)]
        return spread([float(value) for value in values]) if values else None


def arm_results(results: Mapping[str, Any]) -> list[ArmResult]:
    """Return a line for each arm and length, in the order of the study."""
    study, cells = results["study"], results["cells"]
    finished = [cell for cell in cells if cell["stage"] == "final" and cell["status"] == "finished"]
    by_arm: dict[tuple[str, str], dict[int, float]] = {}
    for cell in finished:
        by_arm.setdefault((cell["arm"], cell["budget"]), {})[cell["seed"]] = cell["loss"]
    lines = []
    for budget in study["budgets"]:
        for arm in study["arms"]:
            key = (arm["name"], budget)
            mine = [cell for cell in cells if (cell["arm"], cell["stage"]) == (arm["name"], "final")]
            mine = [cell for cell in mine if cell["budget"] == budget]
            tried = _tried(cells, arm, budget)
            lines.append(
                ArmResult(
                    arm=arm["name"],
                    method=arm["method"],
                    budget=budget,
                    cells=tuple(cell for cell in mine if cell["status"] == "finished"),
                    failures=tuple(
                        f"{cell['name']}: {cell['failure']}" for cell in mine if cell.get("failure")
                    ),
                    num_missing=len(study["seeds"]) - sum(cell["status"] != "missing" for cell in mine),
                    tried=tuple(tried),
                    choice=choose(tried) if len(tried) > 1 else None,
                    references=arm["references"],
                    differences={
                        label: paired_difference(by_arm.get(key, {}), by_arm.get((other, budget), {}))
                        for label, other in arm["references"].items()
                        if other != arm["name"]
                    },
                )
            )
    return lines


def _tried(cells: Sequence[Row], arm: Row, budget: str) -> list[Tried]:
    """Return the points of an arm's sweep that have ended, each with the axes that it swept itself."""
    return [
        Tried(
            settings={axis: cell["swept"][axis] for axis in arm["grid"] if axis in cell["swept"]},
            loss=cell["loss"] if cell["status"] == "finished" else math.inf,
        )
        for cell in cells
        if cell["arm"] == arm["name"]
        and cell["stage"] == "tuning"
        and budget in cell["serves"]
        and cell["status"] != "missing"
    ]
