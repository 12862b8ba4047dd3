"""What a person watching a run sees: a progress display on a terminal, plain lines anywhere else.

Everything goes to standard error, so that standard output stays free for `--json`. On a terminal a
bar with two lines of figures is redrawn in place, and what should stay (evaluations, the switch,
restarts) scrolls away above it. Elsewhere each logged record is one line without control codes.
"""

import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from relora.log.restarts import restart_line
from relora.log.units import count, duration, number, perplexity, scientific, visible

PHASES = {"warm_start": "warm start", "low_rank": "low-rank", "full": "full rank"}
_PACE_RECORDS = 50
_GAP = "   "


class Console:
    """Show a run's progress; a sink of its records, and a context manager that leaves a clean screen."""

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        switch_step: int | None = None,
        restart_steps: Sequence[int] = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display; it appears with the first call.

        Args:
            total_steps: The last step of the run.
            start_step: The step a resumed run stands at.
            switch_step: The last step of the warm start, where there is one.
            restart_steps: The steps at which restarts will fall, in order.
            stream: Where to write; standard error unless given.
            clock: Seconds that only go forward, for the time left.
        """
        self._total_steps = total_steps
        self._switch_step = switch_step
        self._restart_steps = list(restart_steps)
        self._stream = sys.stderr if stream is None else stream
        self._pace = _Pace(start_step, clock)
        self._heldout: tuple[int, float] | None = None
        self._closed = False
        self._bar = _bar(self._stream, total_steps, start_step) if _is_screen(self._stream) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Move the bar to a step that is done; cheap, and nothing but that."""
        if self._bar is not None and not self._closed:
            self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=step)

    def log(self, record: Mapping[str, object]) -> None:
        """Show one record of metrics.jsonl."""
        step = int(number(record.get("step")) or 0)
        heldout = number(record.get("eval/perplexity"))
        if heldout is not None:
            self._heldout = (step, heldout)
        left_s = self._pace.left(step, self._total_steps)
        phase = visible(str(PHASES.get(str(record.get("phase")), record.get("phase", ""))))
        figures = [*self._figures(record, step), *self._coming(step)]
        if self._bar is None:
            time_left = [] if left_s is None else [f"{duration(left_s)} left"]
            self.say(" | ".join([f"step {step}/{self._total_steps}", phase, *figures, *time_left]))
            return
        if heldout is not None:
            self.say(f"step {step}: held-out perplexity {perplexity(heldout)}")
        self.advance(step)
        self._bar.update(
            self._bar.task_ids[0],
            description=phase,
            figures=_GAP.join(figures),
            left="" if left_s is None else f"{duration(left_s)} left",
        )

    def switch(self, step: int, *, heldout_perplexity: float | None = None) -> None:
        """Say that the warm start ended with `step`."""
        at = "" if heldout_perplexity is None else f", held-out perplexity {perplexity(heldout_perplexity)}"
        self.say(f"switch after step {step}: low-rank from here{at}")

    def restart(self, report: Mapping[str, object]) -> None:
        """Say what a restart did, from its RestartReport as a mapping."""
        self.say(restart_line(report))

    def say(self, text: str) -> None:
        """Write one line that stays."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(Text(text))

    def close(self) -> None:
        """Leave the display as it stands and give the terminal back; `say` still works afterwards."""
        self._closed = True
        if self._bar is not None:
            self._bar.stop()

    def _figures(self, record: Mapping[str, object], step: int) -> list[str]:
        loss = number(record.get("train/loss"))
        lr = number(record.get("lr"))
        tokens_per_s = number(record.get("tokens_per_s"))
        figures = ["loss not finite" if loss is None else f"loss {loss:.4f}"]
        if self._heldout is not None and (self._bar is not None or self._heldout[0] == step):
            figures.append(f"held-out ppl {perplexity(self._heldout[1])}")
        if lr is not None:
            figures.append(f"lr {scientific(lr)}")
        if tokens_per_s is not None:
            figures.append(f"{count(tokens_per_s)} tokens/s")
        return figures

    def _coming(self, step: int) -> list[str]:
        if self._switch_step is not None and step < self._switch_step:
            return [f"switch in {_steps(self._switch_step - step)}"]
        passed = bisect_right(self._restart_steps, step)
        if passed == len(self._restart_steps):
            return []
        return [f"restart {passed + 1} in {_steps(self._restart_steps[passed] - step)}"]


class _Pace:
    """Seconds a step over the last records: evaluations and saves count, a slow first compile fades."""

    def __init__(self, start_step: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen = deque([(start_step, clock())], maxlen=_PACE_RECORDS)

    def left(self, step: int, total_steps: int) -> float | None:
        self._seen.append((step, self._clock()))
        (first_step, first_s), (last_step, last_s) = self._seen[0], self._seen[-1]
        if last_step <= first_step:
            return None
        return (total_steps - step) * (last_s - first_s) / (last_step - first_step)


class _Bar(Progress):
    """A progress bar with a line of figures under it, which wraps on a narrow screen."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Padding(Text(task.fields["figures"], style="dim"), (0, 0, 0, 2))


def _steps(number_of: int) -> str:
    return "1 step" if number_of == 1 else f"{number_of} steps"


def _is_screen(stream: TextIO) -> bool:
    # Asked of the stream itself: rich would take FORCE_COLOR for a terminal, and write codes to a file.
    return stream.isatty() and not RichConsole(file=stream).is_dumb_terminal


def _bar(stream: TextIO, total_steps: int, start_step: int) -> _Bar:
    bar = _Bar(
        TextColumn("{task.description}", markup=False, style="bold"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=RichConsole(file=stream, highlight=False, markup=False, emoji=False),
        refresh_per_second=4,
        redirect_stdout=False,  # standard output belongs to --json
        expand=True,
    )
    bar.add_task("starting", total=total_steps, completed=start_step, figures="", left="")
    return bar
