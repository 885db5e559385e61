"""Memory that a cell has freed: kept for its next step, given back to the system after it.

glibc gives a large block back at once, and the next step of a training gets it anew, page by page, each of them
cleared: benchmarks/memory.py shows what that costs. In a process with threads on other cores, as Ray's workers are,
these must be interrupted for each block besides.
"""

from __future__ import annotations

import ctypes
import functools
import os

KEPT = 1 << 30  # bytes at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


@functools.cache
def keep_freed() -> bool:
    """From now on this process takes its memory from the heap, and keeps up to KEPT bytes of what is freed at its end
    and all within it, until `give_back`. Peaks are higher for it: what is freed in pieces is not always of use.

    False where nothing is changed: the C library is not glibc, or the environment says how memory is to be had
    (VARIABLES, or GLIBC_TUNABLES for malloc).
    """
    if any(name in os.environ for name in VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = _of_glibc("mallopt", ctypes.c_int, ctypes.c_int)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, KEPT) and mallopt(M_MMAP_MAX, 0))


def give_back() -> None:
    """Whatever is free, to the system. Does nothing where the C library is not glibc."""
    if (trim := _of_glibc("malloc_trim", ctypes.c_size_t)) is not None:
        trim(0)


@functools.cache
def _of_glibc(name: str, *arguments: type) -> ctypes._CFuncPtr | None:
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function
