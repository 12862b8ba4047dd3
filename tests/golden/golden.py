"""The golden curve: 100 steps of a tiny ReLoRA run, every number of it as it was recorded.

    python tests/golden/golden.py

records it anew, in curve.json beside this file. Do so only where a change is meant to change the numbers, and
say so in its commit.
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from relora.checkpoint.store import load_checkpoint
from relora.train.fit import fit
from tiny_run import tiny_recipe

CURVE = Path(__file__).with_name("curve.json")
COLUMNS = ("step", "train/loss", "grad_norm", "lr", "restart_index", "phase", "eval/loss")
TOLERANCE = 2e-3
"""Relative, for another version of torch or another processor: their sums are in another order."""


def record(folder: Path) -> dict[str, Any]:
    """Train the run and return its curve, and on what it was trained."""
    recipe = tiny_recipe(
        folder,
        relora={"rank": 4, "init": "kaiming", "restart_every": 15, "warm_start_steps": 25, "dropout": 0.05},
        schedule={"warmup_steps": 10, "rewarmup_steps": 3},
        train={"steps": 100},
        eval={"every": 25, "sequences": 16},
        checkpoint={"every": 0},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads would be in another order on another machine
    try:
        run = fit(recipe).folder
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_checkpoint(run / "checkpoints" / "step-00000100").tensors["model"]
    return {
        "made_with": made_with(),
        "curve": [{key: line[key] for key in COLUMNS if key in line} for line in lines],
        "final_norms": {name: float(weights[name].double().norm()) for name in sorted(weights)},
    }


def made_with() -> dict[str, str]:
    """Return what the bits of a CPU run depend on."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_name() -> str:
    """Return what tells one processor from another: libraries choose their kernels, and so the order of sums,
    by it. Virtual machines share a model's name across generations, so its numbers and flags count too.
    """
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    numbers = [said.get(key, "?") for key in ("cpu family", "model", "stepping")]
    flags = hashlib.sha256(" ".join(sorted(said.get("flags", "").split())).encode()).hexdigest()[:8]
    return f"{said['model name']} {'/'.join(numbers)} flags {flags}"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        golden = record(Path(scratch))
    lines = ",\n".join("  " + json.dumps(line) for line in golden["curve"])
    rest = {key: value for key, value in golden.items() if key != "curve"}
    CURVE.write_text(json.dumps(rest, indent=1)[:-2] + f',\n "curve": [\n{lines}\n ]\n}}\n')
    print(f"recorded {len(golden['curve'])} steps with {golden['made_with']} in {CURVE}")


if __name__ == "__main__":
    main()
