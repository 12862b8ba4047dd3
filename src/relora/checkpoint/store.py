"""The folder of a run's checkpoints: save, find the newest valid one, retire the oldest.

A checkpoint becomes visible as a whole. It is written into a temporary sibling whose name begins with a dot,
every file is forced to the disk, the manifest comes last, and one rename gives the folder its name
step-00001000; it is then opened again and verified. Which one is the newest is computed from what verifies,
never from a pointer file.
"""

import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from relora.checkpoint.files import FileOperations, Observer, disk_errors
from relora.checkpoint.folder import (
    CheckpointContent,
    LoadedCheckpoint,
    load_checkpoint,
    verify_checkpoint,
    write_content,
)
from relora.checkpoint.lock import writer_lock
from relora.checkpoint.manifest import MAX_STEP, folder_name, is_finished, is_temporary, step_of
from relora.checkpoint.strict_json import listed, shown
from relora.errors import CheckpointError

__all__ = [
    "LoadedCheckpoint",
    "latest_valid",
    "load_checkpoint",
    "retire",
    "save_checkpoint",
    "verify_checkpoint",
]


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    description: Mapping[str, object],
    observer: Observer | None = None,
) -> Path:
    """Write a checkpoint, durably and as a whole, and verify it.

    Args:
        root: The folder of all checkpoints of the run; made if missing.
        step: The step it belongs to. A damaged checkpoint of that step that is there already is replaced.
        tensors: One file for each key, such as "model". For tensors that share memory see `tensor_file`.
        state: What else is needed to go on, as JSON values that come back the same.
        description: What a reader may want to know without loading it; joins the manifest.
        observer: Told of each file operation (its name and its path) before it is done.

    Returns:
        The checkpoint's folder, root / "step-00001000".

    Raises:
        CheckpointError: if a part cannot be stored, the disk refuses, another process is writing in `root`,
            or a valid checkpoint of this step exists. Checkpoints written before are untouched.
    """
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"step must be a whole number from 0 to {MAX_STEP}, not {shown(step)}")
    content = CheckpointContent.checked(step, tensors, state, description)
    files = FileOperations(observer)
    with disk_errors("create", root):
        root.mkdir(parents=True, exist_ok=True)
    with writer_lock(root) as alone:
        if alone:
            _sweep(root, files)
        target = root / folder_name(step)
        if target.is_dir() and not verify_checkpoint(target):
            raise CheckpointError(f"{target} exists and is valid: a step's checkpoint is written once")
        temporary = _temporary_name(target)
        try:
            files.make_folder(temporary)
            write_content(temporary, content, files)
            _put_in_place(temporary, target, files)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _confirm(target, files)
    return target


def latest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that verifies.

    Args:
        root: The folder of all checkpoints of the run; it may be missing.

    Returns:
        Its folder, or None if there is none, and what is wrong with each newer one that was passed over.

    Raises:
        CheckpointError: if `root` cannot be read.
    """
    passed_over: list[str] = []
    for path in _finished(root):
        problems = verify_checkpoint(path)
        if not problems:
            return path, passed_over
        passed_over += [f"{path.name}: {problem}" for problem in problems]
    return None, passed_over


def retire(
    root: Path,
    *,
    keep_last: int,
    keep_every: int = 0,
    keep_steps: Collection[int] = (),
    verified: Path | None = None,
    observer: Observer | None = None,
) -> list[Path]:
    """Remove the oldest checkpoints; the newest one that verifies always stays.

    Args:
        root: The folder of all checkpoints of the run.
        keep_last: How many stay, counted from the newest one that verifies; at least 1.
        keep_every: Checkpoints of its multiples stay besides; 0 is none.
        keep_steps: Steps whose checkpoints stay besides.
        verified: The newest valid checkpoint, as `save_checkpoint` has just returned it; None looks for it.
        observer: As in `save_checkpoint`.

    Returns:
        What was removed. Damaged checkpoints newer than the newest valid one are left to be looked at.

    Raises:
        CheckpointError: if the disk refuses, another process is writing there, or keep_last is below 1.
    """
    if keep_last < 1:
        raise CheckpointError(f"keep_last must be at least 1, not {keep_last}")
    newest = latest_valid(root)[0] if verified is None else verified
    if newest is None:
        return []
    files = FileOperations(observer)
    removed = []

    def stays(path: Path) -> bool:
        step = step_of(path.name)
        return step in keep_steps or (keep_every > 0 and step % keep_every == 0)

    with writer_lock(root):
        older = [path for path in _finished(root) if path.name < newest.name and not stays(path)]
        for path in older[keep_last - 1 :]:
            # Renamed first: half of a checkpoint must never bear a finished one's name.
            temporary = _temporary_name(path)
            files.rename(path, temporary)
            files.sync_folder(root)
            files.remove(temporary)
            removed.append(path)
    return removed


def _finished(root: Path) -> list[Path]:
    """Return what is named as a checkpoint, newest first."""
    with disk_errors("read", root):
        found = list(root.iterdir()) if root.exists() else []
    return sorted((path for path in found if is_finished(path.name)), reverse=True)


def _sweep(root: Path, files: FileOperations) -> None:
    """Remove what dead writers left; the caller holds the lock, so no living one owns any of it."""
    with disk_errors("read", root):
        found = sorted(root.iterdir())
    for path in found:
        if is_temporary(path.name):
            files.remove(path)


def _put_in_place(temporary: Path, target: Path, files: FileOperations) -> None:
    damaged = _temporary_name(target) if target.exists() or target.is_symlink() else None
    if damaged is not None:
        files.rename(target, damaged)
    files.rename(temporary, target)
    files.sync_folder(target.parent)
    if damaged is not None:
        files.remove(damaged)


def _confirm(target: Path, files: FileOperations) -> None:
    with files.step("verify", target):
        problems = verify_checkpoint(target)
    if problems:
        raise CheckpointError(f"{target} does not read back as written: {listed(problems)}; check the disk")


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
