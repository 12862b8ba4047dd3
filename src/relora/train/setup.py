"""Build what a run trains, in the phase it is in, and move it from one phase to the next."""

import shutil
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from relora.checkpoint.files import replace_folder
from relora.checkpoint.rng import seed_rng_
from relora.checkpoint.store import load_checkpoint
from relora.data.prepare import PreparedData
from relora.method.targets import choose_targets
from relora.train.folders import empty_model
from relora.train.groups import PhaseName
from relora.train.guard import Past
from relora.train.methods import load_method
from relora.train.model import build_model
from relora.train.parallel import Processes
from relora.train.phase import Plan, carry_memory_, free_gradients_, method_config
from relora.train.precision import Resolved, resolve_precision
from relora.train.run_folder import OpenedRun, refuse_other_settings
from relora.train.saved import MODEL_CONFIG, TOKENIZER
from relora.train.state import Progress, RunState, SavedState, restore_state_
from relora.train.training_method import TrainingMethod
from relora.train.watch import RestartWatch


def state_to_begin_with(
    opened: OpenedRun, plan: Plan, data: PreparedData, here: Processes, past: Past | None
) -> tuple[RunState, Resolved, str]:
    """Build a run as it stands at its newest checkpoint, or as it begins.

    Args:
        opened: The run's folder, and the checkpoint.
        plan: Its recipe and calendar.
        data: What it trains on.
        here: Decides the device.
        past: What it has been through, where it went back to this checkpoint.

    Returns:
        The state, the precision to train in, and why that one, in words.

    Raises:
        CheckpointError: if the checkpoint is not this run's, or does not fit it.
    """
    recipe = opened.recipe
    # Measured once: ranks that raced by themselves could come to different ends.
    precision, why = here.from_main(lambda: resolve_precision(recipe.train.precision, here.device))
    method = load_method(recipe.run.method)(plan)
    if opened.resume_from is None:
        seed_rng_(recipe.run.seed)  # so that what is saved of the streams is the run's, not the process's
        state = build_state(build_model(method.model_recipe(data), data), method, here, low_rank=False)
    else:
        checkpoint = load_checkpoint(opened.resume_from)
        saved = SavedState.of(checkpoint)
        refuse_other_settings(opened, saved.recipe)
        _take_over_warm_start_(saved, plan)
        if recipe.train.precision == "auto":
            precision, why = saved.precision, "as the run began"
        # A run that goes on needs neither the checkpoint it was initialised from nor a network.
        model = empty_model(opened.folder / MODEL_CONFIG, checkpoint.tensors["model"])
        state = build_state(model, method, here, low_rank=saved.phase == "low_rank")
        restore_state_(state, checkpoint, saved, fingerprint=data.fingerprint)
    if past is not None:
        state.progress.passed_batches = past.next_batch - (state.progress.step + 1)
        state.progress.nonfinite_events = past.num_events
    return state, precision, why


def _take_over_warm_start_(saved: SavedState, plan: Plan) -> None:
    """Let the loss have ended the warm start where it did, unless a fork ends it by another rule."""
    recipe, progress = plan.recipe, saved.progress
    rule = {
        "relora.warm_start_until": recipe.relora.warm_start_until,
        "relora.warm_start_steps": recipe.switch_step,
    }
    is_other = any(saved.recipe.get(name, value) != value for name, value in rule.items())
    if saved.phase != "low_rank" and is_other:
        # A window of losses is a part of the longest warm start: those of another rule count for none.
        progress.switch = None
        progress.warm_start_means.clear()
        progress.warm_start_pending.clear()
    elif progress.switch is not None and "steepness" in progress.switch:
        plan.ended_at = int(progress.switch["step"])


def build_state(
    model: PreTrainedModel, method: TrainingMethod, here: Processes, *, low_rank: bool
) -> RunState:
    """Build a run's state around a plain model, on the device unless the switch is next.

    Args:
        model: As the run begins, or of its shape with weights still to be restored.
        method: Of the run; it knows the recipe and the calendar.
        here: Decides the device.
        low_rank: Whether the factors are in already, as in a checkpoint taken after the switch.

    Raises:
        ConfigError: if the switch, however far away, could not put factors into this model.
    """
    recipe, plan = method.recipe, method.plan
    if plan.switch_step is not None and recipe.spec.injects:
        choose_targets(model, method_config(recipe))
    if recipe.train.gradient_checkpointing:
        enable_checkpointing_(model)
    is_at_full_rank = not low_rank and plan.switch_step != 0
    if is_at_full_rank:
        cast(nn.Module, model).to(here.device)
    # Else the switch is next, and what it stores in fewer bits is never whole on the device.
    phase: PhaseName = "full" if plan.switch_step is None else "warm_start"
    state = RunState(
        model=model,
        optimizer=method.build_optimizer(model, phase),
        method=method,
        phase=phase,
        progress=Progress(),
        watch=RestartWatch(
            restart_every=recipe.relora.restart_every, rewarmup_steps=recipe.schedule.rewarmup_steps
        ),
        device=here.device,
    )
    if phase == "full":
        method.attach(model, state.optimizer.adamw)
    if low_rank:
        at_low_rank(state)
    return state


def enable_checkpointing_(model: PreTrainedModel) -> None:
    """Let the model's layers recompute their activations in the backward pass."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def at_low_rank(state: RunState) -> str:
    """Let the method change the model for the low-rank phase, and build that phase's optimizer, in place.

    The full-rank gradients are freed first. AdamW goes on with the states of what trains on as it did; the
    others are freed.

    Returns:
        What was done, in words.
    """
    free_gradients_(state.model)
    memory = dict(state.optimizer.adamw.state)
    state.optimizer.adamw.state.clear()
    report = state.method.switch_(state.model)
    state.model.to(state.device)
    state.optimizer = state.method.build_optimizer(state.model, "low_rank")
    num_kept = carry_memory_(memory, state.optimizer.adamw)
    state.method.attach(state.model, state.optimizer.adamw)
    state.phase = "low_rank"
    return f"{report}\nAdamW keeps its memory of {num_kept} tensors that train on" if num_kept else report


def save_model_files(run: Path, model: object, data: PreparedData) -> None:
    """Put the model's configuration and the tokenizer into the run, so that it can be read by itself.

    Each folder appears as a whole: a run killed here must not go on with half a tokenizer.

    Raises:
        CheckpointError: if the disk refuses.
    """
    plain = cast(PreTrainedModel, model)

    def write_configs(folder: Path) -> None:
        plain.config.save_pretrained(folder)
        if plain.generation_config is not None:
            plain.generation_config.save_pretrained(folder)

    replace_folder(run / MODEL_CONFIG, write_configs)
    replace_folder(
        run / TOKENIZER, lambda folder: shutil.copytree(data.tokenizer_folder, folder, dirs_exist_ok=True)
    )
