"""Where do the frozen base layers come from? From one NF4 file per layer, made once and checked by its hash.

The checkpoint is quantised layer by layer into bitsandbytes' layout (matrices NF4, norms and biases as stored), so that
at most one layer is in memory in full precision. A file that is torn or flipped is found by its SHA-256 and made again.
Hashing takes 15 to 28 % as long as decoding, so it is done at a process's first read of a file, and again whenever the
file's identity, size or times have changed since.

What stays in memory is chosen with ``hold``. Everything else is read when it is used, with ``pread`` into buffers of
ours: mapped pages would count as resident, and on unified memory the page cache competes with the model, so the pages
are given back after use.

Two backbones answer the same questions: :class:`Backbone` with what a client computes with, and :class:`DenseBackbone`
with the unquantised weights, for the baselines and for the evaluation of an exported checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fedblocks.edge_client.decoder_block import CPU, BlockWeights
from fedblocks.kernels.ops import Nf4Weight, nf4_dequant, quantize_nf4
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.durable import write_durably

FORMAT: Final = "fedblocks-nf4-1"
_STATE: Final = ".quant_state.bitsandbytes__nf4"
_DTYPES: Final = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
READ_BYTES: Final = 1 << 20
"""Read and hashed at a time, so that the hash finds the bytes in the processor's cache."""
_ABSENT: Final = object()

Quantiser = Callable[[Tensor], Nf4Weight]
_Mark = tuple[int, int, int, int]  # inode, size, times of change of content and of anything
Stored = dict[str, Nf4Weight | Tensor]
"""One layer as it is stored: suffix -> NF4 matrix, or vector in the checkpoint's precision."""


class BackboneError(RuntimeError):
    """The backbone's files cannot be made or read; the text says which file and what to do."""

    exit_code = 2


class LayerSource(Protocol):
    """What a backbone needs of a checkpoint (``edge_client/checkpoint.py`` has one)."""

    @property
    def shape(self) -> ModelShape: ...

    def layer_tensors(self, layer: int, /) -> Mapping[str, Tensor]:
        """Suffix -> tensor of one base layer, as stored."""
        ...


class FrozenLayers(Protocol):
    """The frozen base layers as the stack reads them."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def device(self) -> torch.device:
        """Where everything lies that the methods below give."""
        ...

    @property
    def digest(self) -> str:
        """What these weights are, for cache keys: equal digests mean equal decoded bits."""
        ...

    def hold(self, *, decoded: Collection[int] = (), packed: Collection[int] = (), dtype: torch.dtype) -> None:
        """Chooses the layers that stay in memory from their next use on, in which form; all others are dropped."""
        ...

    def release(self) -> None:
        """Drops everything that is held."""
        ...

    def block(self, layer: int, dtype: torch.dtype) -> BlockWeights:
        """One layer's weights, decoded."""
        ...

    def packed(self, layer: int) -> Stored:
        """One layer as it is stored."""
        ...

    def stream(self, layers: Iterable[int], dtype: torch.dtype) -> Generator[BlockWeights]:
        """These layers in turn, decoded; each is valid until the next one is asked for."""
        ...


def bitsandbytes_quantiser() -> tuple[str, Quantiser] | None:
    """The library's name and version, and its quantiser as one of ours; None where it is not installed or not usable.

    Only its codes are taken: decoding is ours, because its own is wrong at some widths (runtime.md 5.1), and its linear
    layer repacks weights behind one's back (runtime.md 9.2).
    """
    try:
        with _without_hub_kernels(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
            from bitsandbytes.functional import quantize_4bit
    except (ImportError, OSError, RuntimeError):
        return None

    def quantise(weight: Tensor) -> Nf4Weight:
        packed, state = quantize_4bit(weight.float().contiguous(), quant_type="nf4", compress_statistics=True)
        return Nf4Weight(
            packed=packed.reshape(-1),
            absmax=state.absmax,
            nested_code=state.state2.code,
            nested_absmax=state.state2.absmax,
            offset=float(state.offset),
            code=state.code,
            shape=(weight.shape[0], weight.shape[1]),
        )

    return f"bitsandbytes {bitsandbytes.__version__}", quantise


def default_quantiser() -> tuple[str, Quantiser]:
    """bitsandbytes' where it is installed, else our own; both write the same layout."""
    return bitsandbytes_quantiser() or ("fedblocks reference", quantize_nf4)


class Backbone:
    """The NF4 backbone of one base in one folder; use :meth:`open`. Nothing is held until :meth:`hold` says so."""

    def __init__(
        self, *, folder: Path, checkpoint: LayerSource, meta: dict[str, Any], device: torch.device = CPU
    ) -> None:
        self._folder = folder
        self.device = device
        """Packed bytes are moved there and decoded there."""
        self._checkpoint = checkpoint
        self._meta = meta
        self._most_bytes = _most_bytes(checkpoint.shape)
        self._layouts: dict[int, tuple[str, _Layout]] = {}  # layer -> hash and layout of its file
        self._verified: dict[int, _Mark] = {}  # layer -> its file as it was when its hash was right
        self._keep_decoded: frozenset[int] = frozenset()
        self._keep_packed: frozenset[int] = frozenset()
        self._keep_dtype = torch.float32
        self._decoded: dict[int, BlockWeights] = {}
        self._packed: dict[int, Stored] = {}
        self.remade: list[int] = []
        """Layers whose file failed its hash, or could not be read, and was made again."""

    @classmethod
    def open(
        cls,
        checkpoint: LayerSource,
        folder: Path,
        *,
        base_hash: str,
        quantiser: tuple[str, Quantiser] | None = None,
        device: torch.device = CPU,
    ) -> Backbone:
        """Opens the backbone under ``folder``, quantising what is not there yet.

        Args:
            folder: the client's cache folder; each base gets a folder of its own in it.
            base_hash: the base's content hash.
            quantiser: name and function; default :func:`default_quantiser`. Only called for files that are missing.
            device: where the layers are computed with.

        Raises:
            BackboneError: no room or no right to write.
        """
        home = folder / f"nf4-{base_hash[:16]}"
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(home / "lock"):
                meta = _read_meta(home, base_hash)
                for layer in range(checkpoint.shape.num_layers):
                    if str(layer) not in meta["files"] or not _file(home, layer).is_file():
                        quantiser = quantiser or default_quantiser()
                        _make(home, checkpoint, layer, meta, quantiser)
        except OSError as e:
            raise BackboneError(
                f"cannot write the 4-bit backbone into {home}: {e.strerror or e}; free space there or choose another "
                "cache folder"
            ) from e
        return cls(folder=home, checkpoint=checkpoint, meta=meta, device=device)

    @property
    def shape(self) -> ModelShape:
        """Sizes of the base."""
        return self._checkpoint.shape

    @property
    def digest(self) -> str:
        """SHA-256 over the layers' file hashes."""
        files: dict[str, str] = self._meta["files"]
        joined = "".join(files[str(layer)] for layer in range(self.shape.num_layers))
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def quantiser(self) -> str:
        """Which quantiser made the files."""
        return self._meta["quantiser"]

    def hold(self, *, decoded: Collection[int] = (), packed: Collection[int] = (), dtype: torch.dtype) -> None:
        """Chooses the layers that stay in memory from their next use on; all others that are held are dropped.

        Args:
            decoded: kept as :meth:`block` gives them, in ``dtype``.
            packed: kept as :meth:`packed` gives them: about 0.52 bytes per weight.
        """
        if dtype != self._keep_dtype:
            self._decoded.clear()
        self._keep_decoded, self._keep_packed, self._keep_dtype = frozenset(decoded), frozenset(packed), dtype
        for layer in self._decoded.keys() - self._keep_decoded:
            del self._decoded[layer]
        for layer in self._packed.keys() - self._keep_packed:
            del self._packed[layer]

    def release(self) -> None:
        """Drops everything that is held."""
        self.hold(dtype=self._keep_dtype)

    def block(self, layer: int, dtype: torch.dtype = torch.float32) -> BlockWeights:
        """One layer decoded to ``dtype``: the one that is held, else a new one.

        Raises:
            BackboneError: the file cannot be read, nor made again.
        """
        kept = layer in self._keep_decoded and dtype == self._keep_dtype
        if kept and layer in self._decoded:
            return self._decoded[layer]
        weights = BlockWeights.empty(self.shape, dtype, self.device)
        _decode(self.packed(layer), weights.named(self.shape), dtype)
        if kept:
            self._decoded[layer] = weights
        return weights

    def packed(self, layer: int) -> Stored:
        """One layer as stored: the one that is held, else read anew and checked.

        Raises:
            BackboneError: the file cannot be read, nor made again.
        """
        if layer in self._packed:
            return self._packed[layer]
        stored = self._views(layer, self._read(layer))
        if layer in self._keep_packed:
            self._packed[layer] = stored
        return stored

    def stream(self, layers: Iterable[int], dtype: torch.dtype) -> Generator[BlockWeights]:
        """These layers in turn, decoded to ``dtype``; what was given is valid until the next one is asked for.

        While a layer is used a thread reads the next ones, into two buffers that take turns; all layers are decoded
        into the same tensors. So two packed layers and one decoded one are in memory, however many layers there are.
        Layers that are held are neither read nor, where they are held decoded, decoded. The thread ends with the
        iterator, also with one that is closed or forgotten half-way.

        Raises:
            BackboneError: a file cannot be read, nor made again.
        """
        wanted = tuple(layers)
        held = self._keep_packed | (self._keep_decoded if dtype == self._keep_dtype else frozenset())
        unheld = [layer for layer in wanted if layer not in held]
        with _ReadAhead(self._read, unheld, self._most_bytes) as reader:
            weights: BlockWeights | None = None
            places: dict[str, Tensor] = {}
            for layer in wanted:
                if layer in held and layer not in self._keep_packed:
                    yield self.block(layer, dtype)
                    continue
                if weights is None:
                    weights = BlockWeights.empty(self.shape, dtype, self.device)
                    places = weights.named(self.shape)
                if layer in held:
                    _decode(self.packed(layer), places, dtype)
                else:
                    with reader.next() as data:
                        _decode(self._views(layer, data), places, dtype)
                yield weights

    def _views(self, layer: int, data: Tensor) -> Stored:
        """The tensors of a layer's file as views of its checked bytes, on the device; the header is parsed once."""
        file_hash = self._meta["files"][str(layer)]
        known = self._layouts.get(layer)
        if known is None or known[0] != file_hash:
            known = self._layouts[layer] = (file_hash, _Layout.of(data))
        return known[1].views(data.to(self.device))

    def _read(self, layer: int, buffer: Tensor | None = None) -> Tensor:
        """The checked bytes of a layer's file, (n,) uint8: at the start of ``buffer``, else in memory of their own."""
        path = _file(self._folder, layer)
        with contextlib.suppress(OSError):  # a file that is gone or a bad sector: a new file may do
            data, mark, file_hash = _read_file(path, buffer, self._most_bytes, self._verified.get(layer))
            if data is not None and file_hash in (None, self._meta["files"][str(layer)]):
                self._verified[layer] = mark
                return data
        self._verified.pop(layer, None)
        try:
            with _locked(self._folder / "lock"):
                made = _make(self._folder, self._checkpoint, layer, self._meta, default_quantiser())
        except OSError as e:
            raise BackboneError(f"cannot read {path}, nor write it again: {e.strerror or e}") from e
        self.remade.append(layer)
        data = torch.empty(len(made), dtype=torch.uint8) if buffer is None else buffer[: len(made)]
        return data.copy_(torch.frombuffer(bytearray(made), dtype=torch.uint8))


class DenseBackbone:
    """The unquantised base layers in one dtype, all in memory."""

    def __init__(self, checkpoint: LayerSource, base_hash: str = "", device: torch.device = CPU) -> None:
        self._checkpoint = checkpoint
        self.device = device
        self._base_hash = base_hash
        self._layers: dict[tuple[int, torch.dtype], BlockWeights] = {}

    @property
    def shape(self) -> ModelShape:
        """Sizes of the base."""
        return self._checkpoint.shape

    @property
    def digest(self) -> str:
        """Names the base itself."""
        return hashlib.sha256(f"dense {self._base_hash}".encode()).hexdigest()

    def hold(self, *, decoded: Collection[int] = (), packed: Collection[int] = (), dtype: torch.dtype) -> None:
        """Nothing to choose: every layer stays from its first use on."""

    def release(self) -> None:
        """Drops all layers."""
        self._layers.clear()

    def block(self, layer: int, dtype: torch.dtype = torch.float32) -> BlockWeights:
        """One layer cast to ``dtype``."""
        if (layer, dtype) not in self._layers:
            tensors = self._checkpoint.layer_tensors(layer)
            self._layers[layer, dtype] = BlockWeights.of(self.shape, tensors, dtype, self.device)
        return self._layers[layer, dtype]

    def packed(self, layer: int) -> Stored:
        """One layer as the checkpoint stores it: no matrix is NF4."""
        return {name: tensor.to(self.device) for name, tensor in self._checkpoint.layer_tensors(layer).items()}

    def stream(self, layers: Iterable[int], dtype: torch.dtype) -> Generator[BlockWeights]:
        """These layers in turn."""
        for layer in layers:
            yield self.block(layer, dtype)


class _ReadAhead:
    """A thread that reads layers in a given order, at most two ahead of their use; a context that ends with it.

    Args:
        read: (layer, buffer) -> the layer's bytes, at the start of the buffer; what it raises is raised by
            :meth:`next`.
        layers: which; the thread is only started for some.
        buffer_bytes: size of each of the two buffers.
    """

    def __init__(self, read: Callable[[int, Tensor], Tensor], layers: Sequence[int], buffer_bytes: int) -> None:
        self._free: SimpleQueue[Tensor | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Tensor, Tensor] | BaseException] = SimpleQueue()
        self._stopped = threading.Event()
        for _ in layers[:2]:
            self._free.put(torch.empty(buffer_bytes, dtype=torch.uint8))
        # The thread knows the queues and not this object, nor its user: what is forgotten can be collected.
        arguments = (read, layers, self._free, self._ready, self._stopped)
        self._thread = threading.Thread(target=_read_ahead, args=arguments, name="backbone-reader", daemon=True)
        if layers:
            self._thread.start()

    @contextlib.contextmanager
    def next(self) -> Iterator[Tensor]:
        """The next layer's bytes, valid inside the ``with``."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        buffer, data = item
        yield data
        self._free.put(buffer)

    def __enter__(self) -> _ReadAhead:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._free.put(None)  # wakes it if it waits
        # A garbage collection can end a forgotten stream in any thread, this one too.
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()


def _read_ahead(
    read: Callable[[int, Tensor], Tensor],
    layers: Sequence[int],
    free: SimpleQueue[Tensor | None],
    ready: SimpleQueue[tuple[Tensor, Tensor] | BaseException],
    stopped: threading.Event,
) -> None:
    for layer in layers:
        buffer = free.get()
        if buffer is None or stopped.is_set():
            return
        try:
            ready.put((buffer, read(layer, buffer)))
        except BaseException as e:  # noqa: BLE001 - raised in the thread that waits for the layer
            ready.put(e)
            return


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tensors of one layer's file lie."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], int, int]]
    """Name -> type, shape, start and end in the file, bytes."""
    states: Mapping[str, Mapping[str, Any]]
    """Suffix of each matrix -> what bitsandbytes calls its quantisation state."""

    @classmethod
    def of(cls, data: Tensor) -> _Layout:
        """From the bytes (n,) uint8 of a safetensors file of ours."""
        start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
        header: dict[str, Any] = json.loads(data[8:start].numpy().tobytes())
        tensors = {
            name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
        states: dict[str, Mapping[str, Any]] = {}
        for name, (_, _, first, end) in tensors.items():
            suffix, found, _ = name.partition(_STATE)
            if found:
                states[suffix] = json.loads(data[first:end].numpy().tobytes())
        return cls(tensors, states)

    def views(self, data: Tensor) -> Stored:
        """The layer's tensors in these bytes."""
        read: Stored = {}
        for name in self.tensors:
            if name in self.states:
                state = self.states[name]
                read[name] = Nf4Weight(
                    packed=self._view(data, name).reshape(-1),
                    absmax=self._view(data, f"{name}.absmax"),
                    nested_code=self._view(data, f"{name}.nested_quant_map"),
                    nested_absmax=self._view(data, f"{name}.nested_absmax"),
                    offset=state["nested_offset"],
                    code=self._view(data, f"{name}.quant_map"),
                    shape=tuple(state["shape"]),
                )
            elif name.endswith((".weight", ".bias")):
                read[name] = self._view(data, name)
        return read

    def _view(self, data: Tensor, name: str) -> Tensor:
        dtype, shape, start, end = self.tensors[name]
        part = data[start:end]
        if start % dtype.itemsize:
            part = part.clone()  # the format does not promise alignment, though the library's writer aligns
        return part.view(dtype).view(shape)


def _decode(stored: Stored, places: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes a layer, decoded to ``dtype``, into its places."""
    for name, tensor in stored.items():
        if isinstance(tensor, Nf4Weight):
            nf4_dequant(tensor, dtype, out=places[name])
        else:
            places[name].copy_(tensor)


def _read_file(
    path: Path, buffer: Tensor | None, most_bytes: int, known: _Mark | None
) -> tuple[Tensor | None, _Mark, str | None]:
    """The file's bytes, (n,) uint8, in ``buffer`` if there is one; what it was; its SHA-256.

    No bytes if it is longer than ``most_bytes`` or ends early; no hash, because none is computed, if it still is what
    was ``known``.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        mark = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if status.st_size > most_bytes:
            return None, mark, None
        data = torch.empty(status.st_size, dtype=torch.uint8) if buffer is None else buffer[: status.st_size]
        view = memoryview(data.numpy())
        digest = None if mark == known else hashlib.sha256()
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + READ_BYTES]], done)
            if got == 0:
                return None, mark, None
            if digest is not None:
                digest.update(view[done : done + got])
            done += got
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return data, mark, None if digest is None else digest.hexdigest()


def _most_bytes(shape: ModelShape) -> int:
    """No file of a layer is longer: what a buffer must hold, and what a damaged file may claim."""
    total = 1 << 16  # the header, at most 50 entries
    for spec in shape.block_tensors():
        size = math.prod(spec.shape)
        groups = -(-size // 64)
        tables = 4 * (256 + 16) + 512  # the two codes, the state in JSON
        nf4 = -(-size // 2) + groups + 4 * -(-groups // 256) + tables
        total += nf4 if len(spec.shape) == 2 else 4 * size
    return total


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


def _read_meta(folder: Path, base_hash: str) -> dict[str, Any]:
    fresh = {"format": FORMAT, "base_hash": base_hash, "quantiser": "", "files": {}}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fresh
    right = isinstance(meta, dict) and meta.get("format") == FORMAT and meta.get("base_hash") == base_hash
    return meta if right and isinstance(meta.get("files"), dict) else fresh


def _make(
    folder: Path, checkpoint: LayerSource, layer: int, meta: dict[str, Any], quantiser: tuple[str, Quantiser]
) -> bytes:
    """Quantises one layer, writes its file and then the meta file; the bytes written."""
    from safetensors.torch import save

    name, quantise = quantiser
    tensors: dict[str, Tensor] = {}
    for suffix, tensor in checkpoint.layer_tensors(layer).items():
        if tensor.dim() == 2:
            tensors |= _bitsandbytes_keys(suffix, quantise(tensor), tensor.dtype)
        else:
            tensors[suffix] = tensor.contiguous()
    data = save(tensors)
    write_durably(_file(folder, layer), data)
    meta["files"][str(layer)] = hashlib.sha256(data).hexdigest()
    meta["quantiser"] = name
    write_durably(folder / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())
    return data


def _bitsandbytes_keys(suffix: str, weight: Nf4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """One NF4 matrix under the key names that bitsandbytes saves."""
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": weight.offset,
    }
    return {
        suffix: weight.packed.unsqueeze(1).contiguous(),
        f"{suffix}.absmax": weight.absmax.contiguous(),
        f"{suffix}.quant_map": weight.code.clone(),  # our quantiser shares one table between weights
        f"{suffix}.nested_absmax": weight.nested_absmax.contiguous(),
        f"{suffix}.nested_quant_map": weight.nested_code.clone(),
        f"{suffix}{_STATE}": torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8),
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One maker per folder; others wait and then find the files."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Hides the package ``kernels``, with which bitsandbytes would look on a hub for a kernel while it is imported.

    A client never reaches for the network by itself; the one warning about the missing kernel says nothing to its user.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, module = logger.level, sys.modules.get("kernels", _ABSENT)
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment] # makes its import fail
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if module is not _ABSENT:
            sys.modules["kernels"] = module  # type: ignore[assignment]
