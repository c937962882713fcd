"""The line is timed by the run's own messages; what is short, overlapping or cut off says nothing about it."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from fedblocks.edge_client.link import LINKS_FILE, LinkMeter, read_record, with_link, write_record
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.link import ENOUGH_BYTES, LinkRecord
from fedblocks.protocol.messages import Delta, TrainReport

PROFILE = DeviceProfile(
    device="test", source="measured", accelerator="cpu", compute_dtype="float32", cpu_cores=1,
    memory_usable_bytes=2**31, runtime_memory_bytes=2**26, gemm_flops_per_s=1e10, memory_bytes_per_s=1e10,
    step_overhead_s=0.01, uplink_bytes_per_s=1.0, downlink_bytes_per_s=2.0, disk_read_bytes_per_s=1e9,
    disk_free_bytes=2**33, four_bit="ok",
)  # fmt: skip


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return LinkMeter(clock=clock)


def update(num_bytes, attempt_id="a1"):
    report = TrainReport(
        num_target_tokens=1, loss_first=1.0, loss_last=1.0, anchor_kl=0.0, prefix_s=0.0, train_s=0.0, measure_s=0.0,
        encode_s=0.0, step_s=0.0, peak_memory_bytes=0, predicted_peak_bytes=0, mode=ExecutionMode(),
        gradient_energy=(),
    )  # fmt: skip
    return Delta(
        attempt_id=attempt_id, round=1, version=0, num_examples=8, steps=1, format="fp32", density=1.0, tensors=(),
        payload_bytes=num_bytes, payload_sha256="", train=report, measurements=(),
    )  # fmt: skip


def test_the_greeting_is_the_first_round_trip(meter, clock):
    meter.greeted()
    clock.now_s += 0.25
    meter.welcomed()
    meter.welcomed()
    assert meter.record.round_trip_s.value == pytest.approx(0.25)
    assert meter.record.round_trip_s.runs == 1


def test_a_heartbeat_counts_if_no_payload_moves_and_none_before_it_is_open(meter, clock):
    def beat(seconds=0.1):
        meter.beat()
        clock.now_s += seconds
        meter.beat_answered()

    beat()
    assert meter.record.round_trip_s.runs == 1
    meter.beat()
    beat()  # the reply is that of the one before
    meter.beat_answered()
    assert meter.record.round_trip_s.runs == 1
    meter.payload_begins(1)
    beat()
    meter.payload_ends(1, 10)
    meter.beat()
    meter.chunk_sent(update(10))  # it left while the reply was under way
    meter.beat_answered()
    beat()
    meter.answered("a1", accepted=True)
    assert meter.record.round_trip_s.runs == 1
    beat(0.2)
    assert meter.record.round_trip_s.runs == 2
    assert meter.record.round_trip_s.value == pytest.approx(0.13)


def test_an_update_is_timed_from_its_first_chunk_to_its_ack(meter, clock):
    sent = update(4 * ENOUGH_BYTES)
    meter.announced(sent)
    clock.now_s += 50  # the aggregator made it wait
    for _ in range(4):
        meter.chunk_sent(sent)
        clock.now_s += 0.5
    meter.answered("a1", accepted=True)
    assert meter.record.uplink_bytes_per_s.value == pytest.approx(2 * ENOUGH_BYTES)
    meter.answered("a1", accepted=True)
    assert meter.record.uplink_bytes_per_s.runs == 1


def test_a_refused_a_cut_off_and_a_small_update_say_nothing(meter, clock):
    for num_bytes, end in (
        (4 * ENOUGH_BYTES, lambda: meter.answered("a1", accepted=False)),
        (4 * ENOUGH_BYTES, meter.lost),
        (ENOUGH_BYTES - 1, lambda: None),
    ):
        meter.chunk_sent(update(num_bytes))
        clock.now_s += 1.0
        end()
        meter.answered("a1", accepted=True)
    assert meter.record == LinkRecord()


def test_an_update_that_is_announced_again_is_timed_again(meter, clock):
    sent = update(4 * ENOUGH_BYTES)
    meter.chunk_sent(sent)
    clock.now_s += 30
    meter.announced(sent)
    meter.chunk_sent(sent)
    clock.now_s += 2
    meter.answered("a1", accepted=True)
    assert meter.record.uplink_bytes_per_s.value == pytest.approx(2 * ENOUGH_BYTES)


def test_payloads_that_overlap_share_the_line(meter, clock):
    meter.payload_begins(1)
    clock.now_s += 1
    meter.payload_begins(2)
    clock.now_s += 1
    meter.payload_ends(1, ENOUGH_BYTES)
    assert meter.record.downlink_bytes_per_s is None
    clock.now_s += 1
    meter.payload_ends(2, ENOUGH_BYTES // 2)
    assert meter.record.downlink_bytes_per_s.value == pytest.approx(ENOUGH_BYTES / 2)
    meter.payload_begins(3)
    clock.now_s += 100
    meter.lost()
    meter.payload_ends(3, ENOUGH_BYTES)
    assert meter.record.downlink_bytes_per_s.runs == 1


def test_a_clock_that_stands_still_gives_no_infinite_rate(meter):
    meter.payload_begins(1)
    meter.payload_ends(1, ENOUGH_BYTES)
    meter.chunk_sent(update(ENOUGH_BYTES))
    meter.answered("a1", accepted=True)
    meter.greeted()
    meter.welcomed()
    assert meter.record == LinkRecord()


def test_any_order_of_events_leaves_the_meter_sound(meter, clock):
    rng = random.Random(3)
    sent = update(ENOUGH_BYTES)
    events = [
        meter.lost, meter.greeted, meter.welcomed, meter.beat, meter.beat_answered,
        lambda: meter.announced(sent), lambda: meter.chunk_sent(sent),
        lambda: meter.answered("a1", accepted=rng.random() < 0.5),
        lambda: meter.payload_begins(rng.randrange(3)),
        lambda: meter.payload_ends(rng.randrange(3), ENOUGH_BYTES),
    ]  # fmt: skip
    for _ in range(5000):
        rng.choice(events)()
        clock.now_s += rng.choice((0.0, 0.01))
    assert meter.record.round_trip_s.low >= 0.01
    assert meter.record.uplink_bytes_per_s.high <= ENOUGH_BYTES / 0.0099


def test_the_record_of_each_aggregator_is_kept_apart(tmp_path):
    record = LinkRecord().with_figure("round_trip_s", 0.2).with_figure("uplink_bytes_per_s", 5e5)
    other = LinkRecord().with_figure("downlink_bytes_per_s", 1e6)
    write_record(tmp_path, "tcp://a:1", record)
    write_record(tmp_path, "tcp://b:1", other)
    assert read_record(tmp_path, "tcp://a:1") == record
    assert read_record(tmp_path, "tcp://b:1") == other
    assert read_record(tmp_path, "tcp://c:1") == LinkRecord()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"tcp://a:1": {}}', '{"tcp://a:1": {"round_trip_s": 3}}', "\0"])
def test_an_unreadable_file_knows_nothing_and_is_replaced(content, tmp_path):
    (tmp_path / LINKS_FILE).write_text(content)
    assert read_record(tmp_path, "tcp://a:1") == LinkRecord()
    write_record(tmp_path, "tcp://a:1", LinkRecord())
    assert json.loads((tmp_path / LINKS_FILE).read_text())["tcp://a:1"]["round_trip_s"] is None


def test_a_figure_that_is_no_number_is_not_believed(tmp_path):
    figure = {"value": -1.0, "low": 1.0, "high": 1.0, "runs": 1}
    record = {"round_trip_s": None, "uplink_bytes_per_s": figure, "downlink_bytes_per_s": None}
    (tmp_path / LINKS_FILE).write_text(json.dumps({"tcp://a:1": record}))
    assert read_record(tmp_path, "tcp://a:1") == LinkRecord()


def test_the_profile_takes_what_is_known_of_the_line_and_keeps_the_rest():
    record = LinkRecord().with_figure("uplink_bytes_per_s", 7e5)
    assert with_link(PROFILE, record) == replace(PROFILE, uplink_bytes_per_s=7e5)
    assert with_link(PROFILE, LinkRecord()) == PROFILE
