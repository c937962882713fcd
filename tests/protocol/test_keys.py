"""Keys as texts and in files."""

from __future__ import annotations

import os

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from fedblocks.protocol.keys import (
    KeyFileError,
    KeyPair,
    parse_key,
    read_key_pair,
    require_secure_zmq,
    write_key_pair,
)


def new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())


def test_a_pair_is_read_back_from_a_file_that_only_its_owner_can_read(tmp_path):
    pair = new_pair()
    write_key_pair(tmp_path / "key.json", pair)
    assert (tmp_path / "key.json").stat().st_mode & 0o777 == 0o600
    assert read_key_pair(tmp_path / "key.json") == pair


def test_an_existing_key_file_is_never_overwritten(tmp_path):
    write_key_pair(tmp_path / "key.json", new_pair())
    with pytest.raises(FileExistsError):
        write_key_pair(tmp_path / "key.json", new_pair())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_key_file_that_others_may_read_is_refused(tmp_path, mode):
    write_key_pair(tmp_path / "key.json", new_pair())
    os.chmod(tmp_path / "key.json", mode)
    with pytest.raises(KeyFileError, match="expected 0600"):
        read_key_pair(tmp_path / "key.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"public": 1, "secret": 2}', '{"public": "short"}'])
def test_a_file_without_a_key_pair_is_refused_without_repeating_what_is_in_it(tmp_path, text):
    path = tmp_path / "key.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"key\.json"):
        read_key_pair(path)


def test_no_text_shows_a_secret(tmp_path):
    pair = new_pair()
    assert pair.secret not in repr(pair)
    with pytest.raises(KeyFileError) as caught:
        KeyPair(public=pair.public, secret=pair.secret[:-1] + '"')
    assert pair.secret[:20] not in str(caught.value)


@given(st.binary(min_size=32, max_size=32))
def test_every_32_bytes_in_z85_are_a_key(raw):
    from zmq.utils import z85

    text = z85.encode(raw).decode()
    assert parse_key(text) == text


@pytest.mark.parametrize("text", ["", "x" * 39, "x" * 41, "x" * 39 + '"', "x" * 39 + "é", "#" * 40])
def test_a_text_that_is_no_key_is_refused(text):
    with pytest.raises(KeyFileError):
        parse_key(text)


def test_an_old_libzmq_or_one_without_curve_is_refused():
    require_secure_zmq((4, 3, 3), has_curve=True)
    for version, has_curve in (((4, 3, 2), True), ((4, 3, 5), False)):
        with pytest.raises(KeyFileError, match="libzmq"):
            require_secure_zmq(version, has_curve=has_curve)
