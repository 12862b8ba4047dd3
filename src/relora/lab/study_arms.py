"""The [methods.NAME] tables of a study, and the settings in them, as arms."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from relora.lab.study import Arm, arm_named
from relora.lab.study_tables import Table
from relora.lab.values import flat, shown
from relora.train.config import SECTIONS
from relora.train.methods import method_names, option_annotation, unknown_method
from relora.train.recipe_io import nearest

_METHOD = {"method": str, "inherit": str, "set": dict, "grid": dict, "vary": dict}
_DECIDED = {
    **dict.fromkeys(("run.name", "run.out"), "the study names its cells"),
    **dict.fromkeys(("run.seed",), "study.seeds decides"),
    **dict.fromkeys(("run.method",), "method = decides, in [methods.NAME]"),
    **dict.fromkeys(("train.steps", "train.tokens"), "study.steps or study.tokens decides"),
    **dict.fromkeys(("eval.split", "data.tuning_fraction"), "[tuning] decides"),
    **dict.fromkeys(("checkpoint.keep_last",), "study.keep_checkpoints decides"),
}
PLAIN_NAME = re.compile(r"[\w.+=@-]+")


def read_settings(table: Table, place: str, problems: list[str], *, lists: bool = False) -> dict[str, Any]:
    """Return a table of sections as "section.field"; each value a list of values where `lists`."""
    sections = {}
    for section, fields in table.items():
        if section not in SECTIONS:
            problems.append(f"{place}.{section} is not a section of a recipe{nearest(section, SECTIONS)}")
        elif not isinstance(fields, Mapping):
            problems.append(f"{place}.{section} must hold settings ({section}.field = value)")
        else:
            sections[section] = fields
    found = flat(sections)
    for key, value in found.items():
        if key in _DECIDED:
            problems.append(f"{place}: {key} must be left out: {_DECIDED[key]}")
        if key.startswith("method.") and option_annotation(key.removeprefix("method.")) is None:
            problems.append(f"{place}: {key} is a setting of no method")
        if lists and (not isinstance(value, list) or not value):
            problems.append(f"{place}: {key} must be a list of values, not {value!r}")
    return found


def read_arms(methods: Table, references: Sequence[str], problems: list[str]) -> list[Arm]:
    """Return the arms of a study, each after the one it inherits from.

    Args:
        methods: The tables by name.
        references: The study's, which each arm is to find its own of.
        problems: Receives what is wrong, in words.
    """
    drafts: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    varied: dict[str, dict[str, object]] = {}
    for name, table in methods.items():
        place = f"methods.{name}"
        if not isinstance(table, Mapping):
            problems.append(f"{place} must be a table [{place}], not {table!r}")
            continue
        for key in table:
            if key not in _METHOD:
                problems.append(f"{place}.{key} is not a known key{nearest(key, _METHOD)}")
            elif not isinstance(table[key], _METHOD[key]):
                wanted = "a text" if _METHOD[key] is str else f"a table [{place}.{key}]"
                problems.append(f"{place}.{key} must be {wanted}, not {table[key]!r}")
        if not PLAIN_NAME.fullmatch(name):
            problems.append(f"{place}: a method's name must be plain (letters, digits and -_.+=@)")
        problems += [
            f"{place}.{problem}{nearest(str(table.get('method', name)), method_names())}"
            for problem in unknown_method(str(table.get("method", name)))
        ]
        parts = {key: value if isinstance(value := table.get(key), Mapping) else {} for key in _METHOD}
        own = read_settings(parts["set"], f"{place}.set", problems)
        grid = read_settings(parts["grid"], f"{place}.grid", problems, lists=True)
        vary = read_settings(parts["vary"], f"{place}.vary", problems, lists=True)
        problems += [
            f"{place}: {key} must be in one of set, grid and vary"
            for key in {*own, *grid, *vary}
            if sum(key in part for part in (own, grid, vary)) > 1
        ]
        for arm_name, values in _combinations(name, vary):
            drafts[arm_name] = (name, {**own, **values}, grid)
            varied[arm_name] = values
    return _linked(methods, drafts, varied, references, problems)


def _combinations(name: str, vary: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, object]]]:
    lists = [values if isinstance(values, list) else [values] for values in vary.values()]
    for values in itertools.product(*lists):
        chosen = dict(zip(vary, values, strict=True))
        words = [f"{key.partition('.')[2]}={shown(value)}" for key, value in chosen.items()]
        yield " ".join([name, *words]), chosen


def _linked(
    methods: Table,
    drafts: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]],
    varied: Mapping[str, Mapping[str, object]],
    references: Sequence[str],
    problems: list[str],
) -> list[Arm]:
    """Return the arms with what they refer to, each after the one it inherits from."""

    def meant(wanted: str, mine: str, place: str, *, must_be_one: bool = True) -> str | None:
        found = arm_named(varied, wanted, varied[mine])
        if len(found) == 1:
            return found[0]
        if found and not must_be_one:  # an arm that does not vary what the reference varies
            return None
        if not found:
            problems.append(f"{place}: {wanted!r} is no method of the study{nearest(wanted, methods)}")
        else:
            problems.append(f"{place}: {wanted!r} is several arms ({', '.join(found)}): name one of them")
        return None

    arms = []
    for name, (key, settings, grid) in drafts.items():
        parent = methods[key].get("inherit")
        place = f"methods.{key}.inherit"
        inherited = meant(parent, name, place) if isinstance(parent, str) else None
        method = methods[key].get("method", key)
        arms.append(
            Arm(
                name=name,
                method=method if isinstance(method, str) else key,
                settings=settings,
                grid={axis: tuple(values) for axis, values in grid.items() if isinstance(values, list)},
                inherit=inherited,
                references={
                    label: found
                    for label in references
                    if (found := meant(label, name, "study.references", must_be_one=False)) is not None
                },
            )
        )
    return _in_order(arms, problems)


def _in_order(arms: Sequence[Arm], problems: list[str]) -> list[Arm]:
    ordered: list[Arm] = []
    left = list(arms)
    while left:
        known = {arm.name for arm in ordered}
        ready = [arm for arm in left if arm.inherit is None or arm.inherit in known]
        if not ready:
            problems.append(f"inherit goes in a circle: {', '.join(arm.name for arm in left)}")
            break
        ordered += ready
        left = [arm for arm in left if arm not in ready]
    return ordered
