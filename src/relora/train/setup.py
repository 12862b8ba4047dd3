"""Build what a run trains, in the phase it is in, and move it from one phase to the next."""

import shutil
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from relora.data.prepare import PreparedData
from relora.method.inject import InjectReport
from relora.train.parallel import Processes
from relora.train.phase import Plan, build_optimizer, free_gradients_, inject_factors
from relora.train.saved import MODEL_CONFIG, TOKENIZER
from relora.train.state import Progress, RunState


def build_state(model: PreTrainedModel, plan: Plan, here: Processes, *, low_rank: bool) -> RunState:
    """Put a plain model on the device and build its optimizer.

    Args:
        model: As the run begins, or of its shape with weights still to be restored.
        plan: The run's recipe and calendar.
        here: Decides the device.
        low_rank: Whether the factors are in already, as in a checkpoint taken after the switch.
    """
    recipe = plan.recipe
    if recipe.train.gradient_checkpointing:
        enable_checkpointing_(model)
    cast(nn.Module, model).to(here.device)
    phase = plan.phase(1)
    state = RunState(
        model=model,
        optimizer=build_optimizer(model, recipe, phase),
        relora=None,
        phase="warm_start" if phase == "low_rank" else phase,
        progress=Progress(),
    )
    if low_rank:
        at_low_rank(state, plan)
    return state


def enable_checkpointing_(model: PreTrainedModel) -> None:
    """Let the model's layers recompute their activations in the backward pass."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def at_low_rank(state: RunState, plan: Plan) -> InjectReport:
    """Put factors into the model and build the low-rank phase's optimizer, in place.

    The full-rank phase's gradients and optimizer state are freed before the new ones are made.
    """
    free_gradients_(state.model)
    state.optimizer.adamw.state.clear()
    report = inject_factors(state.model, plan.recipe)
    state.optimizer = build_optimizer(state.model, plan.recipe, "low_rank")
    state.relora = plan.restarter(state.model, state.optimizer.adamw)
    state.phase = "low_rank"
    return report


def save_model_files(run: Path, model: object, data: PreparedData) -> None:
    """Put the model's configuration and the tokenizer into the run, so that it can be read by itself."""
    plain = cast(PreTrainedModel, model)
    plain.config.save_pretrained(run / MODEL_CONFIG)
    if plain.generation_config is not None:
        plain.generation_config.save_pretrained(run / MODEL_CONFIG)
    if not (run / TOKENIZER).exists():
        shutil.copytree(data.tokenizer_folder, run / TOKENIZER)
