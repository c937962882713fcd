"""A client measures its device once a day, and again where the machine is no longer as it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedblocks.edge_client import client as client_module
from fedblocks.edge_client.client import (
    PROFILE_FILE,
    PROFILE_MAX_AGE_S,
    SiteClient,
    StoredProfile,
    device_profile,
    is_running,
    marked_running,
    why_outdated,
    write_profile,
)
from fedblocks.edge_client.link import read_record, write_record
from fedblocks.profiles.board import MachineState
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.link import LinkRecord
from fedblocks.protocol.messages import DataStatistics
from fedblocks.protocol.site_file import RuntimeSettings

ADDRESS = "tcp://127.0.0.1:5555"
NOW_S = 1_700_000_000.0
PROFILE = DeviceProfile(
    device="test", source="measured", accelerator="cpu", compute_dtype="float32", cpu_cores=1,
    memory_usable_bytes=2**31, runtime_memory_bytes=2**26, gemm_flops_per_s=1e10, memory_bytes_per_s=1e10,
    step_overhead_s=0.01, uplink_bytes_per_s=1.0, downlink_bytes_per_s=2.0, disk_read_bytes_per_s=1e9,
    disk_free_bytes=2**33, four_bit="ok", measured_unix_s=NOW_S,
)  # fmt: skip
SLOW = MachineState(nvpmodel="0 15W", gpu_limit_hz=0.6e9)
FAST = MachineState(nvpmodel="2 MAXN_SUPER", gpu_limit_hz=1.0e9)


@pytest.fixture
def machine(monkeypatch):
    """The machine's state, its clock, and how often it was probed."""
    machine = SimpleNamespace(state=SLOW, now_s=NOW_S, probes=0)

    def probe(**_options):
        machine.probes += 1
        profile = replace(PROFILE, measured_unix_s=machine.now_s, gemm_flops_per_s=1e9 * machine.probes)
        return SimpleNamespace(profile=profile, before=machine.state)

    monkeypatch.setattr("fedblocks.profiles.probe.probe", probe)
    monkeypatch.setattr(client_module, "read_state", lambda: machine.state)
    monkeypatch.setattr(client_module, "time", SimpleNamespace(time=lambda: machine.now_s, monotonic=time.monotonic))
    return machine


@pytest.fixture
def options(tmp_path):
    site = SimpleNamespace(
        address=ADDRESS, run_id="r", base_hash="0" * 64, client_name="site-1", join=SimpleNamespace(share_topics=False)
    )
    return SimpleNamespace(
        home=tmp_path / "home", site=site, runtime=RuntimeSettings(), emulate=None, emulate_scale=1.0,
        evaluate_general=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("age_s", "why"),
    [
        (0.0, ""),
        (PROFILE_MAX_AGE_S - 1, ""),
        (PROFILE_MAX_AGE_S, "measured 24 hours ago"),
        (-59.0, ""),
        (-3600.0, "measured in the future, by this machine's clock"),
    ],
)
def test_figures_hold_for_a_day(age_s, why):
    known = StoredProfile(profile=PROFILE, state=SLOW)
    assert why_outdated(known, SLOW, now_unix_s=NOW_S + age_s) == why


def test_another_power_mode_voids_them_and_an_unrecorded_state_does_not():
    known = StoredProfile(profile=PROFILE, state=SLOW)
    assert why_outdated(known, FAST, now_unix_s=NOW_S) == "nvpmodel was 0 15W, is 2 MAXN_SUPER"
    assert why_outdated(replace(known, state=None), FAST, now_unix_s=NOW_S) == ""


def test_a_device_is_probed_once_a_day_and_after_a_change_of_mode(machine, options):
    said = []
    first = device_profile(options, said.append)
    assert device_profile(options, said.append) == first
    assert machine.probes == 1

    machine.state = FAST
    assert device_profile(options, said.append).gemm_flops_per_s == 2e9
    assert "nvpmodel was 0 15W, is 2 MAXN_SUPER" in said[-2]
    device_profile(options, said.append)
    assert machine.probes == 2

    machine.now_s += PROFILE_MAX_AGE_S
    assert device_profile(options, said.append).measured_unix_s == machine.now_s
    assert machine.probes == 3


def test_the_state_stays_in_the_clients_own_file(machine, options):
    device_profile(options, print)
    stored = json.loads((options.home / PROFILE_FILE).read_text())
    assert stored["state"]["nvpmodel"] == "0 15W"
    assert "nvpmodel" not in json.dumps(stored["profile"])


@pytest.mark.parametrize("content", ["", "{}", '{"profile": {}, "state": null}', '{"device": "as it was before"}'])
def test_an_unreadable_profile_is_measured_again(content, machine, options):
    options.home.mkdir()
    (options.home / PROFILE_FILE).write_text(content)
    said = []
    device_profile(options, said.append)
    assert machine.probes == 1
    assert "measuring again" in said[0]
    device_profile(options, said.append)
    assert machine.probes == 1


def test_the_line_as_it_was_measured_is_part_of_the_profile_and_not_of_an_emulated_ones(machine, options):
    options.home.mkdir()
    write_record(options.home, ADDRESS, LinkRecord().with_figure("uplink_bytes_per_s", 3e5))
    profile = device_profile(options, print)
    assert (profile.uplink_bytes_per_s, profile.downlink_bytes_per_s) == (3e5, 2.0)
    assert json.loads((options.home / PROFILE_FILE).read_text())["profile"]["uplink_bytes_per_s"] == 1.0
    options.emulate = "raspberry-pi-5-8gb"
    assert device_profile(options, print).uplink_bytes_per_s != 3e5


@pytest.fixture
def client(options):
    options.home.mkdir()
    store = SimpleNamespace(held_state=lambda: (4, {}))
    statistics = DataStatistics(num_examples=1, num_target_tokens=1, mean_tokens=2.0, max_tokens=2)
    data = SimpleNamespace(statistics=lambda share_topics: statistics)
    return SiteClient(
        options=options, site=options.site, encoder=None, data=data, identity=None, store=store, summary=None,
        profile=PROFILE, say=print,
    )  # fmt: skip


def test_the_next_greeting_says_what_the_traffic_has_shown(client, options):
    assert client.hello().profile == PROFILE
    record = LinkRecord().with_figure("round_trip_s", 0.1)
    client._keep_line(record, ends=False)
    assert client.hello().profile == PROFILE
    assert read_record(options.home, ADDRESS) == LinkRecord()  # not written at each heartbeat

    record = record.with_figure("uplink_bytes_per_s", 3e5)
    client._keep_line(record, ends=False)
    assert client.hello().profile == replace(PROFILE, uplink_bytes_per_s=3e5)
    assert client.hello().held_version == 4
    assert read_record(options.home, ADDRESS) == record

    record = record.with_figure("round_trip_s", 0.2)
    client._keep_line(record, ends=True)
    assert read_record(options.home, ADDRESS) == record
    options.emulate = "raspberry-pi-5-8gb"
    assert client.hello().profile == PROFILE


def test_a_home_that_cannot_be_written_is_said_and_ends_nothing(client, options):
    options.home.rmdir()
    said = []
    client.say = said.append
    client._keep_line(LinkRecord().with_figure("uplink_bytes_per_s", 3e5), ends=False)
    assert "cannot be kept" in said[0]
    assert client.line.uplink_bytes_per_s.value == 3e5


def test_a_running_client_is_seen_by_others_until_it_ends_even_by_a_kill(tmp_path):
    assert not is_running(tmp_path)
    with marked_running(tmp_path):
        assert is_running(tmp_path)
        with marked_running(tmp_path):  # a second one is the aggregator's to tell
            assert is_running(tmp_path)
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); "
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "running")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        assert is_running(tmp_path)
    finally:
        other.kill()
        other.wait()
    assert not is_running(tmp_path)


def test_a_profile_written_without_a_state_is_read_back(machine, options):
    options.home.mkdir()
    write_profile(options.home, PROFILE)
    assert device_profile(options, print) == PROFILE
    assert machine.probes == 0
