"""The folder of a run: begin it, go on in it, or fork a new one off its newest checkpoint.

The same command again resumes. What may change on the way is how a run is watched and kept, never what it
computes: any other change is refused with the fields named.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from relora.checkpoint.store import latest_valid
from relora.errors import CheckpointError, ConfigError
from relora.train.config import Recipe
from relora.train.forking import fork_violations
from relora.train.recipe_io import changed_fields, load_recipe, write_recipe
from relora.train.saved import CHECKPOINTS, MODEL_CONFIG, RECIPE, TOKENIZER

METRICS = "metrics.jsonl"
RESTARTS = "restarts.jsonl"
SUMMARY = "summary.json"
_FREE_SECTIONS = ("eval", "checkpoint", "log")
_FREE_FIELDS = ("run.out",)


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run folder, and where to begin."""

    folder: Path
    recipe: Recipe
    resume_from: Path | None
    """The newest valid checkpoint, or None to begin at step 0."""
    notes: tuple[str, ...]
    """What the user should know about how it was opened."""

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / CHECKPOINTS


def open_run(recipe: Recipe, *, overwrite: bool = False, fork: str | None = None) -> OpenedRun:
    """Make or reopen the folder of a run and write its resolved recipe.

    Args:
        recipe: What to run; its folder is run.out / run.name.
        overwrite: Remove the run that is there first.
        fork: Name of a new run to begin from this one's newest checkpoint, with `recipe` as it is now.

    Raises:
        ConfigError: if the folder is not a run, cannot be written, or holds a run of another recipe.
        CheckpointError: if there is no valid checkpoint to fork from.
    """
    try:
        if fork is not None:
            return _fork(recipe, fork, overwrite=overwrite)
        folder = recipe.run.folder
        if folder.exists() and any(folder.iterdir()):
            if not (folder / RECIPE).is_file():
                raise ConfigError(
                    f"{folder} exists and is not a run (it has no {RECIPE}): "
                    "choose another run.name or run.out"
                )
            if not overwrite:
                return _reopen(recipe, folder)
            shutil.rmtree(folder)
        return _begin(recipe, folder)
    except OSError as error:
        raise ConfigError(
            f"run folder {recipe.run.folder} cannot be used: {error.strerror or error}; "
            "give one that can be written with --run.out"
        ) from error


def _begin(recipe: Recipe, folder: Path) -> OpenedRun:
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, folder / RECIPE)
    return OpenedRun(folder=folder, recipe=recipe, resume_from=None, notes=())


def _has_never_begun(folder: Path) -> bool:
    """Tell whether a recipe is all there is: its data or model was refused, and nothing is to be kept."""
    return [path.name for path in folder.iterdir()] == [RECIPE]


def _reopen(recipe: Recipe, folder: Path) -> OpenedRun:
    before = load_recipe(folder)
    changes = {
        name: values
        for name, values in changed_fields(before, recipe).items()
        if name.partition(".")[0] not in _FREE_SECTIONS and name not in _FREE_FIELDS
    }
    if changes and not _has_never_begun(folder):
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changes.items())
        raise ConfigError(
            f"{folder} holds a run of another recipe ({listed}). Give the same settings to resume it, "
            "--run.name for a new run, --fork NAME to begin a new run from its newest checkpoint, "
            "or --overwrite to begin it anew"
        )
    write_recipe(recipe, folder / RECIPE)
    newest, problems = latest_valid(folder / CHECKPOINTS)
    notes = [f"passed over a damaged checkpoint: {problem}" for problem in problems]
    if newest is None:
        notes.append(f"{folder} has no valid checkpoint yet: beginning at step 0, with fresh logs")
    else:
        notes.append(f"resuming {folder} from {newest.name}")
    return OpenedRun(folder=folder, recipe=recipe, resume_from=newest, notes=tuple(notes))


def _fork(recipe: Recipe, name: str, *, overwrite: bool) -> OpenedRun:
    source = recipe.run.folder
    if not (source / RECIPE).is_file():
        raise ConfigError(f"--fork {name}: there is no run in {source} to fork from")
    newest, problems = latest_valid(source / CHECKPOINTS)
    if newest is None:
        raise CheckpointError(f"--fork {name}: {source} has no valid checkpoint; {'; '.join(problems)}")
    if violations := fork_violations(load_recipe(source), recipe, newest):
        raise ConfigError.from_violations(f"--fork {name}", violations)
    changed = replace(recipe, run=replace(recipe.run, name=name))
    folder = changed.run.folder
    if folder.exists() and source.samefile(folder):
        raise ConfigError(f"--fork {name}: the fork needs a name of its own")
    if folder.exists() and not overwrite:
        raise ConfigError(f"--fork {name}: {folder} exists; give another name, or --overwrite")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for part in (MODEL_CONFIG, TOKENIZER):
        shutil.copytree(source / part, folder / part)
    for log in (METRICS, RESTARTS):
        if (source / log).is_file():
            shutil.copy2(source / log, folder / log)
    kept = {newest.name, f"step-{changed.switch_step or 0:08d}"}
    for checkpoint in sorted((source / CHECKPOINTS).iterdir()):
        if checkpoint.name in kept:
            shutil.copytree(checkpoint, folder / CHECKPOINTS / checkpoint.name)
    write_recipe(changed, folder / RECIPE)
    return OpenedRun(
        folder=folder,
        recipe=changed,
        resume_from=folder / CHECKPOINTS / newest.name,
        notes=(f"forked {folder} off {source} at {newest.name}",),
    )
