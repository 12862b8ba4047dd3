"""Small checkpoints for the tests of the store, and what one needs to compare and to forge them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relora.checkpoint.manifest import _digest
from relora.checkpoint.store import save_checkpoint
from relora.checkpoint.strict_json import to_json


def save(root: Path, step: int, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(step)
    arguments = {
        "tensors": {
            "model": {"a.weight": torch.randn(3, 7, generator=generator), "b": torch.tensor(float(step))},
            "optimizer": {"a.weight/exp_avg": torch.randn(3, 7, generator=generator)},
        },
        "state": {"position": step, "losses": [0.1, 1e-300], "phase": "low_rank", "next": None},
        "description": {"restart_index": 2, "recipe_sha256": "ab" * 32},
    }
    return save_checkpoint(root, step=step, **(arguments | changes))


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.numel():
        assert torch.equal(
            found.reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8)
        )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest the way an attacker would: consistent in itself."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["manifest_sha256"]
    change(content)
    path.write_bytes(to_json({**content, "manifest_sha256": _digest(content)}, place="manifest"))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Put other content in place of a file, listed with its right size and digest."""
    (folder / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))
