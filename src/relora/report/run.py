"""Read a run folder for the report, whatever state it is in: finished, running, empty or damaged.

Nothing that can be read is lost because something beside it cannot: what is left out is noted, by
file and line, and the notes stand on the page.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from relora.errors import ConfigError
from relora.log.jsonl import NON_FINITE, JsonLines, read_jsonl, record_step
from relora.log.units import number

RUN_FILES = ("recipe.toml", "metrics.jsonl", "restarts.jsonl", "summary.json")
_NAMED = 8
_TAIL_BYTES = 8192

Record = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says, in the order of its steps."""

    name: str
    recipe: str
    """The resolved recipe as written; empty where there is none."""
    settings: Mapping[str, object]
    """The same, parsed."""
    metrics: tuple[Record, ...]
    """One record a logged step."""
    restarts: tuple[Record, ...]
    """One RestartReport each."""
    summary: Record | None
    """None while the run is in progress."""
    notes: tuple[str, ...]
    """What was left out, or deserves a warning, in words."""

    @cached_property
    def last_step(self) -> int:
        """The last logged step; 0 before the first."""
        return _step(self.metrics[-1]) if self.metrics else 0

    @cached_property
    def planned_steps(self) -> int | None:
        """The steps the recipe asks for, where it says."""
        steps = number(self.section("train").get("steps"))
        return None if steps is None else int(steps)

    @cached_property
    def switch_step(self) -> int | None:
        """The last step of the warm start once it has ended; None where there was none, or not yet."""
        switch = (self.summary or {}).get("switch")
        told = number(switch.get("step")) if isinstance(switch, Mapping) else None
        if told is not None:
            return int(told)
        warm = [_step(record) for record in self.metrics if record.get("phase") == "warm_start"]
        if not warm or self.is_warming:
            return None
        planned = number(self.section("relora").get("warm_start_steps"))
        is_fixed = self.section("relora").get("warm_start_until", "steps") == "steps"
        return int(planned) if planned is not None and is_fixed else warm[-1]

    @property
    def is_warming(self) -> bool:
        """Whether the run, as far as it is logged, is still in its warm start."""
        return bool(self.metrics) and self.metrics[-1].get("phase") == "warm_start"

    def section(self, name: str) -> Mapping[str, object]:
        """Return a section of the recipe; empty where it is missing."""
        section = self.settings.get(name)
        return section if isinstance(section, Mapping) else {}


def read_run(folder: Path) -> Run:
    """Read the files of a run.

    Raises:
        ConfigError: if the folder is no run folder.
        CheckpointError: if a file is there but cannot be read.
    """
    if not any((folder / name).is_file() for name in RUN_FILES):
        raise ConfigError(
            f"{folder} is no run folder: it holds none of {', '.join(RUN_FILES)}. Name the folder that "
            "`relora train` wrote, runs/NAME by default"
        )
    notes: list[str] = []
    recipe = _text(folder / "recipe.toml")
    settings = _parsed_recipe(recipe, notes)
    metrics = _by_step("metrics.jsonl", read_jsonl(folder / "metrics.jsonl"), notes)
    restarts = _by_step("restarts.jsonl", read_jsonl(folder / "restarts.jsonl"), notes)
    _note_non_finite(metrics, notes)
    _note_hurtful_restarts(restarts, notes)
    run_section = settings.get("run")
    name = run_section.get("name") if isinstance(run_section, Mapping) else None
    return Run(
        name=name if isinstance(name, str) and name else folder.resolve().name,
        recipe=recipe,
        settings=settings,
        metrics=metrics,
        restarts=restarts,
        summary=_summary(folder / "summary.json", notes),
        notes=tuple(notes),
    )


def _step(record: Record) -> int:
    step = record_step(record)
    assert step is not None, "_by_step lets no other record through"
    return step


def _by_step(name: str, lines: JsonLines, notes: list[str]) -> tuple[Record, ...]:
    if lines.damaged:
        notes.append(
            f"{name}: {_plural(len(lines.damaged), 'line')} could not be read as JSON and "
            f"{'is' if len(lines.damaged) == 1 else 'are'} left out ({_some('line', lines.damaged)})."
        )
    dated = [record for record in lines.records if record_step(record) is not None]
    if len(dated) < len(lines.records):
        notes.append(f"{name}: {_plural(len(lines.records) - len(dated), 'record')} without a step left out.")
    # A stable sort: of records that tell the same step, the one written last counts.
    latest = {_step(record): record for record in sorted(dated, key=_step)}
    if len(latest) < len(dated):
        notes.append(
            f"{name}: {_plural(len(dated) - len(latest), 'record')} left out because a later line "
            "tells the same step again."
        )
    return tuple(latest.values())


def _note_non_finite(metrics: Sequence[Record], notes: list[str]) -> None:
    steps = [_step(record) for record in metrics if record.get(NON_FINITE)]
    if steps:
        notes.append(
            f"metrics.jsonl: {_plural(len(steps), 'record')} with a value that is not finite "
            f"({_some('step', steps)}); the lines of the plots are broken there."
        )


def _note_hurtful_restarts(restarts: Sequence[Record], notes: list[str]) -> None:
    for restart in restarts:
        before, after = number(restart.get("loss_before")), number(restart.get("loss_after"))
        if restart.get("hurt") is True and before is not None and after is not None:
            index = number(restart.get("restart_index")) or 0
            notes.append(
                f"Restart {index:.0f}, after step {_step(restart)}, hurt: the loss was "
                f"{before:.4f} before it and {after:.4f} after its re-warm."
            )


def _summary(path: Path, notes: list[str]) -> Record | None:
    text = _text(path)
    if not text:
        return None
    try:
        summary = json.loads(text)
    except (ValueError, RecursionError):
        summary = None
    if isinstance(summary, dict):
        return summary
    notes.append("summary.json: could not be read as a JSON object and is left out.")
    return None


def _parsed_recipe(recipe: str, notes: list[str]) -> Mapping[str, object]:
    try:
        return tomllib.loads(recipe)
    except (ValueError, RecursionError):
        notes.append("recipe.toml: could not be read as TOML; it is shown as it stands.")
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _plural(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}" + ("" if number_of == 1 else "s")


def _some(noun: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{noun}{'' if len(numbers) == 1 else 's'} {shown}{more}"


def last_record(folder: Path) -> Record | None:
    """Return the last whole line of a run's metrics, without reading the file; None where there is none."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):  # what follows the last line's end may be half a line
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return None
