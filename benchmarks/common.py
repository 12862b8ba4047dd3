"""What the benchmarks share: where they ran, interleaved timing, the allocator's count, one JSON form."""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from relora.train.precision import Resolved, resolve_precision

RESULTS = Path(__file__).parent / "results"
MEASURED = ("src", "recipes", "benchmarks/*.py")
"""What decides a result, from the repository's root."""
_ROOT = Path(__file__).parents[1]
_PACKAGES = ("relora", "torch", "transformers", "tokenizers", "peft", "galore-torch", "bitsandbytes")


def environment() -> dict[str, Any]:
    """Return where and with what a benchmark ran."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "has_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def is_unchanged(commit: str) -> bool:
    """Return whether nothing that decides a result has changed since a commit."""
    return _git("diff", "--quiet", commit, "--", *MEASURED) is not None


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several things in turn, so that what else the machine does falls on all alike.

    Args:
        runs: What to time, by name; each is called once a round.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        clock: Seconds that only go forward.

    Returns:
        Seconds of every round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            _wait()
            begun = clock()
            run()
            _wait()
            if index >= warmup:
                times[name].append(clock() - begun)
    return times


def ratios(times: Mapping[str, Sequence[float]], *, base: str) -> dict[str, dict[str, float]]:
    """Return how fast each is next to `base`: the median over rounds of the ratio within a round."""
    found = {}
    for name, values in times.items():
        each = [theirs / mine for mine, theirs in zip(values, times[base], strict=True)]
        found[name] = {
            "median_s": statistics.median(values),
            "speed": statistics.median(each),
            "speed_quartiles": quartiles(each),
        }
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of a least-squares line through the logarithms: values grow as sizes^slope."""
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in values]
    return statistics.linear_regression(xs, ys).slope


def allocated(profiler: profile) -> Iterator[int]:
    """Yield the CPU allocator's count of live bytes after each change, from 0 where the profile begins."""
    kineto = profiler.profiler
    assert kineto is not None
    waiting = list(kineto.kineto_results.experimental_event_tree())
    changes = []
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    yield from accumulate(change for _, change in sorted(changes, key=lambda change: change[0]))


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that the CPU allocator held at once for something, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return max(allocated(profiler), default=0)


def chosen_precisions(asked: list[Resolved] | None) -> tuple[list[Resolved], dict[str, str]]:
    """Return the precisions to measure, and why another is left out: bf16, unless asked for or fast here."""
    if asked is not None:
        return asked, {}
    fast, why = resolve_precision("auto", torch.device("cpu"))
    return (["fp32", "bf16"], {}) if fast == "bf16" else (["fp32"], {"bf16": why})


def bar(
    what: str, value: float, *, least: float = -math.inf, most: float = math.inf, **beside: Any
) -> dict[str, Any]:
    """Return one bar of this project, what was measured, and whether it is met; `beside` stands beside it."""
    limits = {"least": least, "most": most}
    wanted = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
    return {"what": what, "value": value, **wanted, "is_met": least <= value <= most, **beside}


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


def publish(name: str, result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print a finished result with where it was taken, and write it where asked."""
    whole = record(name, {"is_complete": True, **result}, options)
    print(json.dumps(whole, indent=2))


def record(name: str, result: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return a result with where it was taken, and write it where asked; a long benchmark does so as it goes,
    so that what it has measured is there if it is stopped.
    """
    head = {"benchmark": name, "is_quick": options.quick, "is_complete": False, "environment": environment()}
    whole = head | dict(result)
    path: Path | None = options.json
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole


def note(text: str) -> None:
    """Say how far a benchmark is, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Return what git says; None where it fails, or where there is no history."""
    try:
        found = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
