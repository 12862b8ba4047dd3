"""`relora eval RUN_OR_FOLDER`: how good a model is on text it has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.cli.arguments import FolderPath, VerbArguments, parse, split_settings
from relora.cli.output import print_result, stdout_for_result
from relora.errors import ConfigError
from relora.train.config import DataConfig
from relora.train.recipe_io import typed_layer


@dataclass(frozen=True, kw_only=True)
class EvalArguments(VerbArguments):
    """Measure held-out loss, perplexity and bits per byte.

    A run is measured on the held-out text of its recipe, with the --data settings given here in place of its
    own; a model folder on that of the --data settings.
    """

    path: FolderPath
    """A run's folder, a checkpoint, or a model folder in Hugging Face form."""
    sequences: int | None = None
    """Held-out sequences to measure on; none means eval.sequences of the run, or all of them for a folder."""


def run(words: Sequence[str]) -> int:
    """Evaluate, and say the result."""
    others, overrides = split_settings(words)
    arguments = parse(EvalArguments, others, verb="eval", sections={"data": DataConfig()})
    if arguments.sequences is not None and arguments.sequences < 1:
        raise ConfigError(f"eval: sequences must be at least 1, not {arguments.sequences}")
    data = typed_layer(overrides, only="data")
    with stdout_for_result(only_json=arguments.json):
        from relora.train.evaluate import evaluate_path

        result = evaluate_path(arguments.path, data=data, sequences=arguments.sequences)
    print_result(result, as_json=arguments.json)
    return 0
