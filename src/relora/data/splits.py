"""Token files of the splits: one pass over the encoded documents, each to the side its hash decided."""

from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from relora.data.corpus import HASH_RANGE, Document, Split, Tally
from relora.data.prepared import TRAIN, TokenArray
from relora.data.tokenizer import TextTokenizer, Tokens

_MIN_TOKENS = 2


def token_dtype(tokenizer: TextTokenizer) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """Return the narrowest dtype that every id fits."""
    return np.dtype(np.uint16) if tokenizer.vocab_size <= 1 << 16 else np.dtype(np.uint32)


def write_tokens(
    folder: Path,
    tokenizer: TextTokenizer,
    encoded: Iterable[tuple[Document, Tokens]],
    tally: Tally,
    kept_apart: Sequence[Split],
) -> int:
    """Write train.bin in the order of the source, and each split kept apart in the order of the hashes.

    Args:
        folder: Where to write.
        tokenizer: What encoded the documents.
        encoded: Documents with their ids.
        tally: Receives the counts.
        kept_apart: The splits to write besides "train".

    Returns:
        The lowest rank of a training document: what the held-out threshold would have to exceed.
    """
    dtype = token_dtype(tokenizer)
    lowest_rank = HASH_RANGE
    with ExitStack() as stack:
        train = stack.enter_context((folder / TRAIN).open("wb"))
        apart = {split: _Apart(folder, split, dtype, stack) for split in kept_apart}
        for document, ids in encoded:
            if len(ids) < _MIN_TOKENS:
                tally.note("short_skipped", document.place)
                continue
            row = np.append(ids, np.uint32(tokenizer.eos_token_id)).astype(dtype).tobytes()
            split = document.split
            if split == "train":
                train.write(row)
                lowest_rank = min(lowest_rank, document.rank)
            else:
                apart[split].add(row, document.rank, len(ids) + 1)
            tally.counts[f"{split}_documents"] += 1
            tally.counts[f"{split}_tokens"] += len(ids) + 1
            tally.counts[f"{split}_bytes"] += document.num_bytes
    for each in apart.values():
        each.sort()
    return lowest_rank


class _Apart:
    """A split that is written as it comes, and then once more in the order of the documents' hashes."""

    def __init__(self, folder: Path, split: Split, dtype: "np.dtype[Any]", stack: ExitStack) -> None:
        self._sorted, self._unsorted = folder / f"{split}.bin", folder / f"{split}.unsorted"
        self._dtype = dtype
        self._ranks, self._lengths = array("Q"), array("Q")
        self._stream = stack.enter_context(self._unsorted.open("wb"))

    def add(self, row: bytes, rank: int, length: int) -> None:
        """Write a document's tokens."""
        self._stream.write(row)
        self._ranks.append(rank)
        self._lengths.append(length)

    def sort(self) -> None:
        """Write the documents in order; the stream has been closed."""
        with self._sorted.open("wb") as stream:
            if self._ranks:
                tokens = np.memmap(self._unsorted, dtype=self._dtype, mode="r")
                _copy_sorted(tokens, self._ranks, self._lengths, stream)
        self._unsorted.unlink()


def _copy_sorted(tokens: TokenArray, ranks: "array[int]", lengths: "array[int]", stream: BinaryIO) -> None:
    ends = np.cumsum(np.frombuffer(lengths, dtype=np.uint64)).astype(np.int64)
    starts = ends - np.frombuffer(lengths, dtype=np.uint64).astype(np.int64)
    for index in np.argsort(np.frombuffer(ranks, dtype=np.uint64), kind="stable").tolist():
        stream.write(tokens[starts[index] : ends[index]].tobytes())
