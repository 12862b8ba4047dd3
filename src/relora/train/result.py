"""TrainResult: how a call of `fit` ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `fit` ended."""

    folder: Path
    summary: dict[str, Any]
    """As summary.json; empty if training was stopped before its last step."""
    exit_code: int
    """0, or 130 or 143 after SIGINT or SIGTERM."""
    was_finished: bool = False
    """Whether there was nothing left to train."""
