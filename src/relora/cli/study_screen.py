"""What a person watching a study sees: a bar for the whole and one for each cell that trains.

Elsewhere than on a terminal, a line for each cell that begins or ends.
"""

import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from relora.lab.plan import Outcome
    from relora.lab.study import Cell


class StudyScreen:
    """Shows how a study goes; an `Observer` of the laboratory, and a context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._num_cells = self._num_ended = self._total_tokens = 0
        self._tokens: dict[str, int] = {}
        self._tasks: dict[str, TaskID] = {}
        self._whole: TaskID | None = None
        self._bars = _bars(self._stream) if self._stream.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, *, total_tokens: int, num_cells: int) -> None:
        """Show the whole; grids that are extended add to it later."""
        self._num_cells, self._total_tokens = num_cells, total_tokens
        self.say(f"{num_cells} cells, {total_tokens / 1e6:.1f} M tokens")
        if self._bars is not None:
            self._bars.start()
            self._whole = self._bars.add_task("all cells", total=total_tokens, figures="")

    def grown(self, *, total_tokens: int, num_cells: int) -> None:
        """Show that there is more to do than was known."""
        if num_cells > self._num_cells:
            self._num_cells, self._total_tokens = num_cells, max(total_tokens, self._total_tokens)
            self._show_whole()

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self._bars is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bars.console.print(Text(text))

    def started(self, cell: "Cell") -> None:
        """Show a cell that trains."""
        if self._bars is None:
            self.say(f"started {cell.name}: {cell.tokens / 1e6:.2f} M tokens")
        else:
            self._tasks[cell.name] = self._bars.add_task(cell.name, total=cell.tokens, figures="")

    def progressed(self, cell: "Cell", record: Mapping[str, Any]) -> None:
        """Show how far a cell is."""
        tokens, loss = record.get("tokens"), record.get("train/loss")
        if not isinstance(tokens, int):
            return
        self._tokens[cell.name] = tokens
        if self._bars is not None and cell.name in self._tasks:
            figures = f"loss {loss:.4f}" if isinstance(loss, float) else ""
            self._bars.update(self._tasks[cell.name], completed=tokens, figures=figures)
            self._show_whole()

    def ended(self, cell: "Cell", outcome: "Outcome") -> None:
        """Show how a cell ended."""
        self._num_ended += 1
        self._tokens[cell.name] = cell.tokens
        perplexity = math.exp(min(outcome.loss, 700))
        result = outcome.failure or f"loss {outcome.loss:.4f}, perplexity {perplexity:.2f}"
        self.say(f"[{self._num_ended}/{self._num_cells}] {cell.name}: {result}")
        if self._bars is not None:
            task = self._tasks.pop(cell.name, None)
            if task is not None:
                self._bars.remove_task(task)
            self._show_whole()

    def _show_whole(self) -> None:
        if self._bars is not None and self._whole is not None:
            figures = f"{self._num_ended}/{self._num_cells} cells"
            done = sum(self._tokens.values())
            self._bars.update(self._whole, total=self._total_tokens, completed=done, figures=figures)


def _bars(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=Console(file=stream, highlight=False, markup=False, emoji=False),
        refresh_per_second=2,
        redirect_stdout=False,
    )
