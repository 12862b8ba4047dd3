"""What came out of a run: summary.json, with the rank that was learned and a sample of text."""

import json
import math
import resource
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from relora.checkpoint.store import load_checkpoint
from relora.errors import CheckpointError
from relora.log.files import replacing
from relora.method.linear import LoRALinear
from relora.method.spectrum import function_weights, spectra
from relora.train.folders import open_tokenizer
from relora.train.generate import generate
from relora.train.model import num_positions
from relora.train.parallel import Processes
from relora.train.phase import Plan, num_parameters, state_bytes
from relora.train.precision import Resolved
from relora.train.run_folder import SUMMARY, OpenedRun
from relora.train.saved import TOKENIZER
from relora.train.state import RunState, versions

_SAMPLE_TOKENS = 96
# Singular values of all layers take about this many multiplications at most: seconds, not minutes.
_SPECTRUM_BUDGET = 3e11


def summarise(
    opened: OpenedRun, state: RunState, plan: Plan, here: Processes, *, precision: Resolved
) -> dict[str, Any]:
    """Measure a finished run and write its summary.json."""
    recipe, progress = opened.recipe, state.progress
    summary = {
        "method": recipe.run.method,
        "steps": progress.step,
        "tokens": progress.tokens,
        "parameters_total": num_parameters(state.model),
        "parameters_trainable": num_parameters(state.model, trainable=True) + state.method.num_in_place,
        "weight_bytes": sum(t.nbytes for t in (*state.model.parameters(), *state.model.buffers())),
        "optimizer_bytes": state_bytes(state.optimizer.adamw, state.model),
        **progress.evaluated,
        "eval_split": recipe.eval.split,
        "wall_s": progress.wall_s,
        "tokens_per_s": progress.tokens / progress.wall_s,
        "peak_memory_bytes": max(progress.peak_memory_bytes, peak_memory_bytes(here.device)),
        "restarts": progress.restarts,
        "world_size": here.world_size,
        "strategy": here.strategy,
        "device": device_name(here.device),
        "precision": precision,
        "versions": versions(),
        "switch": progress.switch,
        "method_facts": state.method.facts(),
        "ranks": _ranks(opened, state, plan),
        "sample": _sample(opened, state),
    }
    with replacing(opened.folder / SUMMARY) as file:
        file.write(json.dumps(summary, indent=2).encode())
    return summary


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """Return a GPU's model, and "cpu" for a CPU, whose model torch does not tell."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _ranks(opened: OpenedRun, state: RunState, plan: Plan) -> dict[str, float] | None:
    """Return the rank of what was learned since the switch; None where nothing compares, or it costs much."""
    layers = {m.name: m for m in state.model.modules() if isinstance(m, LoRALinear)}
    sides = [(layer.out_features, layer.in_features) for layer in layers.values()]
    cost = sum(math.prod(side) * min(side) for side in sides)
    if not layers or cost > _SPECTRUM_BUDGET:
        return None
    start = _weights_at_switch(opened.checkpoints / f"step-{plan.switch_step or 0:08d}", layers)
    if start is None:
        return None
    changes = spectra(start, function_weights(state.model)).values()
    return {
        "one_cycle": opened.recipe.relora.rank,
        "learned": median(change.rank for change in changes),
        "effective": median(change.effective_rank for change in changes),
        "largest": median(map(min, sides)),
    }


def _weights_at_switch(checkpoint: Path, layers: dict[str, LoRALinear]) -> dict[str, Tensor] | None:
    if not checkpoint.is_dir():
        return None
    try:
        saved = load_checkpoint(checkpoint).tensors["model"]
    except CheckpointError as error:  # the run itself is whole: it must not lose its summary
        warnings.warn(f"the rank of what was learned is not in the summary: {error}", stacklevel=2)
        return None
    weights = {name: saved[f"{name}.weight"] for name in layers}
    return {name: w.T if layers[name].is_transposed else w for name, w in weights.items()}


def _sample(opened: OpenedRun, state: RunState) -> str:
    tokenizer = open_tokenizer(opened.folder / TOKENIZER)
    model = cast(PreTrainedModel, state.model)
    positions = num_positions(model)
    return generate(
        model,
        tokenizer,
        prompt="",
        max_new_tokens=_SAMPLE_TOKENS if positions is None else min(_SAMPLE_TOKENS, positions - 1),
        temperature=0.8,
        seed=opened.recipe.run.seed,
    )
