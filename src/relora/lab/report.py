"""Write what a study found: study.json, table.md, report.html and plots/, all from the one value."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relora.errors import CheckpointError, ConfigError
from relora.lab.gather import FORMAT
from relora.lab.results import ArmResult, arm_results
from relora.lab.table import cautions, columns, how_made, markdown, rows
from relora.lab.values import magnitude
from relora.report.study_page import Part, StudyPage, Table, write_file, write_study_page
from relora.report.study_plots import Curves, Ends, curves_picture, ends_picture, gaps_picture
from relora.report.svg import Picture

RESULTS = "study.json"
TABLE = "table.md"


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write study.json and everything that is made from it.

    Raises:
        CheckpointError: if the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / RESULTS, json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")
    write_tables(folder, results)


def write_tables(folder: Path, results: Mapping[str, Any]) -> None:
    """Write table.md, report.html and plots/."""
    write_file(folder / TABLE, markdown(results))
    write_study_page(folder, page_of(results))


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return what study.json holds; None where there is none.

    Raises:
        CheckpointError: if it cannot be read.
        ConfigError: if it is of another version's form.
    """
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = results["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as the results of a study: {error}") from error
    if version != FORMAT:
        raise ConfigError(f"{path} has format {version}, this version of relora reads {FORMAT}")
    return results


def page_of(results: Mapping[str, Any]) -> StudyPage:
    """Return the page: a section with the table and the figures for each length, then the sweeps."""
    study = results["study"]
    lines = arm_results(results)
    parts = []
    for number, budget in enumerate(study["budgets"]):
        mine = [line for line in lines if line.budget == budget]
        table = Table(
            caption="Held-out figures of the final runs",
            columns=columns(study["references"]),
            rows=rows(mine, study["references"]),
        )
        suffix = f"-{number + 1}" if len(study["budgets"]) > 1 else ""
        pictures = _pictures(mine, study["references"], suffix)
        parts.append(Part(title=budget, tables=[table], pictures=pictures))
    parts.append(Part(title="Sweeps", pictures=_sweeps(lines)))
    return StudyPage(
        title=study["name"],
        question=study["question"],
        how=how_made(results),
        cautions=cautions(results),
        parts=[part for part in parts if part.tables or part.pictures],
        source=study["source"],
    )


def _pictures(
    lines: Sequence[ArmResult], references: Sequence[str], suffix: str
) -> list[tuple[str, Picture]]:
    against_tokens = [
        Curves(label=line.arm, runs=[_curve(cell, 0, 1e6) for cell in line.cells]) for line in lines
    ]
    against_time = [
        Curves(label=line.arm, runs=[_curve(cell, 1, 60) for cell in line.cells]) for line in lines
    ]
    against_memory = [
        Ends(label=line.arm, points=[(cell["peak_memory_bytes"] / 1e6, cell["loss"]) for cell in line.cells])
        for line in lines
    ]
    found = {
        f"loss-tokens{suffix}": curves_picture(
            against_tokens,
            name=f"loss-tokens{suffix}",
            xlabel="tokens (millions)",
            title="Held-out loss against tokens",
        ),
        f"gap-tokens{suffix}": _gaps(lines, references, f"gap-tokens{suffix}"),
        f"loss-time{suffix}": curves_picture(
            against_time,
            name=f"loss-time{suffix}",
            xlabel="minutes of training",
            title="Held-out loss against wall-clock",
        ),
        f"loss-memory{suffix}": ends_picture(
            against_memory,
            name=f"loss-memory{suffix}",
            xlabel="peak memory of the process (MB)",
            title="Final held-out loss against peak memory",
        ),
    }
    return [(name, picture) for name, picture in found.items() if picture is not None]


def _gaps(lines: Sequence[ArmResult], references: Sequence[str], name: str) -> Picture | None:
    """Return each arm's distance to a reference along the run: to full rank, where that is one."""
    full = [label for line in lines if line.method == "full" for label in line.stands_for]
    label = next(iter((*full, *references)), None)
    if label is None:
        return None
    cells = {line.arm: {cell["seed"]: cell for cell in line.cells} for line in lines}
    arms = []
    for line in lines:
        theirs = {} if label in line.stands_for else cells.get(line.references.get(label, ""), {})
        pairs = [(cell, theirs[seed]) for seed, cell in cells[line.arm].items() if seed in theirs]
        arms.append(Curves(label=line.arm, runs=[_gap(mine, other) for mine, other in pairs]))
    return gaps_picture(arms, name=name, xlabel="tokens (millions)", reference=label)


def _gap(cell: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return by how much a run's held-out loss lies above another's, wherever both were measured."""
    theirs = dict(_curve(other, 0, 1e6))
    return [(tokens, loss - theirs[tokens]) for tokens, loss in _curve(cell, 0, 1e6) if tokens in theirs]


def _curve(cell: Mapping[str, Any], column: int, scale: float) -> list[tuple[float, float]]:
    return [(point[column] / scale, point[2]) for point in cell["eval_curve"]]


def _sweeps(lines: Sequence[ArmResult]) -> list[tuple[str, Picture]]:
    """Return a figure for each axis: the best loss on the tuning split at each of its values."""
    axes = dict.fromkeys(axis for line in lines for axis in line.axes)
    found = []
    for axis in axes:
        arms = [Ends(label=_label(line, lines), points=_profile(line, axis)) for line in lines]
        name = f"sweep-{axis.replace('.', '-')}"
        title = f"Sweep of {axis}: the best loss on the tuning split at each value"
        picture = ends_picture(arms, name=name, xlabel=axis, title=title, joined=True)
        if picture is not None:
            found.append((name, picture))
    return found


def _label(line: ArmResult, lines: Sequence[ArmResult]) -> str:
    return line.arm if len({other.budget for other in lines}) == 1 else f"{line.arm}, {line.budget}"


def _profile(line: ArmResult, axis: str) -> list[tuple[float, float]]:
    best: dict[float, float] = {}
    for point in line.tried:
        place = magnitude(point.settings.get(axis))
        if place is not None and place > 0 and math.isfinite(point.loss):
            best[place] = min(point.loss, best.get(place, math.inf))
    return sorted(best.items())


def _finite(value: Any) -> Any:
    """Return a value with None for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
