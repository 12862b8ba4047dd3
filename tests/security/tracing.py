"""Which lines of given functions were run: to know that a fuzzer reaches all of a parser."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any


class Reached:
    """The lines run of some functions, nested ones included."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self.wanted = {
            (code.co_filename, line)
            for function in functions
            for code in _codes(_plain(function).__code__)
            for line in _lines(code)
        }
        self.files = {file for file, _ in self.wanted}
        self.seen: set[tuple[str, int]] = set()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Note what runs inside the block, on this thread."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    @property
    def missed(self) -> list[str]:
        """The lines never run, as "file:line"."""
        return sorted(f"{file.rpartition('/')[2]}:{line}" for file, line in self.wanted - self.seen)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename in self.files else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def _plain(function: Any) -> Any:
    """Return the function inside a class method, a property or a context manager."""
    for name in ("__func__", "fget", "__wrapped__"):
        function = getattr(function, name, function)
    return function


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _lines(code: CodeType) -> set[int]:
    lines = {line for _, _, line in code.co_lines() if line is not None}
    return lines - {code.co_firstlineno}
