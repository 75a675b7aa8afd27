"""What becomes of freed memory on a CPU.

glibc hands large freed blocks back to the system at once, and the next tensor of that size pays
for every page anew: half of an evaluation's time with a small network
(benchmarks/importance_weighted.py). A run keeps them.
"""

from __future__ import annotations

import ctypes

_M_TOP_PAD, _M_MMAP_THRESHOLD = -2, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes, the largest that glibc takes


def keep_freed_memory(spare: int = 256 * 2**20) -> bool:
    """Lets this process keep `spare` bytes of what tensors free for the next ones.

    Returns:
        Whether the system's allocator can be told so: glibc's can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    wanted = {_M_TOP_PAD: spare, _M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD}
    return all(mallopt(what, value) for what, value in wanted.items())
