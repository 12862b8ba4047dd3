"""`relora export RUN OUT`: a model for everybody else's tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from relora.cli.arguments import FolderPath, VerbArguments, parse
from relora.cli.output import print_json, stdout_for_result
from relora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportArguments(VerbArguments):
    """Write a run's model, factors merged, as a folder that stock transformers loads."""

    path: FolderPath
    """The run's folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write; it must not exist."""
    step: int | None = None
    """Checkpoint to export; none means the newest valid one."""


def run(words: Sequence[str]) -> int:
    """Export, and say where to."""
    arguments = parse(ExportArguments, words, verb="export")
    if arguments.step is not None and arguments.step < 0:
        raise ConfigError(f"export: --step must be at least 0, not {arguments.step}")
    with stdout_for_result(only_json=arguments.json):
        from relora.train.export import export_run

        out = export_run(arguments.path, arguments.out, step=arguments.step)
    if arguments.json:
        print_json({"run": arguments.path, "out": out})
    else:
        print(f"exported {arguments.path} to {out}")
    return 0
