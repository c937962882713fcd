"""Where does a payload come from when it is sent, and where is it kept when it arrives?

From memory without a copy, or from a file read piece by piece; into memory, or into a private file that becomes visible
under its final name only after it is complete and durable (:func:`commit_file`).
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Protocol

from fedblocks.protocol.durable import naming, sync_folder
from fedblocks.protocol.errors import LocalProtocolError

Bytes = bytes | memoryview


class Source(Protocol):
    """A payload to be sent, read piece by piece."""

    @property
    def num_bytes(self) -> int: ...
    def read(self, offset: int, num_bytes: int) -> Bytes: ...
    def close(self) -> None: ...


class MemorySource:
    """A payload in memory, never copied."""

    def __init__(self, data: Bytes) -> None:
        self._view = memoryview(data).cast("B")

    @property
    def num_bytes(self) -> int:
        return self._view.nbytes

    def read(self, offset: int, num_bytes: int) -> Bytes:
        return self._view[offset : offset + num_bytes]

    def close(self) -> None:
        self._view = memoryview(b"")


class FileSource:
    """A payload in a file, read on demand; the file stays open while it is sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._num_bytes = os.fstat(self._fd).st_size

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def read(self, offset: int, num_bytes: int) -> Bytes:
        data = os.pread(self._fd, num_bytes, offset)
        if len(data) != num_bytes:
            raise LocalProtocolError(
                f"{self._path.name}: shorter than the {self._num_bytes} bytes it had when announced"
            )
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_source(payload: Bytes | Path) -> Source:
    """The source for bytes in memory or for a file."""
    return FileSource(payload) if isinstance(payload, Path) else MemorySource(payload)


class Sink(Protocol):
    """Where a payload that arrives is kept. ``write`` raises OSError if there is no room."""

    def write(self, data: Bytes) -> object: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...


class MemorySink:
    """Keeps the payload in memory; the owner checked its announced length against a limit before."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()

    def write(self, data: Bytes) -> object:
        return self._buffer.write(data)

    def finish(self) -> None:
        """Nothing to do: the bytes are there."""

    def discard(self) -> None:
        self._buffer = io.BytesIO()

    def payload(self) -> bytes:
        """All bytes, without a second copy (BytesIO hands out its own object)."""
        return self._buffer.getvalue()


class FileSink:
    """Writes the payload to a new private file; ``finish`` closes it, :func:`commit_file` makes it durable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def write(self, data: Bytes) -> object:
        view = memoryview(data).cast("B")
        with naming(self.path):
            while view:
                view = view[os.write(self._fd, view) :]
        return None

    def finish(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        self.finish()
        self.path.unlink(missing_ok=True)


def commit_file(part: Path, final: Path) -> None:
    """Makes a finished file durable under its final name: fsync, rename, fsync of the folder."""
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    part.replace(final)
    sync_folder(final.parent)
