"""DataConfig: where the text comes from, how it becomes tokens, and what is held out."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

SourceName = Literal["python-stdlib", "text", "jsonl", "parquet", "hub"]
DocumentUnit = Literal["auto", "file", "block", "line"]
InvalidUtf8 = Literal["replace", "skip", "error"]

TRAIN_BPE = "bpe"
_NUM_BYTE_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, tokenizer and packing. The defaults need no download: the standard library's own source code."""

    source: SourceName = "python-stdlib"
    """"python-stdlib" (the running Python's .py files without its tests), "text", "jsonl", "parquet" (local
    files) or "hub" (any `datasets` name)."""
    path: str | None = None
    """File, folder or glob of a local source; name ("allenai/c4") or local folder of a "hub" dataset."""
    name: str | None = None
    """Configuration of a hub dataset, for example "en" of allenai/c4."""
    split: str = "train"
    """Split of a hub dataset to read; the held-out documents are taken from it, by their hash."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset. Cached tokens are keyed by it: pin a commit to repeat a run."""
    streaming: bool = True
    """Read a hub dataset as it arrives; false downloads and converts all of it first."""
    text_field: str = "text"
    """Field or column that holds a document's text (jsonl, parquet, hub)."""
    document: DocumentUnit = "auto"
    """What is one document of "text": "file"; "line"; "block" (2 to 16 KB, cut at blank lines where there are
    any); "auto": blocks where path is a single file, whole files otherwise."""
    on_invalid_utf8: InvalidUtf8 = "replace"
    """A document that is not UTF-8: "replace" the bad bytes by U+FFFD, "skip" the document, or stop with an
    "error". The first two are counted and reported."""
    max_documents: int | None = None
    """Read no more than this many documents, held-out ones included; None reads all."""
    max_bytes: int | None = None
    """Stop reading after the document with which this many bytes of text are reached; None reads all."""
    tokenizer: str = TRAIN_BPE
    """"bpe" trains a byte-level BPE on the training documents; otherwise a tokenizer.json, or a Hugging Face
    folder or id."""
    vocab_size: int = 4096
    """Size of the BPE that is trained; a given tokenizer brings its own."""
    tokenizer_bytes: int = 500_000_000
    """Bytes of training documents, from the first on, that the BPE is trained on."""
    eos_token: str | None = None
    """End-of-document token; None takes the tokenizer's own ("<|endoftext|>" where a BPE is trained)."""
    seq_len: int = 256
    """Tokens in a sequence; documents are joined by the end-of-document token and cut to this length."""
    heldout_fraction: float = 0.05
    """Fraction of documents kept for evaluation, chosen by a hash of their content."""
    tuning_fraction: float = 0.0
    """Fraction of documents kept to choose settings by (eval.split = "tuning"): training documents of their
    own, chosen by the same hash; which are held out stays the same."""
    cache_dir: str | None = None
    """Folder for prepared tokens; None is .cache/relora in the home folder."""

    def violations(self) -> list[str]:
        """Return every field that cannot work, in words; empty if all can."""
        return [
            *_choice("source", self.source, get_args(SourceName)),
            *self._source_violations(),
            *_text("split", self.split),
            *_text("text_field", self.text_field),
            *_choice("document", self.document, get_args(DocumentUnit)),
            *_choice("on_invalid_utf8", self.on_invalid_utf8, get_args(InvalidUtf8)),
            *_boolean("streaming", self.streaming),
            *_integer("max_documents", self.max_documents, least=1, optional=True),
            *_integer("max_bytes", self.max_bytes, least=1, optional=True),
            *_text("tokenizer", self.tokenizer),
            *self._vocab_violations(),
            *_integer("tokenizer_bytes", self.tokenizer_bytes, least=1),
            *_text("eos_token", self.eos_token, optional=True),
            *_integer("seq_len", self.seq_len, least=2),
            *self._split_violations(),
            *_text("cache_dir", self.cache_dir, optional=True),
        ]

    def _split_violations(self) -> list[str]:
        found = [
            *_fraction("heldout_fraction", self.heldout_fraction),
            *_fraction("tuning_fraction", self.tuning_fraction, may_be_zero=True),
        ]
        if not found and self.heldout_fraction + self.tuning_fraction >= 1:
            total = self.heldout_fraction + self.tuning_fraction
            found.append(
                f"heldout_fraction and tuning_fraction must leave text to train on, not sum to {total:g}"
            )
        return found

    def _source_violations(self) -> list[str]:
        found = [
            *_text("path", self.path, optional=True),
            *_text("name", self.name, optional=True),
            *_text("revision", self.revision, optional=True),
        ]
        if self.source == "python-stdlib" and self.path is not None:
            found.append(
                f"path must be left out with source 'python-stdlib', which would ignore {self.path!r}: "
                "choose source 'text', 'jsonl', 'parquet' or 'hub'"
            )
        if self.source != "python-stdlib" and self.path is None:
            found.append(f"path must be given with source {self.source!r}")
        if self.source != "hub":
            unused = {"name": self.name, "revision": self.revision}
            found += [
                f"{field} must be left out with source {self.source!r}: only 'hub' has it"
                for field, value in unused.items()
                if value is not None
            ]
        return found

    def _vocab_violations(self) -> list[str]:
        if self.tokenizer != TRAIN_BPE:
            return _integer("vocab_size", self.vocab_size, least=1)
        # 256 bytes and the end-of-document token: the smallest byte-level vocabulary there is.
        return _integer("vocab_size", self.vocab_size, least=_NUM_BYTE_TOKENS + 1)


def _integer(field: str, value: object, *, least: int, optional: bool = False) -> list[str]:
    if optional and value is None:
        return []
    if isinstance(value, bool) or not isinstance(value, int):
        return [f"{field} must be a whole number, not {value!r}"]
    return [] if value >= least else [f"{field} must be at least {least}, not {value}"]


def _fraction(field: str, value: object, *, may_be_zero: bool = False) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return [f"{field} must be a finite number, not {value!r}"]
    if may_be_zero and value == 0:
        return []
    least = "at least" if may_be_zero else "above"
    return [] if 0.0 < value < 1.0 else [f"{field} must be {least} 0 and below 1, not {value}"]


def _boolean(field: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{field} must be true or false, not {value!r}"]


def _choice(field: str, value: object, choices: tuple[str, ...]) -> list[str]:
    if isinstance(value, str) and value in choices:
        return []
    return [f"{field} must be one of {', '.join(map(repr, choices))}, not {value!r}"]


def _text(field: str, value: object, *, optional: bool = False) -> list[str]:
    if (optional and value is None) or (isinstance(value, str) and value):
        return []
    return [f"{field} must be a string that is not empty, not {value!r}"]
