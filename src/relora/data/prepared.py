"""PreparedData: a folder of token files and a manifest, checked against its digests whenever it is opened."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relora.data.corpus import Tally
from relora.errors import DataError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TRAIN = "train.bin"
HELDOUT = "heldout.bin"
TUNING = "tuning.bin"
TOKENIZER = "tokenizer"
_DIGEST = "manifest_sha256"

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Everything training needs of its text."""

    folder: Path
    fingerprint: str
    """Hex digest of the token files and the tokenizer: equal if and only if training sees the same ids."""
    vocab_size: int
    """Tokens of the tokenizer; every id is below it."""
    eos_token_id: int
    train_tokens: TokenArray
    """Flat, read-only memory map; each document ends with eos_token_id."""
    heldout_tokens: TokenArray
    """The same, documents in the order of their hashes: any beginning is a random sample."""
    heldout_bytes: int
    """UTF-8 bytes of the held-out documents."""
    tuning_tokens: TokenArray | None
    """The same of the tuning documents; None where data.tuning_fraction is 0."""
    counts: Mapping[str, int]
    """Documents, tokens, bytes of each split, and documents skipped or mended by reason."""
    notes: tuple[str, ...]
    """What was skipped, mended or odd, one line each, with its first place."""

    @property
    def tokenizer_folder(self) -> Path:
        """A folder that `transformers.AutoTokenizer.from_pretrained` loads offline."""
        return self.folder / TOKENIZER

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a held-out token stands for: bits per byte = loss / ln 2 / bytes_per_token."""
        return self.heldout_bytes / len(self.heldout_tokens)

    def evaluation(self, split: str) -> tuple[TokenArray, float]:
        """Return the tokens of the "heldout" or the "tuning" split, and the bytes one of them stands for.

        Raises:
            DataError: if there is no such split.
        """
        if split == "heldout":
            return self.heldout_tokens, self.bytes_per_token
        if self.tuning_tokens is None:
            raise DataError(f"{self.folder} has no tuning split: set data.tuning_fraction above 0")
        return self.tuning_tokens, self.counts["tuning_bytes"] / len(self.tuning_tokens)

    def check_fits(self, vocab_size: int) -> None:
        """Raise DataError if a model with `vocab_size` embeddings has none for some token."""
        if self.vocab_size > vocab_size:
            raise DataError(
                f"{self.folder} has token ids up to {self.vocab_size - 1}, but the model's vocab_size is "
                f"{vocab_size}: set data.tokenizer to the tokenizer the model was made with"
            )


def load_prepared(folder: Path) -> PreparedData:
    """Open a folder that `prepare` made, and check every file against its size and SHA-256.

    Raises:
        DataError: if it is no such folder, or a file of it has changed.
    """
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        _check_file(folder, name, expected)
    dtype = np.dtype(manifest["dtype"])
    counts: dict[str, int] = manifest["counts"]
    has_tuning = TUNING in manifest["files"]
    return PreparedData(
        folder=folder,
        fingerprint=manifest["fingerprint"],
        vocab_size=manifest["vocab_size"],
        eos_token_id=manifest["eos_token_id"],
        train_tokens=np.memmap(folder / TRAIN, dtype=dtype, mode="r"),
        heldout_tokens=np.memmap(folder / HELDOUT, dtype=dtype, mode="r"),
        heldout_bytes=counts["heldout_bytes"],
        tuning_tokens=np.memmap(folder / TUNING, dtype=dtype, mode="r") if has_tuning else None,
        counts=counts,
        notes=tuple(Tally(Counter(counts), manifest["first"]).describe()),
    )


def describe_files(folder: Path) -> dict[str, dict[str, object]]:
    """Return size and SHA-256 of every file below `folder`, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def too_short(split: str, *, num_tokens: int, seq_len: int) -> str:
    """Say that a split does not fill one sequence, and what can be done about it."""
    return (
        f"the {split} documents have {num_tokens} tokens, fewer than one sequence of data.seq_len = "
        f"{seq_len}: add text, lower data.seq_len, or change data.heldout_fraction"
    )


def manifest_bytes(content: Mapping[str, object]) -> bytes:
    """Return the text of a manifest, with a digest of itself: a flipped bit in it is damage too."""
    return _text({**content, _DIGEST: hashlib.sha256(_text(content)).hexdigest()})


def _text(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        if not isinstance(manifest, dict):
            raise ValueError(f"a {type(manifest).__name__}, not an object")
        content = {key: value for key, value in manifest.items() if key != _DIGEST}
        is_whole = manifest_bytes(content) == data
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{folder} is not prepared data ({path.name}: {error}): delete this folder and prepare again"
        ) from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder} has format {version!r}, this version of relora reads {FORMAT_VERSION}: "
            "delete this folder and prepare again"
        )
    if not is_whole:
        raise DataError(f"{path} differs from its own digest: delete {folder} and prepare again")
    return manifest


def _check_file(folder: Path, name: str, expected: Mapping[str, object]) -> None:
    path = folder / name
    try:
        size = path.stat().st_size
        problem = f"has {size} bytes, not {expected['bytes']}" if size != expected["bytes"] else ""
        if not problem and sha256(path) != expected["sha256"]:
            problem = "differs from its SHA-256"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        raise DataError(f"{path} {problem}: the prepared data is damaged; delete {folder} and prepare again")
