"""`relora inspect RUN`: what a folder holds, without training."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.cli.arguments import FolderPath, VerbArguments, parse
from relora.cli.output import print_result, stdout_for_result


@dataclass(frozen=True, kw_only=True)
class InspectArguments(VerbArguments):
    """Show what a run is, how far it is, and what its checkpoints hold."""

    path: FolderPath
    """The run's folder."""


def run(words: Sequence[str]) -> int:
    """Inspect, and say what was found."""
    arguments = parse(InspectArguments, words, verb="inspect")
    with stdout_for_result(only_json=arguments.json):
        from relora.train.inspect import inspect_run

        result = inspect_run(arguments.path)
    print_result(result, as_json=arguments.json)
    return 0
