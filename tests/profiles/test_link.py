"""The line's figures are running means of transfers that say something."""

from __future__ import annotations

import math

import pytest

from fedblocks.profiles.link import ENOUGH_BYTES, LinkFigure, LinkRecord, says_something


def test_the_first_figure_stands_and_the_next_counts_three_tenths():
    record = LinkRecord().with_figure("uplink_bytes_per_s", 1000.0)
    assert record.uplink_bytes_per_s == LinkFigure(value=1000.0, low=1000.0, high=1000.0, runs=1)
    record = record.with_figure("uplink_bytes_per_s", 2000.0)
    assert record.uplink_bytes_per_s == LinkFigure(value=1300.0, low=1000.0, high=2000.0, runs=2)
    assert record.downlink_bytes_per_s is None


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_rate_changes_nothing(value):
    record = LinkRecord().with_figure("round_trip_s", 0.1)
    assert record.with_figure("round_trip_s", value) == record
    with pytest.raises(ValueError, match="positive"):
        LinkFigure(value=value, low=1.0, high=1.0, runs=1)


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "counts"),
    [
        (ENOUGH_BYTES - 1, 1.9, False),
        (ENOUGH_BYTES, 0.001, True),
        (16 * 1024, 1.9, False),
        (16 * 1024, 2.0, True),
        (16 * 1024 - 1, 60.0, False),
        (0, 60.0, False),
    ],
)
def test_only_large_or_long_transfers_say_something(num_bytes, seconds, counts):
    assert says_something(num_bytes, seconds) is counts


def test_a_record_in_words():
    assert LinkRecord().text() == "not measured yet"
    record = LinkRecord().with_figure("round_trip_s", 0.02).with_figure("round_trip_s", 0.03)
    record = record.with_figure("downlink_bytes_per_s", 2.5e6)
    assert record.text() == "round trip 23 ms (20 to 30 in 2), down 2.5 MB/s"
