"""How the process asks the system for memory."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

KEPT = 1 << 30
"""Bytes of freed memory that the process holds for its next allocations."""


def keep_freed_memory() -> bool:
    """Let the C library use freed memory again at once instead of giving it back to the system; on a CPU only.

    A feature map of a few dozen megabytes is allocated and freed for every layer. By default glibc asks the system for
    each, which hands out zeroed pages one fault at a time; that takes about half of an encoder's time. For programs
    (server, command line), not for those who import the library. To be called before threads are started.

    Returns:
        Whether this C library can do it (glibc can); else nothing has changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    # One arena: those of other threads are too small for a feature map and would go to the system again.
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, KEPT), mallopt(_M_ARENA_MAX, 1)])
