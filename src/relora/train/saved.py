"""Open a trained model, wherever it is: a run's folder, one of its checkpoints, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from relora.checkpoint.store import LoadedCheckpoint, latest_valid, load_checkpoint
from relora.errors import CheckpointError, ConfigError
from relora.method.inject import fold
from relora.train.config import Recipe
from relora.train.folders import empty_model
from relora.train.model import load_pretrained
from relora.train.phase import inject_factors
from relora.train.recipe_io import load_recipe
from relora.train.state import SavedState, load_weights_

RECIPE = "recipe.toml"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
MODEL_CONFIG = "model"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model read back, plain and in eval mode on the CPU."""

    model: PreTrainedModel
    tokenizer_folder: Path
    recipe: Recipe | None
    """None for a Hugging Face folder."""
    step: int | None
    run: Path | None
    tokens: int | None = None
    """Tokens that a run's model has been trained on."""


def load_saved(path: Path, *, step: int | None = None) -> SavedModel:
    """Read a model.

    Args:
        path: A run's folder (its newest valid checkpoint is taken), RUN/checkpoints/step-00001000, or a
            folder in Hugging Face form.
        step: Which checkpoint of a run.

    Raises:
        ConfigError: if `path` is none of these, or a step is asked of a checkpoint.
        CheckpointError: if the run has no (such) valid checkpoint.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder: give a run, a checkpoint or a model folder")
    if (path / RECIPE).is_file():
        return _from_run(path, _checkpoint_of(path, step))
    if path.parent.name == CHECKPOINTS and (path.parent.parent / RECIPE).is_file():
        if step is not None:
            raise ConfigError(f"{path} is one checkpoint: leave the step out, or give {path.parent.parent}")
        return _from_run(path.parent.parent, load_checkpoint(path))
    if (path / "config.json").is_file():
        return _from_folder(path)
    raise ConfigError(f"{path} holds neither {RECIPE} (a run) nor config.json (a Hugging Face model)")


def _checkpoint_of(run: Path, step: int | None) -> LoadedCheckpoint:
    root = run / CHECKPOINTS
    if step is not None:
        return load_checkpoint(root / f"step-{step:08d}")
    newest, problems = latest_valid(root)
    if newest is None:
        found = f": {'; '.join(problems)}" if problems else " yet: the first is written at checkpoint.every"
        raise CheckpointError(f"{run} has no valid checkpoint{found}")
    return load_checkpoint(newest)


def _from_run(run: Path, checkpoint: LoadedCheckpoint) -> SavedModel:
    recipe = load_recipe(run)
    saved = SavedState.of(checkpoint)
    model = empty_model(run / MODEL_CONFIG, checkpoint.tensors["model"])
    has_factors = saved.phase == "low_rank" and recipe.spec.injects
    if has_factors:
        inject_factors(model, recipe)
    load_weights_(model, checkpoint.tensors["model"])
    if has_factors:
        fold(model)
    return SavedModel(
        model=model.eval(),
        tokenizer_folder=run / TOKENIZER,
        recipe=recipe,
        step=checkpoint.step,
        run=run,
        tokens=saved.progress.tokens,
    )


def _from_folder(folder: Path) -> SavedModel:
    model = load_pretrained(str(folder)).eval()
    return SavedModel(model=model, tokenizer_folder=folder, recipe=None, step=None, run=None)
