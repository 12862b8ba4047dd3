"""JSON that comes back as it went in: no NaN, no tuples, no doubled keys, and bounded depth and size.

`json` alone turns tuples into lists and numbers into text keys without a word; a resumed run would then start
from another state than the one it saved. Values it would change are refused on the way out, and foreign text
is measured before it is parsed.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from relora.errors import CheckpointError

MAX_DEPTH = 64
MAX_INTEGER_BITS = 4096

# Texts as wholes, so that brackets inside them do not count; one without its end runs to the end of the file.
# Possessive, so that no input makes it go back: the scan is linear.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


def to_json(value: object, *, place: str) -> bytes:
    """Return `value` as JSON in one form: reading it and writing it again gives the same bytes.

    Args:
        value: None, booleans, finite numbers, texts, lists, and dicts with text keys.
        place: What it is, for the message.

    Raises:
        CheckpointError: naming each value that would not come back the same.
    """
    problems = _unfit(value, place, MAX_DEPTH)
    if problems:
        raise CheckpointError(f"cannot write {place} as JSON: {listed(problems)}")
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii")


def from_json(data: bytes, *, place: str) -> Any:
    """Return the value that JSON text spells.

    Raises:
        CheckpointError: if it is no JSON, nested too deep, holds NaN or an infinity, or gives a key twice.
    """
    if too_deep(data):
        raise CheckpointError(f"{place} is nested deeper than {MAX_DEPTH} levels")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_doubles,
            parse_float=_finite,
            parse_int=_bounded,
            parse_constant=_not_json,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is not valid JSON: {shown(str(error))}") from error


def shown(value: object) -> str:
    """Return a value for a message: what foreign text holds is escaped and cut short."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def listed(problems: Sequence[str], *, most: int = 10) -> str:
    """Join problems into one text, the first ones in full and the others by their number."""
    rest = len(problems) - most
    return "; ".join([*problems[:most], *([f"and {rest} more"] if rest > 0 else [])])


def _unfit(value: object, place: str, depth: int) -> list[str]:
    if isinstance(value, dict | list):
        return _unfit_parts(value, place, depth - 1) if depth else [f"{place} is nested too deep"]
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        return [f"{place} is too large a number"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{place} is {value}, which JSON does not have"]
    if value is None or isinstance(value, bool | int | float | str):
        return []
    return [f"{place} is a {type(value).__name__} (use numbers, texts, lists and dicts)"]


def _unfit_parts(value: dict[Any, object] | list[object], place: str, depth: int) -> list[str]:
    if isinstance(value, list):
        parts = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
        problems = []
    else:
        parts = [(f"{place}.{key}", item) for key, item in value.items()]
        problems = [
            f"{place} has a key {shown(key)} that is no text" for key in value if not isinstance(key, str)
        ]
    return problems + [problem for inner, item in parts for problem in _unfit(item, inner, depth)]


def too_deep(data: bytes) -> bool:
    """Whether JSON text is nested deeper than MAX_DEPTH, told without parsing it."""
    depth = 0
    for token in _TOKEN.finditer(data):
        if token[0] in (b"[", b"{"):
            depth += 1
        elif token[0] in (b"]", b"}"):
            depth -= 1
        if depth > MAX_DEPTH:
            return True
    return False


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(text)} is too large")
    return number


def _bounded(text: str) -> int:
    number = int(text)  # Python itself refuses thousands of digits, whose conversion takes quadratic time
    if number.bit_length() > MAX_INTEGER_BITS:
        raise ValueError("a number is too large")
    return number


def _not_json(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
