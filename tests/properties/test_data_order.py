"""Order and split, for any size, seed, step and text."""

import hashlib
from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data.batches import TokenBatches
from relora.data.config import DataConfig
from relora.data.corpus import Record, Tally, documents
from relora.data.files import find_files
from relora.data.sources import MAX_BLOCK_BYTES, TextFiles

quick = settings(max_examples=50, deadline=None, database=None)

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**63)
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=30)


def numbered(num_sequences, seed):
    """Batches over sequences of length 1, so that a batch is the list of its sequences' numbers."""
    return TokenBatches(np.arange(num_sequences, dtype=np.uint32), seq_len=1, seed=seed)


def rows(batches, step, batch_size):
    return batches.batch(step, batch_size=batch_size)[:, 0].tolist()


@quick
@given(sizes, seeds, st.integers(1, 80), st.integers(1, 2000))
def test_a_batch_is_a_function_of_seed_and_step_alone(num_sequences, seed, batch_size, step):
    used = numbered(num_sequences, seed)
    for other in (step + 1, 1, step):
        found = rows(used, other, batch_size)
    assert found == rows(numbered(num_sequences, seed), step, batch_size)


@quick
@given(sizes, seeds, st.integers(1, 80))
def test_every_epoch_visits_every_sequence_once(num_sequences, seed, batch_size):
    batches = numbered(num_sequences, seed)
    num_steps = 3 * num_sequences // batch_size + 1
    order = [row for step in range(1, num_steps + 1) for row in rows(batches, step, batch_size)]
    for start in range(0, len(order) - num_sequences + 1, num_sequences):
        assert sorted(order[start : start + num_sequences]) == list(range(num_sequences))


@quick
@given(sizes, seeds, st.integers(1, 12), st.integers(1, 5))
def test_the_order_does_not_know_how_it_is_batched(num_sequences, seed, batch_size, factor):
    batches = numbered(num_sequences, seed)
    small = [row for step in range(1, factor + 1) for row in rows(batches, step, batch_size)]
    assert rows(batches, 1, factor * batch_size) == small


@quick
@given(sizes, seeds, st.integers(0, 20))
def test_the_order_of_an_epoch_is_that_of_its_philox_draws(num_sequences, seed, epoch):
    """Written again from the module's formula, with sorted() for argsort."""
    stream = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    draws = [int(stream.random_raw()) for _ in range(num_sequences)]
    expected = sorted(range(num_sequences), key=draws.__getitem__)
    assert rows(numbered(num_sequences, seed), epoch + 1, num_sequences) == expected


@quick
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 8), seeds)
def test_sequences_tile_the_tokens_without_overlap(num_sequences, seq_len, tail, seed):
    tokens = np.arange(num_sequences * seq_len + min(tail, seq_len - 1), dtype=np.uint16)
    batches = TokenBatches(tokens, seq_len=seq_len, seed=seed)
    epoch = batches.batch(1, batch_size=num_sequences)
    assert torch.equal(epoch.reshape(-1).sort().values, torch.arange(num_sequences * seq_len))
    assert torch.equal(epoch, epoch[:, :1] + torch.arange(seq_len))


class Memory:
    """A source of texts that need no file."""

    def __init__(self, given):
        self.name = "memory"
        self.given = given

    def key(self):
        return {}

    def records(self):
        return (Record(text, f"text {number}") for number, text in enumerate(self.given))


def sides(given, fraction):
    config = DataConfig(heldout_fraction=fraction)
    found = documents(Memory(given), config, Tally())
    return [(document.text, document.heldout) for document in found]


@quick
@given(texts, texts, st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_sides_depend_on_nothing_but_the_text(given, added, fraction, random):
    before = dict(sides(given, fraction))
    grown = [*given, *added, *given]
    random.shuffle(grown)
    after = sides(grown, fraction)
    assert len(set(after)) == len({text for text, _ in after})
    assert before.items() <= dict(after).items()


@quick
@given(texts, st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_a_larger_fraction_only_adds_held_out_documents(given, fraction, more):
    held = {text for text, heldout in sides(given, fraction) if heldout}
    assert held <= {text for text, heldout in sides(given, fraction + more) if heldout}


def test_the_fraction_held_out_is_the_fraction_asked_for():
    many = [f"document {number}" for number in range(20_000)]
    held = sum(heldout for _, heldout in sides(many, 0.05))
    # Binomial: mean 1000, standard deviation 31; five of them on either side.
    assert 845 < held < 1155
    assert all(
        heldout == (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < 0.05)
        for text, heldout in sides(many[:300], 0.05)
    )


@settings(max_examples=25, deadline=None, database=None)
@given(
    st.lists(
        st.sampled_from([b"\n\n", b"\n", b" ", b"word" * 300, b"\xff\x80", "\u20ac".encode() * 99]),
        max_size=90,
    ),
    st.binary(max_size=3 * MAX_BLOCK_BYTES),
)
def test_appended_text_changes_no_block_before_the_last(tmp_path_factory, content, appended):
    file = tmp_path_factory.mktemp("blocks") / "book.txt"

    def blocks(data):
        file.write_bytes(data)
        return [record.text for record in TextFiles("book", find_files(str(file)), "block").records()]

    content = b"".join(content)
    before, after = blocks(content), blocks(content + appended)
    assert b"".join(before) == content
    assert b"".join(after) == content + appended
    assert not Counter(before[:-1]) - Counter(after)
    assert before[:-1] == after[: max(len(before) - 1, 0)]
