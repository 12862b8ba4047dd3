"""Real runs, killed and resumed until they end, and compared bit for bit with one that was not."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import run_victim
import torch

import relora
from relora.checkpoint.store import load_checkpoint, verify_checkpoint
from relora.train.config import Recipe
from relora.train.recipe_io import write_recipe
from tiny_run import tiny_recipe

SIGKILL = -9
_MEASURED = ("tokens_per_s",)
"""What a line of metrics.jsonl holds of the clock."""

PLACES: dict[str, list[Any]] = {
    "in the first save": ["write_tensors", "return", 2],
    "before a checkpoint is renamed": ["_put_in_place", "call", 2],
    "after a checkpoint is renamed": ["_confirm", "call", 3],
    "in verifying": ["_check_digest", "call", 9],
    "in copying what is saved": ["copied", "return", 5],
    "in retiring": ["retire", "call", 2],
    "in the switch": ["at_low_rank", "return", 1],
    "in a merge": ["_merge_layer_", "call", 17],
    "between merge and reinit": ["reinit_", "call", 1],
    "in reinit": ["reinit_", "call", 24],
    "between merge and optimizer reset": ["reset_optimizer_state_", "call", 2],
    "in an optimizer reset": ["reset_optimizer_state_", "return", 1],
    "between a restart and its line": ["count_restart", "return", 2],
    "in logging a restart": ["amend", "call", 1],
    "between backward and update": ["agree", "return", 8],
    "in an update": ["_fused_adam", "return", 7],
    "in evaluation": ["evaluate", "return", 2],
    "in writing the tokenizer": ["sync_file", "call", 2],
}
"""Functions of the trainer in which a run is killed: entered or left, and for which time."""


class Victims:
    """The process that forks victims, seen from here; victims run one after the other."""

    def __init__(self) -> None:
        source = Path(relora.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, run_victim.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def train(self, recipe: Path, **request: Any) -> dict[str, Any]:
        """Train by a recipe file; return the exit code (negative: a signal) and the end of what was said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"recipe": str(recipe), "log": f"{recipe}.log", **request}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.communicate(timeout=30)


class Trial:
    """Runs of one recipe: one that is left alone, and others that are killed."""

    def __init__(self, victims: Victims, folder: Path, **changes: Any) -> None:
        self.victims, self.folder = victims, folder
        # Both factors, a magnitude reset, dropout: everything that a resumed run must get right.
        self.recipe = tiny_recipe(folder, **{"relora": {"dropout": 0.1}, **changes})
        self.restarts = self.recipe.run.method == "relora"
        answer = victims.train(self.file("whole"))
        assert answer["code"] == 0, answer
        self.num_events = int(re.findall(r"EVENTS (\d+)", answer["log"])[-1])
        self.whole = self.run_folder("whole")

    @staticmethod
    def at(place: str, *, nth: int | None = None) -> dict[str, Any]:
        """Return the request to be killed in a place."""
        name, event, usual = PLACES[place]
        return {"at_functions": [[name, event, nth or usual, "SIGKILL"]]}

    def file(self, name: str, **checkpoint: Any) -> Path:
        """Return the recipe file of a run of this name."""
        path = self.folder / f"{name}.toml"
        recipe: Recipe = replace(self.recipe, run=replace(self.recipe.run, name=name))
        write_recipe(replace(recipe, checkpoint=replace(recipe.checkpoint, **checkpoint)), path)
        return path

    def run_folder(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.recipe.run.out / name

    def kill_and_resume(self, name: str, *kills: dict[str, Any], **checkpoint: Any) -> list[str]:
        """Kill a run at each of the points given, one resumption after the other, then let it end.

        Returns:
            Where it was killed; a run that ended before its point was not.
        """
        recipe = self.file(name, **checkpoint)
        places = []
        for kill in kills:
            answer = self.victims.train(recipe, **kill)
            assert answer["code"] in (0, SIGKILL), answer["log"]
            if answer["code"] == SIGKILL:
                found = re.findall(r"SIGKILL IN (.*)", answer["log"])
                places.append(found[-1] if found else f"after {kill.get('after_s', 0):.2f} s")
        answer = self.victims.train(recipe, watched=False)
        assert answer["code"] == 0, answer["log"]
        return places

    def differences(self, name: str) -> list[str]:
        """Return in what a run differs from the one that was left alone; empty where no bit does."""
        return differences(self.run_folder(name), self.whole)


def differences(run: Path, whole: Path) -> list[str]:
    """Return in what two runs differ, beyond times of day."""
    found = []
    mine, theirs = last_checkpoint(run), last_checkpoint(whole)
    if mine.name != theirs.name or verify_checkpoint(mine):
        return [f"last checkpoint {mine.name}, not {theirs.name}: {verify_checkpoint(mine)}"]
    one, other = load_checkpoint(mine), load_checkpoint(theirs)
    for group in ("model", "optimizer", "rng"):
        if one.tensors[group].keys() != other.tensors[group].keys():
            found.append(f"{group}: other tensors")
            continue
        found += [
            f"{group}: {key}"
            for key, tensor in one.tensors[group].items()
            if not same_bits(tensor, other.tensors[group][key])
        ]
    states = [{**each.state, "progress": timeless_progress(each.state)} for each in (one, other)]
    found += [f"state: {key}" for key in states[0] if states[0][key] != states[1].get(key)]
    for log in ("metrics.jsonl", "restarts.jsonl"):
        if timeless(run / log) != timeless(whole / log):
            found.append(f"{log}: {timeless(run / log)} is not {timeless(whole / log)}"[:2000])
    left = [path.name for path in run.rglob(".*.tmp")] + [path.name for path in run.rglob("*.new")]
    return found + [f"left behind: {name}" for name in left]


def timeless_progress(state: dict[str, Any]) -> dict[str, Any]:
    """Return the counters of a checkpoint's state without the seconds it took."""
    counters: dict[str, Any] = state["progress"]["dict"]
    return {key: value for key, value in counters.items() if key not in ("wall_s", "peak_memory_bytes")}


def last_checkpoint(run: Path) -> Path:
    """Return the folder of a run's last checkpoint."""
    return max((run / "checkpoints").glob("step-*"))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same in dtype, shape and every bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*as_bytes)


def timeless(log: Path) -> list[dict[str, Any]]:
    """Return the records of a log without what is measured by the clock."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _MEASURED} for line in lines]
