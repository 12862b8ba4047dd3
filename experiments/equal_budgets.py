"""Equal time and equal memory instead of equal tokens: what the studies' results say, without another run.

    python experiments/equal_budgets.py

Time: full rank has been trained to two lengths. Between them its loss is taken as linear in the logarithm
of the tokens, which gives the length at which full rank has an arm's loss; over the arm's own tokens that is
the share of its time in which full rank would be as far. An arm is ahead at equal time if it is faster than
1 over that share; where it begins with a warm start, what is after that has to be faster still.

Memory: full rank has been trained in two sizes, of which the smaller is `control`. Between them its loss is
taken as linear in the logarithm of the parameters, which gives the loss of a full rank that holds as many
bytes of weights, gradients and optimizer states as an arm does (16 a parameter in float32 with AdamW).

Means over seeds, each paired with full rank of its seed, with 95 % intervals.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from committed import HERE, final_cells, over_seeds

SPEEDS = HERE.parent / "benchmarks" / "results" / "gpu_1b.json"
FULL_BYTES = 16
"""A parameter's, of weight, gradient and AdamW's two moments in float32."""


@dataclass(frozen=True)
class Pair:
    """Where full rank stands at two lengths, and the arms that are measured by them."""

    title: str
    short: tuple[str, str]
    """Study and length of full rank's shorter runs."""
    long: tuple[str, str]
    arms: tuple[tuple[str, str], ...]
    """Arms of the longer runs' study, and at which of the two lengths."""


PAIRS = (
    Pair(
        "source code, 1.0 M parameters outside embeddings and head",
        ("warm-start", "2 M tokens"),
        ("main-python", "5 M tokens"),
        tuple((arm, "5 M tokens") for arm in ("lora", "relora", "relora-B", "relora-paper")),
    ),
    Pair(
        "the same with all that helps at once",
        ("combined", "2 M tokens"),
        ("combined-5m", "5 M tokens"),
        (("lora rank=32", "5 M tokens"), ("relora rank=32", "5 M tokens")),
    ),
    Pair(
        "prose, 3.0 M parameters outside embeddings and head",
        ("main-3x-prose", "2.5 M tokens"),
        ("main-3x-prose", "7.5 M tokens"),
        (
            ("beyond", "2.5 M tokens"),
            ("full-muon", "2.5 M tokens"),
            ("muon-in-place", "2.5 M tokens"),
            ("lora", "7.5 M tokens"),
        ),
    ),
)


def between(at: float, ends: Sequence[tuple[float, float]]) -> float:
    """Return y at x = `at` on the line through two points."""
    (x1, y1), (x2, y2) = ends
    return y1 + (y2 - y1) * (at - x1) / (x2 - x1)


def time_share(cell: Mapping[str, Any], short: Mapping[str, Any], long: Mapping[str, Any]) -> float:
    """Return full rank's tokens at a cell's loss over the cell's own."""
    ends = [(full["loss"], math.log(full["tokens"])) for full in (short, long)]
    return math.exp(between(cell["loss"], ends)) / float(cell["tokens"])


def held_bytes(cell: Mapping[str, Any]) -> int:
    """Return the bytes of weights, gradients and states after the switch."""
    return int(cell["weight_bytes"] + cell["optimizer_bytes"] + 4 * cell["parameters_trainable"])


def same_memory_loss(cell: Mapping[str, Any], small: Mapping[str, Any], full: Mapping[str, Any]) -> float:
    """Return the loss of a full rank that holds a cell's bytes."""
    ends = [(math.log(other["parameters_total"]), other["loss"]) for other in (small, full)]
    return between(math.log(held_bytes(cell) / FULL_BYTES), ends)


def in_words(values: Mapping[int, float]) -> str:
    """Return mean and interval over seeds."""
    found = over_seeds(values)
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def print_times(pair: Pair) -> None:
    """Print how fast arms would have to be."""
    short, long = (final_cells(study, "full", budget) for study, budget in (pair.short, pair.long))
    print(f"\n### Time: {pair.title}\n")
    print(
        "| arm | M tokens | full rank's tokens at its loss, over its | as fast at least | after the switch |"
    )
    print("|---|---|---|---|---|")
    for arm, budget in pair.arms:
        cells = final_cells(pair.long[0], arm, budget)
        shares = {seed: time_share(cell, short[seed], long[seed]) for seed, cell in cells.items()}
        share = sum(shares.values()) / len(shares)
        after = ""
        switch = next(iter(cells.values()))["switch"]
        if switch is not None:
            warm = switch["step"] / next(iter(cells.values()))["steps"]
            after = f"{(1 - warm) / (share - warm):.2f}"
        tokens = next(iter(cells.values()))["tokens"] / 1e6
        print(f"| {arm} | {tokens:.1f} | {in_words(shares)} | {1 / share:.2f} | {after} |")


def print_memory(study: str, arms: Sequence[str], small_of: str | None = None) -> None:
    """Print where a smaller full rank in the same memory stands; of another study on that text if need be."""
    small, full = final_cells(small_of or study, "control"), final_cells(study, "full")
    print(f"\n### Memory: {study}, weights, gradients and states after the switch\n")
    print("| arm | MB | MB of full rank | loss over full rank of those MB |\n|---|---|---|---|")
    for arm in arms:
        cells = final_cells(study, arm)
        gaps = {seed: c["loss"] - same_memory_loss(c, small[seed], full[seed]) for seed, c in cells.items()}
        mine, whole = held_bytes(next(iter(cells.values()))), held_bytes(full[0])
        print(f"| {arm} | {mine / 1e6:.1f} | {whole / 1e6:.1f} | {in_words(gaps)} |")


def main() -> None:
    """Print both, and what speeds have been measured."""
    for pair in PAIRS:
        print_times(pair)
    rows = json.loads(SPEEDS.read_text(encoding="utf-8"))["rows"]
    full = rows["llama-1b, full, not compiled"]["sizes"][0]
    print("\nMeasured at 1.3 B parameters, 16 sequences of 1024, one H100:", end=" ")
    ratios = {name: rows[f"llama-1b, {name}, not compiled"]["sizes"][0] for name in ("one-sided", "auto")}
    print(", ".join(f"{name} {full['step_s'] / row['step_s']:.2f}" for name, row in ratios.items()))
    for study in ("main-python", "main-prose"):
        print_memory(study, ("control", "lora", "relora", "relora-B", "full-muon", "beyond"))
    print_memory("combined-5m", ("lora rank=32", "relora rank=32"), small_of="main-python")


if __name__ == "__main__":
    main()
