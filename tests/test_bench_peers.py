"""The benchmark beside Flower and NVFlare: what can be tried without them, and the page that is written from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch")

REPO = Path(__file__).parents[1]
sys.path.append(str(REPO / "benchmarks"))

import bench_peers  # noqa: E402
import peers_document  # noqa: E402
from light_clients import TINY  # noqa: E402
from peers import cases, crashes, nvflare_simulator, our_bad_inputs, ours  # noqa: E402
from peers.processes import Watch  # noqa: E402


def test_every_bad_update_that_the_peers_are_given_is_refused_by_ours():
    found = our_bad_inputs.answers()
    assert list(found) == list(cases.CASES)
    assert {name: found[name] for name in ("one NaN", "one infinity")} == dict.fromkeys(
        ("one NaN", "one infinity"), "non_finite"
    )
    assert found["another key than the rest"] == "not_assigned"
    assert found["weight 10^12"] == "bad_weight"
    assert "accepted" not in found.values()


def test_the_answer_to_a_case_is_the_mean_or_what_stops_it_and_faults_of_ours_are_not_answers():
    def plain(replies):
        return {"x": [sum(arrays["x"][0] * weight for arrays, weight in replies) / sum(w for _, w in replies)]}

    assert cases.answer("weight 10^12", lambda replies: replies, plain) == "x = [9.0]"
    assert cases.answer("weight 0 of all four", lambda replies: replies, plain) == "stops: ZeroDivisionError"
    with pytest.raises(KeyError):
        cases.answer("one NaN", lambda replies: replies[0][0]["z"], plain)


def test_a_watch_counts_what_children_and_orphans_take_and_ends_what_is_left(tmp_path):
    burn = "import time\nuntil = time.process_time() + 0.3\nwhile time.process_time() < until: pass"
    (tmp_path / "burn.py").write_text(burn)
    (tmp_path / "run.sh").write_text(f"sleep 60 &\n{sys.executable} {tmp_path / 'burn.py'}\nsleep 1\n")
    with Watch(("sleep",)) as watch:
        subprocess.run(["sh", str(tmp_path / "run.sh")], check=True)
    found = watch.figures()
    assert 0.3 <= found["cpu_s"] < 5.0
    assert found["clients_peak_pss_bytes"] > 0
    assert found["server_peak_pss_bytes"] > 0
    assert found["all_peak_pss_bytes"] >= found["clients_peak_pss_bytes"]
    assert psutil.Process().children(recursive=True) == []


def test_a_run_of_ours_is_timed_round_by_round_and_every_update_counts(tmp_path):
    found = ours.leg(tmp_path / "run", TINY, clients=2, rounds=2, format="int8")
    assert found["result_ok"]
    assert len(found["round_s"]) == 2
    assert found["encrypted"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_aggregator_that_dies_in_mid_round_goes_on_with_the_bits_of_the_undisturbed_run(tmp_path):
    found = crashes.CASES["box_killed", "ours"](tmp_path / "run")
    assert found["ended"]
    assert found["rounds_done"] == crashes.ROUNDS
    assert found["accepted_by_round"] == [crashes.NODES] * crashes.ROUNDS
    assert found["same_bits_as_undisturbed"]


def test_rounds_are_read_from_the_log_of_the_simulator(tmp_path):
    def line(seconds: str, text: str, name: str = "FedAvg") -> str:
        return json.dumps({"asctime": f"2026-01-01 00:00:{seconds}", "name": name, "message": text}) + "\n"

    job = object.__new__(nvflare_simulator.Simulator)
    job._folder = tmp_path
    assert job.controller_lines() == []
    log = tmp_path / "peers" / "server" / "log.json"
    log.parent.mkdir(parents=True)
    log.write_text(
        line("00,900", "Workflow controller started.", name="ServerRunner")
        + line("01,000", "\n---\n      Round 0 started.      \n---")
        + line("03,000", "Aggregated 1/2 results")
        + line("04,250", "Aggregated 2/2 results")
        + line("05,000", "\n---\n      Round 1 started.      \n---")
        + line("05,500", "Aggregated 1/2 results")
        + '{"asctime": "2026-01'
    )
    assert job.round_seconds(2) == [3.25]
    assert job.aggregated_by_round() == [2, 1]
    assert job.rounds_ended() == 1


def leg(*seconds: float, ok: bool = True) -> dict[str, object]:
    return {
        "round_s": list(seconds),
        "result_ok": ok,
        "encrypted": False,
        "wall_s": 9.0,
        "cpu_s": 5.0,
        "server_cpu_s": 2.0,
        "server_peak_pss_bytes": 2_000_000,
        "clients_peak_pss_bytes": 3_000_000,
        "all_peak_pss_bytes": 4_000_000,
        "most_processes": 3,
        "load_average": 0.5,
    }


def test_a_summary_leaves_first_rounds_out_and_compares_medians():
    found = bench_peers.summary(
        {"ours_fp32": [leg(9, 2, 4), leg(9, 3, 3)], "flower": [leg(99, 12)]}, "25MB", clients=2, rounds=2
    )
    assert found["median_round_s"] == {"ours_fp32": 3, "flower": 12}
    assert found["fp32_over_flower"] == 0.25
    assert "fp32_over_bare_curve" not in found


def test_the_page_says_which_targets_were_missed_and_no_time_of_a_wrong_result():
    found = bench_peers.summary({"ours_fp32": [leg(9, 4)], "bare_curve": [leg(9, 1)]}, "25MB", clients=2, rounds=1)
    assert "| ours, fp32, over bare ZeroMQ with CURVE | 1.5 | 4 | not met |" in peers_document.targets(found)
    wrong = bench_peers.summary({"flower": [leg(9, 4, ok=False)]}, "25MB", clients=2, rounds=1)
    with pytest.raises(ValueError, match="a result was wrong"):
        peers_document.rounds(wrong, "title")


def test_the_page_is_written_from_what_was_measured():
    content = json.loads((REPO / "benchmarks" / "results" / "peers.json").read_text())
    page = (REPO / "docs" / "peers.md").read_text()
    for part in peers_document.parts_of(content):
        assert part in page, f"run: python benchmarks/peers_document.py\n{part}"
