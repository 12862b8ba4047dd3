"""Random generators derived from named counters instead of a global stream.

Every rank and every resumed run can then draw the same numbers without talking to anyone: a generator is a
function of its parts alone, here (seed, restart_index, layer name, purpose).
"""

import hashlib

import torch


def derived_seed(*parts: str | int) -> int:
    """Return a 63-bit hash of `parts`, the same in every process and on every machine."""
    spelled = repr(tuple(part if isinstance(part, str) else int(part) for part in parts))
    digest = hashlib.blake2b(spelled.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derived_generator(*parts: str | int) -> torch.Generator:
    """Return a CPU generator seeded by `derived_seed` of `parts`."""
    return torch.Generator(device="cpu").manual_seed(derived_seed(*parts))
