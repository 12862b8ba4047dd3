"""What the benchmarks share: where they ran, interleaved timing, growth exponents, one JSON form."""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("relora", "torch", "transformers", "tokenizers", "peft", "galore-torch")


def environment() -> dict[str, Any]:
    """Return where and with what a benchmark ran."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Time several things in turn, so that what else the machine does falls on all alike.

    Args:
        runs: What to time, by name; each is called once a round.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.

    Returns:
        Seconds of every round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            _wait()
            begun = time.perf_counter()
            run()
            _wait()
            if index >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times


def ratios(times: Mapping[str, Sequence[float]], *, base: str) -> dict[str, dict[str, float]]:
    """Return how fast each is next to `base`: the median over rounds of the ratio within a round."""
    found = {}
    for name, values in times.items():
        each = [theirs / mine for mine, theirs in zip(values, times[base], strict=True)]
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        found[name] = {
            "median_s": statistics.median(values),
            "speed": statistics.median(each),
            "speed_quartiles": [low, high],
        }
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of a least-squares line through the logarithms: values grow as sizes^slope."""
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in values]
    return statistics.linear_regression(xs, ys).slope


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: does it run at all?"
    )
    return parser


def publish(name: str, result: Mapping[str, Any], path: Path | None) -> None:
    """Print a result with where it was taken, and write it where asked."""
    whole = {"benchmark": name, "environment": environment(), **result}
    text = json.dumps(whole, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
