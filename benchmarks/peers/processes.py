"""What do the processes of a leg take? CPU time, and memory by side, of everything that this process has started.

Orphans come to this process (a subreaper), so that nothing that a peer starts and leaves behind escapes the count or
the end of the leg.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

SAMPLE_S: Final = 0.5
PR_SET_CHILD_SUBREAPER: Final = 36


class Watch:
    """Watches all descendants of this process while it is open, and ends those that are left when it closes.

    Args:
        client_words: a process is a client's if its command line, or that of a process above it, holds one of these;
            the others are the server's. ``server_words`` decides before them.
    """

    def __init__(self, client_words: Sequence[str], server_words: Sequence[str] = ()) -> None:
        self._client_words, self._server_words = tuple(client_words), tuple(server_words)
        self._sides: dict[int, bool | None] = {}
        self._server_cpu: dict[int, float] = {}
        self._peaks = {"server": 0, "clients": 0, "all": 0}
        self._most_processes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample_on)

    def __enter__(self) -> Watch:  # noqa: PYI034 - typing.Self is of Python 3.11
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed; Linux 3.4 or later is needed")
        self._began_s, self._load = time.monotonic(), os.getloadavg()[0]
        self._cpu_before_s = _reaped_s()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wall_s = time.monotonic() - self._began_s
        self._done.set()
        self._thread.join()
        end_descendants()
        self._cpu_s = _reaped_s() - self._cpu_before_s

    def figures(self) -> dict[str, Any]:
        """The leg's, once it is over."""
        return {
            "wall_s": self._wall_s,
            "cpu_s": self._cpu_s,
            "server_cpu_s": sum(self._server_cpu.values()),
            "server_peak_pss_bytes": self._peaks["server"],
            "clients_peak_pss_bytes": self._peaks["clients"],
            "all_peak_pss_bytes": self._peaks["all"],
            "most_processes": self._most_processes,
            "load_average": self._load,
        }

    def _sample_on(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        held = {"server": 0, "clients": 0}
        alive = 0
        for process in psutil.Process().children(recursive=True):
            try:
                is_client = self._is_client(process)
                times, pss = process.cpu_times(), pss_bytes(process.pid)
            except (psutil.Error, OSError):
                continue
            alive += 1
            held["clients" if is_client else "server"] += pss
            if not is_client:
                self._server_cpu[process.pid] = times.user + times.system
        self._most_processes = max(self._most_processes, alive)
        for side, now in {**held, "all": sum(held.values())}.items():
            self._peaks[side] = max(self._peaks[side], now)

    def _is_client(self, process: psutil.Process) -> bool:
        """By its own command line, else by that of its parent; a process that runs another program is asked again."""
        if process.pid == os.getpid():
            return False
        line = " ".join(process.cmdline())
        if any(word in line for word in self._server_words):
            return False
        if any(word in line for word in self._client_words):
            return True
        parent = process.parent()
        return parent is not None and self._is_client(parent)


def _reaped_s() -> float:
    """CPU seconds of all processes that ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pss_bytes(pid: int) -> int:
    """Memory of a process, where what several share counts once among all of them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def end_descendants() -> None:
    """Ends and reaps all that this process has started and that is still there; the top first, or it starts anew."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            kill(process.pid)
        psutil.wait_procs(psutil.Process().children(), timeout=10)


def kill(pid: int) -> None:
    """SIGKILL; no error if it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_until(holds: Callable[[], bool], *, timeout_s: float, what: str, every_s: float = 0.2) -> None:
    """Waits.

    Raises:
        TimeoutError: it did not come.
    """
    until_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until_s:
            raise TimeoutError(f"{what} did not come within {timeout_s:g} s")
        time.sleep(every_s)
