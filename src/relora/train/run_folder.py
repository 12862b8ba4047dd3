"""The folder of a run: begin it, go on in it, or fork a new one off its newest checkpoint.

The same command again resumes. What may change on the way is how a run is watched and kept, never what it
computes: any other change is refused with the fields named. One process at a time has a run open.
"""

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relora.checkpoint.folder import read_state
from relora.checkpoint.lock import LOCK_NAME, folder_lock
from relora.checkpoint.manifest import folder_name
from relora.checkpoint.store import latest_valid
from relora.errors import CheckpointError, ConfigError, ReLoRAError
from relora.train.checks import field_types
from relora.train.config import SECTIONS, Recipe
from relora.train.forking import fork_violations
from relora.train.recipe_io import PART_SUFFIX, changed_fields, load_recipe, section_of, write_recipe
from relora.train.saved import CHECKPOINTS, MODEL_CONFIG, RECIPE, TOKENIZER
from relora.train.state import Progress

METRICS = "metrics.jsonl"
RESTARTS = "restarts.jsonl"
NONFINITE = "nonfinite.jsonl"
SUMMARY = "summary.json"
FORKED_FROM = "forked_from.json"
_FREE_SECTIONS = ("eval", "checkpoint", "log")
_FREE_FIELDS = ("run.out", "train.nonfinite", "train.nonfinite_limit")
# What a process that died in making a run may leave: none of it makes a folder somebody else's.
_BEGINNINGS = {LOCK_NAME, f".{RECIPE}{PART_SUFFIX}"}
_HALF_WRITTEN = re.compile(r"\.\w+\.jsonl?\.[0-9]+\.tmp")
# The disk is at fault, not the name that was given.
_DISK = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "ENOSPC", "EPERM", "EROFS")
    if hasattr(errno, name)
}


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run folder, and where to begin."""

    folder: Path
    recipe: Recipe
    resume_from: Path | None
    """The newest valid checkpoint, or None to begin at step 0."""
    notes: tuple[str, ...]
    """What the user should know about how it was opened."""
    summary: dict[str, Any] | None = None
    """What came out, where the run is finished: there is nothing to train."""
    is_new_fork: bool = False
    """Whether its folder holds nothing but copies of another run's."""

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / CHECKPOINTS


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run; None where there is none that can be read."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None


def _is_free(name: str) -> bool:
    return name.partition(".")[0] in _FREE_SECTIONS or name in _FREE_FIELDS


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe decides what its run computes, by "section.field", as JSON values."""
    return {
        f"{name}.{field}": _as_json(getattr(section, field))
        for name, section in ((name, section_of(recipe, name)) for name in SECTIONS)
        for field in field_types(type(section))
        if not _is_free(f"{name}.{field}") and f"{name}.{field}" != "run.name"
    }


def _as_json(value: object) -> object:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def refuse_other_settings(opened: OpenedRun, saved: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint that another recipe made, such as one copied from elsewhere.

    Settings that only one of the two knows, as other versions have them, are not compared; and a fork begins
    from a checkpoint of another recipe by its nature.

    Raises:
        CheckpointError: naming the settings that differ.
    """
    checkpoint, origin = opened.resume_from, opened.folder / FORKED_FROM
    if checkpoint is None or (origin.is_file() and f'"{checkpoint.name}"' in origin.read_text("utf-8")):
        return
    mine = settings(opened.recipe)
    other = [f"{k} {saved[k]!r} (here {mine[k]!r})" for k in mine if k in saved and saved[k] != mine[k]]
    if other:
        raise CheckpointError(
            f"{checkpoint} was made by a run with other settings: {', '.join(other)}. It is not this run's: "
            "move it away, and the newest one before it is taken"
        )


def note_origin(folder: Path, source: Path, checkpoint: str) -> None:
    """Say that a run begins from another's checkpoint, whose recipe may differ from its own."""
    origin = {"run": str(source), "checkpoint": checkpoint}
    (folder / FORKED_FROM).write_text(json.dumps(origin) + "\n", encoding="utf-8")


def open_run(
    recipe: Recipe, held: ExitStack, *, overwrite: bool = False, fork: str | None = None
) -> OpenedRun:
    """Make or reopen the folder of a run and write its resolved recipe.

    Args:
        recipe: What to run; its folder is run.out / run.name.
        held: Takes the run's lock, and lets go of it when it is closed.
        overwrite: Remove the run that is there first.
        fork: Name of a new run to begin from this one's newest checkpoint, with `recipe` as it is now; where
            that fork has begun already, it is reopened.

    Raises:
        ConfigError: if the folder is not a run, cannot be one, or holds a run of another recipe.
        CheckpointError: if another process has the run open, the disk refuses, or there is no valid
            checkpoint to go on from.
    """
    wanted = recipe if fork is None else replace(recipe, run=replace(recipe.run, name=fork))
    folder = wanted.run.folder
    with _worded(folder):
        if fork is not None and (overwrite or not _is_fork_of(folder, recipe.run.folder)):
            _refuse_fork(recipe, wanted, overwrite=overwrite)
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        locked = held.enter_context(folder_lock(folder, doing="training"))
        _sweep(folder)
        if overwrite or not (folder / RECIPE).is_file():
            _clear(folder)
        if (folder / RECIPE).is_file():
            opened = _reopen(wanted, folder)
        elif fork is None:
            opened = _begin(wanted, folder)
        else:
            opened = _fork(recipe, wanted)
    unlocked = f"{folder}: this file system has no locks; see to it that no other process trains there"
    return opened if locked else replace(opened, notes=(*opened.notes, unlocked))


@contextmanager
def undone_if_refused(opened: OpenedRun, *, is_main: bool) -> Iterator[None]:
    """Remove a fork that was just made, if the block refuses it: the mended command makes it again."""
    try:
        yield
    except ReLoRAError:
        if opened.is_new_fork and is_main:
            with _worded(opened.folder):
                _clear(opened.folder)
                shutil.rmtree(opened.folder, ignore_errors=True)  # what is left is at most its open lock
        raise


@contextmanager
def _worded(folder: Path) -> Iterator[None]:
    """Say what the system refused: a disk that does not take it, or a name that cannot be a run's."""
    try:
        yield
    except OSError as error:
        kind = CheckpointError if error.errno in _DISK else ConfigError
        raise kind(
            f"run folder {folder} cannot be used: {error.strerror or error}. What is in it is untouched; "
            "make room or make it writable, or give another one with --run.out"
        ) from error


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or any((folder / name).is_file() for name in (RECIPE, FORKED_FROM)):
        return
    if any(path.name not in _BEGINNINGS for path in folder.iterdir()):
        raise ConfigError(
            f"{folder} exists and is not a run (it has no {RECIPE}): choose another run.name or run.out"
        )


def _sweep(folder: Path) -> None:
    """Remove half-written files of processes that died here; the caller holds the lock."""
    for path in folder.iterdir():
        if _HALF_WRITTEN.fullmatch(path.name):
            path.unlink()


def _clear(folder: Path) -> None:
    """Empty a run's folder; what makes it a run goes last: a kill must not leave a stranger's folder."""
    found = [path for path in folder.iterdir() if path.name != LOCK_NAME]
    for path in sorted(found, key=lambda path: path.name in (RECIPE, FORKED_FROM)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _begin(recipe: Recipe, folder: Path) -> OpenedRun:
    write_recipe(recipe, folder / RECIPE)
    return OpenedRun(folder=folder, recipe=recipe, resume_from=None, notes=())


def _has_never_begun(folder: Path) -> bool:
    """Tell whether a recipe is all there is: its data or model was refused, and nothing is to be kept."""
    return {path.name for path in folder.iterdir()} <= {RECIPE, LOCK_NAME}


def _reopen(recipe: Recipe, folder: Path) -> OpenedRun:
    before = load_recipe(folder)
    changes = {name: values for name, values in changed_fields(before, recipe).items() if not _is_free(name)}
    if changes and not _has_never_begun(folder):
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changes.items())
        raise ConfigError(
            f"{folder} holds a run of another recipe ({listed}). Give the same settings to resume it, "
            "--run.name for a new run, --fork NAME to begin a new run from its newest checkpoint, "
            "or --overwrite to begin it anew"
        )
    newest, problems = latest_valid(folder / CHECKPOINTS)
    notes = [f"passed over a damaged checkpoint: {problem}" for problem in problems]
    summary = read_summary(folder)
    if newest is not None:
        notes.append(f"resuming {folder} from {newest.name}")
        if newest.name != folder_name(recipe.total_steps):  # its end was lost: it is not finished
            (folder / SUMMARY).unlink(missing_ok=True)
            summary = None
    elif problems or summary is None or summary.get("steps") != recipe.total_steps:
        _refuse_to_begin_anew(folder, problems)
        notes.append(f"{folder} has no checkpoint yet: beginning at step 0, with fresh logs")
    write_recipe(recipe, folder / RECIPE)
    return OpenedRun(folder=folder, recipe=recipe, resume_from=newest, notes=tuple(notes), summary=summary)


def _refuse_to_begin_anew(folder: Path, problems: list[str]) -> None:
    """Keep from step 0 a run that has been further: its logs would go, and a fork be of no recipe at all."""
    origin = folder / FORKED_FROM
    if origin.is_file():
        raise CheckpointError(
            f"{folder} was forked ({origin.read_text(encoding='utf-8', errors='replace').strip()}) and the "
            f"checkpoint it began from is not valid: {'; '.join(problems) or 'it is missing'}. "
            "Fork again with --overwrite"
        )
    if problems:
        raise CheckpointError(
            f"{folder} has checkpoints, none of them valid: {'; '.join(problems)}. Put back one that is, or "
            "give --overwrite to begin it anew"
        )
    if (folder / SUMMARY).is_file():
        raise CheckpointError(
            f"{folder} has no checkpoint, and a {SUMMARY} that cannot be read or is of another length: mend "
            "it or move it away, or give --overwrite to begin the run anew"
        )


def _is_fork_of(folder: Path, source: Path) -> bool:
    """Tell whether a folder is a run that began as a fork of another."""
    origin = folder / FORKED_FROM
    if not ((folder / RECIPE).is_file() and origin.is_file()):
        return False
    try:
        found = json.loads(origin.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("run") == str(source)


def _refuse_fork(recipe: Recipe, wanted: Recipe, *, overwrite: bool) -> None:
    source, folder, name = recipe.run.folder, wanted.run.folder, wanted.run.name
    if not (source / RECIPE).is_file():
        raise ConfigError(f"--fork {name}: there is no run in {source} to fork from")
    if folder.exists() and source.samefile(folder):
        raise ConfigError(f"--fork {name}: the fork needs a name of its own")
    newest, problems = latest_valid(source / CHECKPOINTS)
    if newest is None:
        raise CheckpointError(f"--fork {name}: {source} has no valid checkpoint; {'; '.join(problems)}")
    if violations := fork_violations(load_recipe(source), recipe, newest):
        raise ConfigError.from_violations(f"--fork {name}", violations)
    if (folder / RECIPE).is_file() and not overwrite:
        raise ConfigError(f"--fork {name}: {folder} exists; give another name, or --overwrite")


def _fork(recipe: Recipe, wanted: Recipe) -> OpenedRun:
    """Copy what a new run begins from: first where it comes from, last the recipe that makes it a run."""
    source, folder = recipe.run.folder, wanted.run.folder
    newest, problems = latest_valid(source / CHECKPOINTS)
    if newest is None:
        raise CheckpointError(f"--fork: {source} has no valid checkpoint any more; {'; '.join(problems)}")
    # The rank that is learned is measured against the weights at the switch, wherever that was.
    switch = Progress.from_json(read_state(newest).get("progress", {})).switch
    switch_step = int(switch["step"]) if switch else wanted.switch_step or 0
    kept = {newest.name, folder_name(switch_step)}
    note_origin(folder, source, newest.name)
    for part in (MODEL_CONFIG, TOKENIZER):
        shutil.copytree(source / part, folder / part)
    for log in (METRICS, RESTARTS, NONFINITE):
        if (source / log).is_file():
            shutil.copy2(source / log, folder / log)
    for checkpoint in sorted((source / CHECKPOINTS).iterdir()):
        if checkpoint.name in kept:
            shutil.copytree(checkpoint, folder / CHECKPOINTS / checkpoint.name)
    write_recipe(wanted, folder / RECIPE)
    return OpenedRun(
        folder=folder,
        recipe=wanted,
        resume_from=folder / CHECKPOINTS / newest.name,
        notes=(f"forked {folder} off {source} at {newest.name}",),
        is_new_fork=True,
    )
