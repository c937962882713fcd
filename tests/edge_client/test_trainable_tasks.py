"""Does a client carry out tasks over pairs and base tensors, within what the cost model predicts, and if allowed?"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import TextEncoder, load_site_data
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.work import BaseTrainingRefusedError, DoesNotFitError, Workbench
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.units import unit_tensors
from fedblocks.protocol import run_config
from fedblocks.protocol.messages import DataFormat, Delta, Report, ResourceInfo, StateUpdate
from fedblocks.protocol.method_plan import plan_of
from fedblocks.protocol.state import state_sha256
from fedblocks.protocol.tensors import decode_tensor, delta_layout

PROFILE = DeviceProfile(
    device="test", source="measured", accelerator="cpu", compute_dtype="float32", cpu_cores=1,
    memory_usable_bytes=1 << 34, runtime_memory_bytes=0, gemm_flops_per_s=1e11, memory_bytes_per_s=1e10,
    step_overhead_s=0.001, uplink_bytes_per_s=1e7, downlink_bytes_per_s=1e7, disk_read_bytes_per_s=1e9,
    disk_free_bytes=1 << 40, four_bit="ok",
)  # fmt: skip


def open_bench(folder: Path, tiny_checkpoint: Any, method: str, *overrides: str, **more: Any) -> Workbench:
    """A client's workbench in a run of this method, all of whose files lie in ``folder``."""
    sizes = more.pop("sizes", {"layers": 4})
    checkpoint = Checkpoint.open(tiny_checkpoint(folder, **sizes))
    store = ClientStore(folder / "client")
    config = run_config.from_mapping({}, [f"run.method={method}", *overrides])
    plan = plan_of(config, base_hash=base_hash(checkpoint.folder), model_config=checkpoint.config)
    files = {
        "plan.json": plan.to_json().encode(),
        "anchor.bin": sample_anchor(checkpoint, num_sequences=16, num_tokens=24, seed=1).to_bytes(),
    }
    for name, data in files.items():
        info = ResourceInfo(name=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        store.put_resource(info, data)
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"ab{i % 7}c", "completion": f"d{i % 5}"}) + "\n" for i in range(60)))
    encoder = TextEncoder(checkpoint.folder, DataFormat(max_tokens=32, append_eos=False, join=" "))
    fields = {"profile": PROFILE, "memory_limit_bytes": 0, "emulation": None, "allow_base_training": True, **more}
    return Workbench(
        checkpoint=checkpoint,
        store=store,
        data=load_site_data(rows, encoder),
        encoder=encoder,
        client="k" * 40,
        say=lambda _line: None,
        **fields,
    )


@pytest.fixture
def bench(tmp_path: Path, tiny_checkpoint: Any) -> Any:
    return lambda method, *overrides, **more: open_bench(tmp_path / method, tiny_checkpoint, method, *overrides, **more)


def run(made: Workbench, make_assignment: Any, **fields: Any) -> tuple[Delta, bytes]:
    units = made.plan.units.published()
    state = StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256=state_sha256(units, {}))
    defaults = {"state": state, "anchor_weight": 1.0, "measure": ("anchor",), "steps": 4, "delta_format": "fp32"}
    task = make_assignment(**{**defaults, "blocks": made.plan.unit_ids, **fields})
    found = made.train(task, b"", status=lambda _phase, _steps: None)
    assert not isinstance(found, Report), found
    return found


def decoded(made: Workbench, delta: Delta, body: bytes) -> dict[tuple[int, str], np.ndarray]:
    layout = delta_layout(
        delta.tensors,
        shape=made.plan.units,
        blocks=made.plan.unit_ids,
        format=delta.format,
        density=delta.density,
        width=delta.width,
    )
    return {
        (slot.block, slot.spec.name): decode_tensor(
            slot.spec, slot.rows_sent, slot.of(memoryview(body)), format=delta.format, density=delta.density
        )
        for slot in layout.slots
    }


@pytest.mark.parametrize("method", ["fedit", "flora", "fedavg", "topn"])
def test_a_task_ends_in_an_update_of_its_units_and_the_anchor_starts_at_zero(
    method: str, bench: Any, make_assignment: Any
) -> None:
    made = bench(method)
    delta, body = run(made, make_assignment)
    found = decoded(made, delta, body)
    assert len(found) == sum(len(unit_tensors(made.plan.units, unit)) for unit in made.plan.unit_ids)
    assert all(np.isfinite(values).all() for values in found.values())
    assert np.mean([values.any() for values in found.values()]) > 0.9
    [measured] = delta.measurements
    assert abs(measured.kl_sum) < 1e-4
    assert len(delta.train.gradient_energy) == len(made.plan.unit_ids)
    again, body_again = run(made, make_assignment)  # the published state was brought back
    assert (again.payload_sha256, body_again) == (delta.payload_sha256, body)


def test_a_narrow_width_of_pairs_makes_a_smaller_update(bench: Any, make_assignment: Any) -> None:
    made = bench("hetlora", least_width=0.125)
    whole, _ = run(made, make_assignment)
    narrow, body = run(made, make_assignment, width=0.25)
    assert narrow.width == 0.25
    assert 3.9 < whole.payload_bytes / narrow.payload_bytes < 4.1
    assert decoded(made, narrow, body)[0, "mlp.up_proj.lora_A"].shape[0] == 8


def test_a_share_of_the_rows_is_chosen_by_their_energy_and_the_same_when_the_round_is_trained_again(
    bench: Any, make_assignment: Any
) -> None:
    made = bench("fedhft", "trainable.rank=8", least_width=0.25)
    whole, _ = run(made, make_assignment, round=3)
    delta, body = run(made, make_assignment, round=3, width=0.25)
    assert run(made, make_assignment, round=3, width=0.25)[1] == body
    assert 1.4 < whole.payload_bytes / delta.payload_bytes < 1.6
    of_q, of_v = (decoded(made, delta, body)[1, f"self_attn.{name}.lora_B"] for name in ("q_proj", "v_proj"))
    assert [values.any(axis=1).sum() for values in (of_q, of_v)] == [len(of_q) // 4, len(of_v) // 4]
    scores = made._row_scores._before(4)[1]["self_attn.q_proj.lora_B"]
    chosen = of_q.any(axis=1)
    assert set(np.argsort(-scores)[: int(0.9 * chosen.sum())]) <= set(np.flatnonzero(chosen))
    later, later_body = run(made, make_assignment, round=4, width=0.25)
    other = decoded(made, later, later_body)[1, "self_attn.q_proj.lora_B"].any(axis=1)
    assert 0 < (other & ~chosen).sum() < chosen.sum()  # most by score, the rest drawn anew


def test_the_proximal_term_keeps_a_task_nearer_to_its_start(bench: Any, make_assignment: Any) -> None:
    made = bench("fedit")

    def length(weight: float) -> float:
        fields = {"proximal_weight": weight, "anchor_weight": 0.0, "steps": 8, "learning_rate": 1e-2}
        delta, body = run(made, make_assignment, **fields)
        return float(np.sqrt(sum((values**2).sum() for values in decoded(made, delta, body).values())))

    assert length(30.0) < 0.7 * length(0.0)


@pytest.mark.parametrize(("method", "owes"), [("fedit", True), ("flora", False), ("fedhft", False)])
def test_what_an_int8_update_leaves_out_waits_only_where_the_pairs_go_on(
    method: str, owes: bool, bench: Any, make_assignment: Any
) -> None:
    made = bench(method)
    delta, _ = run(made, make_assignment, delta_format="int8", delta_density=1.0)
    made.residuals.commit(delta.attempt_id)
    assert bool(made.residuals.load(made.plan.unit_ids, round=1)) == owes


@pytest.mark.parametrize("method", ["fedavg", "topn", "flora"])
def test_the_bases_weights_change_only_where_the_site_allows_it(method: str, bench: Any) -> None:
    with pytest.raises(BaseTrainingRefusedError, match=r"allow_base_training = true in the section \[limits\]") as e:
        bench(method, allow_base_training=False)
    assert e.value.exit_code == 5


def test_pairs_need_no_permission(bench: Any) -> None:
    assert bench("fedit", allow_base_training=False).plan.unit_ids == (0, 1, 2, 3)


def test_a_device_that_cannot_hold_all_of_it_is_refused_with_the_numbers(bench: Any) -> None:
    with pytest.raises(DoesNotFitError, match=r"low-rank pairs of rank 16 over every projection, one .* at least"):
        bench("fedit", memory_limit_bytes=1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedit", "hetlora", "flora", "topn", "fedavg", "fedhft"])
def test_the_measured_peak_is_what_was_predicted(method: str, tmp_path: Path) -> None:
    """In a process of its own: what another test has left in memory would count."""
    ran = subprocess.run([sys.executable, __file__, method, str(tmp_path)], capture_output=True, text=True, check=True)
    for line in ran.stdout.splitlines():
        predicted, measured = map(int, line.split())
        assert 0.6 * predicted < measured < 1.1 * predicted, ran.stdout


def _by_path(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main(method: str, folder: Path) -> None:
    """Predicted and measured peak of three tasks on a base large enough to show in memory."""
    here = Path(__file__).parent
    write = _by_path("shared", here.parent / "conftest.py").write_tiny_checkpoint
    make_assignment = inspect.unwrap(_by_path("own", here / "conftest.py").make_assignment)()
    sizes = {"layers": 6, "hidden": 256, "intermediate": 704, "heads": 8, "vocab": 2048, "dtype": "bfloat16"}
    made = open_bench(folder, write, method, sizes=sizes)
    last = {"width": 0.25} if method == "fedhft" else {"proximal_weight": 0.1}
    for fields in ({"anchor_weight": 0.0}, {"anchor_weight": 1.0}, {"anchor_weight": 0.0, **last}):
        delta = run(made, make_assignment, **fields)[0]
        print(delta.train.predicted_peak_bytes, delta.train.peak_memory_bytes)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
