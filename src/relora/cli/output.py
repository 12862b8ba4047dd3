"""What verbs write to stdout: one JSON object with --json, aligned lines without."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout

_WIDE = 80
"""A list that is longer than this in characters gets a line for each item."""


class HelpShown(Exception):
    """The help was asked for and has been printed: there is nothing left to do."""


def is_main_process() -> bool:
    """Tell whether this is the one process of a torchrun job that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def process_prefix() -> str:
    """Name this process where several write to the same screen."""
    return f"[rank {os.environ.get('RANK', '0')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


@contextmanager
def stdout_for_result(*, only_json: bool) -> Iterator[None]:
    """Send what is printed on the way to stderr, so that stdout holds the JSON result and nothing else."""
    if not only_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_result(result: Mapping[str, object], *, as_json: bool) -> None:
    """Print the result of a verb, once over all processes."""
    if not is_main_process():
        return
    if as_json:
        print_json(result)
    else:
        print("\n".join(_lines(result)))


def print_json(result: Mapping[str, object]) -> None:
    """Print one JSON object; numbers that JSON cannot say (NaN, infinities) are null."""
    if is_main_process():
        print(json.dumps(_plain(result), allow_nan=False))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _lines(result: Mapping[str, object], indent: str = "") -> Iterator[str]:
    width = max((len(str(key)) for key in result), default=0)
    for key, value in result.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list | tuple) and len(_shown(value)) > _WIDE:
            yield f"{indent}{key}"
            yield from (f"{indent}  {_shown(item)}" for item in value)
        else:
            yield f"{indent}{key!s:<{width}}  {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if value is None or value == {}:
        return "none"
    # A model's sample may hold an escape sequence, or turn the text around: neither may act on a screen.
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(value))
