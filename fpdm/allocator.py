"""What glibc does with freed memory: a command keeps it, up to a limit.

A step on a CPU frees tens of megabytes and allocates the same again. glibc returns them to the
kernel in between, which clears every page anew: up to 4,000 page faults, a tenth of a training step
of the digits on two threads. A library must not decide that for its process, so ``import fpdm``
changes nothing; a command owns its process.
"""

from __future__ import annotations

import ctypes
import os

# numbers of mallopt (malloc.h); the first two may also be given in the environment
_OPTIONS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 << 20),  # free memory at the end of the heap is kept
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),  # blocks under it come from the heap; glibc's maximum
}


def keep_freed_memory() -> bool:
    """Asks malloc to keep up to 512 MB of what is freed, unless the environment says otherwise.

    False where there is no ``mallopt``, or nothing was changed.
    """
    if any(name in os.environ for name in _OPTIONS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(number, size) == 1 for number, size in _OPTIONS.values())
