"""The last screen of a run: what came out of it, in words that need no knowledge of the paper."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.box import ROUNDED
from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relora.log.units import count, duration, number, percent, perplexity, size, visible

_PLAIN_WIDTH = 100
_SAMPLE_CHARACTERS = 800


def last_screen(summary: Mapping[str, object], folder: Path, *, stream: TextIO | None = None) -> None:
    """Show a finished run: its figures, a sample of its text, its report, and what to run next.

    Args:
        summary: As in summary.json. "switch" and "ranks" may be null or missing; "ranks" has "one_cycle"
            (the rank of one cycle's update), "learned" (the rank of W_end - W_switch, the median over
            layers) and "largest" (the most a layer allows).
        folder: The run folder, as the user would name it.
        stream: Where to write; standard error unless given.
    """
    stream = sys.stderr if stream is None else stream
    screen = RichConsole(file=stream, highlight=False, markup=False, emoji=False)
    if not stream.isatty():  # no control codes, whatever the environment asks of rich
        screen = RichConsole(
            file=stream, highlight=False, markup=False, emoji=False, width=_PLAIN_WIDTH,
            force_terminal=False, color_system=None,
        )  # fmt: skip
    parts: list[RenderableType] = [Text(""), _figures(summary, folder)]
    sample = summary.get("sample")
    if isinstance(sample, str) and sample.strip():
        parts += [Text(""), _sample(sample)]
    screen.print(Panel(Group(*parts), title=_title(summary, folder), box=ROUNDED, expand=True))
    screen.print(_next(folder, sample if isinstance(sample, str) else ""), soft_wrap=True)


def _title(summary: Mapping[str, object], folder: Path) -> Text:
    steps, tokens, wall_s = (number(summary.get(key)) for key in ("steps", "tokens", "wall_s"))
    done = [
        "" if steps is None else f"{steps:,.0f} steps",
        "" if tokens is None else f"{count(tokens)} tokens",
        "" if wall_s is None else duration(wall_s),
    ]
    name = visible(folder.name or str(folder)).replace("\n", " ")
    return Text(f"{name}: {summary.get('method')}, {', '.join(filter(None, done))}", style="bold")


def _figures(summary: Mapping[str, object], folder: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in figure_rows(summary):
        table.add_row(Text(name), Text(value))
    table.add_row(Text("Report"), Text(visible(str(folder / "report.html"))))
    return table


def figure_rows(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    """List the figures of a summary that are there, named and worded for a newcomer."""
    rows = [
        ("Held-out perplexity", _perplexities(summary)),
        ("Parameters", _parameters(summary)),
        ("Rank", _ranks(summary)),
        ("Restarts", _restarts(summary)),
        ("Speed", _speed(summary)),
    ]
    return [(name, value) for name, value in rows if value]


def _perplexities(summary: Mapping[str, object]) -> str:
    switch = summary.get("switch")
    before = number(switch.get("eval/perplexity")) if isinstance(switch, Mapping) else None
    after = number(summary.get("eval/perplexity"))
    if after is None:
        return ""
    if before is None or not isinstance(switch, Mapping):
        return f"{perplexity(after)} at the end (lower is better)"
    at = f"{perplexity(before)} at the switch (step {switch.get('step')}, where full-rank training ended)"
    return f"{at}, {perplexity(after)} at the end (lower is better)"


def _parameters(summary: Mapping[str, object]) -> str:
    trainable, total = (number(summary.get(f"parameters_{kind}")) for kind in ("trainable", "total"))
    if trainable is None or total is None:
        return ""
    return f"{count(trainable)} trained of {count(total)} in all ({percent(trainable, total)})"


def _ranks(summary: Mapping[str, object]) -> str:
    ranks = summary.get("ranks")
    if not isinstance(ranks, Mapping):
        return ""
    learned, one_cycle, largest = (number(ranks.get(key)) for key in ("learned", "one_cycle", "largest"))
    if learned is None or one_cycle is None:
        return ""
    bound = "" if largest is None else f" (the largest possible: {largest:,.0f})"
    return f"{learned:,.0f} learned over all cycles, where one cycle can reach {one_cycle:,.0f}{bound}"


def _restarts(summary: Mapping[str, object]) -> str:
    restarts = number(summary.get("restarts"))
    if not restarts:
        return ""
    return f"{restarts:,.0f}: each merged what was learned into the weights and began a new low-rank cycle"


def _speed(summary: Mapping[str, object]) -> str:
    tokens_per_s, peak = number(summary.get("tokens_per_s")), number(summary.get("peak_memory_bytes"))
    speed = "" if tokens_per_s is None else f"{count(tokens_per_s)} tokens/s"
    return ", ".join(filter(None, [speed, "" if peak is None else f"{size(peak)} of memory at most"]))


def _sample(sample: str) -> Group:
    shown = visible(sample.strip())
    if len(shown) > _SAMPLE_CHARACTERS:
        shown = shown[:_SAMPLE_CHARACTERS] + " [...]"
    return Group(
        Text("What the model writes", style="bold"), Padding(Text(shown, style="italic"), (0, 0, 0, 2))
    )


def _next(folder: Path, sample: str) -> Text:
    """List commands that can be copied: a line each, which no frame and no fold breaks."""
    run = visible(shlex.quote(str(folder)))
    exported = visible(shlex.quote(f"{folder.name or 'run'}-exported"))
    opening = next((word[:24] for word in sample.split() if word.isalpha()), "The")
    lines = Text("What to run next", style="bold")
    for command, effect in [
        (f"relora eval {run}", "measure it on held-out text again"),
        (f"relora generate {run} --prompt {shlex.quote(opening)}", "let it go on from a text of yours"),
        (f"relora export {run} {exported}", "write a folder that transformers loads"),
    ]:
        lines.append(f"\n  {command}", style="not bold cyan")
        lines.append(f"  # {effect}", style="not bold dim")
    return lines
