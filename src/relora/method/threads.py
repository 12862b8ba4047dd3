"""Linear algebra whose bits must not depend on how many threads there are.

LAPACK rounds as its threads share the work out: ranks, or a run and its resumption, that have unlike numbers
of threads would get factors that differ in their last bits, and go on from there apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute the body's CPU operations on one thread; the number of before comes back after."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
