"""How does an operator stop a run from another terminal? A file in its folder, which the aggregator looks for.

No signal and no process number: it works across containers that share the folder, and can hit no other process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedblocks.aggregator.run_folder import RunFolderError, read_run_folder
from fedblocks.aggregator.status import is_served
from fedblocks.protocol.durable import write_durably

REQUEST_FILE: Final = "stop.request"
INTERVAL_S: Final = 0.1


def stop_requested(run: Path) -> bool:
    """True once somebody has asked for it."""
    return (run / REQUEST_FILE).exists()


def withdraw_request(run: Path) -> None:
    """Forget a request: the run is being served anew, or has stopped."""
    (run / REQUEST_FILE).unlink(missing_ok=True)


def stop(
    run: Path,
    *,
    timeout_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Ask the aggregator that serves the folder to stop as Ctrl-C does, and wait until it has.

    Raises:
        RunFolderError: ``run`` is no run folder, nobody serves it, or it goes on for longer than ``timeout_s``.
    """
    read_run_folder(run)
    if not is_served(run):
        raise RunFolderError(f"{run} is not being served; there is nothing to stop")
    write_durably(run / REQUEST_FILE, b"")
    until_s = clock() + timeout_s
    while is_served(run):
        if clock() > until_s:
            withdraw_request(run)
            raise RunFolderError(
                f"{run} is still being served after {timeout_s:g} s; it may be folding a large round: try again, or "
                "end its process (nothing that was acknowledged is lost)"
            )
        sleep(INTERVAL_S)
    withdraw_request(run)
