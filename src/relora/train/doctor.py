"""`relora doctor`: look for trouble before hour one: devices, disk, determinism, and one step of a recipe.

Each check is a function that returns its findings; what it raises is a finding too. Nothing is left behind
but prepared data, which the run will need anyway.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from relora.checkpoint.lock import folder_lock
from relora.checkpoint.store import load_checkpoint, save_checkpoint
from relora.data.batches import TokenBatches
from relora.data.prepare import prepare
from relora.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ReLoRAError
from relora.log.units import duration, size
from relora.method.merge import merge_and_reinit_
from relora.train.config import Recipe
from relora.train.loss import TokenLoss
from relora.train.memory import memory_errors
from relora.train.methods import load_method
from relora.train.model import build_model
from relora.train.parallel import Processes, processes
from relora.train.phase import Plan
from relora.train.precision import resolve_precision
from relora.train.run_folder import settings
from relora.train.setup import at_low_rank, build_state
from relora.train.state import RunState, SavedState, checkpoint_content, versions
from relora.train.step import train_step_
from relora.train.summary import peak_memory_bytes

Verdict = Literal["ok", "warning", "broken"]
_PROBE_BYTES = 32 * 2**20
_SLOW_BYTES_PER_S = 20 * 2**20
_CODES: dict[type[Exception], int] = {ConfigError: 2, DataError: 3, CheckpointError: 4, NonFiniteError: 5}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Verdict
    said: str
    exit_code: int = 0


def examine(recipe: Recipe) -> list[Finding]:
    """Check this machine, and take a step of the recipe on it.

    Args:
        recipe: What to try; its data is prepared, nothing else of it is kept.
    """
    checks: list[tuple[str, Callable[[Recipe], Iterator[tuple[Verdict, str]]]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("precision", _precision),
        ("determinism", _determinism),
        ("run folder", _run_folder),
        ("one step", _one_step),
    ]
    return [finding for name, check in checks for finding in _found(name, check, recipe)]


def _found(
    name: str, check: Callable[[Recipe], Iterator[tuple[Verdict, str]]], recipe: Recipe
) -> Iterator[Finding]:
    try:
        for verdict, said in check(recipe):
            yield Finding(check=name, verdict=verdict, said=said, exit_code=int(verdict == "broken"))
    except ReLoRAError as error:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1)
        yield Finding(check=name, verdict="broken", said=str(error), exit_code=code)
    except (OSError, RuntimeError) as error:  # a driver or a disk that fails is what is looked for
        yield Finding(check=name, verdict="broken", said=f"{type(error).__name__}: {error}", exit_code=1)


def _versions(_: Recipe) -> Iterator[tuple[Verdict, str]]:
    yield "ok", ", ".join(f"{name} {version}" for name, version in versions().items())


def _devices(_: Recipe) -> Iterator[tuple[Verdict, str]]:
    if not torch.cuda.is_available():
        threads, cores = torch.get_num_threads(), os.cpu_count()
        yield "ok", f"no GPU that torch can use; {threads} threads on {cores} CPU cores"
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        works = float((ones @ ones).sum()) == 64**3
        said = f"cuda:{index} {torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free"
        yield ("ok" if works else "broken"), said if works else f"{said}: its products are wrong"
        if free < total / 2:
            yield "warning", f"cuda:{index}: more than half of its memory is taken by other programs"


def _precision(recipe: Recipe) -> Iterator[tuple[Verdict, str]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, why = resolve_precision("auto", device)
    wanted = recipe.train.precision
    yield "ok", f"{precision} suits this device: {why}"
    if wanted == "bf16" and precision == "fp32":
        yield "warning", "the recipe asks for bf16, which is slow here"


def _determinism(recipe: Recipe) -> Iterator[tuple[Verdict, str]]:
    """Train a few steps of a small network twice, and compare every bit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed = recipe.run.seed

    def train() -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.SiLU(), torch.nn.Linear(128, 64))
            net.to(device)
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
            for _ in range(5):
                optimizer.zero_grad()
                net(torch.randn(256, 64, device=device)).square().mean().backward()
                optimizer.step()
            return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).cpu()

    if torch.equal(train(), train()):
        yield "ok", f"the same steps twice on {device.type} gave the same bits"
    else:
        yield (
            "warning",
            f"the same steps twice on {device.type} differ: resuming will be near, not equal",
        )


def _run_folder(recipe: Recipe) -> Iterator[tuple[Verdict, str]]:
    """Write, sync and read back in the folder of runs, and try its locks."""
    with _scratch(recipe) as scratch:
        probe, data = scratch / "probe", os.urandom(_PROBE_BYTES)
        begun = time.perf_counter()
        with probe.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        speed = _PROBE_BYTES / (time.perf_counter() - begun)
        if probe.read_bytes() != data:
            yield "broken", f"{recipe.run.out} does not read back what was written: check the disk"
        said = f"{recipe.run.out} takes {size(speed)}/s, {size(shutil.disk_usage(scratch).free)} free"
        yield ("ok" if speed >= _SLOW_BYTES_PER_S else "warning"), said
        with folder_lock(scratch, doing="looking") as locked:
            if not locked:
                yield "warning", f"{recipe.run.out} has no locks: two processes on one run are not told apart"


def _one_step(recipe: Recipe) -> Iterator[tuple[Verdict, str]]:
    """Take a step in each phase, merge, save, and read the checkpoint back."""
    data = prepare(recipe.data)
    yield "ok", f"data: {len(data.train_tokens):,} training and {len(data.heldout_tokens):,} held-out tokens"
    plan = Plan(recipe=recipe)
    batches = TokenBatches(data.train_tokens, seq_len=recipe.data.seq_len, seed=recipe.run.seed)
    with processes(recipe.distributed.strategy) as here, _scratch(recipe) as scratch:
        with memory_errors(recipe, None, "the model"):
            method = load_method(recipe.run.method)(plan)
            model = build_model(method.model_recipe(data), data)
            state = build_state(model, method, here, low_rank=False)
        phases = [] if plan.switch_step == 0 else [state.phase]
        for phase in (*phases, *(["low_rank"] if plan.switch_step is not None else [])):
            if phase == "low_rank":
                at_low_rank(state)
            yield from _step(recipe, state, plan, batches, here)
        if state.phase == "low_rank" and recipe.spec.restarts:
            report = merge_and_reinit_(state.model, seed=recipe.run.seed, restart_index=1)
            yield "ok", f"a merge of {len(report.layers)} layers, error {report.relative_merge_error:.1e}"
        yield from _save(recipe, state, scratch)


def _step(
    recipe: Recipe, state: RunState, plan: Plan, batches: TokenBatches, here: Processes
) -> Iterator[tuple[Verdict, str]]:
    train, phase = recipe.train, state.phase.replace("_", " ")
    state.optimizer.set_multiplier_(1.0)
    precision, _ = resolve_precision(train.precision, here.device)
    state.progress.step += 1
    begun = time.perf_counter()
    loss = TokenLoss(cast(PreTrainedModel, state.model), chunk_tokens=train.loss_chunk_tokens)
    with memory_errors(recipe, state, f"one step ({phase})"):
        result = train_step_(
            here.wrap_for_training(loss, compile_it=train.compile),
            state.optimizer,
            batches.batch(state.progress.step, batch_size=train.batch_size),
            here,
            step=state.progress.step,
            seed=recipe.run.seed,
            micro_batch_size=train.micro_batch_size,
            precision=precision,
            clip_grad_norm=recipe.optim.clip_grad_norm,
        )
    took = time.perf_counter() - begun
    if not result.is_applied:
        raise NonFiniteError(f"the first step ({phase}) is not finite: loss {result.loss:g}")
    used = size(peak_memory_bytes(here.device))
    whole = duration(took * plan.recipe.total_steps)
    yield (
        "ok",
        f"{phase}: loss {result.loss:.3f}, {took:.2f} s, {used} at most; {whole} for all steps at this pace",
    )


def _save(recipe: Recipe, state: RunState, scratch: Path) -> Iterator[tuple[Verdict, str]]:
    content = checkpoint_content(state, precision="fp32", fingerprint="", recipe=settings(recipe))
    content["state"]["method"] = None  # two steps were taken, whatever the method's calendar says of them
    begun = time.perf_counter()
    path = save_checkpoint(scratch, **content)
    took = time.perf_counter() - begun
    SavedState.of(load_checkpoint(path))
    written = sum(file.stat().st_size for file in path.iterdir())
    needed = written * (recipe.checkpoint.keep_last + 2)
    yield "ok", f"a checkpoint: {size(written)}, {took:.2f} s to write and verify, and it reads back"
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise CheckpointError(
            f"{recipe.run.out} has {size(free)} free, {recipe.checkpoint.keep_last} checkpoints and the ones "
            f"being written and removed need {size(needed)}: free space, or lower checkpoint.keep_last"
        )
    every = recipe.checkpoint.every
    if every and took > recipe.checkpoint.timeout_s / 2:
        yield "warning", f"a save takes {took:.0f} s of the {recipe.checkpoint.timeout_s:.0f} it may"


@contextmanager
def _scratch(recipe: Recipe) -> Iterator[Path]:
    """Make a folder on the disk of the runs, and remove it with all it holds."""
    out = recipe.run.out
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=out) as folder:
            yield Path(folder)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror or error}. Make room or make it writable, or give "
            "another folder with --run.out"
        ) from error
    finally:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def as_result(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as a verb's result."""
    worst = next((each.verdict for each in findings if each.verdict == "broken"), None)
    return {
        "is_healthy": worst is None,
        "findings": [{"check": each.check, "verdict": each.verdict, "said": each.said} for each in findings],
    }
