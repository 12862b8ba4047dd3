"""`relora VERB ...`: find the verb, run it, and turn what goes wrong into one message and an exit code.

0 done, 2 usage or configuration, 3 data, 4 checkpoint, 5 non-finite, 130 and 143 stopped by SIGINT and
SIGTERM after a good save (1: anything else of ours). Errors that are not ours keep their traceback.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from relora import __version__
from relora.cli.output import HelpShown, print_json, process_prefix
from relora.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ReLoRAError

VERBS = {
    "train": "train a model by a recipe; the same command again resumes the run",
    "prepare": "read, tokenize and cache a recipe's data, without training",
    "plan": "foretell a recipe's memory, FLOPs and length, before it runs",
    "eval": "measure held-out loss, perplexity and bits per byte of a run or a model",
    "generate": "continue a prompt with a run or a model",
    "export": "write a run's model as a folder that stock transformers loads",
    "compare": "run a study: several methods, tuned and measured alike, resumably, to one table",
    "doctor": "look for trouble before a run: devices, disk, determinism, one step of a recipe",
    "inspect": "show what a run is, how far it is, and what its checkpoints hold",
}

_EXIT_CODES: dict[type[ReLoRAError], int] = {
    ConfigError: 2,
    DataError: 3,
    CheckpointError: 4,
    NonFiniteError: 5,
}

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Verb and arguments; by default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _dispatch(words)
        sys.stdout.flush()
    except HelpShown:
        return 0
    except ReLoRAError as error:
        return _complain(error, as_json="--json" in words)
    except KeyboardInterrupt:
        print("relora: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return code


def _show_warning(  # noqa: PLR0917 - as `warnings` calls it
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning in one line: where in the code it was given is of no use on a command line."""
    del category, filename, lineno, line
    print(f"relora: warning: {message}", file=file or sys.stderr)


def exit_code(error: ReLoRAError) -> int:
    """Return the exit code of one of our errors."""
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    verb, *rest = words
    if verb in ("-V", "--version"):
        print(f"relora {__version__}")
        return 0
    if verb not in VERBS:
        from relora.train.recipe_io import nearest

        raise ConfigError(f"{verb!r} is not a verb{nearest(verb, VERBS)}; the verbs are {', '.join(VERBS)}")
    import_module("relora.lab.methods")  # makes their names known to recipes
    code: int = import_module(f"relora.cli.{verb}").run(rest)
    return code


def _complain(error: ReLoRAError, *, as_json: bool) -> int:
    code = exit_code(error)
    print(f"{process_prefix()}relora: {error}", file=sys.stderr)
    if as_json:
        print_json({"error": str(error), "kind": type(error).__name__, "exit_code": code})
    return code


def _overview() -> str:
    lines = ["usage: relora VERB ... (relora VERB --help shows all of a verb's settings)", ""]
    lines += [f"  {verb:<10}{summary}" for verb, summary in VERBS.items()]
    return "\n".join([*lines, "", "`relora train` alone trains the quickstart and downloads nothing."])
