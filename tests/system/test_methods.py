"""Do the methods of other papers run as deployed: init, serve, join, simulate, evaluate, export? And are wrong
configurations told in one sentence?"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedblocks import cli
from fedblocks.aggregator import methods
from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.server import serve
from fedblocks.edge_client.backbone import DenseBackbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.evaluation import evaluate_target
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.export import export_run, load_final
from fedblocks.edge_client.init_run import init_run
from fedblocks.edge_client.starter import starter_folder
from fedblocks.fleet_file import Fleet, Group, load
from fedblocks.protocol import run_config
from fedblocks.protocol.run_config import ConfigError, MethodName
from fedblocks.simulation import Inputs, SimulationResult, simulate

BASELINES = [name for name in get_args(MethodName) if name not in ("fedbe", "fedhft")]
GROUPS = (
    Group(device="jetson-orin-nano-8gb", count=1, name="nano", examples=20),
    Group(device="jetson-agx-orin-64gb", count=1, name="agx", examples=30),
)


@pytest.fixture
def inputs(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Inputs:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "xy"[i % 2] * 2}) + "\n" for i in range(60)))
    model = tiny_checkpoint(tmp_path, layers=2)
    return Inputs(model=model, train=train, general=None, anchor_sequences=8, anchor_tokens=16)


def run_of(name: str, inputs: Inputs, out: Path, **more: Any) -> SimulationResult:
    settings = {"run.max_rounds": 2, "training.steps": 4, "training.learning_rate": 3e-3, "server.keep_updates": True}
    fleet = Fleet(groups=GROUPS, method=name, run={**settings, **more}, seed=5)
    return simulate(fleet, inputs, out)


def exported_logits(model: ExpandedModel) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) % 90
    with torch.no_grad():
        return model.rows_logits(model.forward(ids).flatten(0, 1))


@pytest.mark.parametrize(
    "name", ["fedit", "fedhft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedavg", "flora"))]
)
def test_a_run_is_served_replayed_evaluated_and_exported(name: str, inputs: Inputs, tmp_path: Path) -> None:
    result = run_of(name, inputs, tmp_path / "out")
    run = tmp_path / "out" / "run"
    assert result.finished
    assert [row["num_accepted"] for row in result.rounds] == [2, 2]
    assert all(version.equal for version in replay(run))
    plan, state = load_final(run)
    assert not plan.blocks
    checkpoint = Checkpoint.open(inputs.model)
    dense = ExpandedModel(backbone=DenseBackbone(checkpoint), checkpoint=checkpoint, plan=plan, state=state)
    for strength in (1.0, 0.5):
        out = tmp_path / f"model-{strength}"
        export_run(run, model=inputs.model, out=out, strength=strength)
        grown = Checkpoint.open(out)
        assert grown.shape == checkpoint.shape  # no layer more: the pairs are merged
        dense.set_strength(strength)
        exported = ExpandedModel(backbone=DenseBackbone(grown), checkpoint=grown)
        torch.testing.assert_close(exported_logits(exported), exported_logits(dense), rtol=1e-4, atol=1e-5)
    figures = evaluate_target(run, base=inputs.model, downstream=inputs.train, general=None)
    assert figures["model"]["downstream_nll"] < figures["base"]["downstream_nll"]
    base = export_run(run, model=inputs.model, out=tmp_path / "base", strength=0.0)
    assert base.base_files_copied
    card = (tmp_path / "model-1.0" / "MODEL_CARD.md").read_text()
    assert "changes the base's own tensors" in card


def test_the_anchor_and_the_strength_grid_hold_the_budget_for_pairs_too(inputs: Inputs, tmp_path: Path) -> None:
    result = run_of("fedit", inputs, tmp_path / "out", **{"forgetting.max_kl": 0.02, "delta.format": "int8"})
    final = json.loads((tmp_path / "out" / "run" / "state" / "final.json").read_text())
    assert result.finished
    assert final["strength"] < 1.0  # two rounds at this rate spend more than that
    chosen = next(point for point in final["strengths"] if point["strength"] == final["strength"])
    assert chosen["kl"] <= 0.02
    assert [point["kl"] for point in final["strengths"]] == sorted(point["kl"] for point in final["strengths"])


def test_a_site_takes_part_in_full_fine_tuning_only_where_it_allows_it(
    consortium: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    c = consortium("run.method=fedavg", "training.steps=4", "run.max_rounds=2", clients=1)
    site = c.folder / "site-1.toml"
    arguments = ["fedblocks", "join", str(site), "--data", str(c.folder / "site-1.jsonl")]
    arguments += ["--model", str(c.model), "--home", str(c.home("site-1"))]
    monkeypatch.setattr("sys.argv", arguments)
    said: list[str] = []
    stop = threading.Event()
    served = threading.Thread(target=serve, args=(c.run,), kwargs={"on_event": said.append, "stop": stop})
    served.start()
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 5
        assert "set allow_base_training = true in the section [limits]" in capsys.readouterr().err
        text = site.read_text()
        assert "# allow_base_training = false" in text  # the invitation shows the key, and leaves it to the site
        site.write_text(text.replace("# allow_base_training = false", "allow_base_training = true"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
    finally:
        stop.set()
        served.join(20)
    assert any(line.startswith("site-1 left: is not allowed there: this run changes the base") for line in said)
    assert any(line.startswith("finished after 2 rounds") for line in said)


@pytest.mark.parametrize("name", ["fedit", pytest.param("fedavg", marks=pytest.mark.slow)])
def test_the_costs_may_be_those_of_a_larger_model_with_other_layers(name: str, inputs: Inputs, tmp_path: Path) -> None:
    settings = {"run.max_rounds": 2, "training.steps": 4, "training.learning_rate": 3e-3}
    groups = (Group(device="jetson-agx-orin-64gb", count=2, name="agx", examples=20),)
    fleet = Fleet(groups=groups, method=name, run=settings, seed=5, tick_s=60.0, costs_of="qwen2.5-0.5b")
    result = simulate(fleet, inputs, tmp_path / "out")
    assert [row["num_accepted"] for row in result.rounds] == [2, 2]
    each_way = {"fedit": 35.2e6, "fedavg": 4 * 494e6}[name]  # methods.md 7.2
    for client in result.clients:
        assert client.bytes_up == pytest.approx(2 * each_way, rel=0.02)
        assert client.peak_memory_bytes > 400e6  # the layers in 4 bits, and the embedding
    plan, state = load_final(tmp_path / "out" / "run")
    assert set(state) == set(plan.unit_ids)  # the small model's own units were trained


def test_a_fleet_file_names_its_method(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('method = "fedit"\n[[group]]\ndevice = "jetson-orin-nano-8gb"\n')
    assert load(path).method == "fedit"


def test_init_takes_the_method_and_says_what_trains(inputs: Inputs, tmp_path: Path) -> None:
    arguments = ["init", "--model", str(inputs.model), "--out", str(tmp_path / "run"), "--method", "fedit"]
    done = CliRunner().invoke(cli.app, [*arguments, "--anchor-sequences", "4", "--anchor-tokens", "16"])
    assert done.exit_code == 0, done.output
    assert "trains low-rank pairs of rank 16 over every projection; anchor: " in done.output
    assert run_config.load(tmp_path / "run" / "run.toml").run.method == "fedit"


def test_every_method_has_a_file_and_its_defaults() -> None:
    assert set(methods.METHODS) == set(get_args(MethodName)) == set(run_config.METHOD_DEFAULTS)
    config = run_config.from_mapping({}, ["run.method=fedit"])
    assert (config.delta.format, config.allocation.policy, config.allocation.slim) == ("fp32", "whole", False)
    assert (config.trainable.rank, config.trainable.scaling, config.trainable.targets) == (16, 2.0, "all")
    assert run_config.from_mapping({}, ["run.method=hetlora"]).trainable.rank == 32
    assert run_config.from_mapping({}, ["run.method=fedprox"]).training.proximal_weight == 0.01
    said = run_config.from_mapping({}, ["run.method=fedit", "delta.format=int8", "forgetting.max_kl=0.1"])
    assert (said.delta.format, said.forgetting.max_kl) == ("int8", 0.1)


@pytest.mark.parametrize("name", BASELINES)
def test_what_run_toml_says_of_a_method_reads_back(name: str, tmp_path: Path) -> None:
    config = run_config.from_mapping({}, [f"run.method={name}"])
    (tmp_path / "run.toml").write_text(run_config.to_toml(config))
    assert run_config.load(tmp_path / "run.toml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.method=fedsgd"], "run.method is 'fedsgd', expected one of fedbe, fedavg"),
        (["run.method=fedit", "trainable.rank=33"], r"\[trainable\].*rank is 33, expected at most 32, the smallest"),
        (["run.method=fedit", "trainable.rank=0"], "trainable.rank is 0, expected at least 1"),
        (["run.method=fedit", "trainable.targets=mlp"], "trainable.targets is 'mlp', expected one of all, qv"),
        (["run.method=fedit", "trainable.scaling=0"], "trainable.scaling is 0.0, expected a positive number"),
        (["run.method=topn", "trainable.top_layers=3"], "trainable.top_layers is 3, expected at most the 2 layers"),
        (
            ["run.method=flexlora", "delta.format=int8", "delta.density=0.25"],
            "delta.density is 0.25, expected 1: the pairs of the method flexlora are others in every round",
        ),
        (["training.proximal_weight=-1"], "training.proximal_weight is -1.0, expected 0 or more"),
    ],
)
def test_a_wrong_configuration_is_told_in_one_sentence(
    settings: list[str], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        init_run(model=inputs.model, out=tmp_path / "run", general=None, overrides=settings, anchor_sequences=4)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BASELINES)
def test_every_method_learns_on_the_starter_model(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train = tmp_path / "train.jsonl"
    colors = ("red", "green", "blue")
    rows = [
        {"prompt": f"color of item {i} is", "completion": colors[int(rng.integers(3)) if i % 9 == 0 else i % 3]}
        for i in range(120)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = Inputs(model=starter_folder(), train=train, general=None, anchor_sequences=8, anchor_tokens=16)
    groups = (
        Group(device="jetson-orin-nano-8gb", count=2, name="nano", examples=30),
        Group(device="jetson-agx-orin-64gb", count=1, name="agx", examples=30),
        Group(device="rtx-4070", count=1, name="pc", examples=30),
    )
    run = {"run.max_rounds": 3, "training.steps": 8, "training.learning_rate": 2e-3, "trainable.top_layers": 2}
    result = simulate(Fleet(groups=groups, method=name, run=run, seed=2), inputs, tmp_path / "out")
    assert result.finished
    losses = [row["loss"] for row in result.rounds]
    assert losses[-1] < 0.8 * losses[0], losses
