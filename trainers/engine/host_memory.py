"""Memory of the host that a step frees and the next step needs again."""

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`, from its malloc.h."""
KEPT_BYTES = 2**30
"""Freed memory at the end of the heap that stays with the process."""
LARGEST_IN_HEAP = 32 * 2**20
"""Larger tensors get pages of their own, which are returned when freed. glibc's own limit."""


def keep_freed_memory() -> None:
    """Have this process keep memory that tensors on the host free, for the tensors of later steps.

    By default glibc returns it to the kernel, which fills each page with zeros again when it is
    next touched. Whether a step frees memory that way depends on what was allocated before: the
    same loop took 490 page faults per step, or none. Does nothing with another C library, or
    where the user has set glibc's own variables.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(MMAP_THRESHOLD, LARGEST_IN_HEAP)
