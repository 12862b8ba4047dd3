"""The committed results of the studies, for scripts that ask them more than their tables say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

Cells = Mapping[int, Mapping[str, Any]]
"""Final cells of an arm, by seed."""


def final_cells(study: str, arm: str, millions: int | None = None) -> Cells:
    """Return the finished final cells of an arm.

    Args:
        study: Its folder.
        arm: As the table names it.
        millions: Whole millions of tokens of the length; None where the study has one length.
    """
    results = json.loads((HERE / study / "results" / "study.json").read_text(encoding="utf-8"))
    return {
        cell["seed"]: cell
        for cell in results["cells"]
        if cell["arm"] == arm
        and cell["stage"] == "final"
        and cell["status"] == "finished"
        and millions in (None, round(cell["tokens"] / 1e6 - 0.01))
    }
