"""The committed results of the studies, for scripts that ask them more than their tables say."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from relora.lab.statistics import Difference, paired_difference

HERE = Path(__file__).parent

Cells = Mapping[int, Mapping[str, Any]]
"""Final cells of an arm, by seed."""


def final_cells(study: str, arm: str, budget: str | None = None) -> Cells:
    """Return the finished final cells of an arm.

    Args:
        study: Its folder.
        arm: As the table names it.
        budget: The length as the table names it, such as "2.5 M tokens"; None where the study has one.
    """
    return {
        cell["seed"]: cell
        for cell in _cells(study)
        if cell["arm"] == arm
        and cell["stage"] == "final"
        and cell["status"] == "finished"
        and budget in (None, cell["budget"])
    }


@cache
def _cells(study: str) -> list[dict[str, Any]]:
    results = json.loads((HERE / study / "results" / "study.json").read_text(encoding="utf-8"))
    cells: list[dict[str, Any]] = results["cells"]
    return cells


def over_seeds(values: Mapping[int, float]) -> Difference:
    """Return mean and 95 % interval of differences that are paired by seed already."""
    found = paired_difference(values, dict.fromkeys(values, 0.0))
    assert found is not None
    return found
