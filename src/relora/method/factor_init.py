"""How a new lora_A is drawn, at injection and at every restart (the init policy).

Each policy also knows the root mean square of the entries it draws, because the step that one Adam step on
lora_B makes in the weight is `scaling * lr * sqrt(rank) * rms(lora_A)`, and the "matched" scaling rule sets
that to the learning rate itself. A new policy is one more entry of `FACTOR_INITS`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FactorInit:
    """One way of drawing lora_A."""

    draw: Callable[[int, int, torch.Generator], Tensor]
    """(rank, in_features, generator) -> float32 CPU tensor of shape (rank, in_features)."""
    rms: Callable[[int], float]
    """in_features -> expected root mean square of an entry."""


def _blank(rows: int, columns: int) -> Tensor:
    # Named, since torch's defaults are the caller's: `with torch.device("cuda")`, `set_default_dtype`.
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


def _kaiming(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    # Kaiming-uniform with a = sqrt(5) and fan_in = in_features is U(-1/sqrt(in), 1/sqrt(in)) (paper 2).
    bound = 1 / math.sqrt(in_features)
    return _blank(rank, in_features).uniform_(-bound, bound, generator=generator)


def _orthonormal(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    gaussian = _blank(in_features, rank).normal_(generator=generator)
    with _one_thread():
        columns, triangle = torch.linalg.qr(gaussian)
    # The sign of R's diagonal is the only freedom of QR; fixing it makes the rows uniformly distributed.
    rows: Tensor = (columns * triangle.diagonal().sign()).T.contiguous()
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    # LAPACK rounds as its threads share the work out: ranks, or a run and its resumption, that have unlike
    # numbers of threads would get factors that differ in their last bits, and go on from there apart.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


FACTOR_INITS: dict[str, FactorInit] = {
    "kaiming": FactorInit(draw=_kaiming, rms=lambda in_features: 1 / math.sqrt(3 * in_features)),
    "orthonormal": FactorInit(draw=_orthonormal, rms=lambda in_features: 1 / math.sqrt(in_features)),
}
