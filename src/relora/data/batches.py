"""Token arrays to batches, in an order that is a pure function of (seed, step).

Sequence i is tokens[i * T : (i + 1) * T]. Epoch e visits all of them once, in the order in which as many raw
draws of Philox, keyed by (seed, e), sort. Step s, counted from 1, is positions (s - 1) * B to s * B - 1 of
the epochs laid end to end. So a resumed run, or any rank, finds its rows from the step alone. Raw draws are
what NumPy promises never to change; its `permutation` it does not.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from relora.data.prepared import TokenArray, too_short
from relora.errors import ConfigError, DataError


class TokenBatches:
    """Training batches from a flat array of token ids; the labels are the inputs (the model shifts them)."""

    def __init__(self, tokens: TokenArray, *, seq_len: int, seed: int) -> None:
        """Look at `tokens` as whole sequences.

        Args:
            tokens: Flat array of ids, usually a memory map; a tail shorter than seq_len is never read.
            seq_len: T, tokens in a sequence.
            seed: Decides the order, together with the epoch; not negative.

        Raises:
            ConfigError: if seq_len or seed is out of range.
            DataError: if there is not one whole sequence.
        """
        if seed < 0:
            raise ConfigError(f"seed must not be negative, not {seed}")
        self._sequences = _as_sequences(tokens, seq_len, "training")
        self._seed = seed
        self._orders: dict[int, npt.NDArray[np.uint32]] = {}

    @property
    def num_sequences(self) -> int:
        """Whole sequences in the data, which is the length of an epoch."""
        return len(self._sequences)

    def batch(self, step: int, *, batch_size: int) -> torch.Tensor:
        """Return the global batch of a step.

        Args:
            step: Counted from 1.
            batch_size: B, sequences in the global batch; ranks and micro batches are slices of it.

        Returns:
            Ids, shape (B, T), int64.

        Raises:
            ConfigError: if step or batch_size is below 1.
        """
        return _gather(self._sequences, self.rows(step, batch_size=batch_size))

    def rows(self, step: int, *, batch_size: int) -> npt.NDArray[np.int64]:
        """Return which sequences the global batch of a step is made of, in its order; as `batch`."""
        if step < 1 or batch_size < 1:
            raise ConfigError(f"step and batch_size must be at least 1, not {step} and {batch_size}")
        positions = np.arange((step - 1) * batch_size, step * batch_size)
        epochs, places = np.divmod(positions, self.num_sequences)
        rows = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            rows[inside] = self._order(epoch)[places[inside]]
        return rows

    def _order(self, epoch: int) -> npt.NDArray[np.uint32]:
        if epoch not in self._orders:
            stream = np.random.Philox(np.random.SeedSequence((self._seed, epoch)))
            draws = stream.random_raw(self.num_sequences)
            # Only the epoch in use and the one before are kept: a batch at a border needs both.
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = np.argsort(draws, kind="stable").astype(np.uint32)
        return self._orders[epoch]


def heldout_batches(
    tokens: TokenArray, *, seq_len: int, batch_size: int, num_sequences: int | None = None
) -> Iterator[torch.Tensor]:
    """Return the first held-out sequences in batches, the same ones on every call.

    `prepare` stores held-out documents in the order of their hashes, so the first sequences are a random
    sample of them.

    Args:
        tokens: Flat array of held-out ids.
        seq_len: T, tokens in a sequence.
        batch_size: B, sequences in a batch; the last batch may have fewer.
        num_sequences: How many sequences to use at most; None uses all.

    Returns:
        Iterator of ids, shape (B, T), int64.

    Raises:
        ConfigError: if a number is below 1.
        DataError: if there is not one whole sequence.
    """
    if batch_size < 1 or (num_sequences is not None and num_sequences < 1):
        raise ConfigError(
            f"batch_size and num_sequences must be at least 1, not {batch_size} and {num_sequences}"
        )
    sequences = _as_sequences(tokens, seq_len, "held-out")[:num_sequences]
    starts = range(0, len(sequences), batch_size)
    return (_gather(sequences, slice(start, start + batch_size)) for start in starts)


def _as_sequences(tokens: TokenArray, seq_len: int, what: str) -> TokenArray:
    if seq_len < 1:
        raise ConfigError(f"seq_len must be at least 1, not {seq_len}")
    count = len(tokens) // seq_len
    if count == 0:
        raise DataError(too_short(what, num_tokens=len(tokens), seq_len=seq_len))
    return tokens[: count * seq_len].reshape(count, seq_len)


def _gather(sequences: TokenArray, rows: npt.NDArray[np.int64] | slice) -> torch.Tensor:
    return torch.from_numpy(sequences[rows].astype(np.int64))
