"""The content of one checkpoint folder: written, verified, loaded; what it is called is `store`'s business.

manifest.json       what there is, with sizes and digests; written last
state.json          what is no tensor
NAME.safetensors    one for each group of tensors ("model", "optimizer", "rng", ...)
"""

import hashlib
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from relora.checkpoint.files import FileOperations, disk_errors, file_digest, read_bounded
from relora.checkpoint.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    FileEntry,
    Manifest,
    is_tensor_file,
    manifest_bytes,
    read_manifest,
)
from relora.checkpoint.strict_json import from_json, shown, to_json
from relora.checkpoint.tensor_file import check_storable, check_structure, read_tensors, write_tensors
from relora.errors import CheckpointError

STATE_LIMIT_BYTES = 16 * 2**20

_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """What goes into a checkpoint; what JSON or safetensors would lose is refused before a file is made."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state_data: bytes
    description: Mapping[str, object]

    @classmethod
    def checked(
        cls,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, object],
        description: Mapping[str, object],
    ) -> "CheckpointContent":
        """Check what a caller wants to store.

        Raises:
            CheckpointError: naming each part that cannot be stored or could not be read back.
        """
        for key, named in tensors.items():
            if not is_tensor_file(f"{key}{_SUFFIX}"):
                raise CheckpointError(f"{shown(key)} cannot name a file: use letters, digits, - and _")
            check_storable(named, place=repr(key))
        data = to_json(dict(state), place="state")
        if len(data) > STATE_LIMIT_BYTES:
            raise CheckpointError(
                f"a state of {len(data)} bytes is too long: put its large parts into tensors"
            )
        manifest_bytes(step, {}, description)
        return cls(step=step, tensors=tensors, state_data=data, description=description)


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint in memory, every digest checked."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """As given to `save_checkpoint`, on the CPU, in memory of their own; tied names share one tensor."""
    state: dict[str, Any]
    manifest: dict[str, Any]
    """The whole manifest, with the description its writer gave at the top level."""


def write_content(folder: Path, content: CheckpointContent, files: FileOperations) -> None:
    """Write a checkpoint's files into an empty folder, each forced to the disk, the manifest last.

    Raises:
        CheckpointError: if the disk refuses.
    """
    entries = {STATE_NAME: _write_file(folder / STATE_NAME, content.state_data, files)}
    for key, named in content.tensors.items():
        path = folder / f"{key}{_SUFFIX}"
        with files.step("write", path):
            sha256, tied = write_tensors(path, named)
            # safetensors makes its files for their owner alone; they get the permissions that files get here.
            path.chmod(stat.S_IMODE((folder / STATE_NAME).stat().st_mode))
            size = path.stat().st_size
        files.sync_file(path)
        entries[path.name] = FileEntry(size=size, sha256=sha256, tied=tied)
    _write_file(folder / MANIFEST_NAME, manifest_bytes(content.step, entries, content.description), files)
    files.sync_folder(folder)


def verify_checkpoint(path: Path) -> list[str]:
    """Check a checkpoint: its manifest, then sizes, then digests, then the bounds of what the files hold.

    Args:
        path: Its folder.

    Returns:
        What is wrong, in words; empty for a valid checkpoint.
    """
    return _problems(path, (_check_size, _check_digest, _check_bounds))


def check_sizes(path: Path) -> list[str]:
    """Check a checkpoint's manifest, and its files by their sizes alone; as `verify_checkpoint`."""
    return _problems(path, (_check_size,))


def _problems(path: Path, checks: Sequence[Callable[[Path, FileEntry], None]]) -> list[str]:
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    for check in checks:
        if problems:  # sizes cost nothing; a digest of a file known to be cut short tells nothing more
            break
        for name, entry in manifest.files.items():
            try:
                check(path / name, entry)
            except CheckpointError as error:
                problems.append(str(error))
    return problems


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Read a checkpoint into memory; what is returned is what was digested.

    Args:
        path: Its folder.

    Raises:
        CheckpointError: naming each file that is missing, damaged or out of bounds.
    """
    try:
        return _loaded(path)
    except CheckpointError as error:
        raise CheckpointError(f"cannot load the checkpoint {path}: {error}; use another one") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read what is no tensor of a checkpoint, and nothing else of it.

    Args:
        path: Its folder.

    Raises:
        CheckpointError: if that is missing or damaged.
    """
    return _checked_state(path, read_manifest(path))


def _checked_state(path: Path, manifest: Manifest) -> dict[str, Any]:
    data = read_bounded(path / STATE_NAME, limit=STATE_LIMIT_BYTES)
    _compare_digest(STATE_NAME, manifest.files[STATE_NAME], hashlib.sha256(data).hexdigest())
    return _parsed_state(data)


def _loaded(path: Path) -> LoadedCheckpoint:
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        _check_size(path / name, entry)
    state = _checked_state(path, manifest)
    tensors = {}
    for name, entry in manifest.files.items():
        if is_tensor_file(name):
            tensors[name.removesuffix(_SUFFIX)], digest = read_tensors(path / name, entry.tied)
            _compare_digest(name, entry, digest)
    return LoadedCheckpoint(step=manifest.step, tensors=tensors, state=state, manifest=manifest.content)


def _write_file(path: Path, data: bytes, files: FileOperations) -> FileEntry:
    files.write(path, data)
    files.sync_file(path)
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _check_size(path: Path, entry: FileEntry) -> None:
    with disk_errors("read", path):
        found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path.name} should be a regular file, found a link, a folder or a device")
    if found.st_size != entry.size:
        raise CheckpointError(f"{path.name} should have {entry.size} bytes, found {found.st_size}")


def _check_digest(path: Path, entry: FileEntry) -> None:
    _compare_digest(path.name, entry, file_digest(path))


def _compare_digest(name: str, entry: FileEntry, found: str) -> None:
    if found != entry.sha256:
        digests = f"{entry.sha256[:16]}..., found {found[:16]}..."
        raise CheckpointError(f"{name} should have sha256 {digests}: it is damaged")


def _check_bounds(path: Path, entry: FileEntry) -> None:
    if is_tensor_file(path.name):
        check_structure(path, entry.tied)
    else:
        _parsed_state(read_bounded(path, limit=STATE_LIMIT_BYTES))


def _parsed_state(data: bytes) -> dict[str, Any]:
    state = from_json(data, place=STATE_NAME)
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE_NAME} should be an object, found a {type(state).__name__}")
    return state
