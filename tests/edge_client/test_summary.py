"""The site's own score: what is kept, and when two scores may stand beside each other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.summary import SUMMARY_FILE, Summary, SummaryFile, held_out_sha256
from fedblocks.protocol.messages import Measurement


def start(**changes: object) -> Summary:
    fields = {
        "run_id": "r",
        "base_name": "starter",
        "client_name": "site-a",
        "num_train": 36,
        "num_held_out": 4,
        "held_out_sha256": "a",
    }
    return Summary(**{**fields, **changes})


def measured(version: int, right: int, nll_sum: float = 8.0, measure: str = "validation") -> Measurement:
    return Measurement(measure=measure, version=version, num_items=4, num_correct=right, nll_sum=nll_sum, num_tokens=16)


def sample(*ids: int, labels: int = 1) -> TokenisedSample:
    mask = np.arange(len(ids)) >= len(ids) - labels
    return TokenisedSample(ids=np.array(ids, dtype=np.int32), label_mask=mask)


def test_the_first_score_stays_and_the_last_follows(tmp_path):
    file = SummaryFile(tmp_path, start())
    for round, right in ((1, 0), (2, 3), (5, 2)):
        file.measured([measured(round - 1, right, nll_sum=16.0 / round)], round=round)

    assert file.summary.line() == (
        "own held-out part (4 examples): accuracy 0.000 -> 0.500  nll 1.000 -> 0.200 nats/token  (version 0 -> 4)"
    )
    written = json.loads((tmp_path / SUMMARY_FILE).read_text())
    assert (written["first"]["version"], written["last"]["version"], written["last"]["round"]) == (0, 4, 5)


def test_anchor_and_general_measurements_are_not_the_sites_own_score(tmp_path):
    file = SummaryFile(tmp_path, start())
    file.measured([measured(0, 1, measure="general"), measured(0, 1, measure="anchor")], round=1)

    assert file.summary.first is None
    assert file.summary.line() == "own held-out part: not measured yet"


def test_one_measurement_is_shown_as_one(tmp_path):
    file = SummaryFile(tmp_path, start())
    file.measured([measured(3, 2)], round=4)

    assert file.summary.line() == (
        "own held-out part (4 examples): accuracy 0.500  nll 0.500 nats/token  (version 3; measured once)"
    )


def test_a_site_without_held_out_rows_is_told_so(tmp_path):
    assert "no rows are held out" in SummaryFile(tmp_path, start(num_held_out=0)).summary.line()


def test_a_session_that_goes_on_still_knows_the_first_score(tmp_path):
    file = SummaryFile(tmp_path, start())
    file.measured([measured(0, 1)], round=1)
    file.counted()
    file.ended(7)

    again = SummaryFile(tmp_path, start())
    assert again.summary.exit_code is None
    again.measured([measured(2, 3)], round=3)
    again.counted()

    assert "accuracy 0.250 -> 0.750" in again.summary.line()
    assert again.summary.updates_counted == 2


@pytest.mark.parametrize("changes", [{"held_out_sha256": "b"}, {"run_id": "other"}])
def test_scores_of_another_held_out_part_or_run_are_dropped(tmp_path, changes):
    file = SummaryFile(tmp_path, start())
    file.measured([measured(0, 1)], round=1)

    assert SummaryFile(tmp_path, start(**changes)).summary.first is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "r"}'])
def test_a_damaged_file_counts_as_none(tmp_path, content):
    (tmp_path / SUMMARY_FILE).write_text(content)

    assert SummaryFile(tmp_path, start()).summary == start()


def test_a_summary_that_cannot_be_written_does_not_end_the_round(tmp_path):
    file = SummaryFile(tmp_path / "gone", start())
    file.measured([measured(0, 1)], round=1)

    assert file.summary.first is not None


def test_held_out_parts_are_told_apart_by_tokens_targets_and_borders():
    parts = [
        [sample(1, 2, 3)],
        [sample(1, 2, 4)],
        [sample(1, 2, 3, labels=2)],
        [sample(1, 2), sample(3)],
        [sample(3), sample(1, 2)],
        [],
    ]

    assert len({held_out_sha256(part) for part in parts}) == len(parts)
    assert held_out_sha256(parts[0]) == held_out_sha256([sample(1, 2, 3)])
