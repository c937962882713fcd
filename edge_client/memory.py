"""How much memory did this really take? The peak of this process's anonymous memory above what it held at the start.

Anonymous memory (RssAnon + RssShmem) is what a process cannot do without; pages of mapped files are cache and do not
count. Sampled every 20 ms by a thread of our own. Source: runtime.md 4.5.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    import torch

INTERVAL_S: Final = 0.02
LARGE_BLOCK_BYTES: Final = 256 << 10
_M_MMAP_THRESHOLD: Final = -3
_STATUS: Final = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """RssAnon + RssShmem of this process; 0 where /proc does not say (not Linux)."""
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return 0
    kib = 0
    for line in text.splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kib += int(line.split()[1])
    return kib * 1024


def give_back_freed_memory() -> None:
    """Returns what the allocator holds in reserve to the system (glibc; elsewhere nothing happens)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def return_large_blocks() -> None:
    """Makes the allocator give every block of 256 KiB or more back to the system the moment it is freed (glibc).

    By default glibc raises that size to that of the largest block freed so far, up to 32 MiB, and then keeps what is
    freed in its heap, in pieces that fit nothing: measured, 40 % above the live bytes of a training step, and more with
    every step. With a fixed size a process takes little more than its tensors, which can be predicted. It costs no
    CPU time that could be measured; at 64 KiB, steps of a very small model took half as long again.
    Called once, before anything large is allocated.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def free_bytes(device: torch.device) -> int:
    """What may still be taken where a model on ``device`` lies: a discrete GPU's own memory, else the machine's.

    On a GPU that shares the machine's memory the driver counts the page cache as used; the system's count does not.
    """
    if device.type == "cuda":
        from torch import cuda

        if not cuda.get_device_properties(device).is_integrated:
            return cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class PeakMemory:
    """Measures between ``start()`` and ``stop()``, or as a context manager.

    On a CPU that is this process's anonymous memory, sampled; on a discrete GPU what torch's allocator has given out
    there, which it counts itself; on one that shares the machine's memory, both.

    Args:
        device: where the model lies; default a CPU.
        start_bytes: what counts as zero; default: the memory held when the measurement starts. A session takes it once
            after its imports.
    """

    def __init__(self, start_bytes: int | None = None, device: torch.device | None = None) -> None:
        self._given_start = start_bytes
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._counts_host = True
        self.start_bytes = 0
        """What counts as zero."""
        self._highest = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_bytes(self) -> int:
        """The highest memory seen above the start, so far; never negative."""
        host = max(0, self._highest - self.start_bytes) if self._counts_host else 0
        if self._cuda is None:
            return host
        from torch import cuda

        return host + cuda.max_memory_allocated(self._cuda)

    def start(self) -> None:
        """Begins to sample."""
        give_back_freed_memory()
        if self._cuda is not None:
            from torch import cuda

            self._counts_host = bool(cuda.get_device_properties(self._cuda).is_integrated)
            cuda.reset_peak_memory_stats(self._cuda)
        held = anonymous_bytes()
        self.start_bytes = held if self._given_start is None else self._given_start
        self._highest = held
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Ends sampling; the peak in bytes."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._look()
        return self.peak_bytes

    def __enter__(self) -> PeakMemory:  # noqa: PYI034 - Self needs Python 3.11
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self._highest = max(self._highest, anonymous_bytes())
