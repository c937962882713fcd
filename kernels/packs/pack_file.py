"""What is in a pack: the compiled kernels for one compute capability, in one file that is checked before it is used.

    magic (16), version u32, bytes of the index u32, bytes of the body u64, sha256 of index and body (32)
    index: zlib of a JSON object
    body: one xz stream of all images, one after the other

All numbers are little-endian. The index says what each image is, where it lies in the body once that is unpacked, and
its sha256. Equal images are stored once. One stream serves all, because the variants of a kernel resemble each other:
a third of the bytes that single ones take. No code is in the index, and nothing in it is believed unchecked.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

from fedblocks.kernels.catalog import Variant

MAGIC: Final = b"fedblocks-pack\r\n"  # a file that was taken for text loses the \r
VERSION: Final = 1
MAX_FILE: Final = 16 << 20
MAX_INDEX: Final = 4 << 20
"""Bytes of the index once unpacked."""
MAX_BODY: Final = 64 << 20
"""Bytes of the body once unpacked."""
MAX_ENTRIES: Final = 10_000
_MEMORY: Final = 96 << 20
"""Bytes that unpacking the body may take; it takes the dictionary and a little more."""
_HEADER: Final = struct.Struct("<16sIIQ32s")
_DICTIONARY: Final = 4 << 20
"""Bytes that the packer may look back; the unpacker holds as many."""
TYPES: Final = frozenset(
    {"*bf16", "*fp16", "*fp32", "*fp64", "*u8", "*i8", "*i16", "*i32", "*i64", "i32", "i64", "fp32"}
)
"""Types of parameters: pointers to elements, or numbers passed by value."""

Form = Literal["aligned", "general"]


class PackError(ValueError):
    """A pack that cannot be used; the message names the file, what is wrong with it, and what to do."""


@dataclass(frozen=True, slots=True)
class Image:
    """Where an image lies in the unpacked body: bytes from its start, bytes, sha256."""

    offset: int
    length: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One compiled form of a kernel.

    Args:
        form: what it assumes of its arguments: ``aligned``, that those in ``divisible_by_16`` are; else nothing.
        params: name and type of each argument, in order. Two null pointers follow them at a launch.
        symbol: the name to ask the module for.
        shared: dynamic shared memory of a program, bytes.
        registers: of one thread.
        spilled: bytes of stack and local memory of one thread.
        source: sha256 of the source that was compiled.
        cubin: machine code for the pack's capability, and no other.
        ptx: the same for GPUs to come, which the driver translates; most packs have none.
    """

    kernel: str
    variant: Variant
    form: Form
    params: tuple[tuple[str, str], ...]
    divisible_by_16: tuple[str, ...]
    symbol: str
    shared: int
    registers: int
    spilled: int
    source: str
    cubin: Image
    ptx: Image | None = None

    @property
    def name(self) -> str:
        """``swiglu bf16-BLOCK_1024-w4 aligned``."""
        return f"{self.kernel} {self.variant.name} {self.form}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """What made a pack.

    Args:
        ptx: version of the PTX, ``8.5``.
        elf_abi: version of the machine code's ABI.
        min_driver: the oldest driver that loads the machine code, as cuDriverGetVersion tells it (12080 for 12.8).
        min_driver_ptx: the oldest that translates the PTX.
    """

    triton: str
    ptxas: str
    ptx: str
    elf_abi: int
    min_driver: int
    min_driver_ptx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A pack whose every checksum was right."""

    capability: int
    toolchain: Toolchain
    entries: tuple[Entry, ...]
    body: bytes = field(repr=False)

    def image(self, image: Image) -> bytes:
        """The bytes of a cubin, or of a PTX text with its closing zero."""
        return self.body[image.offset : image.offset + image.length]


def file_name(capability: int) -> str:
    """``sm_87.pack``."""
    return f"sm_{capability}.pack"


FOLDER: Final = Path(__file__).parent
"""Where the packs lie that come with this package."""


def sizes(folder: Path = FOLDER) -> dict[int, int]:
    """Compute capability -> bytes of its pack, of those that there are."""
    found = ((int(path.stem.removeprefix("sm_")), path.stat().st_size) for path in folder.glob("sm_*.pack"))
    return dict(sorted(found))


def encode(
    capability: int,
    toolchain: Toolchain,
    entries: Iterable[tuple[Mapping[str, Any], bytes, bytes | None]],
) -> bytes:
    """A pack's file. The same arguments give the same bytes on one build of xz and zlib.

    Args:
        entries: fields of :class:`Entry` but for the images, the cubin, and the PTX where it is to be carried.
    """
    body, places = bytearray(), dict[bytes, Image]()

    def place(image: bytes) -> Image:
        digest = hashlib.sha256(image)
        if digest.digest() not in places:
            places[digest.digest()] = Image(len(body), len(image), digest.hexdigest())
            body.extend(image)
        return places[digest.digest()]

    listed = list(entries)
    cubins = [place(cubin) for _, cubin, _ in listed]
    texts = [None if ptx is None else place(ptx) for _, _, ptx in listed]
    rows = [
        _row(Entry(**fields, cubin=cubin, ptx=ptx))
        for (fields, _, _), cubin, ptx in zip(listed, cubins, texts, strict=True)
    ]
    names = Toolchain.__dataclass_fields__
    return seal(
        {
            "capability": capability,
            "toolchain": {name: getattr(toolchain, name) for name in names},
            "body": len(body),
            "entries": rows,
        },
        bytes(body),
    )


def seal(index: Mapping[str, Any], body: bytes) -> bytes:
    """The file of an index and an unpacked body, neither of them checked."""
    import lzma

    text = json.dumps(index, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    packed_index = zlib.compress(text.encode("ascii"), 9)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": _DICTIONARY}]
    packed_body = lzma.compress(body, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)
    digest = hashlib.sha256(packed_index + packed_body).digest()
    return _HEADER.pack(MAGIC, VERSION, len(packed_index), len(packed_body), digest) + packed_index + packed_body


def read(capability: int, folder: Path = FOLDER) -> Pack | None:
    """The pack for a capability, or None where ``folder`` has none.

    Raises:
        PackError: the file is not a pack, is damaged, or is for another capability.
        OSError: it cannot be read.
    """
    path = folder / file_name(capability)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        return None
    try:
        pack = decode(data)
        if pack.capability != capability:
            raise PackError(f"is for capability {pack.capability}, expected {capability}")
    except PackError as error:
        raise PackError(f"{path.name}: {error}; install the package again") from None
    return pack


def decode(data: bytes) -> Pack:
    """Checks everything that a file says about itself.

    Raises:
        PackError: with what is wrong; the message names no file.
    """
    if len(data) > MAX_FILE:
        raise PackError(f"has more than {MAX_FILE} bytes")
    if len(data) < _HEADER.size:
        raise PackError(f"has {len(data)} bytes, fewer than a header's {_HEADER.size}")
    magic, version, index_bytes, body_bytes, digest = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise PackError(f"begins with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise PackError(f"has format version {version}, expected {VERSION}")
    if len(data) != (expected := _HEADER.size + index_bytes + body_bytes):
        raise PackError(f"has {len(data)} bytes, its header says {expected}: it was cut off or added to")
    content = memoryview(data)[_HEADER.size :]
    if hashlib.sha256(content).digest() != digest:
        raise PackError("has another sha256 than its header says: it is damaged")
    index = _index(content[:index_bytes])
    body = _body(content[index_bytes:], _whole(index, "body", MAX_BODY))
    entries = tuple(_entry(row, number) for number, row in enumerate(_rows(index)))
    for entry in entries:
        for kind, image in (("cubin", entry.cubin), ("PTX", entry.ptx)):
            if image is not None:
                _check_image(f"{entry.name}: its {kind}", image, body)
    keys = [(entry.kernel, entry.variant, entry.form) for entry in entries]
    if len(set(keys)) != len(keys):
        raise PackError("lists an entry twice")
    return Pack(capability=_whole(index, "capability", 1000), toolchain=_toolchain(index), entries=entries, body=body)


def _check_image(what: str, image: Image, body: bytes) -> None:
    if image.length == 0 or image.offset + image.length > len(body):
        raise PackError(f"{what} lies at {image.offset} + {image.length}, the body has {len(body)} bytes")
    found = hashlib.sha256(memoryview(body)[image.offset : image.offset + image.length]).hexdigest()
    if found != image.sha256:
        raise PackError(f"{what} has sha256 {found[:16]}..., the index says {image.sha256[:16]}...")


def _index(packed: memoryview) -> dict[str, Any]:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, MAX_INDEX)
        if not unpacker.eof or unpacker.unused_data:
            raise PackError(f"has an index of more than {MAX_INDEX} bytes, or one that does not end")
        index = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"has an index that cannot be read ({error})") from None
    if not isinstance(index, dict):
        raise PackError(f"has an index that is a {type(index).__name__}, expected an object")
    return cast("dict[str, Any]", index)


def _body(packed: memoryview, expected: int) -> bytes:
    try:
        import lzma
    except ImportError as error:
        raise PackError(f"cannot be unpacked: this Python was built without lzma ({error})") from None
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        body = unpacker.decompress(packed, max_length=expected + 1)
    except lzma.LZMAError as error:
        raise PackError(f"has a body that cannot be unpacked ({error})") from None
    if len(body) != expected or not unpacker.eof or unpacker.unused_data:
        raise PackError(f"has a body of {len(body)} bytes or more, its index says {expected}")
    return body


# ---- the index: JSON both ways ----


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kernel": entry.kernel,
        "dtype": entry.variant.dtype,
        "constexprs": dict(entry.variant.constexprs),
        "num_warps": entry.variant.num_warps,
        "form": entry.form,
        "params": [list(param) for param in entry.params],
        "divisible_by_16": list(entry.divisible_by_16),
        "symbol": entry.symbol,
        "shared": entry.shared,
        "registers": entry.registers,
        "spilled": entry.spilled,
        "source": entry.source,
        "cubin": [entry.cubin.offset, entry.cubin.length, entry.cubin.sha256],
    }
    return row if entry.ptx is None else row | {"ptx": [entry.ptx.offset, entry.ptx.length, entry.ptx.sha256]}


def _rows(index: dict[str, Any]) -> list[Any]:
    rows = index.get("entries")
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_ENTRIES:
        raise PackError(f"lists no entries, or more than {MAX_ENTRIES}")
    return cast("list[Any]", rows)


def _entry(row: object, number: int) -> Entry:
    try:
        if not isinstance(row, dict):
            raise PackError(f"is a {type(row).__name__}, expected an object")
        fields = cast("dict[str, Any]", row)
        form, constexprs = _text(fields, "form"), fields.get("constexprs")
        if form not in ("aligned", "general"):
            raise PackError(f"has the form {form!r}, expected aligned or general")
        if not isinstance(constexprs, dict) or not all(type(value) is int for value in constexprs.values()):
            raise PackError(f"has the constexprs {constexprs!r}, expected names and whole numbers")
        params = tuple((_text_of(name), _text_of(kind)) for name, kind in fields["params"])
        unknown = sorted({kind for _, kind in params} - TYPES)
        if unknown:
            raise PackError(f"has arguments of the type {unknown[0]!r}, expected one of {', '.join(sorted(TYPES))}")
        divisible = tuple(_text_of(name) for name in fields["divisible_by_16"])
        if (form == "general" and divisible) or not {name for name, _ in params}.issuperset(divisible):
            raise PackError(
                f"has the arguments {divisible} divisible by 16, its form is {form}, its arguments {params}"
            )
        return Entry(
            kernel=_text(fields, "kernel"),
            variant=Variant(
                _text(fields, "dtype"), tuple(sorted(constexprs.items())), _whole(fields, "num_warps", 32, least=1)
            ),
            form=form,
            params=params,
            divisible_by_16=divisible,
            symbol=_text(fields, "symbol"),
            shared=_whole(fields, "shared", 1 << 20),
            registers=_whole(fields, "registers", 255),
            spilled=_whole(fields, "spilled", 1 << 20),
            source=_text(fields, "source"),
            cubin=_image(fields["cubin"]),
            ptx=_image(fields["ptx"]) if "ptx" in fields else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise PackError(f"entry {number} of its index {said}") from None


def _image(value: object) -> Image:
    match value:
        case [int(offset), int(length), str(sha256)] if 0 <= offset <= MAX_BODY and 0 <= length <= MAX_BODY:
            return Image(offset, length, sha256)
        case _:
            raise PackError(f"has an image {value!r}, expected [offset, length, sha256]")


def _toolchain(index: dict[str, Any]) -> Toolchain:
    said = index.get("toolchain")
    if not isinstance(said, dict):
        raise PackError(f"names the toolchain {said!r}, expected an object")
    fields = cast("dict[str, Any]", said)
    return Toolchain(
        triton=_text(fields, "triton"),
        ptxas=_text(fields, "ptxas"),
        ptx=_text(fields, "ptx"),
        elf_abi=_whole(fields, "elf_abi", 255),
        min_driver=_whole(fields, "min_driver", 1_000_000),
        min_driver_ptx=_whole(fields, "min_driver_ptx", 1_000_000),
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise PackError(f"lacks {name}")
    return _text_of(fields[name])


def _text_of(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isascii():
        raise PackError(f"has {value!r}, expected 1 to 200 ASCII characters")
    return value


def _whole(fields: Mapping[str, Any], name: str, most: int, least: int = 0) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise PackError(f"has {name} {value!r}, expected a whole number from {least} to {most}")
    return value
