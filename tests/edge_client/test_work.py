"""Tests of edge_client/work.py: one task from payload to update, in the memory that there is."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from fedblocks.edge_client import work
from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import TextEncoder, load_site_data
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.work import DoesNotFitError, Workbench
from fedblocks.profiles.cost import NoFit
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.messages import DataFormat, Delta, Report, ResourceInfo, StateUpdate
from fedblocks.protocol.site_file import CacheSettings
from fedblocks.protocol.state import state_sha256
from fedblocks.protocol.tensors import cut, decode_tensor, delta_layout

MIB = 1 << 20
PROFILE = DeviceProfile(
    device="test", source="measured", accelerator="cpu", compute_dtype="float32", cpu_cores=1,
    memory_usable_bytes=1 << 34, runtime_memory_bytes=0, gemm_flops_per_s=1e11, memory_bytes_per_s=1e10,
    step_overhead_s=0.001, uplink_bytes_per_s=1e7, downlink_bytes_per_s=1e7, disk_read_bytes_per_s=1e9,
    disk_free_bytes=1 << 40, four_bit="ok",
)  # fmt: skip


@pytest.fixture
def site(tmp_path, tiny_checkpoint):
    """A base, a run's files in a client's folder, and data: what ``bench()`` needs."""
    folder = tiny_checkpoint(tmp_path, layers=6)
    checkpoint = Checkpoint.open(folder)
    store = ClientStore(tmp_path / "client")
    plan = plan_expansion(base_hash=base_hash(folder), config=checkpoint.config, placement="thirds", num_blocks=2)
    files = {
        "plan.json": plan.to_json() if isinstance(plan.to_json(), bytes) else plan.to_json().encode(),
        "anchor.bin": sample_anchor(checkpoint, num_sequences=16, num_tokens=24, seed=1).to_bytes(),
    }
    for name, data in files.items():
        info = ResourceInfo(name=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        store.put_resource(info, data)
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"ab{i % 7}c", "completion": f"d{i % 5}"}) + "\n" for i in range(60)))
    encoder = TextEncoder(folder, DataFormat(max_tokens=32, append_eos=False, join=" "))
    return checkpoint, store, load_site_data(rows, encoder), encoder


@pytest.fixture
def bench(site):
    said = []
    checkpoint, store, data, encoder = site

    def make(**kwargs):
        fields = {"profile": PROFILE, "memory_limit_bytes": 0, "emulation": None, "say": said.append, **kwargs}
        made = Workbench(checkpoint=checkpoint, store=store, data=data, encoder=encoder, client="k" * 40, **fields)
        made.said = said
        return made

    return make


def at_version_0(shape):
    return StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256=state_sha256(shape, {}))


def run(bench, make_assignment, **fields):
    defaults = {"state": at_version_0(bench.plan.shape), "anchor_weight": 1.0, "measure": ("anchor",), "steps": 4}
    return bench.train(make_assignment(**{**defaults, **fields}), b"", status=lambda _phase, _steps: None)


def test_a_device_that_fits_nothing_is_refused_with_code_5_and_the_numbers(bench):
    with pytest.raises(
        DoesNotFitError, match=r"cannot take part: .* takes at least [\d.]+ MiB .* budget is 1\.0 MiB"
    ) as e:
        bench(memory_limit_bytes=MIB)
    assert e.value.exit_code == 5


def test_an_assignment_that_does_not_fit_is_answered_before_anything_is_allocated(bench, make_assignment, monkeypatch):
    made = bench()
    monkeypatch.setattr(made.model, "train_blocks", lambda *_: pytest.fail("allocated"))
    report = run(made, make_assignment, memory_budget_bytes=MIB)
    assert isinstance(report, Report)
    assert report.failure == "over_memory_budget"
    assert "takes at least" in report.text
    assert "the budget is 1.0 MiB" in report.text


def test_the_mode_is_said_once_and_the_update_reports_predicted_and_measured_peak(bench, make_assignment):
    made = bench()
    for _ in range(2):
        delta, body = run(made, make_assignment)
        assert isinstance(delta, Delta)
        assert len(body) == delta.payload_bytes
        assert delta.train.predicted_peak_bytes > 0
        assert f"trains {delta.train.mode.text()}; " in "\n".join(made.said)
    assert sum(line.startswith("trains ") for line in made.said) == 1
    assert sum("read by our own decoder" in line for line in made.said) == 1


def test_the_state_is_measured_at_every_strength_that_is_asked_for(bench):
    made = bench()
    random = np.random.default_rng(0)
    made.state = {
        block: {
            spec.name: 0.3 * random.standard_normal(spec.shape).astype(np.float32)
            for spec in made.plan.shape.block_tensors()
        }
        for block in made.plan.block_ids
    }
    made.model.load_state(made.state)
    wanted = ("anchor", "validation")
    found = made.measure(wanted, seed=1, strengths=(0.0, 0.5, 1.0))
    assert [(m.strength, m.measure) for m in found] == [(g, measure) for g in (0.0, 0.5, 1.0) for measure in wanted]
    anchors = {m.strength: m for m in found if m.measure == "anchor"}
    assert abs(anchors[0.0].kl_sum) < 1e-4
    assert 0 < anchors[0.5].kl_sum < anchors[1.0].kl_sum
    for m in anchors.values():
        assert m.num_items == len(made.teacher.anchors.kl_val_indices)
        assert m.kl_square_sum >= m.kl_sum**2 / m.num_items - 1e-6
    assert made.model.strength == 1.0
    assert made.measure(("validation",), seed=1) == tuple(m for m in found[-1:])


def test_the_leanest_exact_mode_gives_the_same_update(bench, make_assignment, monkeypatch):
    """Recomputing, decoding again and what is held change nothing but memory and time."""
    made = bench()
    task = {"delta_format": "fp32", "delta_density": 1.0}
    _, usual = run(made, make_assignment, **task)
    chosen = made._choose((0, 1), made._workload_of(make_assignment()), 0)
    mode = replace(chosen.mode, frozen="nf4", checkpoint=True, residency="resident")
    monkeypatch.setattr(made, "_choose", lambda *_: replace(chosen, mode=mode))
    _, lean = run(made, make_assignment, **task)
    assert lean == usual
    assert any("recomputed activations" in line for line in made.said)


TASK = """
import dataclasses, json, sys
from pathlib import Path
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.data import TextEncoder, load_site_data
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.work import Workbench
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.messages import Assignment, DataFormat, Delta, StateUpdate

folder, client, rows, profile, task, recompute = sys.argv[1:]
encoder = TextEncoder(Path(folder), DataFormat(max_tokens=32, append_eos=False, join=" "))
bench = Workbench(
    checkpoint=Checkpoint.open(Path(folder)), store=ClientStore(Path(client)),
    data=load_site_data(Path(rows), encoder), encoder=encoder, client="k" * 40,
    profile=DeviceProfile(**json.loads(profile)), memory_limit_bytes=0, emulation=None, say=lambda _: None,
)
fields = json.loads(task)
fields |= {"state": StateUpdate(**fields["state"]), "blocks": tuple(fields["blocks"]), "measure": ("anchor",)}
if recompute == "recompute":
    choose = bench._choose
    def forced(*arguments):
        found = choose(*arguments)
        return dataclasses.replace(found, mode=dataclasses.replace(found.mode, checkpoint=True))
    bench._choose = forced
before = set(sys.modules)
done, _ = bench.train(Assignment(**fields), b"", status=lambda *_: None)
assert isinstance(done, Delta), done
print(json.dumps({"late": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}))
"""


@pytest.mark.parametrize("recompute", ["keep", "recompute"])
def test_a_task_imports_nothing_and_a_session_never_transformers(site, bench, make_assignment, tmp_path, recompute):
    """What a task imports would count as its memory; transformers takes 130 MiB and seconds for nothing it needs."""
    made = bench()  # leaves the 4-bit files: a later session has nothing to quantise
    task = asdict(make_assignment(state=at_version_0(made.plan.shape), anchor_weight=1.0))
    arguments = (site[0].folder, tmp_path / "client", tmp_path / "train.jsonl", json.dumps(asdict(PROFILE)))
    done = subprocess.run(
        [sys.executable, "-c", TASK, *map(str, arguments), json.dumps(task), recompute], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["late"] == []
    assert not {"transformers", "bitsandbytes", "sympy", "torch._dynamo"} & set(found["all"])


def test_a_state_that_was_taken_is_read_from_the_disk_and_is_the_same(bench, make_assignment, random_state):
    from fedblocks.protocol.state import make_update, publish

    made = bench()
    rng = np.random.default_rng(0)
    change = {
        b: {t.name: (0.01 * rng.standard_normal(t.shape)).astype(np.float32) for t in made.plan.shape.block_tensors()}
        for b in made.plan.block_ids
    }
    publication = publish({}, change, {}, shape=made.plan.shape, format="int8", density=1.0)
    sha256 = state_sha256(made.plan.shape, publication.published)
    update, payload = make_update(
        lambda _v: publication.step, shape=made.plan.shape, from_version=0, to_version=1,
        published=publication.published, sha256=sha256,
    )  # fmt: skip
    made.take_state(update, payload)
    assert made.held_version == 1
    assert not isinstance(made.state[0], dict)  # nothing of it is held in memory
    assert state_sha256(made.plan.shape, made.state) == sha256
    reopened = bench()
    assert reopened.held_version == 1
    assert state_sha256(made.plan.shape, reopened.state) == sha256


def test_the_cache_is_where_the_site_wants_it(bench, make_assignment):
    made = bench(cache=CacheSettings(location="ram"))
    run(made, make_assignment)
    folder = made.store.cache_folder / "prefix"
    assert not folder.exists() or not any(folder.rglob("shard-*"))
    other = bench()
    run(other, make_assignment)
    assert any(folder.rglob("shard-*"))
    other.prefix._store.close()  # as the end of its process would
    third = bench()
    run(third, make_assignment)
    assert third.prefix.computed == 0  # a restart finds what was there


def test_bf16_arithmetic_trains_split_values(bench, make_assignment):
    made = bench(profile=replace(PROFILE, compute_dtype="bfloat16"))
    delta, _ = run(made, make_assignment)
    assert delta.train.loss_last < delta.train.loss_first * 1.05
    assert any("bfloat16" in line for line in made.said)


def values_of(made, delta, body):
    """Block id -> tensor name -> what the update says, in the shapes that were sent."""
    layout = delta_layout(
        delta.tensors, shape=made.plan.shape, blocks=(0, 1), format=delta.format, density=delta.density,
        width=delta.width,
    )  # fmt: skip
    assert layout.total_bytes == len(body) == delta.payload_bytes
    found = {0: {}, 1: {}}
    for slot in layout.slots:
        sent = decode_tensor(
            slot.spec, slot.rows_sent, slot.of(memoryview(body)), format=delta.format, density=delta.density
        )
        found[slot.block][slot.spec.name] = sent.reshape(slot.spec.shape)
    return found


@pytest.mark.parametrize("width", [0.125, 0.25, 0.5])
def test_a_slim_task_ends_in_an_update_of_its_slices(bench, make_assignment, width):
    made = bench()
    whole, whole_body = run(made, make_assignment)
    delta, body = run(made, make_assignment, width=width)

    assert (whole.width, delta.width) == (1.0, width)
    assert len(body) < len(whole_body)
    assert delta.train.loss_last < delta.train.loss_first
    assert len(delta.train.gradient_energy) == 2
    assert all(energy > 0 for energy in delta.train.gradient_energy)
    for tensors in values_of(made, delta, body).values():
        assert {n: v.shape for n, v in tensors.items()} == {
            s.name: s.shape for s in made.plan.shape.block_tensors(width)
        }
        assert all(v.any() for v in tensors.values())


def test_tasks_of_changing_widths_lose_nothing_of_what_was_not_sent(bench, make_assignment, monkeypatch):
    """D2 over real tasks from one state, without an aggregator: updates and residual add up to all changes."""
    made, changed = bench(), {}
    encode = work.encode_delta

    def seen(shape, blocks, deltas, residuals, **options):
        changed.setdefault("deltas", []).append({b: {n: deltas[b][n].copy() for n in deltas[b]} for b in blocks})
        return encode(shape, blocks, deltas, residuals, **{**options, "cap": math.inf})

    monkeypatch.setattr(work, "encode_delta", seen)
    specs = made.plan.shape.block_tensors()
    total = {b: {s.name: np.zeros(s.shape) for s in specs} for b in (0, 1)}
    for number, width in enumerate((1.0, 0.25, 0.5, 0.125, 0.5)):
        delta, body = run(made, make_assignment, width=width, attempt_id=f"a{number}", seed=number)
        if number == 2:
            made.residuals.discard(f"a{number}")
            changed["deltas"].pop()
            continue
        made.residuals.commit(f"a{number}")
        for block, tensors in values_of(made, delta, body).items():
            for name, sent in tensors.items():
                cut(total[block][name], sent.shape)[...] += sent
    owed = made.residuals.load((0, 1), round=1)
    for block in (0, 1):
        for spec in specs:
            expected = np.zeros(spec.shape)
            for deltas in changed["deltas"]:
                values = deltas[block][spec.name]
                cut(expected, values.shape)[...] += values
            np.testing.assert_allclose(total[block][spec.name] + owed[block][spec.name], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_leanest_exact_mode_gives_the_same_update_of_slim_blocks(bench, make_assignment, monkeypatch, dtype):
    made = bench(profile=replace(PROFILE, compute_dtype=dtype))
    task = {"delta_format": "fp32", "delta_density": 1.0, "width": 0.25}
    _, usual = run(made, make_assignment, **task)
    chosen = made._choose((0, 1), made._workload_of(make_assignment()), 0, 0.25)
    mode = replace(chosen.mode, frozen="nf4", checkpoint=True, residency="resident")
    monkeypatch.setattr(made, "_choose", lambda *_: replace(chosen, mode=mode))
    _, lean = run(made, make_assignment, **task)
    assert lean == usual


def test_a_device_too_small_for_a_whole_block_takes_part_where_the_run_asks_for_less(bench, make_assignment):
    made = bench(memory_limit_bytes=0)
    one = made._workload(batch_size=1, micro_batch_size=1, steps=1, anchor_batch_size=1, anchor_every=1)
    peaks = [made._choose((1,), one, MIB << 20, width).memory.peak for width in (0.125, 1.0)]
    assert peaks[0] < peaks[1]
    least = min(
        limit for limit in range(peaks[0] // 2, 2 * peaks[1], MIB // 16)
        if not isinstance(made._choose((1,), one, limit, 0.125), NoFit)
    )  # fmt: skip
    assert isinstance(made._choose((1,), one, least, 1.0), NoFit)
    with pytest.raises(DoesNotFitError, match=r"training block 1 alone"):
        bench(memory_limit_bytes=least)
    bench(memory_limit_bytes=least, least_width=0.125)
    with pytest.raises(DoesNotFitError, match=r"training 0\.125 of block 1 alone"):
        bench(memory_limit_bytes=MIB, least_width=0.125)
