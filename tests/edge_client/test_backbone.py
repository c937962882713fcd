"""Tests of edge_client/backbone.py."""

import gc
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from fedblocks.edge_client import backbone as module
from fedblocks.edge_client.backbone import (
    Backbone,
    BackboneError,
    DenseBackbone,
    bitsandbytes_quantiser,
    default_quantiser,
)
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.kernels.ops import nf4_dequant, quantize_nf4

BASE_HASH = "ab" * 32
OURS = ("ours", quantize_nf4)


def never(weight):
    raise AssertionError("quantised again")


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return Checkpoint.open(tiny_checkpoint(tmp_path, family="qwen2", layers=3, dtype="bfloat16"))


def opened(checkpoint, folder, **kwargs):
    return Backbone.open(checkpoint, folder, base_hash=BASE_HASH, **{"quantiser": OURS, **kwargs})


def named(backbone, layer, dtype=torch.float32):
    return backbone.block(layer, dtype).named(backbone.shape)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


def as_tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def tensor_is_nf4(tensor):
    return hasattr(tensor, "packed")


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "backbone-reader"]


def layer_file(backbone_folder, layer):
    return next(backbone_folder.glob(f"nf4-*/layer-{layer:05d}.safetensors"))


def test_matrices_are_nf4_and_everything_else_keeps_its_precision(checkpoint, tmp_path):
    backbone = opened(checkpoint, tmp_path)
    stored = checkpoint.layer_tensors(1)
    for name, tensor in named(backbone, 1).items():
        if tensor.dim() == 2:
            assert torch.equal(tensor, nf4_dequant(quantize_nf4(stored[name]), torch.float32))
            assert 0 < (tensor - stored[name].float()).norm() / stored[name].float().norm() < 0.15
        else:
            assert torch.equal(tensor, stored[name].float())


def test_the_base_is_quantised_once(checkpoint, tmp_path):
    first = opened(checkpoint, tmp_path)
    second = opened(checkpoint, tmp_path, quantiser=("never", never))
    assert second.digest == first.digest
    assert torch.equal(second.block(2).qkv, first.block(2).qkv)
    assert second.quantiser == "ours"


def test_the_files_are_what_bitsandbytes_saves(checkpoint, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    backbone = opened(checkpoint, tmp_path, quantiser=bitsandbytes_quantiser())
    tensors = load_file(layer_file(tmp_path, 0))
    name = "mlp.gate_proj.weight"
    parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    theirs = functional.dequantize_4bit(tensors[name], state)
    assert torch.equal(named(backbone, 0, torch.bfloat16)[name], theirs)


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone", "empty", "longer", "huge"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_damaged_file_is_found_by_its_hash_and_made_again(checkpoint, tmp_path, damage, streamed, monkeypatch):
    monkeypatch.setattr("fedblocks.edge_client.backbone.default_quantiser", lambda: OURS)
    backbone = opened(checkpoint, tmp_path)
    digest, before = backbone.digest, backbone.block(1).gate_up
    file = layer_file(tmp_path, 1)
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    file.write_bytes({"flipped": bytes(data), "torn": bytes(data[:100])}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    if damage == "longer":
        file.write_bytes(bytes(data) + b"\0")
    if damage == "huge":
        os.truncate(file, 1 << 40)  # sparse: must be refused before anything of that size is allocated
    if streamed:
        found = [weights.gate_up.clone() for weights in backbone.stream(range(3), torch.float32)][1]
    else:
        found = backbone.block(1).gate_up
    assert torch.equal(found, before)
    assert backbone.remade == [1]
    assert backbone.digest == digest
    again = opened(checkpoint, tmp_path, quantiser=("never", never))
    assert torch.equal(again.block(1).gate_up, before)
    assert again.remade == []


def test_a_making_that_was_killed_goes_on_where_it_stopped(checkpoint, tmp_path):
    made = []

    def dying(weight):
        made.append(weight)
        if len(made) > 10:  # in the second layer
            raise KeyboardInterrupt
        return quantize_nf4(weight)

    with pytest.raises(KeyboardInterrupt):
        opened(checkpoint, tmp_path, quantiser=("dying", dying))
    layers = []

    def counting(weight):
        layers.append(weight)
        return quantize_nf4(weight)

    backbone = opened(checkpoint, tmp_path, quantiser=("counting", counting))
    assert len(layers) == 14
    assert backbone.digest == opened(checkpoint, tmp_path / "other").digest


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}'])
def test_without_a_readable_meta_file_everything_is_made_again(checkpoint, tmp_path, content):
    digest = opened(checkpoint, tmp_path).digest
    next(tmp_path.glob("nf4-*/meta.json")).write_text(content)
    assert opened(checkpoint, tmp_path).digest == digest


def test_another_base_gets_a_folder_of_its_own(checkpoint, tmp_path):
    opened(checkpoint, tmp_path)
    Backbone.open(checkpoint, tmp_path, base_hash="cd" * 32, quantiser=OURS)
    assert len(list(tmp_path.glob("nf4-*"))) == 2
    for meta in tmp_path.glob("nf4-*/meta.json"):
        assert json.loads(meta.read_text())["base_hash"][:16] == meta.parent.name.removeprefix("nf4-")


def test_what_is_held_is_given_again_and_everything_else_is_made_anew(checkpoint, tmp_path):
    backbone = opened(checkpoint, tmp_path)
    assert backbone.block(0) is not backbone.block(0)
    backbone.hold(decoded=[0, 2], packed=[1], dtype=torch.float32)
    kept, packed = backbone.block(2), backbone.packed(1)
    assert backbone.block(2) is kept
    assert backbone.packed(1) is packed
    assert backbone.block(1) is not backbone.block(1)
    assert backbone.packed(0) is not backbone.packed(0)
    assert backbone.block(2, torch.bfloat16) is not backbone.block(2, torch.bfloat16)  # held in another type
    backbone.hold(decoded=[1, 2], packed=[], dtype=torch.float32)
    assert backbone.block(2) is kept
    assert backbone.packed(1) is not packed
    backbone.hold(decoded=[2], dtype=torch.bfloat16)
    assert backbone.block(2, torch.bfloat16) is backbone.block(2, torch.bfloat16)
    backbone.hold(decoded=[2], dtype=torch.float32)
    assert backbone.block(2) is not kept
    assert equal(backbone.block(2), kept)
    backbone.release()
    assert backbone.block(2) is not backbone.block(2)


def test_what_is_held_is_not_read_again(checkpoint, tmp_path):
    backbone = opened(checkpoint, tmp_path)
    backbone.hold(decoded=[0], packed=[1], dtype=torch.float32)
    expected = [backbone.block(layer) for layer in (0, 1)]
    for layer in (0, 1):
        layer_file(tmp_path, layer).unlink()
    assert equal(backbone.block(0), expected[0])
    assert equal(backbone.block(1), expected[1])
    streamed = backbone.stream((0, 1), torch.float32)
    assert next(streamed) is expected[0]
    assert equal(next(streamed), expected[1])
    assert backbone.remade == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [{}, {"packed": [1]}, {"decoded": [0]}, {"decoded": [2], "packed": [0, 2]}])
def test_streamed_layers_are_those_that_are_decoded_one_by_one(checkpoint, tmp_path, dtype, held):
    backbone = opened(checkpoint, tmp_path)
    expected = [backbone.block(layer, dtype) for layer in (2, 0, 1, 1)]
    backbone.hold(**held, dtype=torch.float32)
    for _ in range(2):
        count = 0
        for weights, wanted in zip(backbone.stream([2, 0, 1, 1], dtype), expected, strict=True):
            assert equal(weights, wanted)
            count += 1
        assert count == 4
        assert readers() == []


def test_a_stream_of_nothing_is_empty(checkpoint, tmp_path):
    assert list(opened(checkpoint, tmp_path).stream((), torch.float32)) == []


def test_a_stream_decodes_into_one_layer_and_reads_into_two_buffers(checkpoint, tmp_path, monkeypatch):
    backbone = opened(checkpoint, tmp_path)
    read, buffers, layers = backbone._read, set(), []

    def noted(layer, buffer):
        layers.append(layer)
        buffers.add(buffer.data_ptr())
        return read(layer, buffer)

    monkeypatch.setattr(backbone, "_read", noted)
    addresses = {weights.qkv.data_ptr() for weights in backbone.stream([0, 1, 2, 0, 1, 2], torch.float32)}
    assert layers == [0, 1, 2, 0, 1, 2]
    assert (len(addresses), len(buffers)) == (1, 2)
    buffers.clear()
    assert len(list(backbone.stream([1], torch.float32))) == len(buffers) == 1


def test_the_next_layers_are_read_while_one_is_used_and_never_over_it(checkpoint, tmp_path, monkeypatch):
    backbone = opened(checkpoint, tmp_path)
    expected = [backbone.block(layer) for layer in (0, 1, 2, 0, 1, 2)]
    read, done = backbone._read, threading.Semaphore(0)

    def noted(layer, buffer):
        data = read(layer, buffer)
        done.release()
        return data

    monkeypatch.setattr(backbone, "_read", noted)
    for i, weights in enumerate(backbone.stream([0, 1, 2, 0, 1, 2], torch.float32)):
        while done.acquire(timeout=0.05):  # everything that it may read ahead has been read
            pass
        assert equal(weights, expected[i])
        copy = [t.clone() for t in weights.tensors().values()]
        time.sleep(0.01)
        assert all(torch.equal(a, b) for a, b in zip(copy, weights.tensors().values(), strict=True))


def test_a_reader_is_never_more_than_two_layers_ahead(checkpoint, tmp_path, monkeypatch):
    backbone = opened(checkpoint, tmp_path)
    read, layers = backbone._read, []

    def noted(layer, buffer):
        layers.append(layer)
        return read(layer, buffer)

    monkeypatch.setattr(backbone, "_read", noted)
    for used, _ in enumerate(backbone.stream([0, 1, 2] * 3, torch.float32), 1):
        time.sleep(0.02)
        assert used <= len(layers) <= used + 2


@pytest.mark.parametrize("how", ["closed", "forgotten", "raised", "unstarted", "collected"])
def test_a_stream_that_is_abandoned_leaves_no_thread(checkpoint, tmp_path, how):
    backbone = opened(checkpoint, tmp_path)
    stream = backbone.stream([0, 1, 2] * 4, torch.float32)
    if how == "unstarted":
        del stream
        assert readers() == []
        return
    next(stream)
    time.sleep(0.05)  # the thread has read all that it may and waits
    if how == "closed":
        stream.close()
    elif how == "forgotten":
        del stream
    elif how == "collected":
        cycle = [stream]
        cycle.append(cycle)
        del stream, cycle
        gc.collect()
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError)
    assert readers() == []


def test_an_error_of_the_reading_thread_is_raised_where_the_layer_is_wanted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "default_quantiser", lambda: OURS)
    backbone = opened(checkpoint, tmp_path)

    def no_room(path, data):
        raise OSError(28, "No space left on device")

    layer_file(tmp_path, 1).unlink()
    monkeypatch.setattr(module, "write_durably", no_room)
    stream = backbone.stream([0, 1, 2], torch.float32)
    next(stream)
    with pytest.raises(BackboneError, match=r"layer-00001.*No space left"):
        next(stream)
    assert readers() == []


def test_a_file_that_cannot_be_read_is_made_again(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "default_quantiser", lambda: OURS)
    backbone = opened(checkpoint, tmp_path)
    expected = backbone.block(0)
    bad = layer_file(tmp_path, 0).stat().st_ino
    real = os.preadv

    def bad_sector(descriptor, buffers, offset):
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(module.os, "preadv", bad_sector)
    assert equal(backbone.block(0), expected)
    assert equal(backbone.block(0), expected)
    assert backbone.remade == [0]  # the new file lies elsewhere


def test_a_file_is_hashed_once_and_again_when_anything_about_it_has_changed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "default_quantiser", lambda: OURS)
    backbone = opened(checkpoint, tmp_path)
    real, hashed = module.hashlib.sha256, []

    def counting(*arguments):
        hashed.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(module.hashlib, "sha256", counting)
    expected = backbone.block(0)
    assert len(hashed) == 1
    assert [equal(weights, expected) for weights in backbone.stream([0, 1, 0], torch.float32)][::2] == [True, True]
    assert len(hashed) == 2
    file = layer_file(tmp_path, 0)
    os.utime(file)
    assert equal(backbone.block(0), expected)
    assert len(hashed) == 3
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-5] ^= 8
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as long and as old as before
    assert equal(backbone.block(0), expected)
    assert backbone.remade == [0]
    assert len(hashed) >= 4


def test_short_reads_are_continued(checkpoint, tmp_path, monkeypatch):
    backbone = opened(checkpoint, tmp_path)
    expected, real = backbone.block(0), os.preadv
    monkeypatch.setattr(module.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:1001]], at))
    assert equal(backbone.block(0), expected)
    assert backbone.remade == []


def test_the_pages_of_a_file_are_given_back_after_reading(checkpoint, tmp_path, monkeypatch):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system has no posix_fadvise")
    backbone = opened(checkpoint, tmp_path)
    advice = []
    monkeypatch.setattr(module.os, "posix_fadvise", lambda *arguments: advice.append(arguments[1:]))
    list(backbone.stream([0, 1], torch.float32))
    assert advice == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2


def test_a_file_without_alignment_is_read_too(checkpoint, tmp_path):
    backbone = opened(checkpoint, tmp_path)
    data = layer_file(tmp_path, 0).read_bytes()
    length = int.from_bytes(data[:8], "little")
    moved = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    expected = backbone.packed(0)
    for name, tensor in module._Layout.of(as_tensor(moved)).views(as_tensor(moved)).items():
        for part in ("packed", "absmax", "nested_absmax", "nested_code", "code") if tensor_is_nf4(tensor) else ():
            assert torch.equal(getattr(tensor, part), getattr(expected[name], part))
        if not tensor_is_nf4(tensor):
            assert torch.equal(tensor, expected[name])


def test_the_longest_possible_file_fits_the_buffers(tiny_checkpoint, tmp_path):
    for family in ("llama", "qwen2", "qwen3"):
        for hidden in (64, 80):
            base = Checkpoint.open(tiny_checkpoint(tmp_path, family, layers=1, hidden=hidden, heads=2, kv_heads=1))
            opened(base, tmp_path / base.folder.name / "cache")
            size = layer_file(tmp_path / base.folder.name / "cache", 0).stat().st_size
            assert size <= module._most_bytes(base.shape) <= size + (1 << 16) + 7 * 512


@pytest.mark.parametrize("hidden", [80, 96])
def test_widths_that_bitsandbytes_decodes_wrongly_are_right_here(tiny_checkpoint, tmp_path, hidden):
    checkpoint = Checkpoint.open(
        tiny_checkpoint(tmp_path, layers=1, hidden=hidden, intermediate=208, heads=2, kv_heads=1)
    )
    for i, quantiser in enumerate((default_quantiser(), OURS)):
        backbone = opened(checkpoint, tmp_path / str(i), quantiser=quantiser)
        for name, tensor in named(backbone, 0).items():
            exact = checkpoint.layer_tensors(0)[name]
            assert (tensor - exact).norm() / exact.norm() < 0.12


def test_without_bitsandbytes_our_own_quantiser_serves(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert bitsandbytes_quantiser() is None
    assert default_quantiser() == ("fedblocks reference", quantize_nf4)
    assert Backbone.open(checkpoint, tmp_path, base_hash=BASE_HASH).quantiser == "fedblocks reference"


NO_NETWORK = """
import socket, sys
def refuse(*args): raise SystemExit("reached for the network")
socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])  # a stand-in for the package that would download
from fedblocks.edge_client.backbone import bitsandbytes_quantiser
print(bitsandbytes_quantiser()[0])
import kernels
print(kernels.__name__)
"""


def test_importing_bitsandbytes_is_silent_and_never_asks_a_hub(tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    raise SystemExit('asked the hub')\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.split("\n")[0].startswith("bitsandbytes ")
    assert done.stdout.split("\n")[1] == "kernels"  # visible again for whoever else wants it


def test_our_codes_are_those_of_bitsandbytes_on_nearly_all_elements_of_a_layer(checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    theirs = opened(checkpoint, tmp_path / "a", quantiser=bitsandbytes_quantiser()).packed(0)
    for name, ours in opened(checkpoint, tmp_path / "b").packed(0).items():
        if hasattr(ours, "packed"):
            assert (ours.packed == theirs[name].packed).float().mean() > 0.999


def test_a_file_in_the_place_of_the_folder_is_an_error_that_names_it(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackboneError, match="choose another cache folder"):
        opened(checkpoint, tmp_path / "file")


def test_the_dense_backbone_holds_the_checkpoint_itself(checkpoint):
    backbone = DenseBackbone(checkpoint, BASE_HASH)
    for name, tensor in named(backbone, 1, torch.bfloat16).items():
        assert torch.equal(tensor, checkpoint.layer_tensors(1)[name])
        assert torch.equal(tensor, backbone.packed(1)[name])
    backbone.hold(decoded=[0], packed=[2], dtype=torch.float32)
    kept = backbone.block(1, torch.bfloat16)
    assert [weights is kept for weights in backbone.stream([0, 1], torch.bfloat16)] == [False, True]
    backbone.release()
    assert backbone.block(1, torch.bfloat16) is not kept
    assert backbone.digest != DenseBackbone(checkpoint, "0" * 64).digest


MEASURED = """
import sys
import torch
from pathlib import Path
from fedblocks.edge_client.backbone import Backbone
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.memory import PeakMemory, anonymous_bytes, give_back_freed_memory
from fedblocks.kernels.ops import quantize_nf4
torch.set_num_threads(1)
checkpoint = Checkpoint.open(sys.argv[1])
backbone = Backbone.open(checkpoint, Path(sys.argv[2]), base_hash="0" * 64, quantiser=("ours", quantize_nf4))
list(backbone.stream([0], torch.float32))
give_back_freed_memory()
start = anonymous_bytes()
highest = 0
with PeakMemory(start) as memory:
    for weights in backbone.stream([0, 1] * 6, torch.float32):
        highest = max(highest, anonymous_bytes() - start)
    del weights
give_back_freed_memory()
print(highest, memory.peak_bytes, anonymous_bytes() - start)
"""


def test_a_stream_takes_two_packed_layers_and_a_decoded_one_however_many_it_gives(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(tmp_path, layers=2, hidden=512, intermediate=2048, dtype="bfloat16")
    shape = Checkpoint.open(folder).shape
    decoded = 4 * sum(torch.Size(spec.shape).numel() for spec in shape.block_tensors())
    packed = module._most_bytes(shape)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # glibc then keeps nothing of what is freed
    )
    between, peak, after = map(int, done.stdout.split())
    assert between <= decoded + 2 * packed + (1 << 20)  # less than a third packed layer
    assert peak <= decoded + 2 * packed + (4 << 20)  # and a slice of a matrix while it is decoded
    assert after <= 1 << 20
