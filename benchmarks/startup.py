"""Measure how long a user waits: for --help, for imports, and from the start of a process to its first step.

    python benchmarks/startup.py [--json FILE] [--recipes llama-9m ...] [--rounds 10] [--cold-rounds 3]

Every figure is the wall clock of a new process, all of them in turns. The first step is there when its line
is on standard error; "cold" prepares its text and trains its tokenizer before (in an empty cache folder),
"warm" finds both. The floor is a process that imports torch and transformers alone. Other recipes train on
the quickstart's data with one sequence a step, so that what grows is the model; the exponent says how what
they take beyond the floor grows with their parameters. Files are in the system's cache.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, bar, exponent, interleaved, note, publish

from relora.train.blueprint import blueprint
from relora.train.phase import num_parameters
from relora.train.recipe_io import load_recipe

PYTHON = [sys.executable, "-c"]
RELORA = [sys.executable, "-m", "relora"]
COMMANDS = {
    "python": [*PYTHON, "pass"],
    "import relora": [*PYTHON, "import relora"],
    "import relora.ReLoRA": [*PYTHON, "from relora import ReLoRA"],
    "import torch": [*PYTHON, "import torch"],
    "import torch, transformers": [*PYTHON, "import torch; from transformers import LlamaForCausalLM"],
    "relora --help": [*RELORA, "--help"],
    "relora train --help": [*RELORA, "train", "--help"],
}
FLOOR, HELP = "import torch, transformers", "relora train --help"
HELP_LIMIT_S = 0.5
VOCAB_SIZE = 4096
SMALL_STEP = ["--data.seq_len", "256", "--train.batch_size", "1", "--train.micro_batch_size", "1"]
TINY_DATA = ["--data.vocab_size", "512", "--data.max_bytes", "400000", "--data.heldout_fraction", "0.3"]


class FirstStep:
    """A run that is stopped once its first step is logged; called, it waits for that."""

    def __init__(self, folder: Path, recipe: str, settings: list[str], *, is_cold: bool) -> None:
        self._folder, self._words, self._is_cold = folder, [recipe, *settings], is_cold
        self._num_runs = 0

    def __call__(self) -> None:
        """Start the process and return when its first step is there."""
        self._num_runs += 1
        name = f"{self._words[0]}-{'cold' if self._is_cold else 'warm'}-{self._num_runs}"
        cache = self._folder / (f"cache-of-{name}" if self._is_cold else "cache")
        places = ["--run.name", name, "--run.out", str(self._folder), "--data.cache_dir", str(cache)]
        command = [*RELORA, "train", *self._words, *places]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
            assert run.stderr is not None
            seen = []
            for line in run.stderr:
                seen.append(line)
                if line.startswith("step 1/"):
                    break
            else:
                raise RuntimeError(f"no first step: {''.join(seen)}")
            run.kill()


def process(command: list[str]) -> Callable[[], object]:
    """Return what runs a command to its end."""
    return lambda: subprocess.run(command, check=True, capture_output=True)


def medians(runs: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each."""
    times = interleaved(runs, rounds=rounds, warmup=warmup)
    found = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in found.items():
        note(f"{name:32}{seconds:8.2f} s")
    return found


def size_of(recipe: str) -> int:
    """Return the parameters of a recipe's model with the vocabulary of SMALL_STEP."""
    return num_parameters(blueprint(load_recipe(recipe), vocab_size=VOCAB_SIZE))


def main() -> None:
    """Time processes that do little, then first steps."""
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="*", default=["llama-9m", "llama-20m", "llama-60m", "llama-130m"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cold-rounds", type=int, default=3, help="each prepares the whole text")
    options = parser.parse_args()
    commands, data, warmup = COMMANDS, ["--data.vocab_size", str(VOCAB_SIZE)], 1
    if options.quick:
        commands, data, warmup = {HELP: COMMANDS[HELP]}, TINY_DATA, 0
        options.rounds, options.cold_rounds, options.recipes = 1, 1, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs: dict[str, Callable[[], object]] = {name: process(words) for name, words in commands.items()}
        processes = medians(runs, rounds=options.rounds, warmup=warmup)
        cold = FirstStep(folder, "quickstart", data, is_cold=True)
        first_steps = medians({"quickstart, cold": cold}, rounds=options.cold_rounds, warmup=0)
        # The round that is not timed fills the cache of the others.
        warm: dict[str, Callable[[], object]] = {
            "quickstart, warm": FirstStep(folder, "quickstart", data, is_cold=False)
        }
        for recipe in options.recipes:
            warm[f"{recipe}, warm"] = FirstStep(folder, recipe, [*data, *SMALL_STEP], is_cold=False)
        first_steps |= medians(warm, rounds=options.rounds, warmup=warmup)
    sizes = {recipe: size_of(recipe) for recipe in options.recipes}
    result: dict[str, Any] = {
        "rounds": options.rounds,
        "cold_rounds": options.cold_rounds,
        "bars": [bar("relora train --help under 0.5 s", processes[HELP], most=HELP_LIMIT_S)],
        "headline": {f"{name}, s to the first step": first_steps[name] for name in list(first_steps)[:2]},
        "process_s": processes,
        "first_step_s": first_steps,
        "parameters": sizes,
    }
    if len(sizes) > 1:
        beyond = [max(first_steps[f"{recipe}, warm"] - processes[FLOOR], 1e-3) for recipe in sizes]
        result["exponent_beyond_floor"] = exponent(list(sizes.values()), beyond)
    publish("startup", result, options)


if __name__ == "__main__":
    main()
