"""`relora plan [RECIPE]`: what a run will need, before it starts."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relora.cli.arguments import RecipeArguments, parse_with_recipe
from relora.cli.output import print_json, stdout_for_result
from relora.errors import ConfigError
from relora.train.checks import unmet

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PlanArguments(RecipeArguments):
    """Foretell a recipe's memory by kind, FLOPs and length, for every method side by side.

    Nothing is allocated, trained or written. The real model and the real training step run on tensors that
    have shapes alone, so the figures are those of the code as it is.
    """

    memory: str | None = None
    """Memory of one device, as 24GiB or 80GB: says what fits, and which settings would make the rest fit."""
    devices: int = 1
    """Processes that share a batch under torchrun."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What each of them trains on; "auto" is a GPU where this machine has one."""
    vocab_size: int | None = None
    """Entries of the tokenizer, where the recipe names one that is not at hand."""
    svg: Path | None = None
    """File to write a bar chart to."""

    def violations(self) -> list[str]:
        """Return what is wrong with these arguments, in words."""
        return unmet(
            (self.devices >= 1, f"devices must be at least 1, not {self.devices}"),
            (
                self.vocab_size is None or self.vocab_size >= 2,
                f"vocab_size must be at least 2, not {self.vocab_size}",
            ),
        )


def run(words: Sequence[str]) -> int:
    """Plan, and show the table."""
    arguments, recipe = parse_with_recipe(PlanArguments, words, verb="plan")
    if violations := arguments.violations():
        raise ConfigError.from_violations("plan", violations)
    memory = None if arguments.memory is None else memory_bytes(arguments.memory)
    with stdout_for_result(only_json=arguments.json):
        from rich.console import Console

        from relora.lab.planner.plan import device_here, plan_run
        from relora.lab.planner.show import show_plan

        with Console(stderr=True).status(f"{recipe.run.name}: tracing each method's steps"):
            plan = plan_run(
                recipe,
                memory_bytes=memory,
                vocab_size=arguments.vocab_size,
                devices=arguments.devices,
                device=device_here() if arguments.device == "auto" else arguments.device,
            )
        if arguments.svg is not None:
            from relora.lab.planner.chart import chart

            _write(arguments.svg, chart(plan))
    if arguments.json:
        print_json(plan.as_dict())
    else:
        show_plan(plan, stream=sys.stdout)
    return 0


def memory_bytes(text: str) -> int:
    """Read an amount of memory: 24GiB, 24 GB, 512M (a letter alone counts in powers of 1024), or bytes.

    Raises:
        ConfigError: if it is none.
    """
    found = _MEMORY.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"plan: --memory must be an amount such as 24GiB or 80GB, not {text!r}")
    number, letter, binary = found.groups()
    is_decimal = letter != "" and not binary and text.strip()[-1] in "bB"
    return int(float(number) * (1000 if is_decimal else 1024) ** " KMGT".index(letter.upper() or " "))


def _write(path: Path, svg: str) -> None:
    try:
        path.write_text(svg + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plan: --svg {path} cannot be written: {error.strerror}") from error
