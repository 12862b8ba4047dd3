"""Measure training on a CUDA GPU: tokens/s, peak memory and restarts, 130 M to 1.3 B parameters, in bf16.

    python benchmarks/gpu.py [--json FILE] [--recipes llama-130m ...] [--curves 120] [--dry-run]

Full rank, PEFT LoRA and ReLoRA (both factors, one factor, bases in bf16 and int8), plain and compiled, each
in a process of its own; sizes, ranks and sequence lengths are the recipes'. The micro batch is doubled until
it no longer fits, unless --sequences names those to measure. A ReLoRA row then restarts after each of some
steps, and the graphs that torch.compile made meanwhile are counted: there should be none. Methods and step
are those of steps.py. --curves trains each recipe by the trainer, as many steps as full rank takes in so
many seconds, by full, lora, relora and ReLoRAConfig.beyond's settings, and keeps loss curves, speed and peak
memory. --dry-run says what would run. Without a GPU: exit code 2.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, cast

import torch
from common import arguments, interleaved, note, publish, record
from torch import nn
from training import METHODS, Stepper, restarter, token_batch
from transformers import LlamaForCausalLM

from relora import ReLoRAConfig
from relora.log.jsonl import read_jsonl
from relora.train.architecture import PAPER_VOCAB_SIZE, llama_config
from relora.train.config import Recipe
from relora.train.fit import fit
from relora.train.parallel import Processes, processes
from relora.train.phase import free_gradients_, num_parameters
from relora.train.precision import resolve_precision
from relora.train.recipe_io import load_recipe
from relora.train.run_folder import METRICS
from relora.train.summary import peak_memory_bytes

TRAINED = (
    "full",
    "PEFT LoRA",
    "auto",
    "one-sided",
    "columns",
    "auto, bf16 base",
    "one-sided, bf16 base",
    "one-sided, int8 base",
)
CURVES = ("full", "lora", "relora", "beyond")
"""What --curves trains by."""
MOST_SEQUENCES = 1024
NO_GPU = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one process measures."""

    recipe: str
    method: str
    is_compiled: bool
    rounds: int
    sequences: tuple[int, ...] = tuple(2**power for power in range(MOST_SEQUENCES.bit_length()))
    """Micro batches to measure, smallest first; the first that does not fit is the last."""

    def __str__(self) -> str:
        return f"{self.recipe}, {self.method}, {'compiled' if self.is_compiled else 'not compiled'}"


def model_on(here: Processes, recipe: Recipe) -> LlamaForCausalLM:
    """Return a recipe's model, made on the device."""
    torch.manual_seed(0)
    with here.device:
        return LlamaForCausalLM(llama_config(recipe.model, vocab_size=PAPER_VOCAB_SIZE))


def measure(row: Row) -> dict[str, Any]:
    """Grow the micro batch of one model until it does not fit; then restart it, where it can be."""
    recipe = load_recipe(row.recipe)
    with processes("auto") as here:
        model = model_on(here, recipe)
        optimizer = METHODS[row.method].prepare(model, recipe.relora.rank)
        precision, _ = resolve_precision("auto", here.device)
        found: dict[str, Any] = {
            "parameters": num_parameters(cast(nn.Module, model)),
            "trainable": num_parameters(cast(nn.Module, model), trainable=True),
            "seq_len": recipe.data.seq_len,
            "precision": precision,
            "sizes": [],
        }

        def stepper_of(sequences: int) -> Stepper:
            torch.compiler.reset()
            batch = token_batch(
                sequences * recipe.data.seq_len, vocab_size=PAPER_VOCAB_SIZE, seq_len=recipe.data.seq_len
            )
            return Stepper(
                model, optimizer, batch, precision=precision, here=here, compile_it=row.is_compiled
            )

        for sequences in row.sequences:
            size = at_size(stepper_of(sequences), row, here)
            if size is None:
                break
            found["sizes"].append(size)
        free_gradients_(cast(nn.Module, model))
        if found["sizes"] and row.method not in ("full", "PEFT LoRA"):
            half = max(int(found["sizes"][-1]["sequences"]) // 2, 1)
            found["restarts"] = restarts(stepper_of(half), rounds=row.rounds)
    return found


def at_size(stepper: Stepper, row: Row, here: Processes) -> dict[str, float] | None:
    """Time the steps of one micro batch and find their peak of memory; None if it does not fit."""
    if here.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        times = interleaved({"step": stepper}, rounds=row.rounds, warmup=3)["step"]
    except torch.OutOfMemoryError:
        return None
    step_s = statistics.median(times)
    return {
        "sequences": len(stepper.tokens),
        "step_s": step_s,
        "tokens_per_s": stepper.tokens.numel() / step_s,
        "peak_memory_bytes": peak_memory_bytes(here.device),
    }


def restarts(stepper: Stepper, *, rounds: int) -> dict[str, float]:
    """Restart after each step, and count the graphs that are compiled after the first of them."""
    stepper()
    before = _num_graphs()
    times = interleaved({"step": stepper, "restart": restarter(stepper)}, rounds=rounds)
    return {
        "step_s": statistics.median(times["step"]),
        "restart_s": statistics.median(times["restart"]),
        "num_new_graphs": _num_graphs() - before,
    }


def _num_graphs() -> int:
    counters = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"])


def curve(
    recipe: str, trained: str, *, tokens_per_s: float, sequences: int, seconds: float
) -> dict[str, Any]:
    """Train a recipe as many steps as full rank takes in `seconds`; return its logged steps and summary."""
    tokens_per_step = sequences * load_recipe(recipe).data.seq_len
    steps = max(int(seconds * tokens_per_s / tokens_per_step), 40)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, dict[str, Any]] = {
            "relora": {"warm_start_steps": steps // 4, "restart_every": max(steps // 8, 1)},
            "schedule": {"warmup_steps": steps // 10, "rewarmup_steps": max(steps // 100, 1)},
            "train": {"steps": steps, "batch_size": sequences, "micro_batch_size": sequences},
            "eval": {"every": max(steps // 8, 1)},
            "checkpoint": {"every": 0},
            "log": {"every": max(steps // 100, 1)},
        }
        settings["run"] = {"method": "relora" if trained == "beyond" else trained, "out": folder}
        if trained == "beyond":
            plain = load_recipe(recipe)
            preset = asdict(ReLoRAConfig.beyond(rank=plain.relora.rank))
            preset["restart_every"] = min(preset["restart_every"], steps)
            settings["relora"] = {**preset, "warm_start_steps": 0}
            settings["optim"] = {"factor_lr": plain.optim.lr / 2}
            settings["schedule"]["rewarmup_steps"] = 0
        result = fit(load_recipe(recipe, settings))
        kept = ("tokens", "wall_s", "tokens_per_s", "peak_memory_bytes", "restarts", "eval/loss", "precision")
        return {
            "summary": {key: result.summary[key] for key in kept},
            "metrics": list(read_jsonl(result.folder / METRICS).records),
        }


def curves(rows: dict[str, dict[str, Any]], recipe: str, *, seconds: float) -> dict[str, Any]:
    """Return the loss curves of a recipe, each over the tokens that full rank takes `seconds` for."""
    full = rows.get(str(Row(recipe=recipe, method="full", is_compiled=False, rounds=0)), {})
    if not full.get("sizes"):
        return {}
    largest = full["sizes"][-1]
    return {
        trained: alone(
            curve,
            recipe,
            trained,
            tokens_per_s=largest["tokens_per_s"],
            sequences=max(largest["sequences"] // 2, 1),
            seconds=seconds,
        )
        for trained in CURVES
    }


def alone(run: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns in a process of its own, or its error in words."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(run, *args, **kwargs).result()
        except (BrokenProcessPool, RuntimeError, ValueError, TypeError, ImportError) as error:
            return {"error": f"{type(error).__name__}: {error}"}


def headline(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the largest tokens/s of each row."""
    return {
        f"{name}: tokens/s": max(size["tokens_per_s"] for size in row["sizes"])
        for name, row in rows.items()
        if row.get("sizes")
    }


def planned(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what to measure."""
    for recipe, method, is_compiled in product(options.recipes, options.methods, options.compiled):
        row = Row(recipe=recipe, method=method, is_compiled=is_compiled == "yes", rounds=options.rounds)
        yield replace(row, sequences=tuple(sorted(options.sequences))) if options.sequences else row


def parse() -> argparse.Namespace:
    """Return the command line's settings; --quick is the smallest recipe, not compiled."""
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", default=["llama-130m", "llama-350m", "llama-1b"])
    parser.add_argument("--methods", choices=TRAINED, nargs="+", default=list(TRAINED))
    parser.add_argument("--compiled", choices=["no", "yes"], nargs="+", default=["no", "yes"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sequences", type=int, nargs="+", default=[], help="micro batches; none: doubled")
    parser.add_argument("--curves", type=float, default=0.0, metavar="SECONDS", help="0: no loss curves")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and do not")
    options = parser.parse_args()
    if options.quick:
        options.recipes, options.compiled, options.rounds = options.recipes[:1], ["no"], 2
    return options


def main() -> int:
    """Measure every row; return the exit code."""
    options = parse()
    if options.dry_run:
        for row in planned(options):
            print(
                f"{row}{'' if METHODS[row.method].obstacle is None else f' ({METHODS[row.method].obstacle})'}"
            )
        for recipe in options.recipes if options.curves else ():
            print(f"{recipe}, loss curves of {', '.join(CURVES)}, {options.curves:g} s each")
        return 0
    if not torch.cuda.is_available():
        print(
            "gpu.py: torch finds no CUDA device here, and this benchmark is of one; --dry-run shows what it "
            "would run, steps.py measures the same steps on the CPU",
            file=sys.stderr,
        )
        return NO_GPU
    rows: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {"rows": rows, "absent": {}}
    for row in planned(options):
        if (obstacle := METHODS[row.method].obstacle) is not None:
            result["absent"][row.method] = obstacle
            continue
        note(str(row))
        rows[str(row)] = alone(measure, row)
        result["headline"] = headline(rows)
        record("gpu", result, options)
    if options.curves:
        result["curves"] = {
            recipe: curves(rows, recipe, seconds=options.curves) for recipe in options.recipes
        }
    publish("gpu", result, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
