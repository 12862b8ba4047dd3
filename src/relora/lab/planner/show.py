"""A plan as a table for the terminal, and bytes in words."""

from collections.abc import Callable
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from relora.lab.planner.plan import MethodPlan, RunPlan

_PLAIN_WIDTH = 110
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))

_TRIFLE = 1024
_MOMENTS = {
    "start": "the switch to low rank",
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "update": "the update",
    "evaluation": "an evaluation",
    "restart": "a restart",
}

Row = tuple[str, Callable[[MethodPlan], str]]


def show_plan(plan: RunPlan, *, stream: TextIO) -> None:
    """Print a plan: what is planned, the methods side by side, and what would make them fit."""
    screen = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not stream.isatty():
        screen = Console(
            file=stream, highlight=False, markup=False, emoji=False, width=_PLAIN_WIDTH, color_system=None
        )
    screen.print(_heading(plan))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in plan.methods:
        table.add_column(name + (" *" if is_own(plan, name) else ""), justify="right")
    for words, value in _rows(plan):
        table.add_row(words, *(value(method) for method in plan.methods.values()))
    screen.print(table)
    for line in _advice(plan):
        screen.print(line, soft_wrap=True)


def is_own(plan: RunPlan, name: str) -> bool:
    """Tell whether a method is the one the recipe names."""
    run, factors = plan.recipe.run.method, plan.recipe.relora.factors
    return name == ("relora, one-sided" if run == "relora" and factors == "B" else run)


def in_units(num_bytes: float) -> str:
    """Write bytes in the unit that suits them."""
    unit, letters = unit_for(num_bytes)
    return f"{num_bytes / unit:,.2f} {letters}"


def unit_for(num_bytes: float) -> tuple[int, str]:
    """Return the largest unit of which there is one at least, in bytes and in letters."""
    return next((found for found in _UNITS if num_bytes >= found[0]), _UNITS[-1])


def _heading(plan: RunPlan) -> str:
    recipe = plan.recipe
    tokens = recipe.total_steps * recipe.tokens_per_step
    accumulation = recipe.train.batch_size // (recipe.train.micro_batch_size * plan.devices)
    recomputing = ", gradient checkpointing" if recipe.train.gradient_checkpointing else ""
    place = {"cpu": "this kind of CPU", "cuda": "a GPU"}[plan.device]
    return (
        f"{recipe.run.name}: {recipe.total_steps:,} steps of {recipe.tokens_per_step:,} tokens = {tokens:,} "
        f"tokens; warm start {recipe.relora.warm_start_steps:,} steps, {plan.restarts} restarts\n"
        f"planned for {place}, on each of {plan.devices}: micro batches of {recipe.train.micro_batch_size} x "
        f"{recipe.data.seq_len} tokens, {accumulation} a step, {plan.precision}{recomputing}, rank "
        f"{recipe.relora.rank}"
    )


def _rows(plan: RunPlan) -> list[Row]:
    prints = [method.footprint for method in plan.methods.values()]

    def memory(name: str) -> Callable[[MethodPlan], str]:
        return lambda method: (
            in_units(getattr(method.footprint, name)) if getattr(method.footprint, name) else "-"
        )

    rows: list[Row] = [
        ("parameters", lambda m: f"{m.footprint.parameters_total:,}"),
        ("  that train", lambda m: f"{m.footprint.parameters_trainable:,}"),
        ("  in factors", lambda m: f"{m.footprint.parameters_factors:,}"),
        ("weights", memory("weights_bytes")),
        ("factors", memory("factors_bytes")),
        ("gradients", memory("gradients_bytes")),
        ("optimizer states", memory("optimizer_bytes")),
        ("weights in the products' dtype", memory("casts_bytes")),
        ("activations for the backward", memory("activations_bytes")),
        ("  bytes a token", lambda m: f"{m.footprint.activations_bytes_per_token:,.0f}"),
        ("head and loss, at most", memory("loss_bytes")),
        ("peak of this method's steps", memory("peak_bytes")),
        ("  reached in", lambda m: _MOMENTS[m.footprint.peak_moment]),
        ("peak of the run, warm start included", lambda m: in_units(m.run_peak_bytes)),
        ("FLOPs a token", lambda m: f"{m.footprint.flops_per_token:.3g}"),
        ("speed-up by FLOPs, at best", lambda m: f"{m.speedup:.2f}x"),
        ("  over the whole run", lambda m: f"{m.run_speedup:.2f}x"),
    ]
    after = {name: rows.index(row) + 1 for row in rows for name in [row[0]]}
    extra: list[tuple[str, str, str, bool]] = [
        ("weights", "residual of the base", "residual_bytes", False),
        ("weights", "exact base, in host memory", "host_bytes", False),
        ("gradients", "  kept in DDP's buckets", "bucket_bytes", False),
        ("gradients", "kept for the complement", "observed_bytes", False),
        (
            "peak of the run, warm start included",
            "host memory while a checkpoint is saved",
            "checkpoint_bytes",
            True,
        ),
    ]
    for where, words, name, is_always in reversed(extra):
        if is_always or any(getattr(found, name) > _TRIFLE for found in prints):
            rows.insert(after[where], (words, memory(name)))
    if plan.memory_bytes is not None:
        rows.append((f"fits {in_units(plan.memory_bytes)}", lambda m: "yes" if m.fits else "no"))
    return rows


def _advice(plan: RunPlan) -> list[str]:
    lines: list[str] = []
    for reason in dict.fromkeys(plan.unavailable.values()):
        names = [name for name, found in plan.unavailable.items() if found == reason]
        lines.append(f"{' and '.join(names)}: not planned: {reason}")
    lines += plan.notes
    if plan.memory_bytes is not None:
        for name, method in plan.methods.items():
            lines += _remedy(name, method)
    if any("relora.warm_start_steps" in (method.settings or {}) for method in plan.methods.values()):
        lines.append(
            "Without a warm start give --model.init_from a trained checkpoint, such as one warm-started on a "
            "larger device: from random weights a cold start learns less."
        )
    if plan.recipe.train.precision == "auto":
        lines.append(f"train.precision is auto: planned as {plan.precision}")
    if plan.device == "cuda":
        lines.append(
            "What a GPU's context, its kernels' scratch memory and the allocator's gaps take comes on top."
        )
    else:
        lines.append(
            "On a CPU host memory is the device's: the copy of a checkpoint comes on top while it is saved, "
            "and so does the process itself. --device cuda plans for a GPU."
        )
    return lines


def _remedy(name: str, method: MethodPlan) -> list[str]:
    """Say what would make a method fit that does not."""
    if method.settings is None:
        if method.least_peak_bytes is None:
            return []
        least = in_units(method.least_peak_bytes)
        return [f"{name}: no setting known here makes it fit; the least found is {least}"]
    if not method.settings:
        return []
    flags = " ".join(f"--{key} {_word(value)}" for key, value in method.settings.items())
    return [f"{name} fits with {flags}"]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
