"""Time training steps of a small model in processes that keep what a step frees, and in ones that do not.

    python benchmarks/freed_memory.py [--json FILE] [--rounds 10]

A run on a CPU tells glibc's allocator to keep what is freed (`relora.train.allocator`). Each process here
trains a plain LLaMA for some steps on one thread, and counts the pages that the system mapped meanwhile; one
with the setting and one without take turns. Of each process the fastest step counts, which other guests of
the machine disturb least.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from common import arguments, note, publish, ratios
from training import METHODS, Stepper, llama, token_batch

from relora.train.allocator import keep_freed_memory

HIDDEN, LAYERS, TOKENS = 128, 5, 4096
STEPS, WARMUP = 12, 4
WAYS = ("given back", "kept")
"""What becomes of freed memory."""


def train(way: str, *, hidden: int, tokens: int) -> dict[str, Any]:
    """Train in this process; return its fastest step, the pages mapped in a step, and its peak."""
    is_kept = keep_freed_memory(os.environ) if way == "kept" else False
    model = llama(hidden, LAYERS)
    stepper = Stepper(model, METHODS["full"].prepare(model, 0), token_batch(tokens), precision="fp32")
    times, mapped = [], 0
    for index in range(WARMUP + STEPS):
        if index == WARMUP:
            mapped = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        begun = time.perf_counter()
        stepper()
        times.append(time.perf_counter() - begun)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "is_kept": is_kept,
        "step_s": min(times[WARMUP:]),
        "pages_a_step": (used.ru_minflt - mapped) / STEPS,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def child(way: str, *, hidden: int, tokens: int) -> dict[str, Any]:
    """Train in a new process."""
    command = [sys.executable, __file__, way, str(hidden), str(tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["is_kept"] == (way == "kept"), "the allocator did not take the setting: is it glibc's?"
    return found


def main() -> None:
    """Let processes of both kinds take turns."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    hidden, tokens = HIDDEN, TOKENS
    if options.quick:
        hidden, tokens, options.rounds = 64, 2048, 1
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            runs[way].append(child(way, hidden=hidden, tokens=tokens))
    speeds = ratios({way: [run["step_s"] for run in runs[way]] for way in WAYS}, base="given back")
    rows = {
        way: speeds[way]
        | {name: statistics.median(run[name] for run in runs[way]) for name in ("pages_a_step", "peak_bytes")}
        for way in WAYS
    }
    for way, row in rows.items():
        note(
            f"{way:12}{1e3 * row['median_s']:8.1f} ms{row['speed']:8.3f}x"
            f"{row['pages_a_step']:10.0f} pages a step{row['peak_bytes'] / 1e6:8.0f} MB"
        )
    sizes = {"hidden_size": hidden, "num_layers": LAYERS, "tokens": tokens, "rounds": options.rounds}
    headline = {"speed where freed memory is kept": rows["kept"]["speed"]}
    publish("freed_memory", {**sizes, "headline": headline, "ways": rows}, options)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        print(json.dumps(train(sys.argv[1], hidden=int(sys.argv[2]), tokens=int(sys.argv[3]))))
    else:
        main()
