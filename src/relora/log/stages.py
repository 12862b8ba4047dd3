"""What a person waiting for data sees: a line for each stage, and for every 100 MB of text in it."""

import sys
from typing import TextIO

_BYTES_A_LINE = 100_000_000


class StageLines:
    """Says on standard error what is being done; a progress callback of `data.prepare`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._stage, self._next_bytes = "", 0

    def __call__(self, stage: str, num_bytes: int) -> None:
        """Say it, where it is due."""
        if stage == self._stage and num_bytes < self._next_bytes:
            return
        amount = f" ({num_bytes / 1e6:,.0f} MB so far)" if stage == self._stage else ""
        print(f"{stage}{amount}", file=self._stream, flush=True)
        self._stage, self._next_bytes = stage, num_bytes + _BYTES_A_LINE
