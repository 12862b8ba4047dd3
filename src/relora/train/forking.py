"""What a fork may change: everything its checkpoint does not already hold an answer to.

Learning rates, lengths, batch and the optimizer reset are read anew at every step. Once factors train, their
shape, their scaling and their calendar are part of the checkpoint's weights and counters.
"""

from pathlib import Path

from relora.checkpoint.manifest import read_manifest
from relora.train.config import Recipe
from relora.train.recipe_io import changed_fields

_FREE_WITH_FACTORS = {
    f"relora.{field}"
    for field in ("dropout", "forward", "reset", "reset_ratio", "reset_mask", "reset_step_count")
}


def fork_violations(before: Recipe, wanted: Recipe, checkpoint: Path) -> list[str]:
    """Return what keeps a checkpoint from going on with another recipe, in words; empty if nothing does.

    Args:
        before: The recipe of the run that the checkpoint is of.
        wanted: The recipe of the fork.
        checkpoint: Its folder, which is valid.
    """
    manifest = read_manifest(checkpoint)
    step, has_factors = manifest.step, manifest.content.get("phase") == "low_rank"
    changed = changed_fields(before, wanted)
    found = []
    if shape := [name for name in changed if name.startswith("model.")]:
        found.append(f"a fork goes on with the same model; leave out {', '.join(shape)}")
    if step >= wanted.total_steps:
        found.append(
            f"the run must be longer than the {step} steps it has behind it, not {wanted.total_steps}"
        )
    if has_factors:
        fixed = [name for name in changed if _is_fixed_by_factors(name)]
        if fixed:
            found.append(
                f"{checkpoint.name} holds factors, which decide {', '.join(fixed)}: leave that out, or "
                "export the run and begin a new one with model.init_from"
            )
    elif wanted.switch_step is not None and wanted.switch_step < step:
        found.append(
            f"relora.warm_start_steps must be at least the {step} steps that {checkpoint.name} trained at "
            f"full rank, not {wanted.switch_step}"
        )
    return found


def _is_fixed_by_factors(name: str) -> bool:
    return name in ("run.method", "run.seed") or (
        name.startswith("relora.") and name not in _FREE_WITH_FACTORS
    )
