"""How does a launch reach the GPU without Triton and without a compiler? Packs, on the CUDA driver's C interface.

Everything that a compiled form assumes is checked before the driver hears of the launch: what the arguments are, where
they lie, how they are aligned. Whatever fails is a reason in words, and the next rung of the ladder takes the call. A
call that the driver refuses is an error: it may have left the device unusable, so nothing is tried in its place.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fedblocks.kernels.catalog import DTYPES as _FLOATS
from fedblocks.kernels.catalog import KERNELS, TARGETS, Launch, Variant
from fedblocks.kernels.dispatch import NotSupportedError
from fedblocks.kernels.packs import pack_file
from fedblocks.kernels.packs.pack_file import Entry, Pack, PackError

LIBRARY: Final = "libcuda.so.1"
PTX_FROM: Final = 80
"""Capability of the pack whose PTX stands in for packs that do not exist."""
DTYPES: Final = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
MAX_GRID: Final = (2**31 - 1, 65535, 65535)
SHARED_BY_DEFAULT: Final = 48 << 10
"""Bytes of dynamic shared memory of a program that need not be asked for."""

_VALUE: Final = {"i32": "i4x", "i64": "q", "fp32": "f4x"}
_WHOLE: Final = {"i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}
_LARGEST_FP32: Final = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
_SUCCESS: Final = 0
_MAX_DYNAMIC_SHARED: Final = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class DriverError(RuntimeError):
    """The CUDA driver refused a call.

    Args:
        call: the function of the driver.
        result: name of its result, ``CUDA_ERROR_INVALID_VALUE``.
        entry: what was to be loaded or launched.
    """

    def __init__(self, call: str, result: str, entry: str, capability: int, driver: int) -> None:
        super().__init__(
            f"{call} gave {result} for {entry} on capability {capability}, driver {driver}; the device may be unusable "
            'until the process ends. Set [kernels] backend = "torch" to train without packs'
        )
        self.call = call
        self.result = result
        self.entry = entry


class Devices(Protocol):
    """What torch knows about the GPUs of this process, by their index."""

    def index_of(self, tensor: Tensor) -> int | None:
        """The GPU that a tensor lies on, or None."""
        ...

    def current(self) -> int:
        """The GPU that launches go to."""
        ...

    def capability(self, index: int) -> int:
        """87 for 8.7."""
        ...

    def stream(self, index: int) -> int:
        """Handle of the stream that launches go to."""
        ...

    def capturing(self) -> bool:
        """True while that stream is recorded instead of carried out."""
        ...


class TorchDevices:
    """Those of torch.cuda."""

    def index_of(self, tensor: Tensor) -> int | None:
        """The GPU that a tensor lies on, or None."""
        return tensor.device.index if tensor.is_cuda else None

    def current(self) -> int:
        """The GPU that launches go to."""
        return torch.cuda.current_device()

    def capability(self, index: int) -> int:
        """87 for 8.7."""
        major, minor = torch.cuda.get_device_capability(index)
        return major * 10 + minor

    def stream(self, index: int) -> int:
        """Handle of torch's current stream."""
        return torch.cuda.current_stream(index).cuda_stream

    def capturing(self) -> bool:
        """True while that stream is recorded instead of carried out."""
        return torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True, slots=True)
class _Form:
    """An entry and how its arguments are laid out: 8 bytes each, the two unused pointers at the end."""

    entry: Entry
    name: str
    layout: struct.Struct


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What serves a capability: machine code of its own pack, or PTX that the driver translates."""

    pack: Pack
    ptx: bool
    forms: dict[tuple[str, Variant, bool], _Form]


@dataclass(frozen=True, slots=True)
class _Checked:
    """A launch that may be carried out."""

    form: _Form
    device: int
    values: tuple[float, ...]


class _Driver:
    """The functions of the CUDA driver that a launch needs, with their C types."""

    def __init__(self, library: str) -> None:
        cuda = ctypes.CDLL(library)
        self.version = 0
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        whole, handle = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_void_p)
        types = {
            "cuDriverGetVersion": [whole],
            "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(text)],
            "cuCtxGetCurrent": [handle],
            "cuCtxSetCurrent": [pointer],
            "cuDeviceGet": [whole, ctypes.c_int],
            "cuDevicePrimaryCtxRetain": [handle, ctypes.c_int],
            "cuModuleLoadData": [handle, text],
            "cuModuleGetFunction": [handle, pointer, text],
            "cuFuncSetAttribute": [pointer, ctypes.c_int, ctypes.c_int],
            "cuLaunchKernel": [pointer, *[ctypes.c_uint] * 7, pointer, handle, handle],
        }
        self._functions: dict[str, Any] = {}
        for name, arguments in types.items():
            function = getattr(cuda, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
            self._functions[name] = function
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", "the driver itself", 0, ctypes.byref(version))
        self.version = version.value

    def call(self, name: str, entry: str, capability: int, *arguments: object) -> None:
        """Calls; any result but success is a :class:`DriverError`."""
        code = self._functions[name](*arguments)
        if code != _SUCCESS:
            text = ctypes.c_char_p()
            known = self._functions["cuGetErrorName"](code, ctypes.byref(text)) == _SUCCESS and text.value
            result = f"{text.value.decode()} ({code})" if known and text.value else f"error {code}"
            raise DriverError(name, result, entry, capability, self.version)

    def context(self, index: int, entry: str, capability: int) -> int:
        """The context of this thread; a thread that torch has not used yet has none and gets the device's own."""
        context = ctypes.c_void_p()
        self.call("cuCtxGetCurrent", entry, capability, ctypes.byref(context))
        if not context.value:
            device = ctypes.c_int()
            self.call("cuDeviceGet", entry, capability, ctypes.byref(device), index)
            self.call("cuDevicePrimaryCtxRetain", entry, capability, ctypes.byref(context), device)
            self.call("cuCtxSetCurrent", entry, capability, context)
        return context.value or 0


class Launcher:
    """Carries out launches by the packs of one folder; the rung ``pack`` of the ladder.

    Modules are loaded at their first launch in a context and stay. Nothing here waits for the device. While a stream is
    recorded into a CUDA graph nothing can be loaded: :meth:`preload`, or one launch of each form, comes before.

    Args:
        library: the driver's file.
        ptx: also serve devices that no pack was built for, by PTX that the driver translates when it is loaded.
        devices: what stands for torch.cuda.
    """

    def __init__(
        self,
        *,
        folder: Path = pack_file.FOLDER,
        library: str = LIBRARY,
        ptx: bool = False,
        devices: Devices | None = None,
    ) -> None:
        self._folder = folder
        self._library = library
        self._ptx = ptx
        self._devices: Devices = TorchDevices() if devices is None else devices
        self._lock = threading.RLock()
        self._capabilities: dict[int, int] = {}
        self._packs: dict[int, _Loaded | str] = {}
        self._functions: dict[tuple[int, int], int] = {}  # context, id of a form, which is kept for good
        self._driver: _Driver | str | None = None
        self._ready: dict[int, str | None] = {}
        self.launches = 0
        """Launches so far."""

    # ---- what can be carried out ----

    def missing(self, device: torch.device) -> str | None:
        """Why no launch on ``device`` can be carried out, or None: no pack, a damaged one, no driver or an old one."""
        if device.type != "cuda":
            return f"packs run on CUDA devices, not on {device.type}"
        if isinstance(self._devices, TorchDevices) and not torch.cuda.is_available():
            return "no GPU that torch can use"
        return self._missing(self._devices.current() if device.index is None else device.index)

    def supports(self, launch: Launch) -> str | None:
        """Why this launch cannot be carried out, or None. Loads and launches nothing."""
        checked = self._check(launch)
        return checked if isinstance(checked, str) else None

    def run(self, launch: Launch) -> None:
        """Launches on the current stream of the arguments' device and returns at once.

        Raises:
            NotSupportedError: what :meth:`supports` says of it.
            DriverError: the driver refused.
        """
        reason = self.try_run(launch)
        if reason is not None:
            raise NotSupportedError(f"{launch.kernel} {launch.variant.name}: {reason}")

    def try_run(self, launch: Launch) -> str | None:
        """Launches, or says why not, as :meth:`supports` does; one check instead of two.

        Raises:
            DriverError: the driver refused.
        """
        checked = self._check(launch)
        if isinstance(checked, str):
            return checked
        self._launch(checked, launch.grid)
        return None

    def preload(self, kernels: Collection[str] | None = None, *, dtypes: Collection[str] | None = None) -> int:
        """Loads every form of the kernels, all unless named, on the current device; the number of forms.

        Args:
            dtypes: only variants of these, such as ``bf16``; those of kernels that know fp32 alone are loaded too.

        Raises:
            NotSupportedError: :meth:`missing`, or a kernel that no pack has.
            DriverError: the driver refused.
        """
        index = self._devices.current()
        reason = self._missing(index)
        if reason is not None:
            raise NotSupportedError(reason)
        loaded = self._pack(index)
        assert isinstance(loaded, _Loaded)
        wanted = set(KERNELS if kernels is None else kernels)
        unknown = wanted - {entry.kernel for entry in loaded.pack.entries}
        if unknown:
            raise NotSupportedError(f"no pack has a kernel {min(unknown)!r}; expected some of {', '.join(KERNELS)}")
        chosen = [
            form
            for (kernel, variant, _), form in loaded.forms.items()
            if kernel in wanted
            and (dtypes is None or variant.dtype in dtypes or {v.dtype for v in KERNELS[kernel].variants} == {"fp32"})
        ]
        for form in chosen:
            self._function(form, index)
        return len(chosen)

    def _missing(self, index: int) -> str | None:
        if index not in self._ready:
            with self._lock:
                loaded = self._pack(index)
                if isinstance(loaded, str):
                    self._ready[index] = loaded
                else:
                    self._ready[index] = self._driver_missing(loaded)
        return self._ready[index]

    def _pack(self, index: int) -> _Loaded | str:
        capability = self._capability(index)
        if capability not in self._packs:
            with self._lock:
                self._packs[capability] = self._opened(capability)
        return self._packs[capability]

    def _opened(self, capability: int) -> _Loaded | str:
        try:
            pack, ptx = pack_file.read(capability, self._folder), False
            if pack is None and self._ptx and capability > PTX_FROM:
                pack, ptx = pack_file.read(PTX_FROM, self._folder), True
            if pack is None:
                if capability in TARGETS:
                    return f"{pack_file.file_name(capability)} is not in the package; install it again"
                return f"no pack for capability {capability}; there are packs for {', '.join(map(str, TARGETS))}"
            return _Loaded(pack, ptx, _forms(pack, ptx))
        except (PackError, OSError) as error:
            return str(error)

    def _driver_missing(self, loaded: _Loaded) -> str | None:
        if self._driver is None:
            try:
                self._driver = _Driver(self._library)
            except (OSError, AttributeError, DriverError) as error:
                self._driver = (
                    f"the CUDA driver cannot be used ({error}); install NVIDIA's driver, which brings {LIBRARY}"
                )
        if isinstance(self._driver, str):
            return self._driver
        toolchain = loaded.pack.toolchain
        oldest = toolchain.min_driver_ptx if loaded.ptx else toolchain.min_driver
        if self._driver.version < oldest:
            return f"the driver is of CUDA {_release(self._driver.version)}, the pack needs {_release(oldest)} or later"
        return None

    def _capability(self, index: int) -> int:
        if index not in self._capabilities:
            self._capabilities[index] = self._devices.capability(index)
        return self._capabilities[index]

    # ---- one launch ----

    def _check(self, launch: Launch) -> _Checked | str:
        """Arguments first, since that costs nothing; then the pack; then whether there is a driver."""
        if launch.kernel not in KERNELS or launch.variant.dtype not in _FLOATS:
            return f"no kernel {launch.kernel!r} for {launch.variant.dtype} in the catalog"
        expected = _arguments(launch.kernel, launch.variant.dtype)
        if len(launch.args) != len(expected):
            return f"{len(launch.args)} arguments, expected {len(expected)}"
        if len(launch.grid) != 3 or not all(
            type(size) is int and 1 <= size <= most for size, most in zip(launch.grid, MAX_GRID, strict=False)
        ):
            return f"a grid of {launch.grid}, expected three whole numbers from 1 to {MAX_GRID}"
        index: int | None = None
        aligned = True
        values: list[float] = []
        for (name, kind, dtype, by_16), value in zip(expected, launch.args, strict=True):
            if dtype is not None:
                if not isinstance(value, Tensor):
                    return f"{name} is a {type(value).__name__}, expected a tensor"
                if value.dtype is not dtype:
                    return f"{name} is {value.dtype}, expected {dtype}"
                lies = self._devices.index_of(value)
                if lies is None:
                    return f"{name} lies on {value.device}, expected a CUDA device"
                if index is not None and lies != index:
                    return f"{name} lies on cuda:{lies}, the arguments before it on cuda:{index}"
                index = lies
                number: float = value.data_ptr()
            elif (reason := _refused(kind, value)) is not None:
                return f"{name} is {value!r}, expected {reason}"
            else:
                assert isinstance(value, (int, float))
                number = value
            values.append(number)
            if by_16:
                aligned &= number % 16 == 0
        if index is None:
            return "no argument is a tensor"
        current = self._devices.current()
        if index != current:
            return f"the arguments lie on cuda:{index}, the current device is cuda:{current}: use torch.cuda.device"
        loaded = self._pack(index)
        if isinstance(loaded, str):
            return loaded
        form = loaded.forms.get((launch.kernel, launch.variant, True)) if aligned else None
        form = form or loaded.forms.get((launch.kernel, launch.variant, False))
        if form is None:
            return self._no_form(loaded, launch, values)
        reason = self._missing(index)
        if reason is not None:
            return reason
        if self._devices.capturing() and not self._is_loaded(form, index):
            return "it is not loaded and a CUDA graph is being recorded; call preload, or launch it once, before"
        return _Checked(form, index, tuple(values))

    def _no_form(self, loaded: _Loaded, launch: Launch, values: list[float]) -> str:
        if (launch.kernel, launch.variant, True) not in loaded.forms:
            return f"{pack_file.file_name(loaded.pack.capability)} has no variant {launch.variant.name}"
        odd = [
            f"{param.name} lies at address {value:#x}" if param.is_pointer else f"{param.name} is {value}"
            for param, value in zip(KERNELS[launch.kernel].params, values, strict=True)
            if (param.is_pointer or param.by_16) and value % 16 != 0
        ]
        return f"{', '.join(odd)}: not divisible by 16, and there is no form for such arguments"

    def _is_loaded(self, form: _Form, index: int) -> bool:
        driver = self._driver
        assert isinstance(driver, _Driver)
        where = self._capability(index)
        return (driver.context(index, form.name, where), id(form)) in self._functions

    def _function(self, form: _Form, index: int) -> int:
        """Handle of the function in the current context, loaded if it is not yet."""
        driver = self._driver
        assert isinstance(driver, _Driver)
        entry, capability = form.entry, self._capability(index)
        key = driver.context(index, form.name, capability), id(form)
        found = self._functions.get(key)
        if found is not None:
            return found
        with self._lock:
            if key in self._functions:
                return self._functions[key]
            loaded = self._pack(index)
            assert isinstance(loaded, _Loaded)
            image = entry.ptx if loaded.ptx else entry.cubin
            assert image is not None
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            call = driver.call
            call("cuModuleLoadData", form.name, capability, ctypes.byref(module), loaded.pack.image(image))
            symbol = entry.symbol.encode("ascii")
            call("cuModuleGetFunction", form.name, capability, ctypes.byref(function), module, symbol)
            if entry.shared > SHARED_BY_DEFAULT:
                call("cuFuncSetAttribute", form.name, capability, function, _MAX_DYNAMIC_SHARED, entry.shared)
            self._functions[key] = function.value or 0
            return self._functions[key]

    def _launch(self, checked: _Checked, grid: tuple[int, int, int]) -> None:
        entry, driver = checked.form.entry, self._driver
        assert isinstance(driver, _Driver)
        function = self._function(checked.form, checked.device)
        count = len(checked.values) + 2
        storage = ctypes.create_string_buffer(checked.form.layout.pack(*checked.values, 0, 0), 8 * count)
        first = ctypes.addressof(storage)
        places = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        driver.call(
            "cuLaunchKernel",
            checked.form.name,
            self._capability(checked.device),
            function,
            *grid,
            32 * entry.variant.num_warps,
            1,
            1,
            entry.shared,
            self._devices.stream(checked.device),
            places,
            None,
        )
        self.launches += 1


@cache
def _arguments(kernel: str, dtype: str) -> tuple[tuple[str, str, torch.dtype | None, bool], ...]:
    """Of each argument: name, type, dtype of the tensor if it is one, whether the aligned form wants it by 16."""
    return tuple(
        (
            param.name,
            param.type,
            DTYPES[param.resolved(dtype)[1:]] if param.is_pointer else None,
            param.is_pointer or param.by_16,
        )
        for param in KERNELS[kernel].params
    )


def _refused(kind: str, value: object) -> str | None:
    """What a number passed by value should be, or None if it is."""
    if kind in _WHOLE:
        least, most = _WHOLE[kind]
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return None if fits else f"a whole number from {least} to {most}"
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if fits and (not math.isfinite(value) or abs(value) <= _LARGEST_FP32):  # type: ignore[arg-type]
        return None
    return "a number within the range of fp32"


def _release(version: int) -> str:
    """``12.8`` of 12080."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _forms(pack: Pack, ptx: bool) -> dict[tuple[str, Variant, bool], _Form]:
    """What the launcher needs of each entry.

    Raises:
        PackError: an entry takes other arguments than the catalog's kernel, or has no PTX where that is needed.
    """
    forms = {}
    for entry in pack.entries:
        where = f"{pack_file.file_name(pack.capability)}: {entry.name}"
        kernel = KERNELS.get(entry.kernel)
        expected = () if kernel is None else tuple(kernel.signature(entry.variant.dtype).items())
        if kernel is None or entry.params != expected:
            raise PackError(f"{where} takes {entry.params}, expected {expected}; install the package again")
        checked = {param.name for param in kernel.params if param.is_pointer or param.by_16}
        if not checked.issuperset(entry.divisible_by_16):
            raise PackError(
                f"{where} assumes that {entry.divisible_by_16} are divisible by 16, expected some of "
                f"{sorted(checked)}; install the package again"
            )
        if ptx and entry.ptx is None:
            raise PackError(f"{where} has no PTX; install the package again")
        layout = "".join("Q" if param.is_pointer else _VALUE[param.type] for param in kernel.params)
        form = _Form(entry, entry.name, struct.Struct(f"<{layout}QQ"))
        forms[entry.kernel, entry.variant, entry.form == "aligned"] = form
    return forms
