"""The invitation: what it holds, and how a damaged one is refused."""

from __future__ import annotations

import pytest

from fedblocks.protocol import site_file
from fedblocks.protocol.messages import DataFormat
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.site_file import CacheSettings, JoinSettings, RuntimeSettings, SiteFile


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
        ("run_id", "../other"),
        ("run_id", ".."),
        ("run_id", ""),
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


OWN = {
    "cache": CacheSettings(max_gb=2.5, location="ram", keep=False),
    "runtime": RuntimeSettings(dtype="bfloat16", memory_gb=4.0),
    "join": JoinSettings(hours="22-6"),
}


def written(tmp_path, *lines: str):
    """An invitation without sections of the site's own, and these lines after it."""
    path = tmp_path / "site-a.toml"
    text = site_file.dump(site())
    path.write_text("\n".join([text[: text.index("[cache]")], *lines]) + "\n")
    return path


def test_an_invitation_without_sections_of_the_sites_own_has_their_defaults(tmp_path):
    found = site_file.load(written(tmp_path))

    assert (found.cache, found.runtime, found.join) == (CacheSettings(), RuntimeSettings(), JoinSettings())
    assert found.cache.max_bytes is None
    assert found.cache.keep
    assert found.runtime.memory_bytes == 0


def test_what_a_site_set_for_itself_reads_back_unchanged(tmp_path):
    path = tmp_path / "site-a.toml"
    path.write_text(site_file.dump(site(**OWN)))

    assert site_file.load(path) == site(**OWN)
    assert site_file.load(path).cache.max_bytes == 2_500_000_000
    assert site_file.load(path).runtime.memory_bytes == 4_000_000_000


def test_every_key_of_the_sites_own_stands_in_a_new_invitation_as_a_comment(tmp_path):
    text = site_file.dump(site())

    for key in site_file.local_keys():
        name = key.split(".")[1]
        assert any(line.startswith(f"# {name} = ") and line.count("# ") == 2 for line in text.splitlines()), key


def test_a_whole_number_serves_as_an_amount(tmp_path):
    assert site_file.load(written(tmp_path, "[cache]", "max_gb = 3")).cache.max_gb == 3.0


def test_the_command_line_goes_over_the_file_key_by_key(tmp_path):
    path = written(tmp_path, "[cache]", "max_gb = 3", 'location = "disk"', "[runtime]", 'dtype = "float32"')

    found = site_file.load(path, {"cache.location": "ram", "runtime.memory_gb": 1.5})

    assert found.cache == CacheSettings(max_gb=3.0, location="ram")
    assert found.runtime == RuntimeSettings(dtype="float32", memory_gb=1.5)


@pytest.mark.parametrize(
    ("lines", "key", "value", "expected"),
    [
        (("[cache]", "max_gb = -1"), "cache.max_gb", "-1.0", "0 or more"),
        (("[cache]", "max_gb = inf"), "cache.max_gb", "inf", "0 or more"),
        (("[cache]", "max_gb = nan"), "cache.max_gb", "nan", "0 or more"),
        (("[cache]", "max_gb = '2 GB'"), "cache.max_gb", "'2 GB'", "float"),
        (("[cache]", "max_gb = true"), "cache.max_gb", "True", "float"),
        (("[cache]", "location = 'memory'"), "cache.location", "'memory'", "auto, disk, ram"),
        (("[cache]", "keep = 1"), "cache.keep", "1", "bool"),
        (("[runtime]", "dtype = 'float16'"), "runtime.dtype", "'float16'", "auto, float32, bfloat16"),
        (("[runtime]", "memory_gb = -0.1"), "runtime.memory_gb", "-0.1", "0 or more"),
        (("[join]", "hours = 22"), "join.hours", "22", "str"),
        (("[join]", "hours = '22'"), "join.hours", "'22'", "20:00-06:30"),
    ],
)
def test_a_value_of_the_sites_own_that_cannot_be_used_is_named_with_what_is_expected(
    tmp_path, lines, key, value, expected
):
    with pytest.raises(ConfigError) as refused:
        site_file.load(written(tmp_path, *lines))

    assert f"{key} is {value}, expected" in str(refused.value)
    assert expected in str(refused.value)
    assert "site-a.toml" in str(refused.value)


@pytest.mark.parametrize(
    ("lines", "nearest"),
    [
        (("[cache]", "max_bytes = 1"), "cache.max_gb"),
        (("[cache]", "memory_gb = 1"), "runtime.memory_gb"),
        (("[runtime]", "dtpye = 'auto'"), "runtime.dtype"),
        (("[join]", "hour = '22-6'"), "join.hours"),
        (("[cahce]", "max_gb = 1"), "[cache]"),
        (("[runtimes]",), "[runtime]"),
    ],
)
def test_an_unknown_key_or_section_is_refused_with_the_nearest_name(tmp_path, lines, nearest):
    with pytest.raises(ConfigError) as refused:
        site_file.load(written(tmp_path, *lines))

    assert str(refused.value).endswith(nearest)


def test_a_key_of_the_sites_own_among_the_operators_is_told_where_it_belongs(tmp_path):
    path = tmp_path / "site-a.toml"
    path.write_text(site_file.dump(site()).replace("[site]", "[site]\nkeep = false"))

    with pytest.raises(ConfigError, match=r"unknown key 'site\.keep'; nearest key: cache\.keep"):
        site_file.load(path)


def test_a_wrong_value_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    with pytest.raises(ConfigError) as refused:
        site_file.load(written(tmp_path), {"cache.max_gb": -2.0})

    assert str(refused.value).startswith("cache.max_gb is -2.0")


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("9-17", (540, 1019), (539, 1020, 0)),
        ("22-6", (1320, 1439, 0, 359), (360, 1319, 720)),
        ("20:30-06:15", (1230, 0, 374), (375, 1229)),
        ("0-24", (0, 720, 1439), ()),
        ("22-24", (1320, 1439), (0, 1319)),
        ("22-0", (1320, 1439), (0, 1319)),
    ],
)
def test_hours_begin_at_their_first_minute_and_end_before_their_last(hours, inside, outside):
    parsed = JoinSettings(hours=hours).parsed_hours()

    assert [parsed.contain(minute) for minute in inside] == [True] * len(inside)
    assert [parsed.contain(minute) for minute in outside] == [False] * len(outside)


@pytest.mark.parametrize("hours", ["22-22", "24-6", "6-25", "9:60-17", "9", "9-", "9-17-20", "9.30-17"])
def test_hours_that_are_no_two_times_of_day_are_refused(hours):
    with pytest.raises(ConfigError, match=r"join\.hours is"):
        JoinSettings(hours=hours)


def test_no_hours_mean_always():
    assert JoinSettings().parsed_hours() is None
