"""Growth on the client: the same bits at that moment (W1), and what becomes of its caches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import TextEncoder, load_site_data
from fedblocks.edge_client.evaluate import evaluate_examples
from fedblocks.edge_client.export import load_final
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.work import Workbench
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.messages import DataFormat, Delta, Evaluate, ResourceInfo, StateUpdate
from fedblocks.protocol.state import state_sha256

PROFILE = DeviceProfile(
    device="test", source="measured", accelerator="cpu", compute_dtype="float32", cpu_cores=1,
    memory_usable_bytes=1 << 34, runtime_memory_bytes=0, gemm_flops_per_s=1e11, memory_bytes_per_s=1e10,
    step_overhead_s=0.001, uplink_bytes_per_s=1e7, downlink_bytes_per_s=1e7, disk_read_bytes_per_s=1e9,
    disk_free_bytes=1 << 40, four_bit="ok",
)  # fmt: skip


@pytest.fixture
def make_bench(tmp_path, tiny_checkpoint):
    """A factory: a workbench of a run that may come to have three blocks; ``said`` takes its lines."""

    def make(*, active, placement="thirds", dtype="float32", family="llama"):
        folder = tiny_checkpoint(tmp_path, layers=6, family=family)
        checkpoint = Checkpoint.open(folder)
        store = ClientStore(tmp_path / "client")
        plan = plan_expansion(base_hash=base_hash(folder), config=checkpoint.config, placement=placement, num_blocks=3)
        files = {
            "plan.json": plan.to_json().encode(),
            "anchor.bin": sample_anchor(checkpoint, num_sequences=16, num_tokens=24, seed=1).to_bytes(),
        }
        for name, data in files.items():
            info = ResourceInfo(name=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            store.put_resource(info, data)
        rows = tmp_path / "train.jsonl"
        rows.write_text(
            "".join(json.dumps({"prompt": f"ab{i % 7}c", "completion": f"d{i % 5}"}) + "\n" for i in range(60))
        )
        encoder = TextEncoder(folder, DataFormat(max_tokens=32, append_eos=False, join=" "))
        said = []
        made = Workbench(
            checkpoint=checkpoint, store=store, data=load_site_data(rows, encoder), encoder=encoder, client="k" * 40,
            profile=replace(PROFILE, compute_dtype=dtype), memory_limit_bytes=0, emulation=None,
            active_blocks=active, say=said.append,
        )  # fmt: skip
        made.said = said
        return made

    return make


def trained(bench, blocks, seed=0):
    """Deltas of these blocks, as after some rounds."""
    rng = np.random.default_rng(seed)
    return {
        block: {
            spec.name: (0.05 * rng.standard_normal(spec.shape)).astype(np.float32)
            for spec in bench.plan.shape.block_tensors()
        }
        for block in blocks
    }


def logits(bench, ids):
    with torch.no_grad():
        h = bench.model.forward(ids)
        return bench.model.rows_logits(h.flatten(0, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "placement", "active"),
    [
        ("llama", "thirds", (0, 1)),
        ("llama", "thirds", (0,)),
        ("llama", "top", (0, 1)),
        ("qwen2", "thirds", (0, 1)),
        ("qwen3", "thirds", (0, 1)),
        ("mistral", "thirds", (0, 1)),
    ],
)
def test_logits_are_bit_equal_when_a_block_is_added(make_bench, placement, active, family, dtype):
    bench = make_bench(active=active, placement=placement, dtype=dtype, family=family)
    bench.state = trained(bench, active)
    bench.model.load_state(bench.state)
    ids = torch.randint(4, 100, (3, 12), generator=torch.Generator().manual_seed(1))
    before = logits(bench, ids)
    grown = tuple(sorted({*active, len(active)}))
    bench.use_blocks(grown)
    after = logits(bench, ids)
    assert bench.model.plan.block_ids == grown
    assert torch.equal(before, after)
    # It is there: with something learnt the model is another one.
    bench.model.load_state({**bench.state, **trained(bench, [len(active)], seed=1)})
    assert not torch.equal(before, logits(bench, ids))


def update_to(bench, state, version):
    return StateUpdate(
        encoding="none", from_version=version, to_version=version, state_sha256=state_sha256(bench.plan.shape, state)
    )


def run(bench, make_assignment, **fields):
    defaults = {
        "state": update_to(bench, {}, 0), "anchor_weight": 1.0, "measure": ("anchor", "validation"), "steps": 4,
    }  # fmt: skip
    return bench.train(make_assignment(**{**defaults, **fields}), b"", status=lambda _phase, _steps: None)


def test_a_task_with_another_set_of_blocks_rebuilds_the_model_and_its_caches(make_bench, make_assignment):
    bench = make_bench(active=(0, 1))
    first, _ = run(bench, make_assignment, active_blocks=(0, 1))
    cut, folder = bench.prefix.cut, bench.store.cache_folder / "prefix"
    caches = {path.name for path in folder.iterdir()}
    assert bench.teacher.anchors is not None
    made = len(bench.teacher._store)
    second, _ = run(bench, make_assignment, active_blocks=(0, 1, 2), blocks=(2,), measure=("anchor", "validation"))
    assert isinstance(second, Delta)
    assert bench.model.base_cut < cut
    assert bench.prefix.cut == bench.model.base_cut
    now = {path.name for path in folder.iterdir()}
    assert len(caches & now) == 1  # the teacher's records are kept: the teacher is the base
    assert next(iter(caches & now)).endswith(".teacher")
    assert len(bench.teacher._store) >= made
    # Nothing was trained in between: the published state measures as before.
    before = {m.measure: m for m in first.measurements}
    after = {m.measure: m for m in second.measurements}
    assert after["anchor"].kl_sum == pytest.approx(0.0, abs=1e-4)
    assert after["validation"].nll_sum == pytest.approx(before["validation"].nll_sum, rel=1e-5)
    assert any("the model has blocks [0, 1, 2] now" in line for line in bench.said)


def test_growth_upwards_keeps_what_is_cached(make_bench, make_assignment):
    bench = make_bench(active=(0,), placement="top")
    run(bench, make_assignment, active_blocks=(0,), blocks=(0,))
    before = {path.name for path in (bench.store.cache_folder / "prefix").iterdir()}
    run(bench, make_assignment, active_blocks=(0, 1), blocks=(1,))
    assert {path.name for path in (bench.store.cache_folder / "prefix").iterdir()} == before
    assert bench.prefix.computed == 0  # the same samples again, all from the cache


def test_an_evaluation_brings_its_blocks_too(make_bench):
    bench = make_bench(active=(0, 1))
    report = bench.evaluate(
        Evaluate(
            attempt_id="a", round=1, state=update_to(bench, {}, 0), payload_bytes=0, payload_sha256="",
            active_blocks=(0, 1, 2), measure=("validation",), deadline_s=60.0,
        ),
        b"",
    )  # fmt: skip
    assert bench.active == (0, 1, 2)
    expected = evaluate_examples(bench.model, bench.data.validation)
    assert report.measurements[0].num_tokens == expected.num_tokens


def test_blocks_that_the_plan_does_not_have_are_refused(make_bench):
    bench = make_bench(active=())
    assert bench.active == (0, 1, 2)
    with pytest.raises(RemoteProtocolError, match=r"blocks \[5\] are not in this run's plan \[0, 1, 2\]"):
        bench.use_blocks((0, 5))
    assert bench.active == (0, 1, 2)


def test_an_export_leaves_blocks_out_that_never_became_active(tmp_path, make_bench):
    from safetensors.numpy import save_file

    bench = make_bench(active=(0, 1))
    state = tmp_path / "run" / "state"
    state.mkdir(parents=True)
    (tmp_path / "run" / "plan.json").write_text(bench.plan.to_json())
    save_file({}, state / "final.safetensors")
    (state / "final.json").write_text(json.dumps({"active_blocks": [0, 1]}))
    assert load_final(tmp_path / "run")[0].block_ids == (0, 1)
    (state / "final.json").write_text("{}")  # of a release without growth
    assert load_final(tmp_path / "run")[0].block_ids == (0, 1, 2)
