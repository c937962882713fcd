"""The list of clients in the run folder."""

from __future__ import annotations

import json

import pytest
import zmq

from fedblocks.aggregator.auth import (
    CLIENTS_FILE,
    SERVER_KEY_FILE,
    Registry,
    RegistryError,
    load_or_create_server_keys,
)
from fedblocks.protocol.keys import KeyFileError


def new_key() -> str:
    return zmq.curve_keypair()[0].decode()


def test_enrolled_keys_are_let_in_until_they_are_revoked(tmp_path):
    registry, key = Registry(tmp_path), new_key()
    assert registry.standing(key) == "unknown"
    registry.enrol(key, "site-a", now_unix_s=10)
    assert registry.is_allowed(key)
    assert registry.name_of(key) == "site-a"
    revoked = registry.revoke("site-a", now_unix_s=20)
    assert revoked.revoked_unix_s == 20
    assert registry.standing(key) == "revoked"
    registry.enrol(key, "site-a", now_unix_s=30)
    assert registry.is_allowed(key)


def test_a_change_by_another_process_is_seen_at_the_next_question(tmp_path):
    serving, verb, key = Registry(tmp_path), Registry(tmp_path), new_key()
    verb.enrol(key, "site-a", now_unix_s=1)
    assert serving.is_allowed(key)
    verb.revoke(key, now_unix_s=2)
    assert serving.standing(key) == "revoked"
    assert not serving.refresh()


def test_two_writers_do_not_lose_each_others_lines(tmp_path):
    first, second = Registry(tmp_path), Registry(tmp_path)
    first.enrol(new_key(), "a", now_unix_s=1)
    second.enrol(new_key(), "b", now_unix_s=2)
    first.enrol(new_key(), "c", now_unix_s=3)
    assert [e.name for e in Registry(tmp_path).list()] == ["a", "b", "c"]


def test_enrolling_twice_is_the_same_as_once(tmp_path):
    registry, key = Registry(tmp_path), new_key()
    first = registry.enrol(key, "a", now_unix_s=1)
    assert registry.enrol(key, "a", now_unix_s=2) == first
    assert len(registry.list()) == 1


def test_a_name_belongs_to_one_enrolled_key_and_a_key_to_one_name(tmp_path):
    registry, key = Registry(tmp_path), new_key()
    registry.enrol(key, "a", now_unix_s=1)
    with pytest.raises(RegistryError, match="name of another enrolled key"):
        registry.enrol(new_key(), "a", now_unix_s=2)
    with pytest.raises(RegistryError, match="enrolled as 'a' already"):
        registry.enrol(key, "b", now_unix_s=2)
    registry.revoke("a", now_unix_s=3)
    registry.enrol(new_key(), "a", now_unix_s=4)


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "a\x1b[2Jb"])
def test_a_name_that_would_garble_a_table_is_refused(tmp_path, name):
    with pytest.raises(RegistryError):
        Registry(tmp_path).enrol(new_key(), name, now_unix_s=1)


def test_a_text_that_is_no_key_is_refused(tmp_path):
    with pytest.raises(KeyFileError):
        Registry(tmp_path).enrol("short", "a", now_unix_s=1)
    assert not (tmp_path / CLIENTS_FILE).exists()


def test_revoking_nobody_names_those_who_are_there(tmp_path):
    registry = Registry(tmp_path)
    registry.enrol(new_key(), "a", now_unix_s=1)
    with pytest.raises(RegistryError, match="enrolled: a"):
        registry.revoke("b", now_unix_s=2)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"clients": 3}', '{"clients": [{"key": "x"}]}', None])
def test_a_file_that_breaks_while_serving_leaves_the_last_list_in_force_and_says_so(tmp_path, text):
    registry, key = Registry(tmp_path), new_key()
    registry.enrol(key, "a", now_unix_s=1)
    path = tmp_path / CLIENTS_FILE
    good = path.read_text()
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert registry.is_allowed(key)
    assert "stays in force" in registry.problem
    with pytest.raises(RegistryError, match="mend the file"):
        registry.revoke("a", now_unix_s=2)
    path.write_text(good)
    assert registry.is_allowed(key)
    assert registry.problem is None


def test_a_file_that_is_broken_at_the_start_is_an_error(tmp_path):
    (tmp_path / CLIENTS_FILE).write_text(json.dumps({"clients": "many"}))
    with pytest.raises(RegistryError, match=CLIENTS_FILE):
        Registry(tmp_path)


def test_server_keys_are_made_once_and_kept_private(tmp_path):
    keys = load_or_create_server_keys(tmp_path)
    assert load_or_create_server_keys(tmp_path) == keys
    assert (tmp_path / SERVER_KEY_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / SERVER_KEY_FILE).chmod(0o644)
    with pytest.raises(KeyFileError, match="0644"):
        load_or_create_server_keys(tmp_path)


def test_a_rotated_key_takes_the_place_of_the_old_one_in_one_write(tmp_path):
    registry, serving = Registry(tmp_path), Registry(tmp_path)
    old, new, other = new_key(), new_key(), new_key()
    registry.enrol(old, "site-a", now_unix_s=1)
    registry.enrol(other, "site-b", now_unix_s=1)
    registry.rotate("site-a", new, now_unix_s=5)
    assert (serving.standing(old), serving.standing(new)) == ("revoked", "enrolled")
    assert serving.name_of(new) == "site-a"
    for name, key in (("site-a", new), ("site-a", old), ("site-a", other)):
        with pytest.raises(RegistryError, match="on the list already"):
            registry.rotate(name, key, now_unix_s=6)
    with pytest.raises(RegistryError, match="enrolled: site-a, site-b"):
        registry.rotate("site-c", new_key(), now_unix_s=6)
    with pytest.raises(KeyFileError):
        registry.rotate("site-a", "no key", now_unix_s=6)
    assert (serving.standing(new), serving.standing(other)) == ("enrolled", "enrolled")
