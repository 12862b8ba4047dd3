"""A small checkpoint of a real run, and manifests forged to be consistent in themselves."""

import hashlib
import json
from pathlib import Path
from typing import Any

from relora.checkpoint.manifest import _digest
from relora.checkpoint.strict_json import to_json
from relora.train.fit import fit
from tiny_run import tiny_recipe


def save_run_checkpoint(folder: Path) -> Path:
    """Train a few steps and return the last checkpoint, one that a restart has been through."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    recipe = tiny_recipe(folder, model=sizes, train={"steps": 7}, eval={"every": 0, "sequences": 2})
    return fit(recipe).folder / "checkpoints" / "step-00000007"


def digest_of(manifest: Any, *, loose: bool = False) -> bytes:
    """Return the text of a manifest with its right digest; where ours refuses to write it, as JSON can."""
    if isinstance(manifest, dict):
        manifest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        try:
            return to_json({**manifest, "manifest_sha256": _digest(manifest)}, place="manifest")
        except Exception:
            if not loose:
                raise
    text = json.dumps(manifest, indent=1).encode("utf-8", "surrogatepass")
    return text.replace(
        b"}", b', "manifest_sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"}', 1
    )
