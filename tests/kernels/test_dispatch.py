"""Tests of kernels/dispatch.py: the ladder of rungs, what is said when one is passed over, and what may be demanded."""

import pytest
import torch

from fedblocks.kernels import dispatch, launches
from fedblocks.kernels.dispatch import BackendError, Dispatcher, KernelSettings, NotSupportedError, Operation
from fedblocks.kernels.reference import pointwise

ACCELERATOR = torch.device("meta")  # stands for a GPU: any device that is not a CPU


class FakeRung:
    """Runs nothing; remembers what it was asked for."""

    def __init__(self, missing=None, declines=None):
        self._missing, self._declines = missing, declines
        self.launched = []

    def missing(self, device):
        return self._missing

    def run(self, launch):
        if self._declines:
            raise NotSupportedError(self._declines)
        self.launched.append(launch.kernel)


@pytest.fixture
def ladder(monkeypatch):
    """A dispatcher with the given rungs in the place of the process's, and the operation ``swiglu`` on it."""

    def make(**rungs):
        made = Dispatcher(rungs)
        made.events = []
        made.listener = made.events.append
        monkeypatch.setattr(dispatch, "DISPATCHER", made)
        monkeypatch.setattr(dispatch, "OPERATIONS", dict(dispatch.OPERATIONS))
        return made, Operation("swiglu", launches.swiglu, pointwise.swiglu)

    return make


def on_accelerator():
    return torch.empty(2, 8, device=ACCELERATOR)


def test_a_pack_is_asked_before_triton_and_triton_before_torch(ladder):
    pack, triton = FakeRung(), FakeRung()
    made, swiglu = ladder(pack=pack, triton=triton)
    swiglu(on_accelerator())
    assert (pack.launched, triton.launched, made.events) == (["swiglu"], [], [])


def test_a_rung_that_declines_a_call_is_passed_over_with_one_event_that_is_counted(ladder):
    pack, triton = FakeRung(declines="a pointer is not aligned"), FakeRung()
    made, swiglu = ladder(pack=pack, triton=triton)
    for _ in range(3):
        swiglu(on_accelerator())
    assert triton.launched == ["swiglu"] * 3
    assert [str(event) for event in made.events] == ["kernel swiglu: triton instead of pack: a pointer is not aligned"]
    assert list(made.counts.values()) == [3]


def test_where_no_rung_is_left_torch_serves_and_says_so(ladder):
    made, swiglu = ladder(pack=FakeRung(missing="no pack for sm_999"), triton=FakeRung(declines="odd shape"))
    assert swiglu(on_accelerator()).shape == (2, 4)
    assert [(e.wanted, e.got, e.reason) for e in made.events] == [
        ("pack", "the next rung", "no pack for sm_999"),
        ("triton", "torch", "odd shape"),
    ]


def test_on_a_cpu_torch_serves_without_a_word(ladder):
    triton = FakeRung()
    made, swiglu = ladder(triton=triton)
    x = torch.randn(2, 8)
    assert torch.equal(swiglu(x), pointwise.swiglu(x))
    assert (triton.launched, made.events) == ([], [])


def test_a_demanded_backend_serves_or_is_an_error(ladder):
    pack, triton = FakeRung(), FakeRung(declines="odd shape")
    made, swiglu = ladder(pack=pack, triton=triton)
    made.configure(KernelSettings(backend="torch"))
    swiglu(on_accelerator())
    made.configure(KernelSettings(backend="pack", overrides={"swiglu": "triton"}))
    with pytest.raises(BackendError, match="demands triton for swiglu, which declines this call: odd shape"):
        swiglu(on_accelerator())
    assert pack.launched == []
    made.add_rung("triton", FakeRung(missing="no C compiler"))
    with pytest.raises(BackendError, match="demands triton for swiglu, which is not there: no C compiler"):
        swiglu(on_accelerator())
    with pytest.raises(BackendError, match="names 'swigglu', expected one of"):
        made.configure(KernelSettings(overrides={"swigglu": "torch"}))


def test_what_a_calibration_chose_holds_for_its_dtype_and_size_only(ladder):
    pack, triton = FakeRung(), FakeRung()
    made, swiglu = ladder(pack=pack, triton=triton)
    made.choose("swiglu", "float32", "small", ("triton",))
    made.choose("swiglu", "float32", "large", ())
    swiglu(on_accelerator())
    swiglu(torch.empty(2, 1 << 20, device=ACCELERATOR))
    assert (pack.launched, triton.launched) == ([], ["swiglu"])
    swiglu(on_accelerator().bfloat16())
    assert pack.launched == ["swiglu"]
    made.forget()
    swiglu(on_accelerator())
    assert pack.launched == ["swiglu", "swiglu"]


def test_a_kernel_that_usually_loses_is_asked_only_if_a_calibration_chose_it(ladder):
    made, _ = ladder(triton=FakeRung())
    x = on_accelerator()
    assert made.rungs("nf4_linear", x) == ()
    made.choose("nf4_linear", "float32", "small", ("triton",))
    assert [name for name, _ in made.rungs("nf4_linear", x)] == ["triton"]


def test_demanding_ends_with_its_block(ladder):
    made, _ = ladder(pack=FakeRung(), triton=FakeRung())
    x = on_accelerator()
    with made.demanding("triton"):
        assert [name for name, _ in made.rungs("swiglu", x)] == ["triton"]
    assert [name for name, _ in made.rungs("swiglu", x)] == ["pack", "triton"]


def test_float64_and_mixed_dtypes_and_strided_operands_go_to_torch(ladder):
    made, swiglu = ladder(pack=FakeRung(), triton=FakeRung())
    swiglu(on_accelerator().double())
    swiglu(torch.empty(8, 2, device=ACCELERATOR).T)
    assert [e.reason for e in made.events if e.wanted == "triton"] == [
        "there are no kernels for torch.float64",
        "an operand of shape (2, 8) has strides (1, 2)",
    ]
