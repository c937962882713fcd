"""Tests of edge_client/kernel_choice.py: what a site may demand, what is kept, and what is said."""

import json

import pytest
import torch

from fedblocks.edge_client import kernel_choice
from fedblocks.edge_client.kernel_choice import CALIBRATION_FILE, choices, choose_kernels, describe_kernels
from fedblocks.kernels import calibration
from fedblocks.kernels.dispatch import OPERATIONS, Dispatcher
from fedblocks.kernels.ops import NUMERICS_CLASS
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.site_file import KernelsSettings

META = torch.device("meta")  # stands for a GPU


class Rung:
    def __init__(self, reason=None):
        self.reason = reason

    def missing(self, device):
        return self.reason

    def run(self, launch):
        raise AssertionError("nothing is launched here")


@pytest.fixture
def ladder(monkeypatch):
    """A dispatcher of two rungs, and a calibration that takes no time and chooses triton for rope."""
    made = Dispatcher({"pack": Rung("no pack for sm_999"), "triton": Rung()})
    calls = []

    def calibrate(device, rungs, **_):
        calls.append(device)
        row = calibration.Row(
            op="rope_",
            dtype="bfloat16",
            size="large",
            rungs=("triton",),
            seconds={"torch": 2e-5, "triton": 1e-5},
            refused={"pack": "wrong: its error against the reference is 1.0e+00, expected 0.03"},
        )
        return calibration.Calibration(key=calibration.key_of(device, NUMERICS_CLASS), rows=(row,))

    monkeypatch.setattr(kernel_choice, "DISPATCHER", made)
    monkeypatch.setattr(calibration, "calibrate", calibrate)
    made.calls = calls
    return made


def test_a_calibration_is_made_once_kept_and_applied(ladder, tmp_path):
    said = []
    first = choose_kernels(tmp_path, KernelsSettings(), META, say=said.append)
    again = choose_kernels(tmp_path, KernelsSettings(), META, say=said.append)
    assert first == again
    assert len(ladder.calls) == 1
    assert ladder.explain("rope_", "bfloat16", "large", META) == ("triton", "calibrated")
    assert any("rope_ (bfloat16, large): pack is shut out: wrong" in line for line in said)
    choose_kernels(tmp_path, KernelsSettings(), META, say=said.append, again=True)
    assert len(ladder.calls) == 2


def test_a_calibration_of_other_software_or_a_spoilt_file_is_made_anew_and_said(ladder, tmp_path):
    said = []
    choose_kernels(tmp_path, KernelsSettings(), META, say=said.append)
    path = tmp_path / CALIBRATION_FILE
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "key": "another device"}))
    choose_kernels(tmp_path, KernelsSettings(), META, say=said.append)
    path.write_text('{"rows": 3}')
    choose_kernels(tmp_path, KernelsSettings(), META, say=said.append)
    path.write_text("not json")
    choose_kernels(tmp_path, KernelsSettings(), META, say=said.append)
    assert len(ladder.calls) == 4
    assert sum("is of another device; calibrating again" in line for line in said) == 1
    assert sum("cannot be used" in line for line in said) == 2


def test_on_a_cpu_nothing_is_measured_or_written(ladder, tmp_path):
    assert choose_kernels(tmp_path, KernelsSettings(), torch.device("cpu"), say=print) is None
    assert ladder.calls == []
    assert list(tmp_path.iterdir()) == []


def test_what_a_site_demands_is_checked_before_anything_trains(ladder, tmp_path):
    with pytest.raises(ConfigError, match=r"demands pack, which cannot serve here: no pack for sm_999"):
        choose_kernels(tmp_path, KernelsSettings(backend="pack"), META, say=print)
    with pytest.raises(ConfigError, match="names 'ropes', expected one of"):
        choose_kernels(tmp_path, KernelsSettings(overrides="ropes=torch"), META, say=print)
    choose_kernels(tmp_path, KernelsSettings(backend="triton", overrides="rope_ = torch"), META, say=print)
    assert ladder.explain("rope_", "bfloat16", "large", META) == ("torch", "demanded by [kernels]")
    assert ladder.explain("swiglu", "bfloat16", "large", META) == ("triton", "demanded by [kernels]")
    for wrong in ("rope_", "rope_=cuda", "=torch"):
        with pytest.raises(ConfigError, match="expected OPERATION=BACKEND"):
            KernelsSettings(overrides=wrong)


def test_every_operation_is_listed_in_both_sizes_with_its_reason(ladder, tmp_path):
    found = choose_kernels(tmp_path, KernelsSettings(), META, say=print)
    listed = choices(META, found)
    assert [(c.op, c.size) for c in listed] == [(op, size) for op in calibration.CASES for size in ("small", "large")]
    assert set(calibration.CASES) == set(OPERATIONS)
    (rope,) = [c for c in listed if (c.op, c.size) == ("rope_", "large")]
    assert (rope.rung, rope.seconds) == ("triton", {"torch": 2e-5, "triton": 1e-5})
    (swiglu,) = [c for c in listed if (c.op, c.size) == ("swiglu", "small")]
    assert (swiglu.rung, swiglu.why) == ("triton", "pack: no pack for sm_999; the ladder's order")


def test_the_report_of_a_machine_without_a_gpu_says_so_for_every_rung(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    report = describe_kernels(tmp_path, KernelsSettings(), again=False, say=print)
    assert report.rungs == {"pack": "no GPU that torch can use", "triton": report.rungs["triton"], "torch": "ready"}
    assert report.rungs["triton"] != "ready"
    assert set(report.packs) == {80, 86, 87, 89, 90, 120}
    lines = report.text().splitlines()
    assert len([line for line in lines if line.split()[:1] and line.split()[0] in OPERATIONS]) == len(OPERATIONS)
    json.dumps(report.to_plain())
