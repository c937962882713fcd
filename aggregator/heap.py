"""Does memory that a round has freed go back to the system? With glibc only if it is told to."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

M_MMAP_THRESHOLD: Final = -3  # malloc.h
LARGE_BYTES: Final = 1 << 20


def give_back_large_blocks() -> None:
    """From here on each block of :data:`LARGE_BYTES` or more is asked of the system, and is its again once freed.

    Left alone, glibc raises that size to the largest block freed so far, up to 32 MiB (mallopt(3)): states then come
    from its heap, and stay there in holes once freed. Other C libraries keep their ways. For the whole process.
    """
    with contextlib.suppress(OSError, AttributeError):  # no C library to be asked, or another one
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_the_rest() -> None:
    """What is free in the heap now: of many transfers it holds hundreds of small blocks (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
