"""Tests of kernels/launcher.py against fake_cuda.c, a driver that records; CPU tensors stand for those of a GPU."""

import ctypes
import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fedblocks.kernels import launches
from fedblocks.kernels.catalog import KERNELS, Launch, variant
from fedblocks.kernels.dispatch import NotSupportedError
from fedblocks.kernels.launcher import DriverError, Launcher
from fedblocks.kernels.packs import pack_file
from fedblocks.kernels.reference.adamw import Moments, Moments8Bit
from fedblocks.kernels.reference.nf4 import quantize_nf4

torch.set_num_threads(1)

CONTEXT = 0xC0FFEE
STREAM = 0x5EED


class State(ctypes.Structure):
    """What fake_cuda.c keeps."""

    _fields_ = [
        ("log", ctypes.c_char * (1 << 16)),
        ("fail_call", ctypes.c_char * 64),
        ("fail_code", ctypes.c_int),
        ("version", ctypes.c_int),
        ("context", ctypes.c_uint64),
        ("image_bytes", ctypes.c_uint32),
        ("image", ctypes.c_ubyte * (1 << 20)),
        ("symbol", ctypes.c_char * 256),
        ("attribute", ctypes.c_int),
        ("attribute_value", ctypes.c_int),
        ("attribute_function", ctypes.c_uint64),
        ("modules", ctypes.c_uint32),
        ("param_count", ctypes.c_uint32),
        ("param_bytes", ctypes.c_uint32 * 64),
        ("params", (ctypes.c_ubyte * 8) * 64),
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("extra", ctypes.c_uint64),
    ]

    def calls(self):
        """Names of the calls so far; empties the record."""
        names = self.log.decode().split()
        self.log = b""
        return names


class StandIn:
    """GPU 0 is where CPU tensors lie; those of ``elsewhere`` are said to lie on another one."""

    def __init__(self, capability=87):
        self.of = {0: capability, 1: capability}
        self.device = 0
        self.elsewhere = {}
        self.recording = False

    def index_of(self, tensor):
        return self.elsewhere.get(tensor.data_ptr(), 0)

    def current(self):
        return self.device

    def capability(self, index):
        return self.of[index]

    def stream(self, index):
        return STREAM + index

    def capturing(self):
        return self.recording


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc or cc) to build the fake driver with")
    path = tmp_path_factory.mktemp("cuda") / "libfake.so"
    source = Path(__file__).parent / "fake_cuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(source)], check=True)
    return str(path)


@pytest.fixture
def fake(library):
    state = State.in_dll(ctypes.CDLL(library), "fake")
    ctypes.memset(ctypes.byref(state), 0, ctypes.sizeof(state))
    state.version = 12060
    state.context = CONTEXT
    return state


@pytest.fixture
def devices():
    return StandIn()


@pytest.fixture
def launcher(library, fake, devices):
    return Launcher(library=library, devices=devices)


BYTES = {"i32": 4, "i64": 8, "fp32": 4}


def entry_of(launch, form="aligned", capability=87):
    pack = pack_file.read(capability)
    (entry,) = (e for e in pack.entries if (e.kernel, e.variant, e.form) == (launch.kernel, launch.variant, form))
    return pack, entry


def expect(fake, launch):
    """Tells the driver how many parameters it will get, of how many bytes."""
    params = KERNELS[launch.kernel].params
    fake.param_count = len(params) + 2
    for place, param in enumerate(params):
        fake.param_bytes[place] = 8 if param.is_pointer else BYTES[param.type]
    fake.param_bytes[len(params)] = fake.param_bytes[len(params) + 1] = 8


def packed(launch):
    """The parameters as the kernel must find them, written without the launcher's layout."""
    found = []
    for param, value in zip(KERNELS[launch.kernel].params, launch.args, strict=True):
        if param.is_pointer:
            found.append(value.data_ptr().to_bytes(8, "little"))
        elif param.type == "fp32":
            found.append(torch.tensor(value, dtype=torch.float32).numpy().tobytes())
        else:
            found.append(value.to_bytes(BYTES[param.type], "little", signed=True))
    return [*found, bytes(8), bytes(8)]


def given(fake):
    return [bytes(fake.params[i])[: fake.param_bytes[i]] for i in range(fake.param_count)]


def aligned(*shape, dtype=torch.bfloat16):
    """Zeros at an address that is divisible by 64."""
    n = math.prod(shape)
    size = torch.empty(0, dtype=dtype).element_size()
    storage = torch.zeros(n * size + 64, dtype=torch.uint8)
    start = -storage.data_ptr() % 64
    return storage[start : start + n * size].view(dtype).view(shape)


def of_torch(operation, *args, **kwargs):
    """The launches of an operation."""
    made = []
    operation(made.append, *args, **kwargs)
    return made


def an_nf4_weight(n=64, k=128):
    weight = quantize_nf4(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    assert all(part.data_ptr() % 16 == 0 for part in weight.buffers)
    return weight


def every_launch():
    """At least one launch of every kernel, in the forms of the operations."""
    b, f = torch.bfloat16, torch.float32
    nf4 = an_nf4_weight()
    x, weight, rstd = aligned(5, 896), aligned(896), aligned(5, dtype=f)
    table = aligned(7, 64)
    logits, target = aligned(3, 1024), aligned(3, dtype=torch.int64)
    ids, logp, tail = aligned(3, 4, dtype=torch.int64), aligned(3, 4, dtype=f), aligned(3, dtype=f)
    n, rate = 3 * 512, {"step": 3, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    half, wide = aligned(n, dtype=torch.int16), aligned(n, dtype=f)
    m8 = Moments8Bit.zeros(n, torch.device("cpu"))
    m32 = Moments(m=aligned(n, dtype=f), v=aligned(n, dtype=f))
    rows = aligned(4, 512, dtype=f)
    return [
        *of_torch(launches.nf4_dequant, *nf4.buffers, nf4.offset, aligned(64, 128)),
        *of_torch(launches.nf4_dequant, *nf4.buffers, nf4.offset, aligned(64, 128, dtype=f)),
        *of_torch(launches.nf4_linear, aligned(5, 128), (nf4,)),
        *of_torch(launches.nf4_linear_dgrad, aligned(5, 64), (nf4,)),
        *of_torch(launches.add_rms_norm, x, aligned(5, 896), weight, 1e-6),
        *of_torch(launches.rms_norm_backward, x, None, x, weight, rstd, need_dx=True, need_dw=True),
        *of_torch(launches.rope_, aligned(9, 14, 64), table, table, inverse=True),
        *of_torch(launches.swiglu, aligned(5, 2 * 2048)),
        *of_torch(launches.swiglu_backward_, aligned(5, 2048), aligned(5, 2 * 2048), need_h=True),
        *of_torch(launches.cross_entropy_, logits, target, gradient=True),
        *of_torch(launches.kl_topk_, logits, ids, logp, tail, gradient=False),
        *of_torch(launches.adamw_, wide, None, wide, m32, **rate),
        *of_torch(launches.adamw_, half.view(b), half, wide, m32, **rate),
        *of_torch(launches.adamw_, half.view(b), half, wide, m8, **rate),
        *of_torch(launches.adamw_, wide, None, wide, m8, **rate),
        *of_torch(launches.square_norm, wide),
        *of_torch(launches.delta_rows, rows, rows, None, 0.25),
        *of_torch(launches.delta_codes, rows, aligned(2, dtype=torch.int64), aligned(2, dtype=f)),
    ]


# ---- what reaches the driver ----


def test_every_kernel_reaches_the_driver_byte_for_byte(launcher, fake):
    made = every_launch()
    assert {launch.kernel for launch in made} == set(KERNELS)
    for launch in made:
        assert launcher.supports(launch) is None
        at_16 = all(
            (arg.data_ptr() if param.is_pointer else arg) % 16 == 0
            for param, arg in zip(KERNELS[launch.kernel].params, launch.args, strict=True)
            if param.is_pointer or param.by_16
        )
        pack, entry = entry_of(launch, "aligned" if at_16 else "general")
        expect(fake, launch)
        fake.image_bytes = entry.cubin.length
        launcher.run(launch)
        assert given(fake) == packed(launch), launch.kernel
        assert bytes(fake.image[: entry.cubin.length]) == pack.image(entry.cubin)
        assert bytes(fake.image[:4]) == b"\x7fELF"
        assert fake.symbol.decode() == entry.symbol
        assert tuple(fake.grid) == launch.grid
        assert tuple(fake.block) == (32 * launch.variant.num_warps, 1, 1)
        assert (fake.shared, fake.stream, fake.extra) == (entry.shared, STREAM, 0)
        assert fake.function == 0xF000000000001000 + fake.modules - 1
    assert launcher.launches == len(made)


def test_numbers_are_packed_with_their_sign_and_width(launcher, fake):
    (launch,) = of_torch(launches.square_norm, aligned(4096, dtype=torch.float32))
    wide = Launch(launch.kernel, launch.variant, launch.grid, (*launch.args[:2], -(2**40)))
    expect(fake, wide)
    launcher.run(wide)
    assert given(fake)[2] == struct.pack("<q", -(2**40))
    rows = aligned(1, 512, dtype=torch.float32)
    (launch,) = of_torch(launches.delta_rows, rows, rows, None, -math.inf)
    expect(fake, launch)
    launcher.run(launch)
    assert given(fake)[7:9] == [struct.pack("<i", 512), b"\x00\x00\x80\xff"]


def test_second_launch_loads_nothing(launcher, fake):
    (launch,) = of_torch(launches.swiglu, aligned(5, 4096))
    launcher.run(launch)
    assert fake.calls() == [
        "cuDriverGetVersion",
        "cuCtxGetCurrent",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuLaunchKernel",
    ]
    launcher.run(launch)
    assert fake.calls() == ["cuCtxGetCurrent", "cuLaunchKernel"]


def test_another_context_gets_its_own_module(launcher, fake):
    (launch,) = of_torch(launches.swiglu, aligned(5, 4096))
    launcher.run(launch)
    first = fake.function
    fake.context = CONTEXT + 1
    launcher.run(launch)
    assert fake.modules == 2
    assert fake.function == first + 1
    fake.context = CONTEXT
    launcher.run(launch)
    assert (fake.modules, fake.function) == (2, first)


def test_thread_without_a_context_gets_the_devices_own(launcher, fake):
    fake.context = 0
    (launch,) = of_torch(launches.swiglu, aligned(5, 4096))
    launcher.run(launch)
    assert fake.calls()[1:5] == ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert fake.context == 0xC0DE000000000000 + 40


def test_graph_takes_what_is_loaded_and_nothing_else(launcher, fake, devices):
    (launch,) = of_torch(launches.swiglu, aligned(5, 4096))
    devices.recording = True
    reason = launcher.supports(launch)
    assert "CUDA graph is being recorded" in reason
    assert "cuModuleLoadData" not in fake.calls()
    devices.recording = False
    assert launcher.preload(["swiglu"], dtypes=["bf16"]) == 1
    fake.calls()
    devices.recording = True
    launcher.run(launch)
    assert set(fake.calls()) == {"cuCtxGetCurrent", "cuLaunchKernel"}


def test_preload_counts_forms_and_knows_its_kernels(launcher, fake):
    assert launcher.preload(["square_norm", "nf4_linear"]) == 2 + 2
    assert launcher.preload(["square_norm"], dtypes=["bf16"]) == 2  # fp32 is all it knows
    assert fake.modules == 4
    with pytest.raises(NotSupportedError, match="no pack has a kernel 'nf5'"):
        launcher.preload(["nf5"])


def test_address_or_number_off_16_takes_the_general_form(launcher, fake):
    logits = torch.zeros(3 * 1001 + 1, dtype=torch.bfloat16)
    target = aligned(3, dtype=torch.int64)
    for part in (logits[: 3 * 1001].view(3, 1001), logits[1:].view(3, 1001)):
        (launch,) = of_torch(launches.cross_entropy_, part, target, gradient=False)
        pack, entry = entry_of(launch, "general")
        fake.image_bytes = entry.cubin.length
        expect(fake, launch)
        launcher.run(launch)
        assert bytes(fake.image[: entry.cubin.length]) == pack.image(entry.cubin)
        assert given(fake) == packed(launch)
    assert fake.modules == 1


# ---- packs made for a test ----


def write_pack(folder, capability=87, *, shared=0, form="aligned", min_driver=12000, ptx=None, said=None, **changed):
    """A pack with one form of swiglu in bf16, whose machine code is a text."""
    chosen = KERNELS["swiglu"].variants[0]
    fields = {
        "kernel": "swiglu",
        "variant": chosen,
        "form": form,
        "params": tuple(KERNELS["swiglu"].signature("bf16").items()),
        "divisible_by_16": ("gate_up", "h", "width") if form == "aligned" else (),
        "symbol": "swiglu",
        "shared": shared,
        "registers": 32,
        "spilled": 0,
        "source": "0" * 64,
    } | changed
    tools = pack_file.Toolchain(
        triton="3.7.1", ptxas="12.6.85", ptx="8.5", elf_abi=7, min_driver=min_driver, min_driver_ptx=12050
    )
    data = pack_file.encode(said or capability, tools, [(fields, b"machine code", ptx)])
    (folder / pack_file.file_name(capability)).write_bytes(data)
    return folder


def a_swiglu():
    (launch,) = of_torch(launches.swiglu, aligned(5, 4096))
    return launch


@pytest.mark.parametrize(("shared", "asked"), [(48 << 10, False), ((48 << 10) + 16, True)])
def test_shared_memory_is_asked_for_above_48_kib(tmp_path, library, fake, devices, shared, asked):
    launcher = Launcher(folder=write_pack(tmp_path, shared=shared), library=library, devices=devices)
    launcher.run(a_swiglu())
    assert ("cuFuncSetAttribute" in fake.calls()) == asked
    assert fake.shared == shared
    if asked:
        assert (fake.attribute, fake.attribute_value) == (8, shared)
        assert fake.attribute_function == fake.function


def test_ptx_serves_devices_to_come_where_that_is_wanted(tmp_path, library, fake):
    folder = write_pack(tmp_path, 80, ptx=b".version 8.5\n\0")
    fake.image_bytes = 14
    launch = a_swiglu()
    plain = Launcher(folder=folder, library=library, devices=StandIn(103))
    assert plain.supports(launch) == "no pack for capability 103; there are packs for 80, 86, 87, 89, 90, 120"
    Launcher(folder=folder, library=library, ptx=True, devices=StandIn(103)).run(launch)
    assert bytes(fake.image[:14]) == b".version 8.5\n\0"
    old = Launcher(folder=folder, library=library, ptx=True, devices=StandIn(75))
    assert "no pack for capability 75" in old.supports(launch)
    fake.version = 12040
    older = Launcher(folder=folder, library=library, ptx=True, devices=StandIn(103))
    assert older.supports(launch) == "the driver is of CUDA 12.4, the pack needs 12.5 or later"


# ---- refusals, all of them before the driver hears of the launch ----


def replaced(launch, place, value):
    return Launch(launch.kernel, launch.variant, launch.grid, (*launch.args[:place], value, *launch.args[place + 1 :]))


def with_grid(*grid):
    launch = a_swiglu()
    return Launch(launch.kernel, launch.variant, grid, launch.args)


def of_variant(kernel="swiglu", dtype="bf16", block=1024):
    gate_up, h, width = a_swiglu().args
    to = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return Launch(kernel, variant(dtype, 4, BLOCK=block), (5, 2, 1), (gate_up.to(to), h.to(to), width))


def a_kl():
    wide = {"dtype": torch.float32}
    ids = aligned(3, 4, dtype=torch.int64)
    operands = aligned(3, 64), ids, aligned(3, 4, **wide), aligned(3, **wide)
    (launch,) = of_torch(launches.kl_topk_, *operands, gradient=True)
    return launch


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_variant(block=2), "sm_87.pack has no variant bf16-BLOCK_2-w4"),
        (lambda: of_variant(dtype="fp32"), "sm_87.pack has no variant fp32-BLOCK_1024-w4"),
        (lambda: of_variant(kernel="unknown"), "no kernel 'unknown' for bf16 in the catalog"),
        (
            lambda: replaced(a_swiglu(), 0, aligned(5 * 4096 + 1)[1:].view(5, 4096)),
            r"gate_up lies at address 0x\w+2: not divisible by 16, and there is no form",
        ),
        (lambda: replaced(a_swiglu(), 2, 2040), "width is 2040: not divisible by 16, and there is no form"),
        (lambda: replaced(a_swiglu(), 0, aligned(5, 4096).half()), "gate_up is torch.float16, expected torch.bfloat16"),
        (lambda: replaced(a_swiglu(), 1, None), "h is a NoneType, expected a tensor"),
        (lambda: replaced(a_swiglu(), 2, 2**31), "width is 2147483648, expected a whole number from -2147483648"),
        (lambda: replaced(a_swiglu(), 2, 16.0), "width is 16.0, expected a whole number"),
        (lambda: replaced(a_swiglu(), 2, True), "width is True, expected a whole number"),
        (lambda: replaced(a_kl(), 6, -(2**31) - 1), "num_top is -2147483649, expected a whole number"),
        (lambda: replaced(a_kl(), 7, 1e39), r"tail_min is 1e\+39, expected a number within the range of fp32"),
        (lambda: replaced(a_kl(), 7, "1"), "tail_min is '1', expected a number"),
        (lambda: Launch("swiglu", a_swiglu().variant, (1, 1, 1), a_swiglu().args[:2]), "2 arguments, expected 3"),
        (lambda: with_grid(5, 65536, 1), r"a grid of \(5, 65536, 1\), expected three whole numbers from 1"),
        (lambda: with_grid(5, 1, 65536), r"a grid of \(5, 1, 65536\)"),
        (lambda: with_grid(2**31, 1, 1), r"a grid of \(2147483648, 1, 1\)"),
        (lambda: with_grid(0, 1, 1), r"a grid of \(0, 1, 1\)"),
        (lambda: with_grid(1, 1), r"a grid of \(1, 1\)"),
    ],
)
def test_refusal_says_why_and_calls_no_driver(launcher, fake, make, reason):
    launch = make()
    with pytest.raises(NotSupportedError, match=reason):
        launcher.run(launch)
    assert launcher.supports(launch) == launcher.try_run(launch)
    assert fake.calls() == []
    assert launcher.launches == 0


def test_tensors_of_two_devices_or_of_another_one_are_refused(launcher, fake, devices):
    launch = a_swiglu()
    devices.elsewhere = {launch.args[1].data_ptr(): 1}
    assert launcher.supports(launch) == "h lies on cuda:1, the arguments before it on cuda:0"
    devices.elsewhere = {launch.args[0].data_ptr(): 1, launch.args[1].data_ptr(): 1}
    assert "current device is cuda:0: use torch.cuda.device" in launcher.supports(launch)
    devices.elsewhere = {launch.args[0].data_ptr(): None}
    assert launcher.supports(launch) == "gate_up lies on cpu, expected a CUDA device"
    assert fake.calls() == []


def test_missing_driver_is_a_reason(devices):
    launcher = Launcher(library="libnowhere.so.7", devices=devices)
    assert "the CUDA driver cannot be used (libnowhere.so.7: cannot open" in launcher.supports(a_swiglu())
    assert launcher.missing(torch.device("cuda", 0)) == launcher.supports(a_swiglu())


def test_library_that_is_no_driver_is_a_reason(devices):
    launcher = Launcher(library=None, devices=devices)  # this process itself
    assert "undefined symbol: cu" in launcher.supports(a_swiglu())


def test_driver_that_fails_or_is_too_old_is_a_reason(library, fake, devices):
    fake.fail_call, fake.fail_code = b"cuDriverGetVersion", 999
    assert "cuDriverGetVersion gave error 999" in Launcher(library=library, devices=devices).supports(a_swiglu())
    fake.fail_call = b""
    fake.version = 11080
    reason = Launcher(library=library, devices=devices).supports(a_swiglu())
    assert reason == "the driver is of CUDA 11.8, the pack needs 12.0 or later"


def test_missing_names_the_device(library, fake, devices):
    launcher = Launcher(library=library, devices=devices)
    assert launcher.missing(torch.device("cpu")) == "packs run on CUDA devices, not on cpu"
    assert launcher.missing(torch.device("cuda")) is None
    assert launcher.missing(torch.device("cuda", 1)) is None
    other = Launcher(library=library, devices=StandIn(75))
    assert "no pack for capability 75" in other.missing(torch.device("cuda"))
    with pytest.raises(NotSupportedError, match="no pack for capability 75"):
        other.preload()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"said": 86}, "sm_87.pack: is for capability 86, expected 87"),
        (
            {"params": (("gate_up", "*bf16"), ("h", "*bf16")), "divisible_by_16": ()},
            "sm_87.pack: swiglu bf16-BLOCK_1024-w4 aligned takes",
        ),
        ({"kernel": "gone"}, "sm_87.pack: gone bf16-BLOCK_1024-w4 aligned takes"),
    ],
)
def test_pack_of_another_device_or_version_is_a_reason(tmp_path, library, fake, devices, change, reason):
    launcher = Launcher(folder=write_pack(tmp_path, **change), library=library, devices=devices)
    said = launcher.supports(a_swiglu())
    assert said.startswith(reason)
    assert "install the package again" in said
    assert fake.calls() == []


def test_damaged_pack_is_a_reason(tmp_path, library, fake, devices):
    path = write_pack(tmp_path) / "sm_87.pack"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    launcher = Launcher(folder=tmp_path, library=library, devices=devices)
    assert "sm_87.pack: has another sha256 than its header says: it is damaged" in launcher.supports(a_swiglu())
    path.unlink()
    absent = Launcher(folder=tmp_path, library=library, devices=devices)
    assert absent.supports(a_swiglu()) == "sm_87.pack is not in the package; install it again"
    assert fake.calls() == []


# ---- errors of the driver ----


@pytest.mark.parametrize(
    ("call", "code", "name"),
    [
        ("cuModuleLoadData", 1, r"CUDA_ERROR_INVALID_VALUE \(1\)"),
        ("cuModuleGetFunction", 1, r"CUDA_ERROR_INVALID_VALUE \(1\)"),
        ("cuLaunchKernel", 700, r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"),
        ("cuCtxGetCurrent", 4711, "error 4711"),
    ],
)
def test_result_of_the_driver_is_an_error_that_names_everything(launcher, fake, call, code, name):
    fake.fail_call, fake.fail_code = call.encode(), code
    text = f"{call} gave {name} for swiglu bf16-BLOCK_1024-w4 aligned on capability 87, driver 12060"
    with pytest.raises(DriverError, match=text) as caught:
        launcher.run(a_swiglu())
    assert caught.value.call == call
    assert not isinstance(caught.value, NotSupportedError)  # nothing else may be tried on such a device
