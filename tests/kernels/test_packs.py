"""Tests of kernels/packs/, and of the packs that come with the package."""

import hashlib
import json
import lzma
import struct
import zlib

import pytest

from fedblocks.kernels import build_packs
from fedblocks.kernels import compile as ahead
from fedblocks.kernels.catalog import KERNELS, TARGETS
from fedblocks.kernels.packs import pack_file
from fedblocks.kernels.packs.pack_file import PackError

TOOLS = pack_file.Toolchain(
    triton="3.7.1", ptxas="12.6.85", ptx="8.5", elf_abi=7, min_driver=12000, min_driver_ptx=12050
)


def fields(kernel="swiglu", place=0, form="aligned"):
    chosen = KERNELS[kernel]
    divisible = [param.name for param in chosen.params if param.is_pointer or param.by_16]
    return {
        "kernel": kernel,
        "variant": chosen.variants[place],
        "form": form,
        "params": tuple(chosen.signature(chosen.variants[place].dtype).items()),
        "divisible_by_16": tuple(divisible if form == "aligned" else ()),
        "symbol": kernel,
        "shared": 512,
        "registers": 40,
        "spilled": 0,
        "source": "ab" * 32,
    }


def a_file():
    return pack_file.encode(
        87,
        TOOLS,
        [
            (fields(), b"one image" * 40, b".version 8.5\n\0"),
            (fields(place=1), b"another image" * 40, None),
            (fields("square_norm", form="general"), b"one image" * 40, None),
        ],
    )


def parts(data):
    """Index and unpacked body of a file."""
    _, _, index_bytes, _, _ = struct.unpack_from("<16sIIQ32s", data)
    return json.loads(zlib.decompress(data[64 : 64 + index_bytes])), lzma.decompress(data[64 + index_bytes :])


# ---- the format ----


def test_what_is_written_is_read_again():
    pack = pack_file.decode(a_file())
    assert (pack.capability, pack.toolchain) == (87, TOOLS)
    first, second, third = pack.entries
    assert pack.image(first.cubin) == b"one image" * 40
    assert pack.image(second.cubin) == b"another image" * 40
    assert pack.image(first.ptx) == b".version 8.5\n\0"
    assert second.ptx is None
    assert first.variant == KERNELS["swiglu"].variants[0]
    assert first.params == (("gate_up", "*bf16"), ("h", "*bf16"), ("width", "i32"))
    assert first.divisible_by_16 == ("gate_up", "h", "width")
    assert (third.form, third.divisible_by_16) == ("general", ())
    assert first.name == "swiglu bf16-BLOCK_1024-w4 aligned"
    assert third.cubin == first.cubin  # equal images are stored once


def test_equal_content_gives_equal_bytes():
    assert a_file() == a_file()


def test_damage_anywhere_is_found():
    data = a_file()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        with pytest.raises(PackError):
            pack_file.decode(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(PackError):
            pack_file.decode(data[:length])
    with pytest.raises(PackError, match="cut off or added to"):
        pack_file.decode(data + b"\0")


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, b"\x7fELF", "begins with .*ELFlocks-pack"),
        (14, b"\n\n", "begins with"),
        (16, b"\x02\0\0\0", "has format version 2, expected 1"),
        (20, b"\xff\xff\xff\xff", "cut off or added to"),
        (24, b"\0\0\0\0", "cut off or added to"),
        (40, b"\0\0\0\0", "has another sha256 than its header says: it is damaged"),
        (70, b"\0\0\0\0", "has another sha256"),
        (-8, b"\0\0\0\0", "has another sha256"),
    ],
)
def test_damage_is_named(place, value, reason):
    data = bytearray(a_file())
    place %= len(data)
    data[place : place + len(value)] = value
    with pytest.raises(PackError, match=reason):
        pack_file.decode(bytes(data))


def sealed(change):
    """The file after ``change`` of the index, its outer checksums right."""
    index, body = parts(a_file())
    change(index)
    return pack_file.seal(index, body)


def of_entry(**changed):
    return lambda index: index["entries"][0].update(changed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            of_entry(cubin=[0, 360, "00" * 32]),
            r"swiglu bf16-BLOCK_1024-w4 aligned: its cubin has sha256 \w+\.\.\., the",
        ),
        (of_entry(cubin=[1, 360, hashlib.sha256(b"one image" * 40).hexdigest()]), "its cubin has sha256"),
        (of_entry(cubin=[0, 10_000, "00" * 32]), r"its cubin lies at 0 \+ 10000, the body has 8\d\d bytes"),
        (of_entry(cubin=[0, 0, "00" * 32]), "its cubin lies at"),
        (of_entry(cubin=[-1, 5, "00" * 32]), "entry 0 of its index has an image"),
        (of_entry(cubin=[0, 1 << 40, "00" * 32]), "has an image"),
        (of_entry(cubin="all"), "has an image 'all', expected"),
        (of_entry(ptx=[0, 5, "00" * 32]), "its PTX has sha256"),
        (of_entry(kernel=7), "entry 0 of its index has 7, expected 1 to 200 ASCII characters"),
        (of_entry(symbol=""), "expected 1 to 200 ASCII"),
        (of_entry(form="other"), "has the form 'other', expected aligned or general"),
        (of_entry(form="general"), "divisible by 16, its form is general"),
        (of_entry(divisible_by_16=["nothing"]), "divisible by 16, its form is aligned"),
        (of_entry(divisible_by_16=5), "entry 0 of its index"),
        (of_entry(params=[["gate_up", "*bf32"]]), r"has arguments of the type '\*bf32', expected one of"),
        (of_entry(params=[["gate_up"]]), "entry 0 of its index"),
        (of_entry(constexprs={"BLOCK": "1024"}), "has the constexprs"),
        (of_entry(num_warps=0), "has num_warps 0, expected a whole number from 1 to 32"),
        (of_entry(shared=-1), "has shared -1"),
        (of_entry(registers=True), "has registers True"),
        (lambda index: index["entries"][0].pop("source"), "entry 0 of its index lacks source"),
        (lambda index: index["entries"][0].pop("cubin"), "entry 0 of its index lacks 'cubin'"),
        (lambda index: index["entries"].append(index["entries"][0]), "lists an entry twice"),
        (lambda index: index["entries"].append([]), "entry 3 of its index is a list"),
        (lambda index: index.update(entries=[]), "lists no entries"),
        (lambda index: index.update(entries={}), "lists no entries"),
        (lambda index: index.update(body=10), "has a body of 11 bytes or more, its index says 10"),
        (lambda index: index.update(body=5000), "its index says 5000"),
        (lambda index: index.update(body=1 << 40), "has body 1099511627776, expected a whole number from 0 to"),
        (lambda index: index.update(capability="87"), "has capability '87'"),
        (lambda index: index.update(toolchain=None), "names the toolchain None"),
        (lambda index: index["toolchain"].pop("ptxas"), "lacks ptxas"),
    ],
)
def test_index_is_not_believed(change, reason):
    with pytest.raises(PackError, match=reason):
        pack_file.decode(sealed(change))


def wrapped(index, body):
    """A file of packed parts with right checksums."""
    digest = hashlib.sha256(index + body).digest()
    return struct.pack("<16sIIQ32s", pack_file.MAGIC, 1, len(index), len(body), digest) + index + body


def test_parts_that_cannot_be_unpacked_are_named():
    index, body = parts(a_file())
    good_index, good_body = zlib.compress(json.dumps(index).encode()), lzma.compress(body)
    pack_file.decode(wrapped(good_index, good_body))
    for bad_index, reason in [
        (b"", "an index that does not end|one that does not end"),
        (good_index[:-9], "one that does not end"),
        (good_index + b"x", "one that does not end"),
        (b"not packed", "has an index that cannot be read"),
        (zlib.compress(b"{"), "has an index that cannot be read"),
        (zlib.compress(b"\xff"), "has an index that cannot be read"),
        (zlib.compress(b"[" * 100_000), "has an index that cannot be read"),
        (zlib.compress(b"[]"), "has an index that is a list, expected an object"),
        (zlib.compress(b" " * (pack_file.MAX_INDEX + 1)), "has an index of more than 4194304 bytes"),
    ]:
        with pytest.raises(PackError, match=reason):
            pack_file.decode(wrapped(bad_index, good_body))
    for bad_body, reason in [
        (b"not packed, and longer than a header", "has a body that cannot be unpacked"),
        (good_body[:-9], "has a body of"),
        (good_body + b"x", "has a body of"),
        (lzma.compress(body + b"x"), "has a body of"),
    ]:
        with pytest.raises(PackError, match=reason):
            pack_file.decode(wrapped(good_index, bad_body))


def test_file_for_another_capability_or_none(tmp_path):
    assert pack_file.read(87, tmp_path) is None
    (tmp_path / "sm_86.pack").write_bytes(a_file())
    with pytest.raises(PackError, match=r"sm_86\.pack: is for capability 87, expected 86; install the package again"):
        pack_file.read(86, tmp_path)
    (tmp_path / "sm_87.pack").write_bytes(a_file())
    assert pack_file.read(87, tmp_path).capability == 87
    with (tmp_path / "sm_80.pack").open("wb") as file:
        file.truncate(pack_file.MAX_FILE + 1)
    with pytest.raises(PackError, match=r"sm_80\.pack: has more than 16777216 bytes"):
        pack_file.read(80, tmp_path)


# ---- the packs of the package ----


@pytest.fixture(scope="module")
def packs():
    return {capability: pack_file.read(capability) for capability in TARGETS}


def test_there_is_a_pack_for_every_target_and_all_are_small(packs):
    assert all(packs.values())
    assert {path.name for path in pack_file.FOLDER.glob("*.pack")} == set(map(pack_file.file_name, TARGETS))
    assert sum(path.stat().st_size for path in pack_file.FOLDER.glob("*.pack")) < 2_000_000


@pytest.mark.parametrize("capability", TARGETS)
def test_pack_has_every_form_of_the_catalog(packs, capability):
    found = [(entry.kernel, entry.variant, entry.form) for entry in packs[capability].entries]
    assert found == [(job.kernel, job.variant, job.form) for job in ahead.jobs([capability])]


@pytest.mark.parametrize("capability", TARGETS)
def test_pack_was_made_of_the_present_sources(packs, capability):
    hashes = {name: ahead.source_hash(name) for name in KERNELS}
    stale = {entry.kernel for entry in packs[capability].entries if entry.source != hashes[entry.kernel]}
    assert not stale, f"the sources of {sorted(stale)} have changed since: run `make packs` and commit kernels/packs"


@pytest.mark.parametrize("capability", TARGETS)
def test_pack_agrees_with_the_catalog(packs, capability):
    budgets = json.loads(build_packs.BUDGETS.read_text())
    for entry in packs[capability].entries:
        kernel = KERNELS[entry.kernel]
        assert entry.params == tuple(kernel.signature(entry.variant.dtype).items())
        divisible = {param.name for param in kernel.params if param.is_pointer or param.by_16}
        assert set(entry.divisible_by_16) == (divisible if entry.form == "aligned" else set())
        assert entry.shared <= ahead.SHARED_LIMITS[capability] << 10
        assert entry.spilled <= build_packs.spill_allowed(budgets, entry.name, capability), entry.name


@pytest.mark.parametrize("capability", TARGETS)
def test_images_are_machine_code_for_the_target(packs, capability):
    pack = packs[capability]
    tools = pack.toolchain
    assert tools.ptxas == build_packs.PTXAS[capability]
    assert tools.triton == build_packs.TRITON
    assert (tools.elf_abi, tools.min_driver) == ((8, 12080) if capability == 120 else (7, 12000))
    for entry in pack.entries:
        cubin = pack.image(entry.cubin)
        assert cubin[:4] == b"\x7fELF"
        (machine,) = struct.unpack_from("<H", cubin, 18)
        assert (machine, cubin[8]) == (190, tools.elf_abi)  # EM_CUDA
        flags = struct.unpack_from("<I", cubin, 48)[0]
        assert capability in (flags & 0xFF, flags >> 8 & 0xFF), entry.name
        assert f".text.{entry.symbol}\0".encode() in cubin
        assert b"/site-packages" not in cubin
        assert b"/tmp" not in cubin


def test_ptx_is_carried_for_devices_to_come(packs):
    for capability, pack in packs.items():
        assert all((entry.ptx is not None) == (capability == 80) for entry in pack.entries)
    for entry in packs[80].entries:
        text = packs[80].image(entry.ptx)
        assert text.startswith(b".version 8.5\n.target sm_80\n")
        assert text.endswith(b"}\n\0")
        assert text.count(b"\0") == 1
        assert f".visible .entry {entry.symbol}(".encode() in text


def test_source_hash_passes_over_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "_SOURCES", tmp_path)
    found = []
    for text in ("x = 1\n", "# why\n\nx = 1  # because\n", "x = 2\n", "if x:\n    x = 1\n", "if x:\n        x = 1\n"):
        (tmp_path / "pointwise.py").write_text(text)
        found.append(ahead.source_hash("swiglu"))
    assert found[0] == found[1]
    assert len(set(found)) == 4
