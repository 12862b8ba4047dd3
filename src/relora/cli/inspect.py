"""`relora inspect RUN`: what a folder holds, without training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from relora.cli.arguments import FolderPath, VerbArguments, parse
from relora.cli.output import print_result, stdout_for_result

_DAMAGED = 4


@dataclass(frozen=True, kw_only=True)
class InspectArguments(VerbArguments):
    """Show what a run is, how far it is, and what its checkpoints hold."""

    path: FolderPath
    """The run's folder."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare every byte of every checkpoint with its digest; exit code 4 if one is damaged."""


def run(words: Sequence[str]) -> int:
    """Inspect, and say what was found."""
    arguments = parse(InspectArguments, words, verb="inspect")
    with stdout_for_result(only_json=arguments.json):
        from relora.train.inspect import inspect_run

        result = inspect_run(arguments.path, verify=arguments.verify)
    print_result(result, as_json=arguments.json)
    return _DAMAGED if arguments.verify and result["num_damaged"] else 0
