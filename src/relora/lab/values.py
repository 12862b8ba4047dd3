"""Settings of a study that depend on others: "2x" of the cell's optim.lr, "25%" of its steps.

Everything else is a recipe's own value. What they come to is decided for each cell, when its learning rate
and its length are known, so that a study of several lengths, or with a swept learning rate, says it once.
"""

import re
from collections.abc import Mapping
from typing import Any

Layer = Mapping[str, Mapping[str, object]]
Flat = Mapping[str, object]

RATES = ("optim.low_rank_lr", "optim.factor_lr", "method.adamw_lr")
STEPS = (
    "relora.warm_start_steps",
    "relora.restart_every",
    "schedule.warmup_steps",
    "schedule.rewarmup_steps",
    "method.merge_every",
    "method.refresh_every",
    "eval.every",
    "checkpoint.every",
    "log.every",
)
_TIMES = re.compile(r"(\d+(?:\.\d+)?(?:e-?\d+)?)x")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


def flat(layer: Layer) -> dict[str, object]:
    """Return a layer's fields as "section.field"."""
    return {
        f"{section}.{field}": value for section, fields in layer.items() for field, value in fields.items()
    }


def nested(settings: Flat) -> dict[str, dict[str, object]]:
    """Return "section.field" settings as a layer."""
    layer: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        layer.setdefault(section, {})[field] = value
    return layer


def settled(settings: Flat, *, lr: float, steps: int) -> dict[str, object]:
    """Return settings with "2x" and "25%" turned into numbers; every other value as it is.

    Args:
        settings: As "section.field".
        lr: The cell's optim.lr.
        steps: The cell's length.
    """
    return {key: _settled(key, value, lr, steps) for key, value in settings.items()}


def _settled(key: str, value: object, lr: float, steps: int) -> object:
    if not isinstance(value, str):
        return value
    if key in RATES and (times := _TIMES.fullmatch(value)):
        return float(times[1]) * lr
    if key in STEPS and (percent := _PERCENT.fullmatch(value)):
        return round(float(percent[1]) / 100 * steps)
    return value


def magnitude(value: object) -> float | None:
    """Return the number in a setting that can be ordered; None for any other.

    "2x" is 2, "25%" is 25, and a list of one number many times, as equal multiples of a rate, that number.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, list | tuple):
        numbers = {magnitude(item) for item in value}
        return numbers.pop() if len(numbers) == 1 else None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str) and (found := _TIMES.fullmatch(value) or _PERCENT.fullmatch(value)):
        return float(found[1])
    return None


def like(value: object, number: float) -> Any:
    """Return a number in the form of a setting: as "2x", "25%", a list, a whole number or a fraction."""
    if isinstance(value, list | tuple):
        return [like(item, number) for item in value]
    if isinstance(value, str):
        return f"{number:g}{value[-1]}"
    return max(1, round(number)) if isinstance(value, int) else float(f"{number:.6g}")


def shown(value: object) -> str:
    """Write a setting for a person."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)
