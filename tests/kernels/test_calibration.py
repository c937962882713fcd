"""Tests of kernels/calibration.py: what is right and faster keeps its place, what is wrong is shut out."""

import json

import pytest
import torch

from fedblocks.kernels import calibration, ops
from fedblocks.kernels.calibration import Calibration, calibrate
from fedblocks.kernels.dispatch import OPERATIONS, Dispatcher, NotSupportedError

torch.set_num_threads(1)
CPU = torch.device("cpu")
TORCH_S = 2.0


class Rung:
    """Answers every launch with the reference, as fast and as wrongly as the test wants."""

    def __init__(self, lab, seconds, spoils=(), declines=(), missing=None):
        self.lab, self.seconds, self.spoils, self.declines, self.reason = lab, seconds, spoils, declines, missing

    def missing(self, device):
        return self.reason

    def run(self, op, args, kwargs):
        if op in self.declines:
            raise NotSupportedError("odd shape")
        self.lab.clock += self.seconds
        result = self.lab.references[op](*args, **kwargs)
        if op in self.spoils:  # the last element only, as a wrong mask would
            tensors = [t for t in calibration._tensors((result, args)) if t.is_floating_point()]
            tensors[0].view(-1)[-1] += 1000
        return result


class Lab:
    """A clock that only operations advance."""

    def __init__(self):
        self.clock = 0.0
        self.references = {name: operation.reference for name, operation in OPERATIONS.items()}

    def calibrate(self, budget_s=1e9, dtypes=(torch.bfloat16,), **rungs):
        return calibrate(
            CPU, rungs, dtypes=dtypes, numerics_class=1, budget_s=budget_s, now=lambda: self.clock, wait=lambda: None
        )


@pytest.fixture
def lab(monkeypatch):
    made = Lab()
    monkeypatch.setattr(calibration, "_rows", lambda size: 8 if size == "small" else 16)
    monkeypatch.setattr(calibration, "_logits", lambda d, t, s: torch.randn(8, 100).to(t))
    for name, operation in OPERATIONS.items():

        def reference(*args, name=name, **kwargs):
            made.clock += TORCH_S
            return made.references[name](*args, **kwargs)

        monkeypatch.setattr(operation, "reference", reference)
        monkeypatch.setattr(operation, "launch", lambda run, *args, name=name, **kwargs: run(name, args, kwargs))
    return made


def row(found, op, size="large"):
    (match,) = [r for r in found.rows if (r.op, r.size) == (op, size)]
    return match


def test_every_operation_is_measured_in_both_sizes(lab):
    found = lab.calibrate(triton=Rung(lab, 1.0))
    assert {(r.op, r.size) for r in found.rows} == {(op, size) for op in OPERATIONS for size in ("small", "large")}


def test_the_faster_rung_comes_first_and_one_slower_than_torch_not_at_all(lab):
    found = lab.calibrate(pack=Rung(lab, 1.5), triton=Rung(lab, 1.0))
    assert row(found, "swiglu").rungs == ("triton", "pack")
    assert row(found, "swiglu").seconds == {"torch": 2.0, "pack": 1.5, "triton": 1.0}
    found = lab.calibrate(pack=Rung(lab, 1.99), triton=Rung(lab, 1.0))
    assert row(found, "swiglu").rungs == ("triton",)


def test_a_rung_that_is_wrong_in_one_element_is_shut_out_with_its_error(lab):
    wrong = ("rope_", "adamw_", "nf4_dequant", "add_rms_norm")
    found = lab.calibrate(triton=Rung(lab, 1.0, spoils=wrong))
    for op in wrong:
        assert row(found, op).rungs == ()
        assert "wrong: its error against the reference is" in row(found, op).refused["triton"]
        assert "triton" not in row(found, op).seconds
    assert row(found, "swiglu").rungs == ("triton",)


def test_a_rung_that_declines_or_is_not_there_is_not_timed(lab):
    found = lab.calibrate(pack=Rung(lab, 1.0, missing="no pack"), triton=Rung(lab, 1.0, declines=("swiglu",)))
    assert row(found, "swiglu").refused == {"triton": "odd shape"}
    assert row(found, "rope_").rungs == ("triton",)
    assert lab.calibrate(pack=Rung(lab, 1.0, missing="no pack")).rows == ()


def test_the_budget_ends_it_and_what_was_not_measured_keeps_the_ladders_order(lab):
    found = lab.calibrate(budget_s=100.0, triton=Rung(lab, 5.0))
    assert 0 < len(found.rows) < 2 * len(OPERATIONS)
    dispatcher = Dispatcher({"triton": Rung(lab, 1.0)})
    found.apply(dispatcher)
    meta = torch.device("meta")
    assert dispatcher.rungs(found.rows[0].op, torch.empty(1 << 20, device=meta, dtype=torch.uint8)) == ()
    assert dispatcher.explain("delta_codes", "float32", "small", meta)[0] == "triton"


def test_choices_are_applied_under_the_dtype_by_which_calls_are_known(lab):
    found = lab.calibrate(triton=Rung(lab, 1.0))
    assert row(found, "nf4_dequant").dtype == "uint8"
    assert row(found, "adamw_").dtype == "bfloat16"
    assert row(found, "square_norm").dtype == "float32"
    dispatcher = Dispatcher({"triton": Rung(lab, 1.0)})
    found.apply(dispatcher)
    who, why = dispatcher.explain("nf4_linear", "bfloat16", "large", torch.device("meta"))
    assert (who, why) == ("triton", "calibrated")


def test_a_stored_calibration_is_read_back_and_rubbish_is_named(lab):
    found = lab.calibrate(triton=Rung(lab, 1.0))
    assert Calibration.from_plain(json.loads(json.dumps(found.to_plain()))) == found
    for rubbish in ({}, {"key": "a", "rows": [{"op": "swiglu"}]}, {"key": "a", "rows": 3}):
        with pytest.raises(ValueError, match="not a calibration of kernels"):
            Calibration.from_plain(rubbish)


def test_the_key_names_everything_that_a_time_depends_on():
    key = calibration.key_of(CPU, ops.NUMERICS_CLASS)
    assert torch.__version__ in key
    assert calibration.key_of(CPU, ops.NUMERICS_CLASS + 1) != key


def test_operations_on_a_cpu_are_explained_without_a_gpu():
    dispatcher = Dispatcher(ops.DISPATCHER.rungs_by_name)  # not the process's own, which other tests may have told
    assert dispatcher.explain("swiglu", "float32", "small", CPU) == ("torch", "on a CPU")
    who, why = dispatcher.explain("swiglu", "float32", "small", torch.device("cuda", 0))
    if not torch.cuda.is_available():
        assert who == "torch"
        assert "pack: " in why
        assert "triton: " in why
