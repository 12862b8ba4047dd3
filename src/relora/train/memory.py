"""Running out of memory, in words: what was needed, what there was, and which settings lower it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from relora.errors import ConfigError
from relora.log.units import size
from relora.train.config import Recipe
from relora.train.phase import momentum_bytes, num_in_place, num_parameters, state_bytes
from relora.train.state import RunState

_CPU = re.compile(r"DefaultCPUAllocator: can't allocate memory|not enough memory")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w*)")


@contextmanager
def memory_errors(recipe: Recipe, state: RunState | None, doing: str) -> Iterator[None]:
    """Turn an allocation that fails inside the block into a ConfigError that says what would help.

    Args:
        recipe: The run's.
        state: What it has built so far; None while it is being built.
        doing: What it does, such as "step 3".

    Raises:
        ConfigError: if memory runs out; every other error passes as it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU.search(str(error))
        if not is_memory:
            raise
        raise ConfigError(f"{doing}: {_worded(recipe, state, str(error))}") from error


def _worded(recipe: Recipe, state: RunState | None, text: str) -> str:
    asked = _ASKED.search(text)
    amount = asked[1] if asked else ""
    wanted = (
        f" (an allocation of {size(int(amount)) if amount.isdigit() else amount} failed)" if amount else ""
    )
    parts = [f"the memory of this device is not enough{wanted}"]
    if state is not None:
        trained = 4 * num_parameters(state.model, trainable=True)
        in_place = num_in_place(state.optimizer.adamw)
        expected = 2 * trained + 2 * in_place + momentum_bytes(state.model)
        states = max(state_bytes(state.optimizer.adamw, state.model), expected)
        parts.append(
            f"weights take {size(4 * num_parameters(state.model))}, gradients {size(trained)}, optimizer "
            f"states {size(states)}; activations come on top"
        )
    return (
        f"{'; '.join(parts)}. To need less: {', '.join(_remedies(recipe))}. Then --overwrite, or --fork NAME"
    )


def _remedies(recipe: Recipe) -> list[str]:
    train, data = recipe.train, recipe.data
    remedies = []
    if train.micro_batch_size > 1:
        remedies.append(
            f"lower train.micro_batch_size (now {train.micro_batch_size}; the batch stays the same)"
        )
    if not train.gradient_checkpointing:
        remedies.append("set train.gradient_checkpointing = true")
    if train.precision == "fp32":
        remedies.append('set train.precision = "bf16" where the hardware has it')
    remedies.append(f"lower data.seq_len (now {data.seq_len})")
    is_by_adamw = recipe.run.method == "full" or recipe.relora.warm_start_steps > 0
    if is_by_adamw and recipe.warm_start_in_place is None:
        in_place = 'set relora.warm_start_kind = "muon" and relora.warm_start_scale = 2.5, or '
        remedies.append(
            "the full-rank phase holds gradients and two moments of every weight: "
            f"{in_place if recipe.spec.takes_variants else ''}begin without a warm start from a trained "
            "model (model.init_from)"
        )
    remedies.append("take a smaller model")
    return remedies
