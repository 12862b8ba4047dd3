"""study.toml -> Study, strictly: whatever is wrong is said at once, with the nearest name.

[study]   like, name, question, base, steps | tokens (one or several), seeds, references,
          keep_checkpoints, tokens_per_s
[tuning]  seed, steps | tokens, fraction, search, extend
[set]     settings of all cells, by section: relora.rank = 32
[methods.NAME]  method (default NAME), inherit;  [.set] its settings;  [.grid] lists to tune over;
          [.vary] lists that make an arm of each combination
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relora.errors import ConfigError
from relora.lab.study import Arm, Budget, Search, Study
from relora.lab.study_arms import PLAIN_NAME, read_arms, read_settings
from relora.lab.study_tables import Table, read_tables
from relora.train.checks import UnfitError, fitted
from relora.train.recipe_io import find_recipe, nearest, read_recipe

_STUDY = {
    "name": str,
    "question": str,
    "base": str,
    "steps": int | tuple[int, ...] | None,
    "tokens": int | tuple[int, ...] | None,
    "seeds": tuple[int, ...],
    "references": tuple[str, ...],
    "keep_checkpoints": bool,
    "tokens_per_s": float | None,
}
_TUNING = {
    "seed": int,
    "steps": int | None,
    "tokens": int | None,
    "fraction": float,
    "search": Search,
    "extend": int,
}


def read_study(path: Path) -> Study:
    """Read a study file; relative paths in it are taken from where the command runs, but `base` beside it.

    Raises:
        ConfigError: if it cannot be read, or listing everything that is wrong with it.
    """
    found = read_tables(path)
    own, *others = found.files
    subject = f"study {own}" + "".join(f" (like {other})" for other in others)
    return build_study(found.tables, source=found.source, subject=subject, beside=path.parent)


def build_study(tables: Table, *, source: str, subject: str, beside: Path) -> Study:
    """Return the study that the tables of a file describe.

    Args:
        tables: As `tomllib` reads them.
        source: The file's text, which results keep.
        subject: What the message of an error is about.
        beside: Folder that a relative `base` is taken from.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    problems = [
        f"[{name}] is not a known table{nearest(name, ('study', 'tuning', 'set', 'methods'))}"
        for name in tables
        if name not in ("study", "tuning", "set", "methods")
    ]
    head = _typed(_table(tables, "study", problems), _STUDY, "study", problems)
    tuning = _typed(_table(tables, "tuning", problems), _TUNING, "tuning", problems)
    settings = read_settings(_table(tables, "set", problems), "set", problems)
    methods = _table(tables, "methods", problems)
    if not methods:
        problems.append("[methods.NAME] must be there for at least one method")
    budgets = _budgets(head, "study", problems, needed=True)
    tuning_budgets = _budgets(tuning, "tuning", problems, needed=False)
    seeds = head.get("seeds", (0,))
    problems += _seed_problems(seeds, tuning.get("seed", 1000))
    arms = read_arms(methods, head.get("references", ()), problems)
    base = _base(head.get("base", "quickstart"), beside, problems)
    fraction = tuning.get("fraction", 0.05 if any(arm.grid for arm in arms) else 0.0)
    if not 0 <= fraction < 1:
        problems.append(f"tuning.fraction must be at least 0 and below 1, not {fraction:g}")
    elif not fraction and any(arm.grid for arm in arms):
        problems.append("tuning.fraction must be above 0 where a method has a grid")
    if tuning.get("extend", 0) < 0:
        problems.append(f"tuning.extend must be at least 0, not {tuning['extend']}")
    if problems:
        raise ConfigError.from_violations(subject, problems)
    study = Study(
        name=head.get("name", beside.resolve().name),
        question=head.get("question", ""),
        source=source,
        base=base,
        settings=settings,
        arms=tuple(arms),
        seeds=seeds,
        budgets=budgets,
        references=head.get("references", ()),
        tuning_seed=tuning.get("seed", 1000),
        tuning_budget=tuning_budgets[0] if tuning_budgets else None,
        tuning_fraction=fraction,
        search=tuning.get("search", "grid"),
        extend=tuning.get("extend", 0),
        keep_checkpoints=head.get("keep_checkpoints", False),
        tokens_per_s=head.get("tokens_per_s"),
    )
    if not PLAIN_NAME.fullmatch(study.name):
        raise ConfigError(f"{subject}: study.name must be a plain folder name, not {study.name!r}")
    _check_recipes(study, subject)
    return study


def _points(study: Study, arm: Arm) -> list[dict[str, object]]:
    """Return every point that an arm's grid names; one empty point where it has none."""
    return [{**arm.fixed, **point} for points in arm.sweeps(study.search) for point in points] or [arm.fixed]


def _table(tables: Table, name: str, problems: list[str]) -> Table:
    table = tables.get(name, {})
    if isinstance(table, Mapping):
        return table
    problems.append(f"{name} must be a table [{name}], not {table!r}")
    return {}


def _typed(table: Table, types: Mapping[str, Any], place: str, problems: list[str]) -> dict[str, Any]:
    found = {}
    for key, value in table.items():
        if key not in types:
            problems.append(f"{place}.{key} is not a known key{nearest(key, types)}")
            continue
        try:
            found[key] = fitted(types[key], value)
        except UnfitError as unfit:
            problems.append(f"{place}.{key} {unfit}")
    return found


def _budgets(table: Table, place: str, problems: list[str], *, needed: bool) -> tuple[Budget, ...]:
    given = {kind: table[kind] for kind in ("steps", "tokens") if table.get(kind) is not None}
    if len(given) != 1:
        if given or needed:
            problems.append(f"{place}.steps or {place}.tokens must be given, and not both")
        return ()
    kind, lengths = next(iter(given.items()))
    listed = lengths if isinstance(lengths, tuple) else (lengths,)
    if not listed or min(listed) < 1 or len(set(listed)) < len(listed):
        problems.append(f"{place}.{kind} must be at least 1, and no length given twice")
    return tuple(Budget(**{kind: length}) for length in listed)


def _seed_problems(seeds: Sequence[int], tuning_seed: int) -> Iterator[str]:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        yield f"study.seeds must be different whole numbers from 0, at least one, not {list(seeds)}"
    if tuning_seed < 0:
        yield f"tuning.seed must be at least 0, not {tuning_seed}"


def _base(name: str, beside: Path, problems: list[str]) -> dict[str, dict[str, object]]:
    try:
        local = beside / name
        path = find_recipe(local if local.is_file() else name)
        base = read_recipe(path)
    except ConfigError as error:
        problems.append(f"study.base: {error}")
        return {}
    return {section: fields for section, fields in base.items() if isinstance(fields, Mapping)} | {
        # The study's own, whatever the recipe says.
        "run": {key: value for key, value in base.get("run", {}).items() if key == "method"},
    }


def _check_recipes(study: Study, subject: str) -> None:
    """Resolve every cell that the grids name, so that what cannot work is known before anything trains."""
    problems: dict[str, None] = {}
    first: dict[str, dict[str, object]] = {}
    for arm in study.arms:
        inherited = first.get(arm.inherit, {}) if arm.inherit else {}
        points = [{**arm.begins_with(inherited), **point} for point in _points(study, arm)]
        first[arm.name] = points[0]
        lengths = {*study.budgets, *([study.tuning_budget] if study.tuning_budget else [])}
        for swept, budget in itertools.product(points, lengths):
            try:
                study.cell(arm, "final", budget, seed=study.seeds[0], swept=swept, out=Path("cells"))
            except ConfigError as error:
                problems.setdefault(f"{error}")
    if problems:
        raise ConfigError.from_violations(subject, list(problems))
