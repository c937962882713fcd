"""Does a client train on a GPU what it trains on a CPU? Loss curves, caches, optimizer modes, memory, files.

Every test runs on both: in the ordinary suite the "device" is the CPU with the fused form of the blocks, held against
the plain form; in ``make test-gpu`` it is the GPU with whatever rung serves it, held against the CPU.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedblocks.edge_client.anchor import AnchorSet, Teacher
from fedblocks.edge_client.backbone import Backbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.expanded_model import ExpandedModel
from fedblocks.edge_client.export import export_hf
from fedblocks.edge_client.memory import PeakMemory, give_back_freed_memory, return_large_blocks
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, cut_key
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.train import Hyper, data_order, run_steps, stack_losses, task_batch, train
from fedblocks.profiles.cost import ExecutionMode, StackLayout, Workload, peak_memory
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.messages import Assignment, AttemptId, StateUpdate
from fedblocks.protocol.tensors import encode_delta

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_ATOL = {"fp32": 1e-3, "bf16": 0.05}
"""Nats, of a loss curve that begins at 7 and ends near 0, between devices: a GPU rounds in another order."""
CHANGE_RTOL = {"fp32": 0.1, "bf16": 0.2}
"""Of all trained change, as a norm: AdamW turns the sign of a gradient near zero into a whole step."""
MIB = 1 << 20


def curve(model, samples, *, optimizer="fp32", prefix=None, steps=20, width=1.0):
    """(loss of each step, trained fp32 values) of both blocks."""
    prefix = prefix or PrefixStates(model, None)
    groups = model.train_blocks(model.plan.block_ids, optimizer, width)
    order = data_order(len(samples), 4, seed=5)
    windows = [next(order) for _ in range(steps)]
    result = run_steps(
        groups=groups,
        losses=stack_losses(model, prefix.cut),
        task=([task_batch([samples[i] for i in w], prefix.padded([samples[i].ids for i in w]))] for w in windows),
        anchor=(),
        hyper=Hyper(steps=steps, learning_rate=3e-3, warmup_steps=2),
        optimizer_mode=optimizer,
        now=time.monotonic,
        status=lambda _phase, _steps: None,
    )
    return result.task_loss, {f"{g.name} {n}": v for g in groups for n, v in g.values().items()}


def change(values, start):
    """All trained change; a key's bias is left out: softmax cancels it, so its gradient is rounding alone."""
    names = sorted(name for name in values if not name.endswith("k_proj.bias"))
    return np.concatenate([(values[name] - start[name]).ravel() for name in names])


def start_values(model, width=1.0):
    groups = model.train_blocks(model.plan.block_ids, width=width)
    return {f"{g.name} {n}": v for g in groups for n, v in g.values().items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.gpu) for family in ("qwen2", "qwen3"))]
)
def test_twenty_steps_have_the_loss_curve_of_the_cpu(device, make_model, samples, family, dtype):
    plain = make_model(CPU, dtype=DTYPES[dtype], fused=False, family=family)
    start = start_values(plain)
    expected, values = curve(plain, samples)
    found, got = curve(make_model(device, dtype=DTYPES[dtype], family=family), samples)
    assert found == pytest.approx(expected, abs=LOSS_ATOL[dtype])
    assert found[-1] < 0.9 * found[0]
    ours, theirs = change(got, start), change(values, start)
    assert np.linalg.norm(ours - theirs) <= CHANGE_RTOL[dtype] * np.linalg.norm(theirs)


@pytest.mark.parametrize(("dtype", "optimizer"), [("fp32", "fp32"), ("bf16", "split"), ("bf16", "split_8bit")])
def test_twenty_steps_on_slim_blocks_have_the_loss_curve_of_the_cpu(device, make_model, samples, dtype, optimizer):
    plain = make_model(CPU, dtype=DTYPES[dtype], fused=False)
    start = start_values(plain, 0.25)
    expected, values = curve(plain, samples, optimizer=optimizer, width=0.25)
    found, got = curve(make_model(device, dtype=DTYPES[dtype]), samples, optimizer=optimizer, width=0.25)
    assert found == pytest.approx(expected, abs=LOSS_ATOL[dtype])
    assert found[-1] < 0.9 * found[0]
    ours, theirs = change(got, start), change(values, start)
    assert np.linalg.norm(ours - theirs) <= CHANGE_RTOL[dtype] * np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_states_train_as_states_that_are_computed_each_time(device, make_model, samples, tmp_path, dtype):
    model = make_model(device, dtype=DTYPES[dtype])
    uncached, _ = curve(model, samples)
    model.load_state({})
    prefix = PrefixStates(model, RecordStore(tmp_path / "prefix", warn=print))
    prefix.fill(sample.ids for sample in samples)
    computed = prefix.computed
    cached, _ = curve(model, samples, prefix=prefix)
    assert prefix.computed == computed == len(samples)  # every state came from the store
    assert cached == pytest.approx(uncached, abs=LOSS_ATOL[dtype])


def test_states_written_on_the_device_are_found_and_trained_on_by_a_cpu(device, make_model, samples, tmp_path):
    """A key names base, layers, cut, dtypes and numerics, not the device: both name one store."""
    there, here = make_model(device), make_model(CPU, fused=False)
    keys = {cut_key(model, model.plan.base_hash, cut=model.base_cut) for model in (there, here)}
    assert len(keys) == 1
    writer = PrefixStates(there, RecordStore(tmp_path / "prefix", warn=print))
    writer.fill(sample.ids for sample in samples)
    writer._store.close()
    reader = PrefixStates(here, RecordStore(tmp_path / "prefix", warn=print))
    ids = [sample.ids for sample in samples]
    states = reader.padded(ids)
    assert (reader.read, reader.computed) == (len(samples), 0)
    assert states.device == CPU
    torch.testing.assert_close(states, PrefixStates(here, None).padded(ids), rtol=1e-4, atol=1e-4)
    expected, _ = curve(here, samples)
    here.load_state({})
    assert curve(here, samples, prefix=reader)[0] == pytest.approx(expected, abs=LOSS_ATOL["fp32"])


@pytest.mark.parametrize("optimizer", ["split", "split_8bit"])
def test_split_weights_train_as_on_the_cpu_and_as_fp32_ones(device, make_model, samples, optimizer):
    expected, _ = curve(make_model(CPU, dtype=torch.bfloat16, fused=False), samples, optimizer=optimizer)
    model = make_model(device, dtype=torch.bfloat16)
    found, values = curve(model, samples, optimizer=optimizer)
    assert found == pytest.approx(expected, abs=LOSS_ATOL["bf16"])
    model.load_state({})
    exact, fp32 = curve(model, samples)
    start = start_values(make_model(CPU))
    assert found == pytest.approx(exact, abs=2 * LOSS_ATOL["bf16"])
    ours, theirs = change(values, start), change(fp32, start)
    assert ours @ theirs > 0.9 * np.linalg.norm(ours) * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "how", [{"frozen": "nf4"}, {"residency": "resident"}, {"recompute": True}], ids=["nf4", "resident", "recomputed"]
)
def test_what_is_held_on_the_device_changes_no_loss(device, make_model, samples, how):
    model = make_model(device)
    expected, _ = curve(model, samples, steps=8)
    other = make_model(device)
    other.hold(residency=how.get("residency", "suffix"), frozen=how.get("frozen", "decoded"))
    other.recompute = how.get("recompute", False)
    assert curve(other, samples, steps=8)[0] == pytest.approx(expected, rel=1e-5)


def an_assignment(**changes):
    fields = {
        "attempt_id": AttemptId("a"),
        "round": 0,
        "state": StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256=""),
        "payload_bytes": 0,
        "payload_sha256": "",
        "blocks": (0, 1),
        "steps": 8,
        "batch_size": 4,
        "anchor_batch_size": 2,
        "anchor_every": 2,
        "anchor_weight": 0.2,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_eps": 1e-8,
        "optimizer_mode": "fp32",
        "micro_batch_size": 2,
        "checkpoint_activations": False,
        "delta_format": "int8",
        "delta_density": 0.5,
        "seed": 3,
        "deadline_s": 100.0,
        "memory_budget_bytes": 0,
        "predicted_peak_bytes": 0,
        "predicted_seconds": 0.0,
        "measure": (),
    }
    return Assignment(**{**fields, **changes})


def carried_out(model, task, samples, folder):
    """A whole assignment with anchor texts, cache and the round's own cut."""
    prefix = PrefixStates(model, RecordStore(folder, warn=print))
    rng = np.random.default_rng(9)
    anchors = AnchorSet(sequences=tuple(rng.integers(4, 128, 10).astype(np.int32) for _ in range(8)), seed=9)
    return train(
        model=model,
        task=task,
        data=samples,
        teacher=Teacher(anchors=anchors, model=model, prefix=prefix, store=None),
        prefix=prefix,
        round_cache_bytes=1 << 20,
        now=time.monotonic,
        status=lambda _phase, _steps: None,
    )


@pytest.mark.parametrize("blocks", [(0, 1), (1,)])
def test_a_whole_assignment_gives_the_update_of_the_cpu(device, make_model, samples, tmp_path, blocks):
    task = an_assignment(blocks=blocks)
    plain = make_model(CPU, fused=False)
    expected = carried_out(plain, task, samples, tmp_path / "cpu")
    model = make_model(device)
    found = carried_out(model, task, samples, tmp_path / "device")
    assert found.loss_first == pytest.approx(expected.loss_first, rel=1e-4)
    assert found.loss_last == pytest.approx(expected.loss_last, rel=1e-3)
    assert found.anchor_kl == pytest.approx(expected.anchor_kl, rel=0.02, abs=1e-6)
    assert found.gradient_energy == pytest.approx(expected.gradient_energy, rel=0.02)
    for block in blocks:
        for name in expected.deltas[block]:
            ours, theirs = (result.deltas[block][name].ravel() for result in (found, expected))
            assert np.linalg.norm(ours - theirs) <= 0.05 * np.linalg.norm(theirs) + 1e-6, name
    encoded = encode_delta(
        model.shape, blocks, {b: dict(found.deltas[b]) for b in blocks}, {}, format="int8", density=0.5
    )
    assert sum(map(len, encoded.parts)) > 0


def test_the_export_of_what_was_trained_on_the_device_loads_and_says_the_same(device, make_model, samples, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make_model(device)
    task = an_assignment(anchor_weight=0.0, anchor_every=1)
    result = carried_out(model, task, samples, tmp_path / "prefix")
    state = {block: {n: np.array(v) for n, v in tensors.items()} for block, tensors in result.deltas.items()}
    summary = export_hf(
        checkpoint=model.checkpoint, plan=model.plan, state=state, strength=1.0, out=tmp_path / "export"
    )
    assert summary.max_abs_logit_difference_at_zero == 0.0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(summary.path).eval()
    assert loaded.config.num_hidden_layers == model.num_positions
    ids = torch.from_numpy(samples[0].ids.astype(np.int64)).unsqueeze(0)
    dense = ExpandedModel(
        backbone=_dense(model.checkpoint, device), checkpoint=model.checkpoint, plan=model.plan, state=state
    )
    with torch.no_grad():
        ours = dense.rows_logits(dense.forward(ids.to(device))[0])
        theirs = loaded(ids).logits[0]
    torch.testing.assert_close(ours.cpu(), theirs.float(), rtol=1e-3, atol=2e-3)


def _dense(checkpoint, device):
    from fedblocks.edge_client.backbone import DenseBackbone

    return DenseBackbone(checkpoint, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_predicted_peak_is_near_the_measured_one(device, tiny_checkpoint, tmp_path, dtype):
    """Within a tenth or 32 MiB (runtime.md 11); on a GPU what torch's allocator gave out, on a CPU anonymous memory.

    On a CPU, in a process that has computed before, the libraries hold workspaces already that are part of the
    prediction: 32 MiB more. ``make bench-memory`` measures in fresh processes.
    """
    checkpoint = Checkpoint.open(
        tiny_checkpoint(
            tmp_path, layers=4, hidden=512, intermediate=1536, heads=8, kv_heads=4, vocab=16384, dtype="bfloat16"
        )
    )
    plan = plan_expansion(base_hash="0" * 64, config=checkpoint.config, placement="thirds", num_blocks=2)
    tokens, batch_size, steps = 256, 4, 2
    rng = np.random.default_rng(0)
    mask = np.arange(tokens) >= tokens // 2
    data = [
        TokenisedSample(ids=rng.integers(4, 16384, tokens).astype(np.int32), label_mask=mask)
        for _ in range(batch_size * steps)
    ]
    optimizer = "fp32" if dtype == "fp32" else "split"
    mode = ExecutionMode(optimizer=optimizer, micro_batch_size=batch_size)
    work = Workload(
        batch_size=batch_size,
        micro_batch_size=batch_size,
        mean_tokens=tokens,
        max_tokens=tokens,
        label_share=0.5,
        steps=steps,
        dtype_bytes=DTYPES[dtype].itemsize,
    )
    layout = StackLayout(num_entries=len(plan.stack()), positions={b: plan.position(b) for b in plan.block_ids})
    predicted = peak_memory(checkpoint.shape, layout, plan.block_ids, work, mode, accelerator=device.type).peak
    Backbone.open(checkpoint, tmp_path / "nf4", base_hash="0" * 64)
    if device.type == "cpu":
        return_large_blocks()
    give_back_freed_memory()
    with PeakMemory(device=device) as memory:
        backbone = Backbone.open(checkpoint, tmp_path / "nf4", base_hash="0" * 64, device=device)
        model = ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=plan, dtype=DTYPES[dtype])
        model.hold(residency=mode.residency, frozen=mode.frozen)
        train(
            model=model,
            task=an_assignment(
                blocks=plan.block_ids, steps=steps, batch_size=batch_size, anchor_weight=0.0, anchor_every=1
            ),
            mode=mode,
            data=data,
            teacher=None,
            prefix=PrefixStates(model, RecordStore(tmp_path / "prefix", warn=print)),
            now=time.monotonic,
            status=lambda _phase, _steps: None,
        )
    print(f"{device.type} {dtype}: predicted {predicted / MIB:.1f} MiB, measured {memory.peak_bytes / MIB:.1f} MiB")
    assert abs(predicted - memory.peak_bytes) <= max(
        0.1 * memory.peak_bytes, (64 if device.type == "cpu" else 32) * MIB
    )


def test_every_tensor_that_trains_lies_on_the_device(device, make_model):
    model = make_model(device, dtype=torch.bfloat16)
    groups = model.train_blocks(model.plan.block_ids, "split")
    assert {t.device.type for group in groups for t in (*group.tensors, *group.lows)} == {device.type}
    assert model.head.device.type == device.type
    assert model.forward(torch.zeros(1, 4, dtype=torch.int64)).device.type == device.type


def test_a_gpu_that_a_pack_was_built_for_is_served_by_it(device):
    """On a CPU torch serves everything; on a GPU of the packs' list the first rung asked is the pack."""
    from fedblocks.kernels.catalog import TARGETS
    from fedblocks.kernels.ops import DISPATCHER

    x = torch.randn(64, 512, device=device, dtype=torch.bfloat16)
    rungs = [name for name, _ in DISPATCHER.rungs("swiglu", x)]
    if device.type == "cpu":
        assert rungs == []
        return
    major, minor = torch.cuda.get_device_capability(device)
    folder = Path(__file__).parents[2] / "kernels" / "packs"
    if 10 * major + minor in TARGETS and (folder / f"sm_{major}{minor}.pack").is_file():
        assert rungs[0] == "pack"
    else:
        pytest.skip(f"no pack was built for capability {major}.{minor}")
