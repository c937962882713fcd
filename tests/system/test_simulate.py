"""``fedblocks simulate``: the real aggregator and real sessions on a virtual clock; the same seed, the same run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from fedblocks import cli, simulation
from fedblocks.fleet_file import Chance, Event, Fleet, Group, load
from fedblocks.profiles import catalog_files
from fedblocks.profiles.catalog_files import QWEN2_5_0_5B
from fedblocks.profiles.cost import upload_bytes
from fedblocks.protocol.run_config import ConfigError
from fedblocks.simulation import Inputs, Rows, assumed_profile, dealt, simulate
from fedblocks.virtual_client import VirtualClock
from fedblocks.virtual_workers import WorkerError

RUN = {"run.max_rounds": 2, "training.steps": 4, "expansion.blocks": 2}


@pytest.fixture
def inputs(tmp_path, tiny_checkpoint):
    train, general = tmp_path / "train.jsonl", tmp_path / "general.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "xy"[i % 2] * 2}) + "\n" for i in range(60)))
    general.write_text("".join(json.dumps({"prompt": f"g{i}", "completion": "ab"}) + "\n" for i in range(8)))
    model = tiny_checkpoint(tmp_path, layers=4)
    return Inputs(model=model, train=train, general=general, anchor_sequences=16, anchor_tokens=24)


def fleet(**changes):
    groups = (
        Group(device="jetson-orin-nano-8gb", count=2, name="nano", examples=20),
        Group(device="jetson-agx-orin-64gb", count=1, name="agx", examples=30),
    )
    return Fleet(**{"groups": groups, "run": RUN, "seed": 5, **changes})


def test_a_fleet_runs_to_its_end_and_the_same_seed_gives_the_same_bits(inputs, tmp_path):
    first = simulate(fleet(), inputs, tmp_path / "a")
    again = simulate(fleet(), inputs, tmp_path / "b")
    other = simulate(fleet(seed=6), inputs, tmp_path / "c")
    assert first.finished
    assert [row["num_accepted"] for row in first.rounds] == [3, 3]
    assert first.state_sha256 == again.state_sha256 != other.state_sha256
    assert first.virtual_s == again.virtual_s
    assert [c.spans for c in first.clients] == [c.spans for c in again.clients]
    assert {c.name: c.updates for c in first.clients} == {"nano-1": 2, "nano-2": 2, "agx-1": 2}
    assert set(first.coverage) == {"nano", "agx"}


def test_with_any_number_of_processes_the_run_is_the_same_to_the_bit(inputs, tmp_path):
    chance = Chance(dropout=0.3, rejoin_s=5.0, straggler=0.2)
    groups = (*fleet().groups, Group(device="raspberry-pi-5-8gb", name="tiny", scale=1e-9, examples=20))
    said = {1: [], 2: [], 3: []}
    found = {
        count: simulate(
            fleet(chance=chance, groups=groups, run={**RUN, "run.max_rounds": 3}),
            inputs,
            tmp_path / str(count),
            workers=count,
            say=said[count].append,
        )
        for count in said
    }
    for other in (found[2], found[3]):
        assert other.state_sha256 == found[1].state_sha256
        assert other.virtual_s == found[1].virtual_s
        assert other.clients == found[1].clients
    assert sorted(said[1]) == sorted(said[2]) == sorted(said[3])
    assert any(client.accuracy is not None for client in found[1].clients)


def test_what_goes_wrong_in_a_worker_is_told_with_its_cause(inputs, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("the arithmetic broke")

    monkeypatch.setattr("fedblocks.virtual_client.VirtualClient.carry_out", fails)
    with pytest.raises(WorkerError, match=r"worker \d failed at a task of \w+-\d:[\s\S]*the arithmetic broke"):
        simulate(fleet(), inputs, tmp_path / "run", workers=2)
    with pytest.raises(ConfigError, match="workers is 0, expected 1 to 64"):
        simulate(fleet(), inputs, tmp_path / "run", workers=0)


def test_the_costs_of_a_larger_model_change_time_bytes_and_memory_and_not_what_is_learnt(inputs, tmp_path):
    run = {**RUN, "allocation.deadline_s": 1e5, "server.heartbeat_interval_s": 600.0, "data.max_tokens": 16}
    plain = simulate(fleet(run=run, tick_s=60.0), inputs, tmp_path / "plain")
    other = simulate(fleet(run=run, tick_s=60.0, costs_of="qwen2.5-0.5b"), inputs, tmp_path / "other")
    assert (plain.costs_of, other.costs_of) == ("", "qwen2.5-0.5b")
    assert [row["num_accepted"] for row in other.rounds] == [3, 3]
    for client in other.clients:
        trained = [span for span in client.spans if span["kind"] == "train"]
        assert client.bytes_up == sum(span["bytes_up"] for span in trained)
        assert all(s["bytes_up"] == upload_bytes(QWEN2_5_0_5B, len(s["blocks"]), "int8", 0.25) for s in trained)
        assert client.peak_memory_bytes > QWEN2_5_0_5B.block_parameters * 16
        assert client.energy_j == pytest.approx(client.train_s * {"nano": 15, "agx": 60}[client.name.split("-")[0]])
    assert other.rounds[-1]["bytes_up"] == sum(s["bytes_up"] for c in other.clients for s in c.spans if s["round"] == 2)
    for device in ("nano-1", "agx-1"):
        found = next(c for c in other.clients if c.name == device)
        assert found.train_s > 5 * next(c for c in plain.clients if c.name == device).train_s
    told = {c["name"]: c for c in other.rounds[0]["clients"]}
    assert told["agx-1"]["predicted_seconds"] < told["nano-1"]["predicted_seconds"]
    assert {tuple(c["blocks"]) for row in (*plain.rounds, *other.rounds) for c in row["clients"]} == {(0, 1)}
    assert plain.rounds[-1]["nll_per_token"] == pytest.approx(other.rounds[-1]["nll_per_token"], rel=1e-3)


def test_a_task_that_the_larger_model_would_not_let_the_device_hold_is_refused_by_it(inputs, tmp_path):
    groups = (Group(device="jetson-orin-nano-8gb", count=1, name="nano", examples=20, scale=0.001), fleet().groups[1])
    said = []
    run = {**RUN, "allocation.deadline_s": 1e5, "server.heartbeat_interval_s": 600.0}
    found = simulate(
        fleet(groups=groups, run=run, tick_s=60.0, costs_of="qwen2.5-0.5b"), inputs, tmp_path / "run", say=said.append
    )
    assert found.finished
    assert {c.name: c.updates for c in found.clients} == {"nano-1": 0, "agx-1": 2}


def test_rows_can_be_dealt_with_shares_of_the_topics_of_each_clients_own():
    rows = Rows(lines=[f"{i}" for i in range(100)], topics=["ab"[i % 2] for i in range(100)])

    def shares(alpha):
        found = [dealt(rows, 20, alpha, np.random.default_rng(seed)) for seed in range(20)]
        assert all(len(set(own)) == 20 for own in found)
        return [sum(int(row) % 2 == 0 for row in own) / 20 for own in found]

    assert np.std(shares(0.1)) > 0.35
    assert np.std(shares(100.0)) < 0.15
    assert len(set(dealt(rows, 1000, 0.1, np.random.default_rng(1)))) == 100
    with pytest.raises(ConfigError, match=r"alpha is 0\.5, but row 1 has no topic"):
        dealt(Rows(lines=["t"], topics=[""]), 1, 0.5, np.random.default_rng(1))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "costs_of is 'other.json', expected qwen2.5-0.5b, or the path of a config.json"),
        ("{", "cannot be read .* expected a config.json"),
        ('{"model_type": "t5"}', "t5"),
    ],
)
def test_costs_of_what_is_no_model_are_refused(content, says, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "other.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        simulate(fleet(costs_of="other.json"), inputs, tmp_path / "run")


def test_a_task_takes_what_was_predicted_for_its_device(inputs, tmp_path):
    found = simulate(fleet(chance=Chance(jitter=0.0)), inputs, tmp_path / "run")
    for row in found.rounds[1:]:  # in the first round first passes are predicted generously
        for client in row["clients"]:
            assert client["measured_seconds"] == pytest.approx(client["predicted_seconds"] / 1.15, rel=0.25)
    spans = {c.name: c.spans for c in found.clients}
    took = {name: max(s["end_s"] - s["start_s"] for s in of if s["kind"] == "train") for name, of in spans.items()}
    assert took["agx-1"] < took["nano-1"]


def test_clients_that_vanish_lose_their_task_come_back_and_the_run_goes_on(inputs, tmp_path):
    found = simulate(
        fleet(chance=Chance(dropout=0.5, rejoin_s=5.0), run={**RUN, "run.max_rounds": 4}), inputs, tmp_path / "r"
    )
    assert found.finished
    assert sum(c.lost for c in found.clients) > 0
    assert sum(row["num_accepted"] for row in found.rounds) > 0
    for client in found.clients:
        away = [s for s in client.spans if s["kind"] == "away"]
        assert len(away) >= client.lost
        assert all(s["end_s"] - s["start_s"] == pytest.approx(5.0) for s in away)


def test_an_update_that_comes_rounds_too_late_is_refused_and_the_run_goes_on(inputs, tmp_path):
    said = []
    run = {**RUN, "run.max_rounds": 8, "allocation.deadline_s": 2.0, "allocation.quorum": 0.5}
    events = (Event(at_s=0.0, clients="nano-2", kind="slow", factor=12.0),)
    found = simulate(fleet(run=run, events=events, tick_s=0.2), inputs, tmp_path / "run", say=said.append)
    assert found.finished
    assert len(found.rounds) == 8
    assert any("nano-2: refused (stale" in line for line in said), said


def test_a_device_that_is_too_small_takes_no_part_and_the_others_go_on(inputs, tmp_path):
    said = []
    groups = (*fleet().groups, Group(device="raspberry-pi-5-8gb", name="tiny", scale=1e-9, examples=20))
    found = simulate(fleet(groups=groups), inputs, tmp_path / "run", say=said.append)
    assert found.finished
    assert {c.name: c.updates for c in found.clients}["tiny-1"] == 0
    assert any(line.startswith("tiny-1: this device cannot take part") for line in said)
    assert all(row["num_accepted"] == 3 for row in found.rounds)


def test_a_whole_gpu_of_the_catalog_is_assumed_on_a_machine_without_one():
    profile = assumed_profile(Group(device="rtx-4090", scale=1.0), 0.5)
    assert (profile.accelerator, profile.compute_dtype) == ("cpu", "float32")
    assert profile.gemm_flops_per_s == catalog_files.load("rtx-4090").gemm_flops_per_s


def test_events_slow_a_client_down_send_it_away_and_let_another_in(inputs, tmp_path):
    events = (
        Event(at_s=0.5, clients="agx", kind="slow", factor=50.0),
        Event(at_s=0.5, clients="nano-2", kind="leave"),
    )
    groups = (*fleet().groups, replace(fleet().groups[0], name="late", count=1, joins_s=1.0))
    found = simulate(fleet(events=events, groups=groups), inputs, tmp_path / "run")
    spans = {c.name: c.spans for c in found.clients}
    assert spans["nano-2"][-1]["kind"] == "away"
    assert math.isinf(spans["nano-2"][-1]["end_s"])
    assert min(s["start_s"] for s in spans["late-1"]) >= 1.0
    plain = found.to_plain()
    json.dumps(plain, allow_nan=False)
    assert [row["device"] for row in plain["device_classes"]] == ["jetson-orin-nano-8gb", "jetson-agx-orin-64gb"]


def test_a_simulation_replaces_its_own_folder_and_no_other(inputs, tmp_path):
    (tmp_path / "mine" / "run").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds run, which no simulation made"):
        simulate(fleet(), inputs, tmp_path / "mine")
    assert (tmp_path / "mine" / "run").is_dir()


def test_the_verb_writes_a_result_and_a_picture(inputs, tmp_path):
    (tmp_path / "fleet.toml").write_text(
        'seed = 5\n[run]\n"run.max_rounds" = 1\n"training.steps" = 4\n"expansion.blocks" = 2\n'
        '[[group]]\ndevice = "laptop-cpu"\ncount = 2\nexamples = 20\n'
    )
    done = CliRunner().invoke(
        cli.app,
        ["simulate", str(tmp_path / "fleet.toml"), "--out", str(tmp_path / "out"), "--model", str(inputs.model),
         "--train", str(inputs.train), "--general", str(inputs.general), "--json", str(tmp_path / "found.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for told in ("laptop-cpu", "2 (100 %)", "rounds", "2 of 2", "Jain's index of the clients' updates 1.00"):
        assert told in done.output
    assert "costs" not in done.output
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["finished"]
    assert result["costs_of"] == ""
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_costs_of_another_model_are_labelled_in_every_part_of_the_report(inputs, tmp_path):
    (tmp_path / "fleet.toml").write_text(
        'costs_of = "qwen2.5-0.5b"\ntick_s = 60.0\n[run]\n"run.max_rounds" = 1\n"training.steps" = 4\n'
        '"expansion.blocks" = 2\n"server.heartbeat_interval_s" = 600.0\n[[group]]\ndevice = "rtx-4090"\nexamples = 20\n'
    )
    done = CliRunner().invoke(
        cli.app,
        ["simulate", str(tmp_path / "fleet.toml"), "--out", str(tmp_path / "out"), "--model", str(inputs.model),
         "--train", str(inputs.train)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "devices (time, bytes and memory of qwen2.5-0.5b)" in done.output
    assert "rounds (time, bytes and memory of qwen2.5-0.5b)" in done.output
    assert json.loads((tmp_path / "out" / "result.json").read_text())["costs_of"] == "qwen2.5-0.5b"
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_fairness_says_how_evenly_the_updates_were_accepted(inputs, tmp_path):
    found = simulate(fleet(), inputs, tmp_path / "run")

    def with_updates(*counts):
        clients = tuple(replace(c, updates=n) for c, n in zip(found.clients, counts, strict=True))
        return replace(found, clients=clients)

    assert with_updates(2, 2, 2).jain_index_of_updates == pytest.approx(1.0)
    assert with_updates(6, 0, 0).jain_index_of_updates == pytest.approx(1 / 3)
    assert with_updates(0, 0, 0).jain_index_of_updates == 0.0
    nano, agx = found.device_classes()
    assert (nano.share_of_clients, agx.share_of_clients) == pytest.approx((2 / 3, 1 / 3))
    assert nano.share_of_updates == pytest.approx(2 / 3)
    assert nano.accuracy_worst <= nano.accuracy


def test_a_model_without_rows_and_rows_without_a_model_are_errors(tmp_path):
    for arguments in ((tmp_path, None, None), (None, tmp_path, None)):
        with pytest.raises(ConfigError, match="need"):
            simulation.inputs_of(*arguments, tmp_path / "out")


def test_the_clock_gives_what_is_due_in_order_and_never_goes_back():
    clock, done = VirtualClock(), []
    clock.at(2.0, lambda: done.append("b"))
    clock.at(1.0, lambda: done.append("a"))
    clock.at(2.0, lambda: done.append("c"))
    for _ in range(3):
        for action in clock.advance(clock.now_s + 1.5):
            action()
    assert (done, clock.now_s) == (["a", "b", "c"], 3.5)
    clock.at(0.5, lambda: done.append("late"))
    for action in clock.advance(0.0):
        action()
    assert (done[-1], clock.now_s) == ("late", 3.5)


GOOD = 'seed = 3\n[chance]\ndropout = 0.1\n[[group]]\ndevice = "laptop-cpu"\ncount = 2\n'


def test_a_fleet_file_is_read_whole(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(
        GOOD + 'name = "slow"\n[[event]]\nat_s = 1.5\nclients = "slow-2"\nkind = "leave"\n[run.training]\nsteps = 4\n'
    )
    found = load(path)
    assert found.seed == 3
    assert found.chance.dropout == 0.1
    assert found.client_names() == ["slow-1", "slow-2"]
    assert found.events[0].clients == "slow-2"
    assert found.run == {"training.steps": 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the number of clients is 0, expected 1 to 1000"),
        (GOOD + "cuont = 3\n", "unknown key 'group.cuont'; nearest key: count"),
        (GOOD.replace("laptop-cpu", "abacus"), "group.device is 'abacus', expected one of"),
        (GOOD.replace("0.1", "1.5"), "chance.dropout is 1.5, expected a share from 0 to 1"),
        (GOOD.replace("seed = 3", "sed = 3"), "unknown key 'sed'; nearest key: seed"),
        (
            GOOD + '[[event]]\nat_s = 1.0\nclients = "x"\nkind = "leave"\n',
            "event.clients is 'x', expected a group or a",
        ),
        (GOOD + '[[event]]\nclients = "laptop-cpu"\nkind = "leave"\n', "event.at_s is missing"),
        (GOOD + '[[event]]\nat_s = 1.0\nclients = "laptop-cpu"\nkind = "explode"\n', "kind"),
        (GOOD + '[[group]]\ndevice = "laptop-cpu"\n', "a name of its own for each"),
        ("seed = ", "not valid TOML"),
    ],
)
def test_what_a_fleet_file_cannot_hold_is_named(text, says, tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "other.toml")


def test_with_clusters_every_client_gets_a_state_of_its_own_and_the_same_seed_gives_the_same_bits(inputs, tmp_path):
    run = {**RUN, "run.max_rounds": 3, "mixture.clusters": 2, "mixture.from_round": 1, "mixture.min_clients": 2}
    groups = (Group(device="jetson-agx-orin-64gb", count=4, name="agx", examples=15),)
    first = simulate(fleet(groups=groups, run=run), inputs, tmp_path / "a")
    again = simulate(fleet(groups=groups, run=run), inputs, tmp_path / "b")
    assert first.finished
    assert first.state_sha256 == again.state_sha256
    final = [json.loads((tmp_path / part / "run" / "state" / "final.json").read_text()) for part in "ab"]
    assert final[0]["memberships"] == final[1]["memberships"]
    shares = np.array(list(final[0]["memberships"].values()))
    assert shares.shape == (4, 2)
    assert np.ptp(shares[:, 0]) > 0.1
