"""`relora inspect`: what a run's folder holds, without training."""

from pathlib import Path
from typing import Any

from relora.checkpoint.folder import check_sizes, verify_checkpoint
from relora.checkpoint.lock import lock_holder
from relora.checkpoint.manifest import is_finished, is_temporary
from relora.errors import ConfigError
from relora.train.recipe_io import load_recipe
from relora.train.run_folder import read_summary
from relora.train.saved import CHECKPOINTS, RECIPE


def inspect_run(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Return what a run is, how far it is, and the state of each of its checkpoints.

    Args:
        path: The run's folder.
        verify: Whether to read every file of every checkpoint and compare it with its digest; otherwise
            manifests are read, and files are compared with their sizes alone.

    Raises:
        ConfigError: if `path` is not a run.
    """
    if not (path / RECIPE).is_file():
        raise ConfigError(f"{path} is not a run: it has no {RECIPE}")
    recipe = load_recipe(path)
    root = path / CHECKPOINTS
    found = sorted(root.iterdir()) if root.is_dir() else []
    check = verify_checkpoint if verify else check_sizes
    checkpoints = {folder.name: check(folder) for folder in found if is_finished(folder.name)}
    valid = [name for name, problems in checkpoints.items() if not problems]
    good = "valid" if verify else "sizes as listed (--verify compares every byte)"
    summary = read_summary(path)
    return {
        "run": str(path),
        "method": recipe.run.method,
        "steps": recipe.total_steps,
        "tokens_per_step": recipe.tokens_per_step,
        "switch_step": recipe.switch_step,
        "in_use_by": lock_holder(path),
        "verified": verify,
        "newest_valid_checkpoint": valid[-1] if valid else None,
        "checkpoints": {name: problems or good for name, problems in checkpoints.items()},
        "num_damaged": len(checkpoints) - len(valid),
        "unfinished_saves": [folder.name for folder in found if is_temporary(folder.name)],
        "is_finished": summary is not None,
        "summary": summary,
    }
