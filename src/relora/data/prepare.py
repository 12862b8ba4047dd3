"""Text to token files, once: a cache folder named by what went in, written whole or not at all.

    key = SHA-256(content of the text, tokenizer, the settings that change the tokens)

Nothing enters the key that leaves the tokens alone: paths, times and seq_len do not. The folder is built
beside its place, under a lock, and renamed into it: a killed run leaves nothing that looks finished, and of
several processes that start together one builds while the others wait.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout

from relora.data.config import TRAIN_BPE, DataConfig
from relora.data.corpus import HASH_RANGE, Document, Source, Split, Tally, documents
from relora.data.prepared import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    TRAIN,
    PreparedData,
    describe_files,
    load_prepared,
    manifest_bytes,
    too_short,
)
from relora.data.sources import open_source
from relora.data.splits import token_dtype, write_tokens
from relora.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer, training_texts
from relora.errors import ConfigError, DataError

__all__ = ["PreparedData", "Progress", "load_prepared", "prepare"]

Progress = Callable[[str, int], None]
"""Called with what is being done and the bytes of text done so far."""

_PROGRESS_BYTES = 1 << 20


def prepare(config: DataConfig, *, progress: Progress | None = None) -> PreparedData:
    """Turn the text that `config` names into token files, or find them in the cache.

    Args:
        config: The text, the tokenizer and the split.
        progress: Told what is being done, about every MB of text.

    Raises:
        ConfigError: listing every setting that cannot work.
        DataError: if the text cannot be read or is too little, the tokenizer cannot be had, or the cache
            folder cannot be written.
    """
    violations = config.violations()
    if violations:
        raise ConfigError.from_violations("[data]", violations)
    tell: Progress = progress or (lambda _what, _num_bytes: None)
    tell("looking for prepared tokens", 0)
    source = open_source(config)
    given = None
    if config.tokenizer != TRAIN_BPE:
        given = load_tokenizer(config.tokenizer, eos_token=config.eos_token)
    inputs = _inputs(config, source, given)
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else Path.home() / ".cache" / "relora"
    folder = cache / "prepared" / _digest(inputs)[:32]
    if not folder.exists():
        fill = partial(_fill, config=config, source=source, given=given, inputs=inputs, tell=tell)
        _make(folder, fill, tell)
    prepared = load_prepared(folder)
    splits = (
        ("training", prepared.train_tokens),
        ("held-out", prepared.heldout_tokens),
        ("tuning", prepared.tuning_tokens),
    )
    for split, tokens in splits:
        if tokens is not None and len(tokens) < config.seq_len:
            raise DataError(too_short(split, num_tokens=len(tokens), seq_len=config.seq_len))
    return prepared


def _inputs(config: DataConfig, source: Source, given: TextTokenizer | None) -> dict[str, object]:
    """Return all that decides the tokens, as JSON-able values."""
    bpe = {
        "vocab_size": config.vocab_size,
        "tokenizer_bytes": config.tokenizer_bytes,
        "eos_token": config.eos_token,
    }
    return {
        "format_version": FORMAT_VERSION,
        "source": {"kind": config.source, **source.key()},
        "tokenizer": bpe if given is None else given.fingerprint,
        "on_invalid_utf8": config.on_invalid_utf8,
        "max_documents": config.max_documents,
        "max_bytes": config.max_bytes,
        "heldout_fraction": config.heldout_fraction,
        # Left out where there is none, so that text prepared without this split keeps its key.
        **({"tuning_fraction": config.tuning_fraction} if config.tuning_fraction else {}),
    }


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _make(folder: Path, fill: Callable[[Path], None], tell: Progress) -> None:
    """Let `fill` write a folder beside its place, and rename it; unless another process did meanwhile."""
    temporary = folder.with_name(f".{folder.name}.partial")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell("waiting for another process that prepares the same data", 0)
            lock.acquire()
        try:
            if folder.exists():
                return
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed: the lock says it is over
            temporary.mkdir()
            fill(temporary)
            _sync(temporary)
            temporary.rename(folder)
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.release()
    except OSError as error:
        raise DataError(
            f"prepared tokens cannot be written to {folder.parent}: {error.strerror or error}: "
            "make room there, or set data.cache_dir to a folder that can be written"
        ) from error


def _fill(
    folder: Path,
    *,
    config: DataConfig,
    source: Source,
    given: TextTokenizer | None,
    inputs: dict[str, object],
    tell: Progress,
) -> None:
    """Write token files, tokenizer and manifest; raise DataError if a split would be empty."""
    tokenizer = given or _train(config, source, tell)
    tokenizer.save(folder / TOKENIZER)
    tally = Tally()
    read = _told(documents(source, config, tally), "tokenising", tell)
    kept_apart: list[Split] = ["heldout", "tuning"] if config.tuning_fraction else ["heldout"]
    lowest_rank = write_tokens(folder, tokenizer, tokenizer.encode(read), tally, kept_apart)
    if not all(tally.counts[f"{split}_tokens"] for split in ("train", *kept_apart)):
        raise _empty_split(source, config, tally, lowest_rank)
    if _inputs(config, source, given) != inputs:
        raise DataError(f"{source.name} changed while it was read: run again when it stays as it is")
    files = describe_files(folder)
    token_files = [TRAIN, *(f"{split}.bin" for split in kept_apart)]
    seen = [*(files[name]["sha256"] for name in token_files), tokenizer.fingerprint]
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _digest(seen),
        "inputs": inputs,
        "source": source.name,
        "dtype": token_dtype(tokenizer).name,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "counts": dict(tally.counts),
        "first": tally.first,
        "files": files,
    }
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))


def _train(config: DataConfig, source: Source, tell: Progress) -> TextTokenizer:
    tally = Tally()
    read = _told(documents(source, config, tally), "training the tokenizer", tell)
    texts = training_texts(read, max_bytes=config.tokenizer_bytes)
    first = next(texts, None)
    if first is None:
        raise _empty_split(source, config, tally, HASH_RANGE)
    return train_tokenizer(chain([first], texts), vocab_size=config.vocab_size, eos_token=config.eos_token)


def _told(read: Iterable[Document], what: str, tell: Progress) -> Iterator[Document]:
    num_bytes = told = 0
    for document in read:
        yield document
        num_bytes += document.num_bytes
        if num_bytes >= told + _PROGRESS_BYTES:
            tell(what, num_bytes)
            told = num_bytes
    tell(what, num_bytes)


def _empty_split(source: Source, config: DataConfig, tally: Tally, lowest_rank: int) -> DataError:
    """Say why there is nothing to train on, or nothing to evaluate on."""
    skipped = "; ".join(tally.describe())
    seen = f"{tally.counts['documents']} documents" + (f" ({skipped})" if skipped else "")
    if lowest_rank < HASH_RANGE and tally.counts["heldout_tokens"]:
        return DataError(
            f"{source.name}: none of {seen} fell into the tuning split with data.tuning_fraction = "
            f"{config.tuning_fraction}: raise it, add documents, or cut smaller ones (data.document)"
        )
    if lowest_rank < HASH_RANGE:
        return DataError(
            f"{source.name}: none of {seen} was held out with data.heldout_fraction = "
            f"{config.heldout_fraction}: set it above {lowest_rank / HASH_RANGE:.4f}, add documents, or cut "
            "smaller ones (data.document)"
        )
    if tally.counts["documents"] - tally.counts["short_skipped"] > 0:
        return DataError(
            f"{source.name}: all of {seen} were held out, none is left to train on: lower "
            f"data.heldout_fraction = {config.heldout_fraction}, add documents, or cut smaller ones "
            "(data.document)"
        )
    return DataError(f"{source.name} is an empty corpus: {seen}: give text in data.path")


def _sync(folder: Path) -> None:
    """Bring every file below `folder`, and the folders, to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename needs no such help
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
