"""``fedblocks preflight``: every question answered yes where it is so, and no with what to do where it is not."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fedblocks import cli
from fedblocks.aggregator.allocation import MAX_SPEED_AGE_S
from fedblocks.aggregator.server import serve
from fedblocks.edge_client import preflight as asked
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.client import PROFILE_FILE, PROFILE_MAX_AGE_S, device_profile, marked_running, write_profile
from fedblocks.edge_client.identity import KEY_FILE, load_or_create_identity
from fedblocks.edge_client.link import read_record, write_record
from fedblocks.profiles.link import LinkRecord
from fedblocks.protocol import site_file


@contextmanager
def served(c) -> Iterator[None]:
    """The aggregator in a thread of this process."""
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=serve, args=(c.run,), kwargs={"on_event": lambda _line: ready.set(), "stop": stop})
    thread.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        stop.set()
        thread.join(20)


def read_run_id(c) -> str:
    return site_file.load(c.folder / "site-1.toml").run_id


def ask(c, name="site-1", *more, code=None):
    arguments = [
        "preflight", str(c.folder / f"{name}.toml"), "--data", str(c.folder / f"{name}.jsonl"),
        "--model", str(c.model), "--home", str(c.home(name)), *more,
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    if code is not None:
        assert done.exit_code == code, done.output
    return done


def checks(done):
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert all(bool(check["remedy"]) == (check["answer"] == "no") for check in found.values()), found
    return found


@pytest.fixture
def site(consortium):
    return consortium("expansion.blocks=1", clients=1)


def test_a_device_that_can_take_part_is_told_so_line_by_line(site):
    with served(site):
        found = checks(ask(site, "site-1", "--json", code=0))
        text = ask(site, code=0).output
    assert {name: check["answer"] for name, check in found.items()} == {
        "data": "yes",
        "base model": "yes",
        "4-bit kernel": "yes",
        "fit 1 block": "yes",
        "fit 2 blocks": "yes",
        "fit 3 blocks": "yes",
        "disk": "yes",
        "reach": "yes",
        "authenticate": "yes",
        "line": "yes",
    }
    assert text.splitlines()[-1] == "ready to join"


def test_a_client_measures_again_long_before_the_aggregator_holds_its_speed_for_old():
    assert PROFILE_MAX_AGE_S == 86400 < MAX_SPEED_AGE_S / 5


def test_round_trip_and_downlink_are_measured_kept_and_told_with_the_next_greeting(consortium, monkeypatch):
    site = consortium("expansion.blocks=1", clients=1)
    home, address = site.home("site-1"), f"tcp://127.0.0.1:{site.port}"
    with served(site):
        text = checks(ask(site, "site-1", "--json", code=0))["line"]["text"]
        assert re.fullmatch(r"round trip .* in 6\) \(down: the run's largest file has \d+ KiB, 256 .*", text), text
        first = read_record(home, address)
        assert (first.round_trip_s.runs, first.downlink_bytes_per_s) == (1, None)

        monkeypatch.setattr(asked, "ENOUGH_BYTES", 1)
        monkeypatch.setattr("fedblocks.profiles.link.ENOUGH_BYTES", 1)
        text = checks(ask(site, "site-1", "--json", code=0))["line"]["text"]
        assert re.search(r"down [0-9.e+]+ MB/s \(by \S+, 0\.\d+ MB\); up: 5 Mbit/s are assumed", text), text
    record = read_record(home, address)
    assert record.round_trip_s.runs == 2
    assert record.uplink_bytes_per_s is None
    sent = [json.loads(line) for line in next(home.glob("*/sent.jsonl")).read_text().splitlines()]
    assert [line["kind"] for line in sent if line["kind"] != "credit"] == [
        *("hello", *["heartbeat"] * 5, "goodbye"),
        *("hello", *["heartbeat"] * 5, "fetch", "goodbye"),
    ]
    said = SimpleNamespace(
        site=site_file.load(site.folder / "site-1.toml"), home=home, emulate=None,
        runtime=site_file.RuntimeSettings(), emulate_scale=1.0,
    )  # fmt: skip
    profile = device_profile(said, print)
    assert profile.downlink_bytes_per_s == record.downlink_bytes_per_s.value
    assert profile.uplink_bytes_per_s == site.profile.uplink_bytes_per_s
    said.emulate = "raspberry-pi-5-8gb"
    assert device_profile(said, print).downlink_bytes_per_s != record.downlink_bytes_per_s.value


def test_a_probe_by_hand_is_kept_for_the_client_and_shows_its_line(site, monkeypatch, tmp_path):
    monkeypatch.setattr("fedblocks.profiles.probe._torch", lambda: None)
    home = tmp_path / "new" / "home"
    address = f"tcp://127.0.0.1:{site.port}"
    write_record(site.home("site-1"), address, LinkRecord().with_figure("uplink_bytes_per_s", 3.25e6))
    common = ["probe", "--budget-s", "0.1", "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    common += ["--site", str(site.folder / "site-1.toml")]
    done = CliRunner().invoke(cli.app, [*common, "--home", str(site.home("site-1"))])
    assert done.exit_code == 0, done.output
    assert "link               3.25 MB/s up, 2.50 MB/s down" in done.output
    out = json.loads((tmp_path / "out.json").read_text())
    stored = json.loads((site.home("site-1") / PROFILE_FILE).read_text())
    assert stored == {"profile": out["profile"], "state": out["state"]["before"]}
    done = CliRunner().invoke(cli.app, [*common, "--home", str(home)])
    assert (done.exit_code, (home / PROFILE_FILE).exists()) == (0, True)
    assert "0.62 MB/s up" in done.output


class TestUpdatesOfFourHundredKibibytes:
    @pytest.fixture
    def tiny_checkpoint(self, tiny_checkpoint):
        return partial(tiny_checkpoint, hidden=96, intermediate=256)

    @pytest.mark.slow
    def test_the_traffic_of_a_run_measures_the_line_for_the_next_greeting(self, consortium):
        c = consortium("expansion.blocks=2", "delta.format=fp32", "run.max_rounds=3", clients=1)
        c.serve()
        c.join("site-1")
        assert c.wait("site-1") == 0, c.text("site-1")
        assert c.wait("aggregator") == 0, c.text("aggregator")
        record = read_record(c.home("site-1"), f"tcp://127.0.0.1:{c.port}")
        assert record.round_trip_s.runs >= 1
        assert record.uplink_bytes_per_s is not None, c.text("site-1")
        assert record.uplink_bytes_per_s.runs == 3
        assert 1e4 < record.uplink_bytes_per_s.low < record.uplink_bytes_per_s.high < 1e9
        arguments = ["join", str(c.folder / "site-1.toml"), "--data", str(c.folder / "site-1.jsonl"), "--dry-run"]
        said = CliRunner().invoke(cli.app, [*arguments, "--model", str(c.model), "--home", str(c.home("site-1"))])
        assert f'"uplink_bytes_per_s": {record.uplink_bytes_per_s.value!r}' in said.output


def test_a_running_client_is_left_alone(site):
    run = site.home("site-1") / read_run_id(site)
    run.mkdir()
    with served(site), marked_running(run):
        found = checks(ask(site, "site-1", "--json", code=0))
    assert found["line"]["answer"] == "unknown"
    assert "a client of this site is running" in found["line"]["text"]
    assert (run / "sent.jsonl").read_text() == ""


def test_a_greeting_that_is_refused_is_a_no_in_the_aggregators_words(site):
    path = site.folder / "site-1.toml"
    path.write_text(path.read_text().replace(read_run_id(site), "another-run"))
    with served(site):
        found = checks(ask(site, "site-1", "--json", code=4))
    assert found["authenticate"]["answer"] == "yes"
    assert found["line"]["answer"] == "no"
    assert "joins run 'another-run'" in found["line"]["text"]


def test_a_key_that_is_not_enrolled_gets_the_line_for_the_operator(site):
    shutil.rmtree(site.home("site-1"))
    site.home("site-1").mkdir()
    write_profile(site.home("site-1"), site.profile)
    load_or_create_identity(site.home("site-1"))
    with served(site):
        done = ask(site, "site-1", "--json", code=4)
    found = checks(done)
    assert found["reach"]["answer"] == "yes"
    assert found["authenticate"]["answer"] == "no"
    assert "fedblocks keys enrol RUN site-1 --key=" in found["authenticate"]["remedy"]


def test_a_site_without_a_key_is_told_that_join_makes_one_and_gets_none_here(site):
    shutil.rmtree(site.home("site-1"))
    site.home("site-1").mkdir()
    write_profile(site.home("site-1"), site.profile)
    with served(site):
        found = checks(ask(site, "site-1", "--json", code=0))
    assert found["authenticate"]["answer"] == found["line"]["answer"] == "unknown"
    assert not (site.home("site-1") / KEY_FILE).exists()


def test_an_aggregator_that_is_not_there_is_a_no_and_the_key_an_unknown(site):
    found = checks(ask(site, "site-1", "--json", code=3))
    assert found["reach"]["answer"] == "no"
    assert "firewall" in found["reach"]["remedy"]
    assert found["authenticate"]["answer"] == "unknown"


def test_a_device_that_is_too_small_is_told_what_the_top_block_takes(site):
    small = replace(site.profile, memory_usable_bytes=site.profile.runtime_memory_bytes + (1 << 20))
    write_profile(site.home("site-1"), small)
    found = checks(ask(site, "site-1", "--json", code=5))
    assert found["fit 1 block"]["answer"] == "no"
    assert "MiB" in found["fit 1 block"]["text"]
    assert "fit 2 blocks" not in found


def test_data_that_cannot_be_read_and_another_base_are_each_named(site, tiny_checkpoint, tmp_path):
    (site.folder / "site-1.jsonl").write_text('{"prompt": "a", "completion": "b"}\nno json\n')
    found = checks(ask(site, "site-1", "--json", code=6))
    assert "line 2" in found["data"]["text"]
    assert found["fit"]["answer"] == found["disk"]["answer"] == "unknown"
    site.model = tiny_checkpoint(tmp_path / "other", seed=5)
    found = checks(ask(site, "site-1", "--json"))
    assert found["base model"]["answer"] == "no"
    assert "same checkpoint as the operator" in found["base model"]["remedy"]


def test_a_full_disk_is_a_no_and_a_rather_full_one_costs_time_only(site, monkeypatch):
    usage = shutil.disk_usage(site.folder)
    sample = SimpleNamespace(ids=range(1000))
    data = SimpleNamespace(train=[sample] * 1000, validation=[])  # hidden states of 256 MB
    options = SimpleNamespace(home=site.home("site-1"))
    answers = []
    for free in (10**6, 10**8, 10**9):
        monkeypatch.setattr(asked.shutil, "disk_usage", lambda _path, free=free: usage._replace(free=free))
        (disk,) = asked._disk(options, Checkpoint.open(site.model), data)
        answers.append((disk.answer, "computed again" in disk.text))
    assert answers == [("no", False), ("yes", True), ("yes", False)]


def test_a_decoder_that_is_wrong_is_found_out(site, monkeypatch):
    from fedblocks.kernels import ops

    plain = ops.frozen_nf4_linear
    monkeypatch.setattr(ops, "frozen_nf4_linear", lambda *args: plain(*args) + 1)
    found = checks(ask(site, "site-1", "--json"))
    assert found["4-bit kernel"]["answer"] == "no"
    assert "wrong by" in found["4-bit kernel"]["text"]
