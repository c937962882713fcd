"""The GPU benchmark on a CPU with tiny sizes: every part runs, says what it could not do, and times nothing wrong."""

from __future__ import annotations

import copy
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

import bench_gpu  # noqa: E402
import gpu_operations  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_timing  # noqa: E402
import runtime_document  # noqa: E402
from gpu_timing import Budget, Candidate, DeviceLostError, Timer, measure_peaks, spread  # noqa: E402
from rivals import Data  # noqa: E402

from fedblocks.kernels.dispatch import DISPATCHER, OPERATIONS  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
TINY = bench_gpu.shapes(["llama1b"], tiny=True)["llama1b"]
DATA = Data(sequences=2, tokens=16, batch_size=2, vocab=TINY.vocab)
CASES = gpu_operations.cases(TINY.shape, 32)


@pytest.fixture(scope="module", autouse=True)
def _choices_end_with_this_file():
    """The benchmark tells the process's dispatcher which kernels were wrong."""
    yield
    DISPATCHER.forget()


@pytest.fixture(scope="module")
def timer():
    return Timer(CPU)


@pytest.fixture(scope="module")
def peaks(timer):
    return measure_peaks(timer, Budget(0.05), size=128)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the one command leaves behind, of one model with one assignment."""
    out = tmp_path_factory.mktemp("gpu") / "gpu-cpu.json"
    bench_gpu.run(
        device=CPU,
        tiny=True,
        seconds=60.0,
        out=out,
        work=out.parent / "work",
        models=["llama1b"],
        parts=["operations", "steps"],
        assignments=["thirds2"],
    )
    return json.loads(out.read_text())


def wrong_rung(launch):
    """Writes nothing: what the outputs held before is the result."""


class WrongRung:
    def missing(self, device):
        return None

    def run(self, launch):
        wrong_rung(launch)


@pytest.fixture
def rung_in_place():
    """``rung_in_place(rung)``: instead of triton's, for one test."""
    before = DISPATCHER.rungs_by_name["triton"]
    yield lambda rung: DISPATCHER.add_rung("triton", rung)
    DISPATCHER.add_rung("triton", before)


def test_every_operation_is_there_with_every_rung(result):
    for op in [*OPERATIONS, "linear_cross_entropy"]:
        assert {row["backend"] for row in result["operations"] if row["op"] == op} >= {"pack", "triton", "torch"}, op
    assert all(row["status"] in {"ok", "missing"} for row in result["operations"]), "see the reasons"
    assert {row["status"] for row in result["operations"] if row["backend"] == "torch"} == {"ok"}


def test_what_is_missing_says_why(result):
    reasons = {row["backend"]: row["reason"] for row in result["operations"] if row["status"] == "missing"}
    assert "not on cpu" in reasons["pack"]
    assert "GPU" in reasons["triton"]
    if "liger" in reasons:
        assert "liger_kernel" in reasons["liger"]


def test_percentiles_are_ordered_and_every_sample_is_kept(result):
    timed = [row for row in result["operations"] if row["status"] == "ok"]
    assert len(timed) > len(OPERATIONS)
    for row in [*timed, *(row["step"] for row in result["steps"] if row["status"] == "ok")]:
        samples = row["samples_s"]
        assert len(samples) >= 2
        assert min(samples) <= row["p20_s"] <= row["median_s"] <= row["p80_s"] <= max(samples)
    for row in timed:
        rate = row["flops_per_s"] if row["flops"] else row["bytes_per_s"]
        assert rate == pytest.approx((row["flops"] or row["bytes"]) / row["median_s"])
        assert row["backend"] not in gpu_operations.RUNGS or row["error"] <= row["tolerance"]


def test_the_file_says_what_was_measured_on(result):
    assert result["device"]["type"] == "cpu"
    assert {"torch", "triton", "cuda", "liger_kernel"} <= result["versions"].keys()
    assert {"nvidia_smi", "nvpmodel"} == result["clocks_before"].keys() == result["clocks_after"].keys()
    assert result["peaks"]["copy"]["bytes_per_s"] > 0
    assert result["peaks"]["gemm_bf16"]["data"] == "random"
    assert result["graphs"] == "not built"
    assert {row["graphs"] for row in result["steps"]} == {"not built"}


def test_steps_of_all_systems_take_as_many_steps_on_the_same_tokens(result):
    rows = {(row["system"], row["labels"]): row for row in result["steps"]}
    for name in (*gpu_steps.OURS, *gpu_steps.SAME_BLOCKS, *gpu_steps.ADAPTERS):
        assert (name, 1.0) in rows
    done = [row for row in rows.values() if row["status"] == "ok"]
    assert {len(row["losses"]) for row in done} == {3}
    assert {row["tokens_per_step"] for row in done} == {32}
    for share in gpu_steps.LABELS:
        first = {row["system"]: row["losses"][0] for row in done if row["labels"] == share}
        assert {"ours", "same blocks", "qlora"} <= first.keys()
        assert max(first.values()) == pytest.approx(min(first.values()), rel=1e-2)
    missing = [row for row in rows.values() if row["status"] != "ok"]
    assert all("liger" in row["system"] and "liger" in row["reason"] for row in missing)


def test_ours_trains_alike_with_and_without_cache_and_nearly_as_transformers_does(result):
    ours = next(row for row in result["steps"] if row["system"] == "ours" and row["labels"] == 1.0)
    assert ours["against"]["ours, no cache"]["largest_loss_difference"] < 1e-3
    assert ours["against"]["same blocks"]["largest_loss_difference"] < 0.05
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["predicted_peak_bytes"] > 0
    assert ours["share_of_roofline"] > 0


def test_flops_are_those_of_the_specification():
    """runtime.md 1.1: Llama-3.2-1B, one block on top, sequences of 512: 3.40, 1.42 and, compacted, 0.58 GFLOP/token."""
    model = bench_gpu.MODELS["llama1b"]
    data = Data(sequences=4, tokens=512, batch_size=4, vocab=model.vocab)

    def per_token(system, labels):
        plan = gpu_steps.Plan(system=system, assignment="top1", labels=(labels,))
        return gpu_steps.flops_of(plan, model, data, labels) / 2048 / 1e9

    assert per_token("ours, no cache", 1.0) == pytest.approx(3.40, abs=0.01)
    assert per_token("ours", 1.0) == pytest.approx(1.42, abs=0.01)
    assert per_token("ours", 0.4) == pytest.approx(0.58, abs=0.01)
    assert per_token("same blocks", 0.4) == per_token("ours, no cache", 1.0)


def test_a_wrong_kernel_is_recorded_and_not_timed(timer, peaks, rung_in_place):
    rung_in_place(WrongRung())
    wrong = {}
    for case in gpu_operations.cases(TINY.shape, 32):
        rows = gpu_operations.measure_case(
            case, timer, peaks, Budget(0.01), shape="x", compile_with=None, why_not="not in this test"
        )
        found = {row["backend"]: row for row in rows}
        wrong[case.op] = found["triton"]
        assert found["torch"]["status"] == "ok", case.op
        assert "median_s" in found["torch"], case.op
    for op, row in wrong.items():
        assert row["status"] == "wrong", (op, row)
        assert "median_s" not in row, op
        assert "largest error" in row["reason"], op


def test_a_kernel_that_raises_is_recorded_and_the_others_are_timed(timer, peaks, rung_in_place, monkeypatch):
    rung_in_place(WrongRung())

    def fails(launch):
        raise RuntimeError("an illegal address\nwas met")

    monkeypatch.setitem(globals(), "wrong_rung", fails)
    case = next(case for case in gpu_operations.cases(TINY.shape, 32) if case.op == "swiglu")
    rows = gpu_operations.measure_case(
        case, timer, peaks, Budget(0.01), shape="x", compile_with=None, why_not="not in this test"
    )
    found = {row["backend"]: row for row in rows}
    assert found["triton"]["status"] == "error"
    assert found["triton"]["reason"] == "RuntimeError: an illegal address"
    assert found["torch"]["status"] == "ok"


def test_a_peer_that_raises_is_recorded_and_the_others_go_on(timer, peaks):
    def fails_when_made(args):
        raise ValueError("no such shape")

    def fails_later(args):
        calls = iter((None, None))  # the first call and the one before the first sample

        def run():
            if next(calls, 1) is not None:
                raise RuntimeError("out of something")

        return run

    case = next(case for case in gpu_operations.cases(TINY.shape, 32) if case.op == "swiglu")
    case = replace(case, peers={"made": fails_when_made, "later": fails_later})
    rows = gpu_operations.measure_case(case, timer, peaks, Budget(0.0), shape="x", compile_with=None, why_not="no")
    found = {row["backend"]: row for row in rows}
    assert (found["made"]["status"], found["made"]["reason"]) == ("error", "ValueError: no such shape")
    assert (found["later"]["status"], found["later"]["reason"]) == ("error", "RuntimeError: out of something")
    assert "median_s" not in found["later"]
    assert found["torch"]["status"] == "ok"


def test_a_system_that_cannot_be_built_or_breaks_off_has_rows_with_its_error(timer, peaks, tmp_path, monkeypatch):
    def no_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(gpu_steps, "Peer", no_memory)
    monkeypatch.setattr(gpu_steps, "plans", lambda _: gpu_steps._of("top1")[:3])
    monkeypatch.setattr(gpu_steps.OursOnDevice, "predicted_bytes", no_memory)
    rows = gpu_steps.measure_model(
        "x", TINY, timer, peaks, Budget(30), work=tmp_path, sizes=[DATA], assignments=["top1"], say=lambda _: None
    )
    found = {(row["system"], row["labels"]): row for row in rows}
    assert found["same blocks", 1.0]["reason"] == "OutOfMemoryError: tried to allocate 20 GiB"
    assert found["ours", 1.0]["status"] == "error"
    assert found["ours, no cache", 1.0]["status"] == "ok"
    assert not list(tmp_path.glob("prefix-*"))


def test_a_budget_that_is_spent_leaves_rows_that_say_so(timer, peaks, tmp_path):
    spent = Budget(0.0)
    rows = gpu_operations.measure_operations({"x": TINY.shape}, timer, peaks, spent, tokens=32, compile_with="eager")
    assert {row["op"] for row in rows} >= set(OPERATIONS)
    assert {row["status"] for row in rows} == {"skipped"}
    rows = gpu_steps.measure_model(
        "x", TINY, timer, peaks, spent, work=tmp_path, sizes=[DATA], assignments=["top1"], say=lambda _: None
    )
    assert {row["status"] for row in rows} == {"skipped"}


def test_candidates_are_measured_in_turn(timer):
    order = []
    runs = {name: Candidate(lambda name=name: order.append(name)) for name in "ab"}
    samples, errors = timer.interleaved(runs, seconds=0, at_least=3)
    assert order == ["a", "a", "b", "b"] * 3  # each once before its sample
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3}
    assert errors == {}


def test_the_spread_of_five_samples_is_the_second_the_middle_and_the_fourth():
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found["p20_s"], found["median_s"], found["p80_s"]) == (2.0, 3.0, 4.0)
    assert found["samples_s"] == [5.0, 1.0, 4.0, 2.0, 3.0]


def test_without_a_gpu_the_command_says_so_and_how_to_try_it(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert bench_gpu.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_the_page_says_that_nothing_was_measured_until_a_file_is_there(tmp_path, result):
    assert "make bench-gpu" in runtime_document.gpu(runtime_document._read_gpu(tmp_path))
    assert "Not yet measured" in runtime_document.gpu([])
    device = {**result["device"], "name": "NVIDIA Example 9", "capability": 87}
    made_up = copy.deepcopy({**result, "device": device, "date": "2030-01-02"})
    made_up["clocks_before"]["nvidia_smi"] = {"driver_version": "540.4.0"}
    made_up["operations"][0] |= {"status": "wrong", "reason": "largest error 1.0e+00, allowed 8.0e-03"}
    made_up["operations"][0].pop("median_s", None)
    (tmp_path / "gpu-nvidia-example-9-2030-01-02.json").write_text(json.dumps(made_up))
    (tmp_path / "gpu-nvidia-example-9-2029-01-02.json").write_text(json.dumps({**made_up, "date": "2029-01-02"}))
    text = runtime_document.gpu(runtime_document._read_gpu(tmp_path))
    assert "Not yet measured" not in text
    assert text.count("### NVIDIA Example 9") == 1
    assert "2030-01-02" in text
    assert "driver 540.4.0" in text
    assert "Wrong, so not timed" in text
    for op in OPERATIONS:
        assert f"| {op} |" in text
    assert "same blocks thirds2" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| nf4_dequant")}
    assert widths == {text[text.index("| operation |") :].splitlines()[0].count("|")}


def test_the_table_for_people_names_every_system_and_every_operation(result):
    text = bench_gpu.table(result)
    assert all(op in text for op in OPERATIONS)
    assert "CUDA graphs: not built" in text
    assert "qlora" in text


class Device:
    """Stands for a device that one backend ruins."""

    def __init__(self):
        self.fine = True

    def usable(self, device):
        return self.fine

    def ruin(self, *_args, **_kwargs):
        self.fine = False
        raise RuntimeError("an illegal memory access was encountered")


@pytest.fixture
def ruined(monkeypatch):
    made = Device()
    for module in (gpu_operations, gpu_steps):
        monkeypatch.setattr(module, "usable", made.usable)
    return made


def test_a_backend_that_ruins_the_device_ends_the_process_with_everything_kept(
    timer, peaks, rung_in_place, monkeypatch, ruined
):
    rung_in_place(WrongRung())
    monkeypatch.setitem(globals(), "wrong_rung", ruined.ruin)
    monkeypatch.setattr(gpu_operations, "cases", lambda shape, tokens: CASES[:3])
    with pytest.raises(DeviceLostError) as lost:
        gpu_operations.measure_operations({"x": TINY.shape}, timer, peaks, Budget(5), tokens=32, compile_with="eager")
    assert lost.value.culprit == (CASES[0].op, "triton")
    rows = lost.value.rows
    assert {row["op"] for row in rows} == {CASES[0].op}
    assert "unusable afterwards" in next(row["reason"] for row in rows if row["backend"] == "triton")
    assert not any("median_s" in row for row in rows)

    ruined.fine = True
    monkeypatch.setitem(globals(), "wrong_rung", lambda launch: None)
    rest = gpu_operations.measure_operations(
        {"x": TINY.shape}, timer, peaks, Budget(5), tokens=32, compile_with="eager", done=rows,
        lost={lost.value.culprit, (CASES[1].op, "triton")},
    )  # fmt: skip
    assert rest[: len(rows)] == rows
    assert [row["op"] for row in rest if row["backend"] == "torch"] == [case.op for case in CASES[1:3]]
    again = next(row for row in rest if (row["op"], row["backend"]) == (CASES[1].op, "triton"))
    assert again == again | {"status": "error", "reason": "left the device unusable before"}


def test_a_system_that_ruins_the_device_is_left_out_by_the_next_process(timer, peaks, tmp_path, monkeypatch, ruined):
    monkeypatch.setattr(gpu_steps, "plans", lambda _: gpu_steps._of("top1")[:3])
    monkeypatch.setattr(gpu_steps, "Peer", ruined.ruin)
    common = {"work": tmp_path, "sizes": [DATA], "assignments": ["top1"], "say": lambda _: None}
    with pytest.raises(DeviceLostError) as lost:
        gpu_steps.measure_model("x", TINY, timer, peaks, Budget(30), **common)
    assert lost.value.culprit == ("x", "same blocks top1")
    ruined.fine = True
    rows = gpu_steps.measure_model("x", TINY, timer, peaks, Budget(30), lost={"same blocks top1"}, **common)
    found = {(row["system"], row["labels"]): row["status"] for row in rows}
    assert found["ours", 1.0] == "ok"
    assert found["same blocks", 1.0] == "error"


def test_the_command_starts_itself_again_without_the_culprit(tmp_path, monkeypatch):
    calls = []

    def started(executable, command):
        calls.append(command)
        raise SystemExit(0)

    def measure(*_args, **_kwargs):
        row = {"op": "swiglu", "shape": "x", "form": "f", "backend": "pack", "status": "error", "reason": "lost"}
        raise DeviceLostError(("swiglu", "pack"), [row])

    monkeypatch.setattr(bench_gpu.os, "execv", started)
    monkeypatch.setattr(bench_gpu, "measure_operations", measure)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit):
        bench_gpu.main(["--device", "cpu", "--tiny", "--out", str(out), "--parts", "operations"])
    assert calls[0][2:8] == ["--device", "cpu", "--tiny", "--out", str(out), "--parts"]
    assert "--resume" in calls[0]
    assert json.loads(out.read_text())["lost"] == [{"in": "swiglu", "backend": "pack"}]

    seen = {}
    monkeypatch.setattr(bench_gpu, "measure_operations", lambda *_a, **kwargs: seen.update(kwargs) or kwargs["done"])
    assert bench_gpu.main(calls[0][2:]) == 0
    assert seen["lost"] == {("swiglu", "pack")}
    assert [row["backend"] for row in seen["done"]] == ["pack"]


def test_what_computes_wrongly_does_not_serve_the_steps(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(bench_gpu.DISPATCHER, "choose", lambda *args: chosen.append(args))
    rows = [
        {"op": "swiglu", "backend": "pack", "status": "wrong"},
        {"op": "rope_", "backend": "liger", "status": "error"},
    ]
    assert bench_gpu._choose_kernels(rows, CPU, tmp_path) is None
    assert {(op, rungs) for op, _, _, rungs in chosen} == {("swiglu", ("triton",))}


def test_a_sample_on_a_gpu_is_the_time_between_two_events_after_the_cache_was_emptied(monkeypatch):
    order = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, other):
            return 2.5

    class Flush:
        def zero_(self):
            order.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = Timer(CPU)
    timer._flush = Flush()
    assert timer.sample(lambda: order.append("run")) == 2.5e-3
    assert order == ["flush", "record", "run", "record", "synchronize"]


def test_clocks_and_power_mode_are_read_where_their_tools_are(tmp_path, monkeypatch):
    values = ", ".join(f"value {i}" for i in range(len(gpu_timing.QUERIES)))
    for name, answer in (("nvidia-smi", values), ("nvpmodel", "NV Power Mode: 15W")):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\necho '{answer}'\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpu_timing.clocks()
    assert found["nvidia_smi"]["driver_version"] == "value 0"
    assert found["nvpmodel"] == "NV Power Mode: 15W"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Field \"pstate\" is not a valid field to query.'\n")
    assert "not a valid field" in gpu_timing.clocks()["nvidia_smi"]
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\ncase "$1" in *reasons*) echo no; exit 2;; esac\necho ' + values[:-10]
    )
    assert gpu_timing.clocks()["nvidia_smi"]["pstate"] == "value 1"


def test_names_of_devices_make_names_of_files():
    assert gpu_timing.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
    assert gpu_timing.slug("Orin (nvgpu)") == "orin-nvgpu"
