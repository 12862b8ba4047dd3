"""Records of a source become documents: decoded, counted, limited, each on one side of the held-out split.

A document is held out if u < heldout_fraction, where u in [0, 1) is the head of the SHA-256 of its text, and
a tuning document if u lies in the tuning_fraction above that.
The side depends on nothing but the text: it stays where it is when data is added, renamed or reordered, and
identical documents are never on both sides.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from relora.data.config import DataConfig, InvalidUtf8
from relora.errors import DataError

Split = Literal["train", "heldout", "tuning"]
HASH_RANGE = 1 << 64
REASONS = {
    "empty_skipped": "empty, skipped",
    "short_skipped": "shorter than 2 tokens, skipped",
    "invalid_utf8_replaced": "not UTF-8, bad bytes replaced by U+FFFD",
    "invalid_utf8_skipped": "not UTF-8, skipped",
    "nul_kept": "with NUL characters, kept as they are",
}
"""What is counted, and what became of it."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """What a source hands over: text as str or as bytes not decoded yet, None if missing, and its place."""

    text: bytes | str | None
    place: str


class Source(Protocol):
    """A place text comes from."""

    @property
    def name(self) -> str:
        """What error messages call it."""

    def key(self) -> dict[str, object]:
        """Return JSON-able values that change when the text changes, and do not when it only moves."""

    def records(self) -> Iterator[Record]:
        """Yield the records in their fixed order; raise DataError where one cannot be read."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, which side of the split it is on, and the hash that decided it."""

    text: str
    num_bytes: int
    rank: int
    """The first 64 bits of the SHA-256 of the text: orders the held-out documents."""
    heldout: bool
    place: str
    tuning: bool = False
    """Neither trained on nor held out: settings are chosen by it."""

    @property
    def split(self) -> Split:
        """The split it belongs to."""
        return "heldout" if self.heldout else "tuning" if self.tuning else "train"


@dataclass
class Tally:
    """Counts by reason, and where each was first met."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, place: str) -> None:
        """Count one occurrence of `reason`."""
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def describe(self) -> list[str]:
        """Return one line for each thing that was met: how often, what became of it, and the first place."""
        met = [reason for reason in REASONS if self.counts[reason]]
        return [
            f"{_documents(self.counts[reason])} {REASONS[reason]} (first: {self.first[reason]})"
            for reason in met
        ]


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"


def content_rank(data: bytes) -> int:
    """Return the first 64 bits of the SHA-256 of `data`, uniform over documents."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def documents(source: Source, config: DataConfig, tally: Tally) -> Iterator[Document]:
    """Yield the documents of `source`, in its order and within the limits of `config`.

    Args:
        source: Where the records come from.
        config: Limits, the policy for invalid UTF-8, and the fraction held out.
        tally: Receives what was replaced, skipped or odd.

    Raises:
        DataError: if a record cannot be read, or is not UTF-8 and the policy is "error".
    """
    threshold = config.heldout_fraction * HASH_RANGE
    tuning_threshold = threshold + config.tuning_fraction * HASH_RANGE
    num_documents = num_bytes = 0
    for record in source.records():
        text = _decode(record, config.on_invalid_utf8, tally)
        if text is None:
            continue
        data = text.encode()
        if b"\0" in data:
            tally.note("nul_kept", record.place)
        tally.counts["documents"] += 1
        rank = content_rank(data)
        heldout = rank < threshold
        tuning = not heldout and rank < tuning_threshold
        yield Document(text, len(data), rank, heldout, record.place, tuning)
        num_documents += 1
        num_bytes += len(data)
        if num_documents == config.max_documents:
            return
        if config.max_bytes is not None and num_bytes >= config.max_bytes:
            return


def _decode(record: Record, policy: InvalidUtf8, tally: Tally) -> str | None:
    """Return the text, or None where there is none or the policy drops it."""
    if not record.text:
        tally.note("empty_skipped", record.place)
        return None
    try:
        if isinstance(record.text, str):
            record.text.encode()
            text = record.text
        else:
            text = record.text.decode()
    except UnicodeError as error:
        if policy == "error":
            raise DataError(
                f"{record.place} is not UTF-8 ({error}): convert it, or set data.on_invalid_utf8 to "
                "'replace' or 'skip'"
            ) from error
        tally.note("invalid_utf8_replaced" if policy == "replace" else "invalid_utf8_skipped", record.place)
        if policy == "skip":
            return None
        text = _replaced(record.text)
    text = text.removeprefix("\ufeff")  # the byte order mark that some editors write is not text
    if not text:
        tally.note("empty_skipped", record.place)
    return text or None


def _replaced(text: bytes | str) -> str:
    # A str gets lone surrogates from JSON: as escapes, or where bad bytes were carried through its parser.
    return _SURROGATE.sub("\ufffd", text) if isinstance(text, str) else text.decode(errors="replace")
