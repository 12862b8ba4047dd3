"""Kill real training runs with SIGKILL 200 times, resume each, and compare every bit with one left alone.

    nice -n 5 python benchmarks/kill_runs.py [--points 200] [--out benchmarks/results/kill_runs.json]

A fifth of the points are named places (in a save, in a merge, between merge and optimizer reset, ...), half
are random among all calls and returns of the interpreter in training, the rest a random time after the start.
Half of the runs are killed twice. Recipes: ReLoRA with both factors, dropout and a magnitude reset; with one
factor and no reset; with a save at each step; with saves in the foreground; LoRA; full rank.

Compared: weights, factors, optimizer states, random states, counters, and the lines of metrics.jsonl and
restarts.jsonl without their clocks. Nothing here is a timing.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "crash")]

from common import environment  # noqa: E402
from killing import PLACES, Trial, Victims  # noqa: E402

RECIPES: dict[str, dict[str, Any]] = {
    "relora, both factors, dropout, magnitude reset": {},
    "relora, one factor, no reset": {"relora": {"factors": "B", "reset": "none", "init": "orthonormal"}},
    "relora, saved at each step": {"checkpoint": {"every": 1, "keep_last": 2}},
    "relora, saved in the foreground": {"checkpoint": {"every": 2, "background": False}},
    "lora": {"run": {"method": "lora"}},
    "full rank": {"run": {"method": "full"}},
}
ONLY_IN_RELORA = ("merge", "reinit", "reset", "restart", "switch")


def kill_of(kind: str, chance: random.Random, trial: Trial, seconds: float) -> tuple[str, dict[str, Any]]:
    """Return a point to kill at, and what to call it."""
    if kind == "named":
        places = [
            place for place in PLACES if trial.restarts or not any(word in place for word in ONLY_IN_RELORA)
        ]
        place = chance.choice(places)
        return place, trial.at(place, nth=chance.randint(1, PLACES[place][2]))
    if kind == "event":
        return "random event", {"at_event": chance.randint(1, trial.num_events)}
    return "random time", {"after_s": chance.uniform(0.0, seconds), "watched": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_runs.json")
    arguments = parser.parse_args()
    chance, victims, runs = random.Random(arguments.seed), Victims(), []
    places: Counter[str] = Counter()
    num_kills = 0
    with tempfile.TemporaryDirectory() as scratch:
        trials = {}
        for name, changes in RECIPES.items():
            trials[name] = Trial(victims, Path(scratch) / f"recipe-{len(trials)}", **changes)
        begun = time.perf_counter()
        victims.train(next(iter(trials.values())).file("timed"), watched=False)
        seconds = time.perf_counter() - begun
        kinds = ["named", "event", "event", "time", "event", "time", "named", "event", "event", "time"]
        while num_kills < arguments.points:
            index = len(runs)
            recipe = chance.choice(list(trials))
            trial = trials[recipe]
            points = [
                kill_of(kinds[(num_kills + offset) % len(kinds)], chance, trial, seconds)
                for offset in range(1 + index % 2)
            ]
            name = f"killed-{index}"
            killed = trial.kill_and_resume(name, *(kill for _, kill in points))
            differing = trial.differences(name)
            num_kills += len(killed)
            places.update(label for label, _ in points[: len(killed)])
            runs.append({"recipe": recipe, "killed": killed, "differences": differing})
            print(f"{num_kills:4d} {'same' if not differing else 'DIFFERENT'} {killed}", flush=True)
    victims.close()
    unequal = [run for run in runs if run["differences"]]
    result = {
        "kills": num_kills,
        "runs": len(runs),
        "runs_equal_bit_for_bit": len(runs) - len(unequal),
        "by_kind": dict(sorted(places.items())),
        "by_recipe": dict(Counter(run["recipe"] for run in runs if run["killed"])),
        "seed": arguments.seed,
        "environment": environment(),
        "killed_in": [run["killed"] for run in runs],
        "unequal": unequal,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(runs) - len(unequal)} of {len(runs)} runs equal, {num_kills} kills: {arguments.out}")
    raise SystemExit(bool(unequal))


if __name__ == "__main__":
    main()
