"""``from fedblocks import simulate, evaluate, load_results``: what a researcher calls."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fedblocks
from fedblocks import cli
from fedblocks.edge_client.data import DataError
from fedblocks.protocol.run_config import ConfigError

LIGHT = """
import sys
import fedblocks
assert {"simulate", "evaluate", "load_results"} <= set(dir(fedblocks))
from fedblocks import simulate, evaluate, load_results
heavy = {"torch", "numpy", "transformers", "msgpack", "zmq", "typer"} & set(sys.modules)
assert not heavy, heavy
assert load_results(sys.argv[1]) == [{"a": 1}]
assert "torch" not in sys.modules
"""
FLEET = """
seed = 5
[run]
"run.max_rounds" = 1
"training.steps" = 2
"expansion.blocks" = 1
[[group]]
device = "laptop-cpu"
count = 2
examples = 20
"""


@pytest.fixture
def suite(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    rows = [{"query": f"q{i}", "choices": ["ab", "cde"], "gold": i % 2} for i in range(4)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_package_stays_light_until_a_function_is_called(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "rows.jsonl")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        fedblocks.simulat  # noqa: B018


def test_a_simulation_is_run_and_its_rounds_are_loaded(tmp_path, tiny_checkpoint):
    (tmp_path / "fleet.toml").write_text(FLEET)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "xy"[i % 2]}) + "\n" for i in range(60)))
    result = fedblocks.simulate(
        tmp_path / "fleet.toml", out=tmp_path / "out", model=tiny_checkpoint(tmp_path), train=train
    )
    assert result.finished
    for path in (tmp_path / "out", tmp_path / "out" / "result.json"):
        (row,) = fedblocks.load_results(path)
        assert row["state_sha256"] == result.rounds[0]["state_sha256"]
        assert row["virtual_s"] == result.rounds[0]["virtual_s"]
    (row,) = fedblocks.load_results(result.run)
    assert row["round"] == result.rounds[0]["round"]


def test_a_suite_is_evaluated_by_the_call_and_by_the_verb(tmp_path, tiny_checkpoint, suite):
    base, other = tiny_checkpoint(tmp_path), tiny_checkpoint(tmp_path, seed=1)
    found = fedblocks.evaluate([other, str(base)], base=base, suite=suite, limit=3, kl_sequences=2, draws=100)
    assert list(found) == ["suite"]
    assert len(found["suite"]["items"]) == 3

    done = CliRunner().invoke(
        cli.app,
        ["evaluate", str(other), "--base", str(base), "--suite", str(suite), "--limit", "3", "--also", str(base),
         "--kl-sequences", "2",
         "--json", str(tmp_path / "found.json"), "--items", str(tmp_path / "items.jsonl")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "choice" in done.output
    assert "KL to the base" in done.output
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["suite"]["tasks"] == found["suite"]["tasks"]
    assert fedblocks.load_results(tmp_path / "found.json") == found["suite"]["tasks"]
    assert fedblocks.load_results(tmp_path / "items.jsonl") == found["suite"]["items"]


def test_files_and_a_suite_are_measured_side_by_side(tmp_path, tiny_checkpoint, suite):
    base = tiny_checkpoint(tmp_path)
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "ab"}) + "\n" for i in range(4)))
    found = fedblocks.evaluate(base, base=base, downstream=task, suite=suite, kl_sequences=2, draws=100)
    assert found["model"]["downstream_nll"] == pytest.approx(found["base"]["downstream_nll"])
    assert found["suite"]["tasks"][0]["num_items"] == 4
    assert "suite" not in fedblocks.evaluate(base, base=base, downstream=task)


def test_several_models_need_a_suite(tmp_path):
    with pytest.raises(ConfigError, match="evaluate: 2 models, expected one"):
        fedblocks.evaluate([tmp_path, tmp_path], base=tmp_path)
    with pytest.raises(ConfigError, match="evaluate: 0 models, expected one"):
        fedblocks.evaluate([], base=tmp_path, suite=tmp_path)
    done = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path), "--base", str(tmp_path), "--limit", "3"])
    assert done.exit_code == 2
    assert "need a folder of tasks" in done.output


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ({"command": "c", "rows": [{"a": 1}, {"a": 2}]}, [{"a": 1}, {"a": 2}]),
        ({"rounds": [{"a": 1}]}, [{"a": 1}]),
        ({"history": [{"a": 1}]}, [{"a": 1}]),
        ({"rows": [], "b": 1}, [{"rows": [], "b": 1}]),
        ({"b": 1}, [{"b": 1}]),
        ([{"a": 1}], [{"a": 1}]),
    ],
)
def test_the_rows_of_a_result_are_found(tmp_path, content, rows):
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert fedblocks.load_results(str(tmp_path / "r.json")) == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"a": 1}\n\n{"a"', r"r\.jsonl, line 3: no valid JSON"),
        ("r.jsonl", '{"a": 1}\n3\n', r"r\.jsonl, line 2: a JSON int, expected an object"),
        ("r.json", "[1]", r"r\.json, row 1: a JSON int, expected an object"),
        ("r.json", "1", r"r\.json: a JSON int, expected an object or a list"),
    ],
)
def test_what_holds_no_rows_is_told(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        fedblocks.load_results(tmp_path / name)


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(DataError, match=r"holds neither result\.json nor metrics\.jsonl"):
        fedblocks.load_results(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        fedblocks.load_results(tmp_path / "absent.json")
