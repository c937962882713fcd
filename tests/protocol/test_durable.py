"""A failed write says which file it was about."""

from __future__ import annotations

import os

import pytest

from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.payloads import FileSink


def full(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_a_file_that_cannot_be_synced_is_named_and_what_it_held_stays(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_durably(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            write_durably(path, b"new")

    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"


def test_an_upload_that_finds_no_room_names_its_file(tmp_path, monkeypatch):
    sink = FileSink(tmp_path / "a.part")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        sink.write(b"bytes")

    assert caught.value.filename == str(tmp_path / "a.part")
