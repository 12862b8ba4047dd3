"""Build what a run trains, in the phase it is in, and move it from one phase to the next."""

import shutil
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from relora.data.prepare import PreparedData
from relora.train.parallel import Processes
from relora.train.phase import PhaseName, free_gradients_
from relora.train.saved import MODEL_CONFIG, TOKENIZER
from relora.train.state import Progress, RunState
from relora.train.training_method import TrainingMethod


def build_state(
    model: PreTrainedModel, method: TrainingMethod, here: Processes, *, low_rank: bool
) -> RunState:
    """Put a plain model on the device and build its optimizer.

    Args:
        model: As the run begins, or of its shape with weights still to be restored.
        method: Of the run; it knows the recipe and the calendar.
        here: Decides the device.
        low_rank: Whether the factors are in already, as in a checkpoint taken after the switch.
    """
    recipe, plan = method.recipe, method.plan
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    cast(nn.Module, model).to(here.device)
    phase: PhaseName = "full" if plan.switch_step is None else "warm_start"
    state = RunState(
        model=model,
        optimizer=method.build_optimizer(model, phase),
        method=method,
        phase=phase,
        progress=Progress(),
    )
    if phase == "full":
        method.attach(model, state.optimizer.adamw)
    if low_rank:
        at_low_rank(state)
    return state


def at_low_rank(state: RunState) -> str:
    """Let the method change the model for the low-rank phase, and build that phase's optimizer, in place.

    The full-rank phase's gradients and optimizer state are freed before the new ones are made.

    Returns:
        What was done, in words.
    """
    free_gradients_(state.model)
    state.optimizer.adamw.state.clear()
    report = state.method.switch_(state.model)
    state.optimizer = state.method.build_optimizer(state.model, "low_rank")
    state.method.attach(state.model, state.optimizer.adamw)
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
