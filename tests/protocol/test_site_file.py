"""The invitation: what it holds, and how a damaged one is refused."""

from __future__ import annotations

import pytest

from fedblocks.protocol import site_file
from fedblocks.protocol.messages import DataFormat
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.site_file import SiteFile


def site(**changes: object) -> SiteFile:
    fields = {
        "client_name": "site-a",
        "address": "tcp://10.0.0.5:5555",
        "server_key": "k" * 40,
        "run_id": "starter-1a2b3c4d",
        "base_name": "starter",
        "base_hash": "a" * 64,
        "data": DataFormat(max_tokens=512, append_eos=True, join=" "),
    }
    return SiteFile(**{**fields, **changes})


def test_an_invitation_reads_back_unchanged(tmp_path):
    path = tmp_path / "site-a.toml"
    path.write_text(site_file.dump(site()))

    assert site_file.load(path) == site()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("client_name", "../x"),
        ("client_name", ""),
        ("address", "10.0.0.5:5555"),
        ("address", "tcp://host"),
        ("server_key", "short"),
        ("base_hash", "xyz"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_its_value(field, value):
    with pytest.raises(ConfigError, match=field):
        site(**{field: value})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("run_id", "runid"),
        lambda text: text.replace("[data]", "[date]"),
        lambda text: text.replace("max_tokens = 512", 'max_tokens = "512"'),
        lambda text: text.replace('"', ""),
    ],
)
def test_a_damaged_invitation_is_refused_with_its_path(tmp_path, spoil):
    path = tmp_path / "site-a.toml"
    path.write_text(spoil(site_file.dump(site())))

    with pytest.raises(ConfigError, match=r"site-a\.toml"):
        site_file.load(path)


def test_a_missing_invitation_says_who_makes_it(tmp_path):
    with pytest.raises(ConfigError, match="fedblocks invite"):
        site_file.load(tmp_path / "site-a.toml")
