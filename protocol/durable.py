"""How is a file written so that a kill or a power cut leaves the old content or the new, never a part of it?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path


def write_durably(path: Path, *pieces: bytes | bytearray | memoryview) -> None:
    """Write the pieces, one after the other, so that after a kill or a power cut ``path`` holds either all of them or
    what it held before.
    """
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Generator[None, None, None]:
    """Errors inside say which file they are about: one of a full disk comes from ``write``, which knows no names."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
