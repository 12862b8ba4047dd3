"""`relora compare STUDY`: methods side by side, tuned alike, over seeds, to a table and a page."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from relora.cli.arguments import VerbArguments, parse
from relora.cli.output import print_json, print_result, stdout_for_result
from relora.errors import ConfigError


def _cores() -> int:
    """Return the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class CompareArguments(VerbArguments):
    """Run a study resumably: finished cells are never run again, and a killed study goes on.

    docs/laboratory.md shows how to write one.
    """

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY")]
    """The study's TOML file, or the folder of one named study.toml."""
    out: Path | None = None
    """Folder of its cells and results; none is runs/NAME."""
    cores: int = field(default_factory=_cores)
    """Threads of all cells together."""
    threads_per_cell: int = 1
    """Threads of each cell; as many cells run side by side as the cores allow."""
    arms: tuple[str, ...] = ()
    """Train only these arms now, and the tuning of those they inherit from; results stay those of all."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only list the cells and the tokens they would train on."""
    tables_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only recompute the table, the page and the plots, from the cells or from study.json."""


def run(words: Sequence[str]) -> int:
    """Compare, and return the exit code."""
    arguments = parse(CompareArguments, words, verb="compare")
    with stdout_for_result(only_json=arguments.json):
        from relora.lab.compare import compare, dry_run, tables_only
        from relora.lab.study_file import read_study
        from relora.lab.study_tables import study_file

        if "--arms" in words and (arguments.tables_only or not arguments.arms):
            raise ConfigError(
                "--arms names the arms to train now, one at least, and has no place beside --tables-only"
            )
        path = study_file(arguments.study)
        study = read_study(path)
        folder = arguments.out or Path("runs") / study.name
        if arguments.tables_only:
            results, code = tables_only(study, folder), 0
        elif arguments.dry_run:
            code = 0
            results = dry_run(
                study,
                folder,
                cores=arguments.cores,
                threads_per_cell=arguments.threads_per_cell,
                arms=arguments.arms,
            )
        else:
            from relora.cli.study_screen import StudyScreen

            with StudyScreen() as screen:
                results, code = compare(
                    study,
                    folder,
                    cores=arguments.cores,
                    threads_per_cell=arguments.threads_per_cell,
                    environment=dict(os.environ),
                    observer=screen,
                    arms=arguments.arms,
                )
        if not arguments.dry_run:
            _conclude(results, folder, code, as_json=arguments.json)
    if arguments.dry_run:
        _show_dry_run(results, as_json=arguments.json)
    elif arguments.json:
        print_json({"folder": folder, "exit_code": code, **_counts(results)})
    return code


def _show_dry_run(listed: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_result(listed, as_json=True)
        return
    shown = {key: value for key, value in listed.items() if key != "cells"}
    print_result(shown, as_json=False)
    for cell in listed["cells"]:
        words = [f"{cell['stage']:<6}", f"{cell['tokens']:>13,}", cell["budget"], f"seed {cell['seed']}"]
        shared = "(warm start shared)" if cell["shares_warm_start"] else ""
        print("  ".join(filter(None, [*words, cell["arm"], cell["swept"], shared])))


def _conclude(results: Mapping[str, Any], folder: Path, code: int, *, as_json: bool) -> None:
    from relora.lab.report import TABLE

    if not as_json:
        print((folder / TABLE).read_text(encoding="utf-8"))
    counts = _counts(results)
    print(", ".join(f"{count} {status}" for status, count in counts["cells"].items()), file=sys.stderr)
    if code == 1:
        print("some cells failed: see the notes; the same command tries them again", file=sys.stderr)
    print(f"{folder}: study.json, {TABLE}, report.html, plots/", file=sys.stderr)


def _counts(results: Mapping[str, Any]) -> dict[str, Any]:
    statuses = [cell["status"] for cell in results["cells"]]
    return {"cells": {status: statuses.count(status) for status in dict.fromkeys(statuses)}}
