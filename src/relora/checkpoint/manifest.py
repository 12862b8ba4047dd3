"""manifest.json: what a checkpoint consists of, written last, so that its presence says that all is there.

It holds format_version, step, files (size, sha256, and for tensors that share memory which name stands for
which), the description its writer gave, and a digest of itself: a flipped bit in the step or the recipe's
hash is damage too.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora.checkpoint.files import disk_errors, read_bounded
from relora.checkpoint.strict_json import from_json, listed, shown, to_json
from relora.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
MANIFEST_LIMIT_BYTES = 4 * 2**20
MAX_STEP = 99_999_999

_TEMPORARY = re.compile(r"\.step-[0-9]{8}\.[0-9a-f]{16}\.tmp")
_FINISHED = re.compile(r"step-[0-9]{8}")
_OWN_KEYS = ("format_version", "step", "files", "manifest_sha256")
_TENSOR_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint as its manifest lists it."""

    size: int
    """Bytes."""
    sha256: str
    """Digest of the whole file, in hex."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Tensor names that are not stored, each with the stored name of the very same tensor."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest that has been read and is consistent in itself."""

    step: int
    files: Mapping[str, FileEntry]
    content: dict[str, Any]
    """The whole of it as JSON, description included."""


def folder_name(step: int) -> str:
    """Return what the finished checkpoint of a step is called."""
    return f"step-{step:08d}"


def is_finished(name: str) -> bool:
    """Whether a name is that of a finished checkpoint; nothing else ever bears one."""
    return _FINISHED.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Whether a name is that of a checkpoint in the making or in removal, be its writer alive or dead."""
    return _TEMPORARY.fullmatch(name) is not None


def step_of(name: str) -> int:
    """Return the step of a finished checkpoint's name."""
    return int(name.removeprefix("step-"))


def is_tensor_file(name: str) -> bool:
    """Whether a name may hold tensors: a bare NAME.safetensors that cannot leave its folder."""
    return _TENSOR_FILE.fullmatch(name) is not None


def manifest_bytes(step: int, files: Mapping[str, FileEntry], description: Mapping[str, object]) -> bytes:
    """Return the text of a manifest, digest of itself included.

    Raises:
        CheckpointError: if the description cannot be written as JSON, or uses a key of the manifest itself.
    """
    taken = [key for key in _OWN_KEYS if key in description]
    if taken:
        raise CheckpointError(
            f"a description may not use the key {shown(taken[0])}, which is the manifest's own"
        )
    content: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "step": step,
        **description,
        "files": {name: _entry_content(entry) for name, entry in files.items()},
    }
    data = to_json({**content, "manifest_sha256": _digest(content)}, place="description")
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise CheckpointError(
            f"a manifest of {len(data)} bytes is too long: at most {MANIFEST_LIMIT_BYTES} allowed"
        )
    return data


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing, damaged, of another format, of another step than the folder's name
            says, or names a file outside the folder.
    """
    with disk_errors("read", folder):
        if is_finished(folder.name) and folder.is_symlink():
            raise CheckpointError(f"{folder} should be a folder, found a link")
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise CheckpointError(f"{folder} should be a folder, found {found}")
    path = folder / MANIFEST_NAME
    data = read_bounded(path, limit=MANIFEST_LIMIT_BYTES)
    content = from_json(data, place=MANIFEST_NAME)
    if not isinstance(content, dict):
        raise CheckpointError(f"{MANIFEST_NAME} is a {type(content).__name__}, not an object")
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST_NAME} should have format_version {FORMAT_VERSION}, found {shown(version)}: "
            "use the version of relora that wrote it"
        )
    problems = [
        *_step_problems(content),
        *_files_problems(content.get("files")),
        *_digest_problems(content, data),
    ]
    if problems:
        raise CheckpointError(f"{MANIFEST_NAME}: {listed(problems)}")
    if is_finished(folder.name) and folder.name != folder_name(content["step"]):
        raise CheckpointError(f"{MANIFEST_NAME} should be of {folder.name}, found step {content['step']}")
    files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    return Manifest(step=content["step"], files=files, content=content)


def _entry_content(entry: FileEntry) -> dict[str, object]:
    tied = {"tied": dict(entry.tied)} if entry.tied else {}
    return {"size": entry.size, "sha256": entry.sha256, **tied}


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(to_json(dict(content), place="description")).hexdigest()


def _digest_problems(content: dict[str, Any], data: bytes) -> list[str]:
    given = content.get("manifest_sha256")
    found = _digest({key: value for key, value in content.items() if key != "manifest_sha256"})
    if given != found:
        return [
            f"its content should have sha256 {shown(given)}, found {shown(found)}: it is edited or damaged"
        ]
    return [] if to_json(content, place=MANIFEST_NAME) == data else ["its text is not as it was written"]


def _step_problems(content: Mapping[str, Any]) -> list[str]:
    step = content.get("step")
    if type(step) is int and 0 <= step <= MAX_STEP:
        return []
    return [f"step should be a whole number from 0 to {MAX_STEP}, found {shown(step)}"]


def _files_problems(files: object) -> list[str]:
    if not isinstance(files, dict):
        return [f"files should be an object, found {shown(files)}"]
    missing = [] if STATE_NAME in files else [f"files should list {STATE_NAME}"]
    return missing + [problem for name, entry in files.items() for problem in _entry_problems(name, entry)]


def _entry_problems(name: str, entry: object) -> list[str]:
    if name != STATE_NAME and not is_tensor_file(name):
        return [f"files names {shown(name)}, which is neither {STATE_NAME} nor a bare NAME.safetensors"]
    if not isinstance(entry, dict) or not {"size", "sha256"} <= set(entry) <= {"size", "sha256", "tied"}:
        return [f"the entry of {name} should hold size and sha256, found {shown(entry)}"]
    problems = []
    if type(entry["size"]) is not int or entry["size"] < 0:
        problems.append(f"the size of {name} should be a number of bytes, found {shown(entry['size'])}")
    if not isinstance(entry["sha256"], str) or not _DIGEST.fullmatch(entry["sha256"]):
        problems.append(f"the sha256 of {name} should be 64 hex digits, found {shown(entry['sha256'])}")
    tied = entry.get("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(stored, str) for stored in tied.values()):
        problems.append(f"the tied names of {name} should be an object of texts, found {shown(tied)}")
    return problems
