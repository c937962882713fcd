"""What is in the base checkpoint, and is it the base of this run?

A :class:`Checkpoint` is a Hugging Face folder with safetensors weights. Tensors are read with ``pread`` into memory of
ours, never mapped: mapped pages would count as resident. Pickled weights, quantised weights and code that comes with a
model are refused, not run.

CheckpointError            this folder cannot be used as a base (exit 2)
└── HubUnreachableError    the hub was asked for it and did not answer (exit 3)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedblocks.edge_client.affine_migration import migrated
from fedblocks.profiles.model_shape import ModelShape, TensorSpec
from fedblocks.protocol.expansion import ExpansionPlan, base_fields, family_of, shape_from_config

#: Bytes per element of the types that the safetensors format knows.
_ITEM_SIZE: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
#: The types that a full-precision checkpoint is stored in; each becomes fp32 without rounding.
TORCH_DTYPE: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: The limit of the safetensors library itself.
_MAX_HEADER_BYTES: Final = 100_000_000
_READ_BYTES: Final = 1 << 20
#: Buffers that old checkpoints saved beside the weights; the model's class computes them itself.
_COMPUTED: Final = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
#: The same of encoders; whole numbers, and no part of the base.
_COUNTED: Final = "embeddings.position_ids"


class CheckpointError(Exception):
    """This folder cannot be used as a base checkpoint; the text says why and what to do."""

    exit_code = 2


class HubUnreachableError(CheckpointError):
    """The base is not on this machine and the hub could not be reached."""

    exit_code = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """Name in the safetensors format: ``F32``, ``BF16``, ``F16``."""
    shape: tuple[int, ...]
    offset: int
    """From the start of the file, bytes."""
    num_bytes: int


class Checkpoint:
    """A base checkpoint on disk; :meth:`open` checks everything that does not need the weights themselves."""

    def __init__(
        self, folder: Path, config: dict[str, Any], stored: dict[str, StoredTensor], marks: dict[Path, tuple[int, int]]
    ) -> None:
        self.folder = folder
        self.config = config
        self.shape: ModelShape = shape_from_config(config)
        self.stored = stored
        self._marks = marks
        family = family_of(config)
        self._prefix = family.layer_prefix
        self._embedding = family.embedding
        self.absorbed: dict[tuple[int, str], torch.Tensor] = {}
        """What ``affine_migration.py`` has computed of this base: vectors that are dear to compute again."""

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """The checkpoint in this folder, or of this hub id (``organisation/name``).

        Raises:
            ExpansionError: a model of this kind cannot be expanded.
            CheckpointError: the folder is not a full-precision safetensors checkpoint of that model.
            HubUnreachableError: a hub id that is not on this machine, and no hub.
        """
        path = _resolve(folder)
        config = _read_json_file(path / "config.json")
        shape_from_config(config)  # refuses what cannot be expanded before a weight file is looked at
        if config.get("quantization_config"):
            raise CheckpointError(
                f"{path}: config.json has a quantization_config, so the weights are quantised; expanded blocks start "
                "from full precision: use the fp32, bf16 or fp16 checkpoint of this model (clients quantise themselves)"
            )
        stored: dict[str, StoredTensor] = {}
        marks: dict[Path, tuple[int, int]] = {}
        for file, listed in _weight_files(path):
            found, marks[file] = _read_header(file)
            if listed is not None and listed != set(found):
                odd = min(listed ^ set(found))
                raise CheckpointError(
                    f"{path}: model.safetensors.index.json and {file.name} disagree about the tensor {odd!r}; "
                    "copy the checkpoint again"
                )
            stored |= found
        stored.pop(_COUNTED, None)
        checkpoint = cls(path, config, stored, marks)
        checkpoint._check_tensors()
        return checkpoint

    def _check_tensors(self) -> None:
        """Exactly the tensors of the model's class, with the sizes that the configuration gives."""
        shape = self.shape
        expected: dict[str, tuple[int, ...]] = {self._embedding: (shape.vocab_size, shape.hidden_size)}
        if shape.encoder:
            expected |= _encoder_tensors(self.config)
        else:
            expected["model.norm.weight"] = (shape.hidden_size,)
        for layer in range(shape.num_layers):
            for spec in shape.block_tensors():
                expected[self.layer_name(layer, spec.name)] = spec.shape
        head: dict[str, tuple[int, ...]] = {"lm_head.weight": expected[self._embedding]}
        if shape.encoder:  # the embedding does not need it; it is carried along
            head = {"pooler.dense.weight": (shape.hidden_size,) * 2, "pooler.dense.bias": (shape.hidden_size,)}
        if not shape.tied_embeddings:
            expected |= head
        for name in expected:
            if name not in self.stored:
                if f"bert.{name}" in self.stored:
                    raise CheckpointError(
                        f"{self.folder}: holds a BERT with a head of its own (tensor {f'bert.{name}'!r}); save the "
                        f"encoder alone: AutoModel.from_pretrained({str(self.folder)!r}).save_pretrained(NEW_FOLDER)"
                    )
                raise CheckpointError(
                    f"{self.folder}: a {shape.family} checkpoint has a tensor {name!r}, this has none"
                )
        for name, tensor in self.stored.items():
            if tensor.dtype not in TORCH_DTYPE:
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} is stored as {tensor.dtype}, expected one of "
                    f"{', '.join(TORCH_DTYPE)}; use the full-precision checkpoint"
                )
            if _COMPUTED.fullmatch(name):
                continue
            size = expected.get(name) or head.get(name)  # a tied head may be stored once more
            if size is None:
                raise CheckpointError(
                    f"{self.folder}: holds a tensor {name!r}, which is no part of a {shape.family} model with this "
                    "config.json; use the unmodified full-precision checkpoint (adapters merged)"
                )
            if tensor.shape != size:
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} has shape {list(tensor.shape)}, config.json means {list(size)}"
                )

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files in the order of their names."""
        return tuple(self._marks)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding table, taken for that of the model."""
        return TORCH_DTYPE[self.stored[self._embedding].dtype]

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of tokenizer.json.

        Raises:
            CheckpointError: there is no such file.
        """
        file = self.folder / "tokenizer.json"
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{self.folder}: has no tokenizer.json; make one with transformers: "
                f"AutoTokenizer.from_pretrained({str(self.folder)!r}).save_pretrained({str(self.folder)!r})"
            ) from e

    def layer_name(self, layer: int, suffix: str) -> str:
        """The stored name of a tensor of a base layer."""
        return f"{self._prefix}.{layer}.{suffix}"

    def names(self) -> tuple[str, ...]:
        """All stored tensors, sorted."""
        return tuple(sorted(self.stored))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its stored type.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: its file changed since :meth:`open`.
        """
        spec = self.stored[name]
        out = torch.empty(spec.shape, dtype=TORCH_DTYPE[spec.dtype])
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """The same into ``out``, a contiguous CPU tensor of the stored type and as many elements.

        Raises:
            ValueError: ``out`` does not match.
        """
        spec = self.stored[name]
        if out.dtype != TORCH_DTYPE[spec.dtype] or out.nbytes != spec.num_bytes or not out.is_contiguous():
            raise ValueError(
                f"read_into: {name} needs a contiguous {spec.dtype} tensor of {spec.num_bytes} bytes, "
                f"got {out.dtype}, {out.nbytes} bytes"
            )
        if spec.num_bytes:
            view = memoryview(out.view(-1).view(torch.uint8).numpy())
            with self._open(spec.file) as fd:
                _read_exactly(fd, view, spec.offset)

    def rows(self, name: str, indices: npt.NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
        """Rows of a matrix, cast: (n, cols); only these rows are read, each once, neighbours together.

        Args:
            indices: (n,) int64, in any order, repeats allowed.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it is no matrix.
            IndexError: an index is not a row of it.
            CheckpointError: its file changed since :meth:`open`.
        """
        spec = self.stored[name]
        if len(spec.shape) != 2:
            raise ValueError(f"rows: {name} has shape {list(spec.shape)}, expected a matrix")
        unique, places = np.unique(indices, return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < spec.shape[0]:
            wrong = unique[0] if unique[0] < 0 else unique[-1]
            raise IndexError(f"rows: index {wrong} of {name}, expected 0 to {spec.shape[0] - 1}")
        found = torch.empty((len(unique), spec.shape[1]), dtype=TORCH_DTYPE[spec.dtype])
        if len(unique):
            row_bytes = spec.num_bytes // spec.shape[0]
            view = memoryview(found.view(-1).view(torch.uint8).numpy())
            starts = np.flatnonzero(np.diff(unique, prepend=-2) > 1).tolist()  # a row that does not follow another
            with self._open(spec.file) as fd:
                for start, stop in zip(starts, [*starts[1:], len(unique)], strict=True):
                    part = view[start * row_bytes : stop * row_bytes]
                    _read_exactly(fd, part, spec.offset + int(unique[start]) * row_bytes)
        return found.to(dtype).index_select(0, torch.from_numpy(places.reshape(-1)))

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The stored bytes of one tensor, at most 1 MiB at a time, in a buffer that is used again."""
        spec = self.stored[name]
        buffer = memoryview(bytearray(min(_READ_BYTES, spec.num_bytes)))
        with self._open(spec.file) as fd:
            for start in range(0, spec.num_bytes, _READ_BYTES):
                part = buffer[: min(_READ_BYTES, spec.num_bytes - start)]
                _read_exactly(fd, part, spec.offset + start)
                yield part

    def layer_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a base layer in their stored type, by suffix, in the order of ``block_tensors()``."""
        return {spec.name: self.tensor(self.layer_name(layer, spec.name)) for spec in self.shape.block_tensors()}

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[int]:
        with file.open("rb", buffering=0) as f:
            if _mark(os.fstat(f.fileno())) != self._marks[file]:
                raise CheckpointError(f"{file} has changed since it was opened; start again")
            yield f.fileno()


def base_hash(folder: str | Path, cache_dir: Path | None = None) -> str:
    """The content hash of a base: SHA-256 over all tensors (name, type, shape, bytes) in the order of their names, the
    configuration fields that bear on them, and tokenizer.json (design.md section 7).

    It does not depend on how tensors are spread over files. With ``cache_dir`` it is computed once and then taken from
    there for as long as path, size and modification time of every file stay the same.

    Raises:
        ExpansionError, CheckpointError: as :meth:`Checkpoint.open`.
    """
    checkpoint = Checkpoint.open(folder)
    tokenizer_hash = checkpoint.tokenizer_hash
    files = [checkpoint.folder / "config.json", checkpoint.folder / "tokenizer.json", *checkpoint.files]
    key = [[str(file.resolve()), *_mark(file.stat())] for file in files]
    entry = None
    if cache_dir is not None:
        path_hash = hashlib.sha256(str(checkpoint.folder.resolve()).encode()).hexdigest()
        entry = cache_dir / f"base-hash-1-{path_hash[:32]}.json"
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            cached = json.loads(entry.read_bytes())
            if cached["files"] == key:
                return str(cached["base_hash"])
    digest = hashlib.sha256(b"fedblocks-base-1\n")
    for name in checkpoint.names():
        spec = checkpoint.stored[name]
        digest.update(json.dumps([name, spec.dtype, spec.shape]).encode() + b"\n")
        for chunk in checkpoint.chunks(name):
            digest.update(chunk)
    digest.update(json.dumps(base_fields(checkpoint.config), sort_keys=True).encode() + b"\n")
    digest.update(tokenizer_hash.encode())
    result = digest.hexdigest()
    if entry is not None:
        with contextlib.suppress(OSError):  # a full or read-only disk costs time at the next start, nothing else
            entry.parent.mkdir(parents=True, exist_ok=True)
            new = entry.with_suffix(f".{os.getpid()}.tmp")
            new.write_text(json.dumps({"files": key, "base_hash": result}))
            new.replace(entry)
    return result


def initial_block(checkpoint: Checkpoint, plan: ExpansionPlan, block_id: int) -> dict[str, torch.Tensor]:
    """The value with which an expanded block starts: its source layer in fp32, the out-tensors zero (methods.md 2.4).

    Of an encoder it has absorbed the norms before it (2.6). Everybody with the same base has the same bits.

    Returns:
        suffix -> fp32 tensor, in the order of ``block_tensors()``.

    Raises:
        KeyError: the plan has no such block.
        CheckpointError: the plan is for a model of other sizes.
    """
    if plan.shape != checkpoint.shape:
        raise CheckpointError(
            f"{checkpoint.folder}: the plan was made for {plan.shape}, this checkpoint has {checkpoint.shape}"
        )
    return {spec.name: initial_tensor(checkpoint, plan, block_id, spec) for spec in checkpoint.shape.block_tensors()}


def initial_tensor(checkpoint: Checkpoint, plan: ExpansionPlan, block_id: int, spec: TensorSpec) -> torch.Tensor:
    """One tensor of :func:`initial_block`, fp32, in memory of its own."""
    if spec.is_out:
        return torch.zeros(spec.shape)
    if checkpoint.shape.encoder:
        return migrated(checkpoint, plan, block_id, spec.name)
    name = checkpoint.layer_name(plan.block(block_id).source_layer, spec.name)
    return checkpoint.tensor(name).to(torch.float32)


def at_strength(
    value: torch.Tensor, initial: Callable[[], torch.Tensor], spec: TensorSpec, strength: float
) -> torch.Tensor:
    """A block's fp32 tensor at this strength: out-tensors times it, the norms of a post-norm block moved so far from
    their initial value, all others as they are (methods.md 2.5, 2.6)."""
    if strength == 1.0:
        return value
    if spec.is_out:
        return value.mul_(strength)
    if spec.is_norm:
        start = initial()
        return start + strength * (value - start)
    return value


def _encoder_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What an encoder has below its layers, beside the words."""
    fields = base_fields(config)
    hidden = fields["hidden_size"]
    return {
        "embeddings.position_embeddings.weight": (fields["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (fields["type_vocab_size"], hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }


def _resolve(folder: str | Path) -> Path:
    """The folder itself, or the local copy of a hub repository."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    hub_id = str(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise CheckpointError(
            f"{folder}: no such folder, and no hub id of the form organisation/name; give the folder that holds "
            "config.json"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"],
                ignore_patterns=["*/*"],
            )
        )
    except (GatedRepoError, RepositoryNotFoundError, HFValidationError) as e:
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the hub does not give this model to you: {e}; check the name, "
            "or log in and accept its licence"
        ) from e
    except (OSError, RuntimeError) as e:
        raise HubUnreachableError(
            f"{hub_id}: no such folder here, no copy in the hub cache, and the hub cannot be reached "
            f"({type(e).__name__}); connect to the network, or copy the model's folder here and give its path"
        ) from e


def _weight_files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The weight files, sorted by name, each with the tensors that the index lists in it (None: there is no index)."""
    single = folder / "model.safetensors"
    if single.is_file():  # transformers prefers it too where both exist
        return [(single, None)]
    index_file = folder / "model.safetensors.index.json"
    if not index_file.is_file():
        pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).exists()]
        if pickled:
            raise CheckpointError(
                f"{folder}: the weights are in {pickled[0]}, a pickle, which can run code when it is read; convert it "
                f"on a machine where you trust it: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
                ".save_pretrained(NEW_FOLDER)"
            )
        raise CheckpointError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json is here; only safetensors weights "
            "are read"
        )
    weight_map = _read_json_file(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file}: weight_map is missing or empty; copy the checkpoint again")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
            raise CheckpointError(f"{index_file}: {name!r} is said to be in {file!r}, expected a file name")
        by_file.setdefault(file, set()).add(name)
    return [(folder / file, names) for file, names in sorted(by_file.items())]


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], tuple[int, int]]:
    """The tensors of one safetensors file and the file's mark; every offset is checked against the file's length.

    Format: 8 bytes length n of the header, little endian; n bytes JSON; then the data without holes or overlaps.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: no valid safetensors file: {what}; copy the checkpoint again")

    try:
        with file.open("rb", buffering=0) as f:
            status = os.fstat(f.fileno())
            prefix = bytearray(8)
            if status.st_size < len(prefix):
                raise refuse(f"{status.st_size} bytes long")
            _read_exactly(f.fileno(), memoryview(prefix), 0)
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > min(_MAX_HEADER_BYTES, status.st_size - 8):
                raise refuse(f"header of {header_bytes} bytes in a file of {status.st_size}")
            header = bytearray(header_bytes)
            _read_exactly(f.fileno(), memoryview(header), 8)
    except FileNotFoundError as e:
        raise CheckpointError(f"{file}: this weight file is missing; copy the checkpoint again") from e
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as e:
        raise refuse(f"header is no JSON ({e})") from e
    if not isinstance(entries, dict):
        raise refuse("header is no map")
    entries.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise refuse(f"entry {name!r} is not dtype, shape, data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_SIZE:
            raise refuse(f"{name!r} has type {dtype!r}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise refuse(f"{name!r} has shape {shape!r} at {offsets!r}")
        num_bytes = _ITEM_SIZE[dtype]
        for size in shape:
            num_bytes *= size
        if offsets[1] - offsets[0] != num_bytes:
            raise refuse(f"{name!r} needs {num_bytes} bytes and has the range {offsets!r}")
        tensors[name] = StoredTensor(
            file=file, dtype=dtype, shape=tuple(shape), offset=start + offsets[0], num_bytes=num_bytes
        )
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != end:
            raise refuse(f"the data before {name!r} has a hole or an overlap")
        end += tensor.num_bytes
    if end != status.st_size:
        raise refuse(f"the tensors end at byte {end}, the file at {status.st_size}")
    return tensors, _mark(status)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _read_json_file(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as e:
        raise CheckpointError(f"{file.parent}: has no {file.name}; give the folder of a Hugging Face model") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: no JSON: {e}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return content


def _mark(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from this offset; one call reads at most 2 GiB on Linux, so in a loop."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            raise CheckpointError(f"the weight file ended {len(buffer) - done} bytes too early; copy it again")
        done += got
