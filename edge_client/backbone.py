"""Where do the frozen base layers come from? From one NF4 file per layer, made once, checked by hash at every read.

The checkpoint is quantised layer by layer into bitsandbytes' layout (matrices NF4, norms and biases as stored), so that
at most one layer is in memory in full precision. A file that is torn or flipped is found by its SHA-256 and made again.
Two backbones answer the same questions: :class:`Backbone` with what a client computes with, and :class:`DenseBackbone`
with the unquantised weights, for the baselines and for the evaluation of an exported checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fedblocks.edge_client.decoder_block import BlockWeights
from fedblocks.kernels.ops import Nf4Weight, nf4_dequant, quantize_nf4
from fedblocks.profiles.model_shape import ModelShape
from fedblocks.protocol.durable import write_durably

FORMAT: Final = "fedblocks-nf4-1"
_ABSENT: Final = object()

Quantiser = Callable[[Tensor], Nf4Weight]


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
    def digest(self) -> str:
        """What these weights are, for cache keys: equal digests mean equal decoded bits."""
        ...

    def block(self, layer: int, dtype: torch.dtype) -> BlockWeights:
        """One layer's weights, decoded."""
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
    """The NF4 backbone of one base in one folder.

    Use :meth:`open`. ``resident`` decoded layers are kept; the least recently used one goes first.
    """

    def __init__(self, *, folder: Path, checkpoint: LayerSource, meta: dict[str, Any], resident: int) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._meta = meta
        self._resident = resident
        self._decoded: OrderedDict[tuple[int, torch.dtype], BlockWeights] = OrderedDict()
        self.remade: list[int] = []
        """Layers whose file failed its hash and was made again."""

    @classmethod
    def open(
        cls,
        checkpoint: LayerSource,
        folder: Path,
        *,
        base_hash: str,
        resident: int | None = None,
        quantiser: tuple[str, Quantiser] | None = None,
    ) -> Backbone:
        """Opens the backbone under ``folder``, quantising what is not there yet.

        Args:
            folder: the client's cache folder; each base gets a folder of its own in it.
            base_hash: the base's content hash.
            resident: how many decoded layers to keep in memory; None keeps all, 0 none.
            quantiser: name and function; default :func:`default_quantiser`. Only called for files that are missing.

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
        keep = checkpoint.shape.num_layers if resident is None else resident
        return cls(folder=home, checkpoint=checkpoint, meta=meta, resident=keep)

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

    def block(self, layer: int, dtype: torch.dtype = torch.float32) -> BlockWeights:
        """One layer decoded to ``dtype``, from memory if it is resident.

        Raises:
            BackboneError: the file cannot be read, nor made again.
        """
        key = (layer, dtype)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        weights = BlockWeights.empty(self.shape, dtype)
        places = weights.named(self.shape)
        for name, tensor in self.stored(layer).items():
            if isinstance(tensor, Nf4Weight):
                nf4_dequant(tensor, dtype, out=places[name])
            else:
                places[name].copy_(tensor)
        if self._resident:
            self._decoded[key] = weights
            while len(self._decoded) > self._resident:
                self._decoded.popitem(last=False)
        return weights

    def block_weights(self, layer: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """One layer decoded, suffix -> tensor."""
        return self.block(layer, dtype).named(self.shape)

    def stored(self, layer: int) -> dict[str, Nf4Weight | Tensor]:
        """One layer as stored: suffix -> NF4 matrix, or vector in the checkpoint's precision. Verified by hash.

        Raises:
            BackboneError: the file cannot be read, nor made again.
        """
        from safetensors.torch import load

        path = _file(self._folder, layer)
        try:
            data = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(data).hexdigest() != self._meta["files"][str(layer)]:
                with _locked(self._folder / "lock"):
                    data = _make(self._folder, self._checkpoint, layer, self._meta, default_quantiser())
                self.remade.append(layer)
        except OSError as e:
            raise BackboneError(f"cannot read {path}, nor write it again: {e.strerror or e}") from e
        return _from_bitsandbytes_keys(load(data))


class DenseBackbone:
    """The unquantised base layers in one dtype, all in memory."""

    def __init__(self, checkpoint: LayerSource, base_hash: str = "") -> None:
        self._checkpoint = checkpoint
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

    def block(self, layer: int, dtype: torch.dtype = torch.float32) -> BlockWeights:
        """One layer cast to ``dtype``."""
        if (layer, dtype) not in self._layers:
            self._layers[layer, dtype] = BlockWeights.of(self.shape, self._checkpoint.layer_tensors(layer), dtype)
        return self._layers[layer, dtype]


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
        f"{suffix}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode("utf-8")), dtype=torch.uint8
        ),
    }


def _from_bitsandbytes_keys(tensors: Mapping[str, Tensor]) -> dict[str, Nf4Weight | Tensor]:
    """The inverse of :func:`_bitsandbytes_keys` for a whole layer."""
    read: dict[str, Nf4Weight | Tensor] = {}
    for name, tensor in tensors.items():
        if f"{name}.absmax" in tensors:
            state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
            read[name] = Nf4Weight(
                packed=tensor.reshape(-1),
                absmax=tensors[f"{name}.absmax"],
                nested_code=tensors[f"{name}.nested_quant_map"],
                nested_absmax=tensors[f"{name}.nested_absmax"],
                offset=state["nested_offset"],
                code=tensors[f"{name}.quant_map"],
                shape=tuple(state["shape"]),
            )
        elif name.endswith((".weight", ".bias")):
            read[name] = tensor
    return read


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
