"""JSON lines: one strict JSON object a line, written so that a kill can tear at most the last one.

JSON has no word for a NaN or an infinity. Such a value is written as null, and the record's key
"non_finite" maps the dotted path of each ("layers.3.delta_norm") to "NaN", "Infinity" or "-Infinity".
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

from relora.errors import CheckpointError
from relora.log.files import replacing, unwritable

NON_FINITE = "non_finite"
_LARGEST_STEP = 2**53  # beyond it a float, which plots need, no longer tells steps apart


@dataclass(frozen=True, kw_only=True)
class TruncateReport:
    """What `JsonlSink.truncate_after` did to a file."""

    num_kept: int
    """Lines that stay."""
    num_later: int
    """Records dropped because their step lies after the given one."""
    num_damaged: int
    """Lines dropped because they hold no record and no kept record follows them: a torn tail."""


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """The records of a file, and the numbers (from 1) of the lines that hold none."""

    records: tuple[dict[str, object], ...]
    damaged: tuple[int, ...]


class JsonlSink:
    """Append records to a file, a line each, handed to the system before `log` returns.

    A process that dies loses no logged record; a machine that dies may lose those since `close`.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; a last line without its end is first closed off.

        Raises:
            CheckpointError: if the file cannot be opened for writing.
        """
        self._path = path
        self._open()

    def log(self, record: Mapping[str, object]) -> None:
        """Append one record.

        Raises:
            CheckpointError: if the disk refuses.
            TypeError: if a value is none that JSON has (a tensor, say), naming its key.
        """
        self._write(strict_json(record).encode() + b"\n")

    def truncate_after(self, step: int) -> TruncateReport:
        """Drop the records of steps after `step`, and a torn last line, so that a resumed run fits on.

        The file is replaced as a whole: killed here, it is found as it was.

        Raises:
            CheckpointError: if the disk refuses; the file is then as it was.
        """
        self._file.close()
        kept = later = 0
        unreadable: list[bytes] = []  # kept where a kept record follows: they are evidence, not a tail
        try:
            with self._path.open("rb") as source, replacing(self._path) as target:
                for line in source:
                    at = record_step(_parse(line))
                    if at is None:
                        unreadable.append(line)
                    elif at > step:
                        later += 1
                    else:
                        target.writelines([*unreadable, line.removesuffix(b"\n"), b"\n"])
                        kept += len(unreadable) + 1
                        unreadable.clear()
        finally:
            self._open()
        return TruncateReport(num_kept=kept, num_later=later, num_damaged=len(unreadable))

    def keep_first(self, num_records: int) -> None:
        """Drop all records but the first ones; lines that hold none stay where they are before them.

        Raises:
            CheckpointError: if the disk refuses; the file is then as it was.
        """
        left = num_records

        def change(record: dict[str, object] | None, line: bytes) -> bytes:
            nonlocal left
            left -= record is not None
            return line if left >= 0 else b""

        self._rewrite(change)

    def amend(self, step: int, values: Mapping[str, object]) -> None:
        """Add values to the record of a step, which stays one line; the file is replaced as a whole.

        Raises:
            CheckpointError: if the disk refuses; the file is then as it was.
            TypeError: as `log`.
        """

        def change(record: dict[str, object] | None, line: bytes) -> bytes:
            if record is None or record_step(record) != step:
                return line
            return strict_json({**record, **values}).encode() + b"\n"

        self._rewrite(change)

    def _rewrite(self, change: Callable[[dict[str, object] | None, bytes], bytes]) -> None:
        self._file.close()
        try:
            with self._path.open("rb") as source, replacing(self._path) as target:
                target.writelines(change(_parse(line), line) for line in source)
        finally:
            self._open()

    def sync(self) -> None:
        """Force what was logged to the disk.

        Raises:
            CheckpointError: if the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._path, error) from error

    def close(self) -> None:
        """Force what was logged to the disk and close the file; a second call does nothing."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._path, error) from error
        finally:
            self._file.close()

    def _open(self) -> None:
        try:
            # Unbuffered: a write that failed leaves nothing behind that close() would try again.
            self._file = self._path.open("ab+", buffering=0)
            if self._file.seek(0, os.SEEK_END):
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._write(b"\n")
        except OSError as error:
            raise unwritable(self._path, error) from error

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise unwritable(self._path, error) from error


def strict_json(record: Mapping[str, object]) -> str:
    """Write a record as one line of strict JSON, its non-finite numbers as null and named."""
    non_finite: dict[str, str] = {}
    plain = {str(key): _plain(value, str(key), non_finite) for key, value in record.items()}
    if non_finite:
        plain[NON_FINITE] = non_finite
    return json.dumps(plain, allow_nan=False)


def read_jsonl(path: Path) -> JsonLines:
    """Read the records of a file that may not exist yet, may be growing, or may be damaged.

    Raises:
        CheckpointError: if the file is there but cannot be read.
    """
    records: list[dict[str, object]] = []
    damaged: list[int] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = _parse(line)
                if record is None:
                    damaged.append(number)
                else:
                    records.append(record)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}. Make it a readable file, or move it away"
        ) from error
    return JsonLines(records=tuple(records), damaged=tuple(damaged))


def record_step(record: Mapping[str, object] | None) -> int | None:
    """Return the step of a record, or None where it has no whole number that a step can be."""
    step = None if record is None else record.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        return None
    return step if 0 <= step <= _LARGEST_STEP else None


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or brackets without end
        return None
    return value if isinstance(value, dict) else None


def _plain(value: object, place: str, non_finite: dict[str, str]) -> object:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{place}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{place}.{index}", non_finite) for index, item in enumerate(value)]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        non_finite[place] = "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
        return None
    raise TypeError(f"the record's {place!r} holds a {type(value).__name__}, which JSON has no form for")
