"""`relora export`: a run's model, merged and plain, for everybody else's tools."""

import tomllib
from pathlib import Path

from relora.checkpoint.card import model_card
from relora.checkpoint.export import export_folder
from relora.errors import ConfigError
from relora.train.folders import open_tokenizer
from relora.train.recipe_io import recipe_toml
from relora.train.run_folder import read_summary
from relora.train.saved import load_saved


def export_run(run: Path, out: Path, *, step: int | None = None) -> Path:
    """Write a run's model as a folder that stock `transformers` loads.

    Args:
        run: The run's folder, or one of its checkpoints.
        out: Folder to write; it must not exist.
        step: Checkpoint to export; None means the newest valid one.

    Returns:
        `out`.
    """
    saved = load_saved(run, step=step)
    if saved.recipe is None or saved.run is None:
        raise ConfigError(f"export: {run} is a model folder already, not a run")
    tokenizer = open_tokenizer(saved.tokenizer_folder)
    summary = read_summary(saved.run)
    if summary is None or summary.get("steps") != saved.step:  # figures of the run's end are not this model's
        summary = {"steps": saved.step, "tokens": saved.tokens}
    card = model_card(tomllib.loads(recipe_toml(saved.recipe)), summary)
    return export_folder(saved.model, tokenizer, out, card=card)
