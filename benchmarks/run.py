"""Run the benchmarks one after the other into benchmarks/results, and print one table of what they found.

    python benchmarks/run.py [NAME ...] [--suite bars] [--again] [--quick] [--dry-run]

"bars" is what this project's bars need, in order of weight; "all" is every benchmark that the docs quote. A
result is kept, and its benchmark skipped, if it is complete and neither the code measured nor the benchmarks
have changed since; --again takes it anew. --quick writes elsewhere and keeps the results. Nothing else should
run on the machine meanwhile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, is_unchanged, note
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
NO_GPU = 2
SIZED = ("factored", "effective", "auto", "one-sided", "columns", "PEFT LoRA", "GaLore")
"""Compared at every size; training the factors alone is compared at one."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One result, and what makes it."""

    words: tuple[str, ...]
    """Script and arguments."""
    minutes: float
    """About, on two idle CPU cores."""
    is_bar: bool = False
    """Whether a bar of this project is measured by it."""


BENCHMARKS = {
    "steps": Benchmark(words=("steps.py", "--hidden", "1024"), minutes=20, is_bar=True),
    "steps_columns": Benchmark(
        words=("steps.py", "--hidden", "1024", "--methods", "one-sided", "columns"), minutes=6
    ),
    "step_profile": Benchmark(words=("step_profile.py",), minutes=3, is_bar=True),
    "overhead": Benchmark(words=("overhead.py",), minutes=3, is_bar=True),
    "restart": Benchmark(words=("restart.py",), minutes=8, is_bar=True),
    "low_rank_linear": Benchmark(words=("low_rank_linear.py", "--hidden", "1024"), minutes=2, is_bar=True),
    "plan_accuracy": Benchmark(words=("plan_accuracy.py",), minutes=10),
    "startup": Benchmark(words=("startup.py",), minutes=12),
    "data_speed": Benchmark(words=("data_speed.py",), minutes=8),
    "checkpoint_speed": Benchmark(words=("checkpoint_speed.py",), minutes=4),
    "save_stall": Benchmark(words=("save_stall.py",), minutes=3),
    "kept_activations": Benchmark(words=("kept_activations.py",), minutes=1),
    "steps_other_sizes": Benchmark(
        words=("steps.py", "--hidden", "512", "256", "2048", "--methods", *SIZED), minutes=40, is_bar=True
    ),
    "gpu": Benchmark(words=("gpu.py",), minutes=60),
}


def result_of(path: Path, *, is_quick: bool) -> dict[str, Any] | None:
    """Return the result that stands in a file, if it is complete and still that of this code."""
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        where = result["environment"]
        is_whole = result["is_complete"] and result["is_quick"] == is_quick and not where["has_changes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if is_whole and where["commit"] and is_unchanged(where["commit"]) else None


def run(name: str, path: Path, *, is_quick: bool) -> int:
    """Run one benchmark into a file and return its exit code."""
    script, *words = BENCHMARKS[name].words
    command = [sys.executable, str(HERE / script), *words, "--json", str(path)]
    command += ["--quick"] if is_quick else []
    note(f"== {name}: about {BENCHMARKS[name].minutes:g} min on two idle cores")
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode


def findings(result: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield what a result says: what, its value, the bar, and whether it is met."""
    for found in result.get("bars", ()):
        limits = [f"{word} {found[key]:g}" for key, word in (("least", ">="), ("most", "<=")) if key in found]
        yield found["what"], f"{found['value']:.4g}", " ".join(limits), "yes" if found["is_met"] else "NO"
    for what, value in result.get("headline", {}).items():
        yield what, f"{value:.4g}", "", ""


def show(folder: Path, names: list[str], failed: dict[str, int]) -> None:
    """Print one table of the results in a folder."""
    table = Table("result", "what", "value", "bar", "met")
    for name in names:
        path = folder / f"{name}.json"
        if name in failed:
            why = "no GPU here" if (name, failed[name]) == ("gpu", NO_GPU) else f"exit code {failed[name]}"
            table.add_row(name, f"not measured: {why}", "", "", "")
        elif path.exists():
            for row in findings(json.loads(path.read_bytes())):
                table.add_row(name, *row)
    Console().print(table)


def parse() -> argparse.Namespace:
    """Return the command line's settings, with the names to run in `names`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--suite", choices=["bars", "all"], default="all", help="where no name is given")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--quick", action="store_true", help="does each run at all?")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and do not")
    parser.add_argument("--out", type=Path, help="folder of the results; default: results, beside this file")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    suite = [name for name, each in BENCHMARKS.items() if each.is_bar or options.suite == "all"]
    options.names = options.names or suite
    return options


def main() -> int:
    """Run what is not there yet; return 1 if a benchmark failed."""
    options = parse()
    elsewhere = Path(tempfile.gettempdir()) / "relora-quick-benchmarks"
    folder = options.out or (elsewhere if options.quick else RESULTS)
    failed: dict[str, int] = {}
    for name in options.names:
        path = folder / f"{name}.json"
        is_there = not options.again and result_of(path, is_quick=options.quick) is not None
        if is_there:
            note(f"{name}: measured already")
        elif options.dry_run:
            note(f"{name}: {BENCHMARKS[name].minutes:g} min, {' '.join(BENCHMARKS[name].words)}")
        elif code := run(name, path, is_quick=options.quick):
            failed[name] = code
    show(folder, options.names, failed)
    return 1 if failed.items() - {("gpu", NO_GPU)} else 0


if __name__ == "__main__":
    sys.exit(main())
