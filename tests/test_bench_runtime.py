"""The speed and memory benchmark: its models, its systems' losses, its figures, its results file."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_7b  # noqa: E402
import bench_runtime  # noqa: E402
from bench_runtime import CASES, MEMORY_CASE, Case, Measured, merge_results, quick, run_case, run_memory  # noqa: E402
from random_models import MODELS, RandomModel, write_random_model  # noqa: E402
from rivals import RIVALS, Assigned, Data, Ours, Rival, Series  # noqa: E402

from fedblocks.edge_client.checkpoint import Checkpoint  # noqa: E402
from fedblocks.profiles.cost import ExecutionMode  # noqa: E402

torch.set_num_threads(1)
TINY = RandomModel(family="llama", layers=3, hidden=64, intermediate=128, heads=2, kv_heads=1, head_dim=32, vocab=512)
TOP = Assigned(placement="top", num_blocks=1)
DATA = Data(sequences=4, tokens=16, batch_size=2, vocab=TINY.vocab)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("random") / "tiny", TINY)


def losses(system, label_share: float = 0.4, loss: str = "stock", steps: int = 2) -> list[float]:
    found: list[float] = []
    system.fill()
    wanted = Series(steps=steps, label_share=label_share, loss=loss)
    system.series(wanted, itertools.cycle(range(DATA.num_batches)), found.append)
    system.close()
    return found


def ours(folder: Path, work: Path, **changes) -> Ours:
    return Ours(folder, work, **({"data": DATA, "dtype": "fp32", "assigned": TOP} | changes))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("m15", 15e6), ("m135", 134.5e6), ("qwen05", 494e6), ("llama1b", 1.236e9), ("qwen7b", 7.616e9)],
)
def test_the_random_models_have_the_sizes_of_their_names(name, parameters):
    assert MODELS[name].shape.total_parameters == pytest.approx(parameters, rel=0.04 if name == "m15" else 1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_random_model_is_a_whole_checkpoint_of_its_class(tmp_path, family, tied):
    from transformers import AutoModelForCausalLM

    model = replace(TINY, family=family, tied=tied)
    path = write_random_model(tmp_path / "model", model)
    assert Checkpoint.open(path).shape == model.shape
    loaded, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.num_parameters() == model.shape.total_parameters
    assert path.joinpath("model.safetensors.index.json").exists()


def test_a_model_whose_writing_was_broken_off_is_written_again_and_a_whole_one_is_not(tmp_path):
    path = write_random_model(tmp_path / "model", TINY)
    shard = path / "model-00002-of-00004.safetensors"
    before = shard.stat().st_mtime_ns
    write_random_model(path, TINY)
    assert shard.stat().st_mtime_ns == before
    (path / "config.json").unlink()
    shard.write_bytes(b"torn")
    write_random_model(path, TINY)
    Checkpoint.open(path)


def test_labels_are_the_last_tokens_and_batches_repeat_themselves():
    first, again = DATA.batch(1, 0.4), DATA.batch(1, 0.4)
    assert [s.ids.tolist() for s in first] == [s.ids.tolist() for s in again]
    assert first[0].label_mask.tolist() == [False] * 10 + [True] * 6
    assert DATA.batch(1, 1.0)[0].label_mask.tolist() == [False] + [True] * 15
    assert DATA.batch(0, 0.4)[0].ids.tolist() != first[0].ids.tolist()


def test_ours_starts_with_the_loss_of_qlora_and_full_with_that_of_lora(folder, tmp_path):
    first = {kind: losses(Rival(folder, kind=kind, data=DATA, dtype="fp32"), steps=1)[0] for kind in RIVALS}
    first["ours"] = losses(ours(folder, tmp_path), steps=1)[0]
    assert first["ours"] == pytest.approx(first["qlora"], rel=1e-5)
    assert first["full"] == pytest.approx(first["lora"], rel=1e-5)
    assert abs(first["ours"] - first["full"]) > 1e-4  # 4-bit and unquantised bases differ


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("label_share", [0.4, 1.0])
def test_the_label_only_loss_trains_a_rival_as_its_own_loss_does(folder, kind, label_share):
    torch.manual_seed(1)
    stock = losses(Rival(folder, kind=kind, data=DATA, dtype="fp32"), label_share, steps=4)
    torch.manual_seed(1)
    label_only = losses(Rival(folder, kind=kind, data=DATA, dtype="fp32"), label_share, "label_only", steps=4)
    assert label_only == pytest.approx(stock, rel=1e-4)
    assert stock[2] < stock[0]  # the same batch again


def test_ours_trains_alike_with_both_caches_with_one_and_with_none(folder, tmp_path):
    thirds = Assigned(placement="thirds", num_blocks=2, highest=1)
    both, none, one = (
        losses(ours(folder, tmp_path, assigned=thirds, **changes), steps=6)
        for changes in ({}, {"cached": False}, {"round_cut": False})
    )
    assert both == pytest.approx(none, rel=1e-6)
    assert both == pytest.approx(one, rel=1e-6)
    assert both[4] < both[0]
    assert not list(tmp_path.glob("prefix-*"))


def test_micro_batches_change_no_loss(folder, tmp_path):
    whole = losses(ours(folder, tmp_path), steps=4)
    assert losses(ours(folder, tmp_path, mode=ExecutionMode(micro_batch_size=1)), steps=4) == pytest.approx(
        whole, rel=1e-5
    )


def test_only_the_highest_blocks_train_where_it_is_asked_for(folder):
    config = Checkpoint.open(folder).config
    for highest, expected in ((0, (0, 1)), (1, (1,)), (2, (0, 1))):
        assigned = Assigned(placement="thirds", num_blocks=2, highest=highest)
        assert assigned.trained(assigned.plan(config, "0" * 64)) == expected


def part(cpu_s: float) -> dict[str, float]:
    return {"cpu_s": cpu_s, "wall_s": 2 * cpu_s, "loss": 1.0}


def measured(step: float, fill: float = 0.0) -> Measured:
    """Three repeats; the first pass is dearer, the last repeat much dearer."""
    return Measured(
        fill=[part(fill)] * 3,
        begin=[part(0.5)] * 3,
        steps=[[part(step * many + 1), part(step * many), part(step * many)] for many in (1, 1, 9)],
    )


def test_steady_steps_leave_the_first_pass_out_and_the_median_an_outlier():
    row = measured(2.0, fill=1.0).row()
    assert row["step_cpu_s"] == 2.0
    assert row["passes_cpu_s"] == 1.0 + 0.5 + 3.0 + 2.0 + 2.0
    assert row["passes_wall_s"] == 2 * row["passes_cpu_s"]
    assert row["prefix_cpu_s"] == 1.0
    assert row["step_cpu_s_range"] == [2.0, 18.0]


@pytest.mark.parametrize(
    ("case", "assignment"), [(CASES[name], assignment) for name in CASES for assignment in CASES[name].assignments]
)
@pytest.mark.parametrize("label_share", [0.4, 1.0])
def test_every_ratio_has_its_ceiling_and_no_ceiling_contradicts_another(case, assignment, label_share):
    systems = [*case.rivals, *(f"{kind}_label_only" for kind in case.rivals), "no_cache"]
    found = bench_runtime._ratios(
        case, assignment, label_share, {"ours": measured(1.0), **{system: measured(5.0) for system in systems}}
    )
    for system in systems:
        assert found[f"speedup_vs_{system}_steady"] == 5.0
        assert found[f"wall_speedup_vs_{system}_steady"] == 5.0
        assert found[f"speedup_vs_{system}_3_passes"] == pytest.approx(16.5 / 4.5)
        assert found[f"ceiling_vs_{system}_steady"] > found[f"ceiling_vs_{system}_3_passes"] > 0
    assert found["ceiling_vs_qlora_steady"] >= found["ceiling_vs_qlora_label_only_steady"] > 1
    assert found["ceiling_vs_no_cache_steady"] > 1
    if "full" in case.rivals:
        assert found["ceiling_vs_full_steady"] > found["ceiling_vs_lora_steady"] == found["ceiling_vs_qlora_steady"]


def test_the_required_conditions_are_measured():
    assert {"top2", "thirds2", "thirds2_highest"} <= set(CASES["m135"].assignments)
    assert CASES["m135"].rivals == RIVALS
    assert (MEMORY_CASE.batch_size * MEMORY_CASE.tokens, list(MEMORY_CASE.assignments)) == (512, ["top1"])
    assert (quick(CASES["m135"]).batch_size, quick(CASES["m135"]).steps_per_pass) == (1, 1)


def test_merging_replaces_what_was_measured_again_and_nothing_else(tmp_path):
    path = tmp_path / "runtime.json"
    merge_results(path, "c", {"a": {"x": 1, "y": 1}, "b": {"x": 1}}, [{"entry": "a", "v": 1}, {"entry": "b", "v": 1}])
    merge_results(path, "c", {"a": {"x": 2}, "memory_model": {"m": 0.1}}, [{"entry": "a", "v": 2}])
    found = json.loads(path.read_text())
    assert (found["a"], found["b"], found["memory_model"]) == ({"x": 2, "y": 1}, {"x": 1}, {"m": 0.1})
    assert sorted((row["entry"], row["v"]) for row in found["rows"]) == [("a", 2), ("b", 1)]
    assert found["command"] == "c"


def test_7b_is_skipped_with_a_message_where_the_disk_is_too_full(tmp_path, monkeypatch, capsys):
    usage = bench_7b.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bench_7b.shutil, "disk_usage", lambda _: usage._replace(free=bench_7b.NEEDED_BYTES - 1))
    bench_7b.main(["--work", str(tmp_path), "--out", str(tmp_path / "out.json")])
    assert "skipped" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", ["split", "split_8bit"])
def test_bf16_trains_with_split_weights_near_the_loss_of_fp32(folder, tmp_path, optimizer):
    exact = losses(ours(folder, tmp_path), steps=4)
    mode = ExecutionMode(optimizer=optimizer, micro_batch_size=2)
    assert losses(ours(folder, tmp_path, dtype="bf16", mode=mode), steps=4) == pytest.approx(exact, rel=2e-2)


@pytest.mark.slow
def test_a_whole_run_over_processes_gives_the_documented_keys(tmp_path):
    case = Case(model=TINY, assignments={"top1": TOP}, batch_size=2, tokens=16, rivals=("lora", "qlora"))
    entries, rows = run_case("tiny", case, ["top1"], dtype="fp32", repeats=1, threads=1, work=tmp_path)
    assert set(entries) == {"tiny_top1", "tiny_top1_all_labels"}
    for name, entry in entries.items():
        label_only = ("lora_label_only", "qlora_label_only") if name == "tiny_top1" else ()
        for system in ("qlora", "lora", "no_cache", *label_only):
            for kind in ("steady", "3_passes"):
                assert entry[f"speedup_vs_{system}_{kind}"] > 0
                assert entry[f"ceiling_vs_{system}_{kind}"] > 0
        assert set(entry["phases"]) == {
            "prefix_decode_share",
            "prefix_attention_share",
            "step_head_share",
            "step_attention_share",
        }
        assert all(0 < share < 1 for share in entry["phases"].values())
        assert {"torch", "peft", "bitsandbytes"} <= set(entry["versions"])
    assert {row["system"] for row in rows if row["entry"] == "tiny_top1"} == {
        "ours",
        "no_cache",
        "lora",
        "qlora",
        "lora_label_only",
        "qlora_label_only",
    }
    start = {row["system"]: row["start_loss"] for row in rows if "start_loss" in row}
    assert start["ours"] == pytest.approx(start["qlora"], rel=1e-5)
    assert start["ours"] == pytest.approx(start["no_cache"], rel=1e-6)


@pytest.mark.slow
def test_memory_is_measured_for_both_modes_of_ours_and_for_qlora(tmp_path):
    case = Case(model=TINY, assignments={"top1": TOP}, batch_size=1, tokens=16)
    found = run_memory(case, "tiny", threads=1, work=tmp_path)
    for key in ("peak_anon_bytes", "peak_anon_bytes_8bit", "peak_anon_bytes_qlora", "peak_anon_ratio_vs_qlora"):
        assert found[key] > 0
    assert found["peak_anon_bytes"] == bench_runtime.highest(found["memory"]["parts"]["ours"])


@pytest.mark.slow
def test_a_small_7b_run_says_how_small_it_was(tmp_path):
    model = replace(TINY, family="qwen2", tied=False)
    found = bench_7b.run(model, steps=2, optimizer="split", threads=1, work=tmp_path)
    assert found["layers"] == model.layers
    assert found["peak_anon_bytes"] > 0
    assert found["prefix_cpu_s_per_token"] > 0
    assert found["suffix_wall_s_per_token"] > 0
