"""A cyclic cover of the input space: successive lora_A are blocks of one orthogonal matrix.

Independent random subspaces overlap: projected out of n / r of them one after the other (n = in_features), a
direction keeps 1/e of its energy. Here a *sweep* of ceil(n / r) restarts takes the rows of one random
orthogonal matrix Q (n, n) block by block, in a shuffled order, so that it covers the space once; the next
sweep has another Q. Where r does not divide n, the last block is completed with the first rows of Q, and so
stays orthonormal.

Q is never formed. A product of Householder reflections H_0 H_1 ... H_{n-1}, where the vector of H_j is drawn
in the last n - j coordinates, is uniformly distributed up to signs (Stewart 1980), and a block of its rows
costs 2 n^2 r operations and n * 256 numbers instead of n^3 and n^2.

With a random permutation as Q a sweep takes the inputs themselves, r at a time: lora_B is then the change of
r columns of the weight, and the optimizer sees each of their entries by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from relora.method.seeds import derived_generator
from relora.method.threads import one_thread

_PANEL = 256  # reflections applied at once; part of what the drawn numbers are a function of


def cover_rows(rank: int, in_features: int, *, index: int, key: Sequence[str | int]) -> Tensor:
    """Return the block of rows that restart `index` takes.

    Args:
        rank: Rows of a block.
        in_features: Width of the space.
        index: Counted from 0 at injection; a pure function of it, whatever was drawn before.
        key: Seed and layer name.

    Returns:
        (rank, in_features) float32 CPU tensor with orthonormal rows, computed there wherever the layer lies.
    """
    sweep, chosen = _turn(rank, in_features, index=index, key=key)
    columns = _unit_rows(chosen, in_features).T.contiguous()
    for first in reversed(range(0, in_features, _PANEL)):
        generator = derived_generator(*key, sweep, "cover", first)
        vectors, taus = _reflections(in_features - first, min(_PANEL, in_features - first), generator)
        with one_thread():
            columns[first:] = torch.ormqr(vectors, taus, columns[first:])
    return columns.T.contiguous()


def column_rows(rank: int, in_features: int, *, index: int, key: Sequence[str | int]) -> Tensor:
    """Return rows that each select one input, of which a sweep takes every one; as `cover_rows` otherwise."""
    sweep, chosen = _turn(rank, in_features, index=index, key=key)
    generator = derived_generator(*key, sweep, "columns")
    return _unit_rows(torch.randperm(in_features, generator=generator, device="cpu")[chosen], in_features)


def _turn(rank: int, in_features: int, *, index: int, key: Sequence[str | int]) -> tuple[int, Tensor]:
    """Return the sweep that a restart belongs to, and which rows of its matrix are that restart's."""
    blocks = -(-in_features // rank)
    sweep, position = divmod(index, blocks)
    shuffle = derived_generator(*key, sweep, "cover order")
    block = int(torch.randperm(blocks, generator=shuffle, device="cpu")[position])
    return sweep, (block * rank + torch.arange(rank, device="cpu")) % in_features


def _unit_rows(chosen: Tensor, in_features: int) -> Tensor:
    rows = torch.zeros(len(chosen), in_features, dtype=torch.float32, device="cpu")
    rows[torch.arange(len(chosen), device="cpu"), chosen] = 1
    return rows


def _reflections(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw Householder vectors as LAPACK stores them: below the diagonal, an implied 1 on it, and tau."""
    gaussian = torch.empty(rows, count, dtype=torch.float32, device="cpu").normal_(generator=generator)
    below = gaussian.tril(-1)
    head = gaussian.diagonal()
    # H maps the drawn vector to -sign(head) * its norm in the first coordinate.
    end = -torch.copysign(torch.sqrt(head.square() + below.square().sum(0)), head)
    taus = (end - head) / end
    return below / (head - end), taus
