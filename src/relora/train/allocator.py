"""The C allocator of a process that trains on a CPU: what a step frees, the next step takes.

glibc gives large blocks back to the system as they are freed. A training step allocates the same activations
and gradients again and again, and each time the system hands out pages that it must map and clear first.
Kept, they are simply there; no bit changes.
"""

import ctypes
import platform
from collections.abc import Mapping

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 2**31 - 1
_PAD = 256 * 2**20


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let this process keep what it frees, up to 2 GiB at the end of its heap, for its next allocations.

    Args:
        environment: The process's. Settings of the allocator that are in it (`MALLOC_...`, `GLIBC_TUNABLES`)
            are left as they are.

    Returns:
        Whether the allocator took it; False where it is not glibc's.
    """
    is_chosen = any(name.startswith("MALLOC_") for name in environment)
    is_chosen |= "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or is_chosen:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, _PAD))
    taken = [mallopt(which, value) == 1 for which, value in wanted]
    return all(taken)
