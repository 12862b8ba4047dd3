"""`relora inspect`: what a run's folder holds, without training."""

from pathlib import Path
from typing import Any

from relora.checkpoint.store import verify_checkpoint
from relora.errors import ConfigError
from relora.train.recipe_io import load_recipe
from relora.train.reporting import read_summary
from relora.train.saved import CHECKPOINTS, RECIPE


def inspect_run(path: Path) -> dict[str, Any]:
    """Return what a run is, how far it is, and the state of each of its checkpoints.

    Raises:
        ConfigError: if `path` is not a run.
    """
    if not (path / RECIPE).is_file():
        raise ConfigError(f"{path} is not a run: it has no {RECIPE}")
    recipe = load_recipe(path)
    root = path / CHECKPOINTS
    found = sorted(root.glob("step-*")) if root.is_dir() else []
    checkpoints = {folder.name: verify_checkpoint(folder) for folder in found}
    valid = [name for name, problems in checkpoints.items() if not problems]
    summary = read_summary(path)
    return {
        "run": str(path),
        "method": recipe.run.method,
        "steps": recipe.total_steps,
        "tokens_per_step": recipe.tokens_per_step,
        "switch_step": recipe.switch_step,
        "newest_valid_checkpoint": valid[-1] if valid else None,
        "checkpoints": {name: problems or "valid" for name, problems in checkpoints.items()},
        "is_finished": summary is not None,
        "summary": summary,
    }
