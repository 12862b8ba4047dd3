"""Batches: shapes, types, borders of epochs, and the held-out sequences."""

import numpy as np
import pytest
import torch

from relora import ConfigError, DataError
from relora.data.batches import TokenBatches, heldout_batches

PINNED = ([7, 0, 2, 5, 1, 4, 6, 3], [6, 7, 1, 5, 4, 3, 2, 0])


def tokens(count, dtype=np.uint16):
    return np.arange(count, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_batch_is_whole_sequences_of_int64(dtype):
    batch = TokenBatches(tokens(10 * 7 + 3, dtype), seq_len=7, seed=0).batch(1, batch_size=4)
    assert batch.shape == (4, 7)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, batch[:, :1] + torch.arange(7))
    assert (batch[:, 0] % 7 == 0).all()


def test_ids_above_two_bytes_survive():
    large = np.full(14, 4_000_000_000, dtype=np.uint32)
    assert (TokenBatches(large, seq_len=7, seed=0).batch(1, batch_size=2) == 4_000_000_000).all()


def test_a_tail_shorter_than_a_sequence_is_never_read():
    batches = TokenBatches(tokens(10 * 7 + 6), seq_len=7, seed=0)
    assert batches.num_sequences == 10
    assert batches.batch(1, batch_size=10).max() == 69


def test_a_batch_across_a_border_ends_one_epoch_and_begins_the_next():
    batches = TokenBatches(tokens(5), seq_len=1, seed=3)
    rows = torch.cat([batches.batch(step, batch_size=3)[:, 0] for step in range(1, 6)])
    epochs = rows.reshape(3, 5)
    assert all(sorted(epoch.tolist()) == [0, 1, 2, 3, 4] for epoch in epochs)


def test_epochs_and_seeds_give_other_orders():
    def first_epochs(seed):
        return TokenBatches(tokens(100), seq_len=1, seed=seed).batch(1, batch_size=200)[:, 0].reshape(2, 100)

    one, other = first_epochs(1), first_epochs(2)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], torch.arange(100))


def test_the_order_is_pinned():
    """Resumed runs rely on it: a change here changes every run in progress."""
    batches = TokenBatches(tokens(8), seq_len=1, seed=11)
    assert batches.batch(1, batch_size=8)[:, 0].tolist() == PINNED[0]
    assert batches.batch(1001, batch_size=8)[:, 0].tolist() == PINNED[1]


def test_memory_maps_are_read_and_left_as_they_are(tmp_path):
    tokens(60).tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    batch = TokenBatches(mapped, seq_len=6, seed=0).batch(2, batch_size=3)
    batch.zero_()
    assert np.array_equal(mapped, tokens(60))


def test_heldout_batches_are_the_first_sequences_and_the_last_batch_may_be_short():
    batches = list(heldout_batches(tokens(100), seq_len=7, batch_size=3, num_sequences=8))
    assert [tuple(batch.shape) for batch in batches] == [(3, 7), (3, 7), (2, 7)]
    assert torch.equal(torch.cat(batches).reshape(-1), torch.arange(56))


@pytest.mark.parametrize("num_sequences", [None, 14, 10_000])
def test_heldout_batches_end_with_the_whole_sequences_there_are(num_sequences):
    batches = list(heldout_batches(tokens(100), seq_len=7, batch_size=4, num_sequences=num_sequences))
    assert torch.equal(torch.cat(batches).reshape(-1), torch.arange(98))


def test_a_corpus_shorter_than_a_sequence_is_refused_with_its_length():
    with pytest.raises(DataError, match=r"training documents have 6 tokens.*seq_len = 7"):
        TokenBatches(tokens(6), seq_len=7, seed=0)
    with pytest.raises(DataError, match=r"held-out documents have 6 tokens.*seq_len = 7"):
        heldout_batches(tokens(6), seq_len=7, batch_size=1, num_sequences=1)


def test_numbers_out_of_range_are_refused_at_once():
    batches = TokenBatches(tokens(70), seq_len=7, seed=0)
    for step, batch_size in ((0, 1), (-1, 1), (1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            batches.batch(step, batch_size=batch_size)
    with pytest.raises(ConfigError, match="seed"):
        TokenBatches(tokens(70), seq_len=7, seed=-1)
    with pytest.raises(ConfigError, match="seq_len"):
        TokenBatches(tokens(70), seq_len=0, seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        heldout_batches(tokens(70), seq_len=7, batch_size=0, num_sequences=1)
    with pytest.raises(ConfigError, match="at least 1"):
        heldout_batches(tokens(70), seq_len=7, batch_size=1, num_sequences=0)
