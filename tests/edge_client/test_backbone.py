"""Tests of edge_client/backbone.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

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


def layer_file(backbone_folder, layer):
    return next(backbone_folder.glob(f"nf4-*/layer-{layer:05d}.safetensors"))


def test_matrices_are_nf4_and_everything_else_keeps_its_precision(checkpoint, tmp_path):
    backbone = opened(checkpoint, tmp_path)
    stored = checkpoint.layer_tensors(1)
    for name, tensor in backbone.block_weights(1).items():
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
    assert torch.equal(backbone.block_weights(0, torch.bfloat16)[name], theirs)


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone", "empty"])
def test_a_damaged_file_is_found_by_its_hash_and_made_again(checkpoint, tmp_path, damage, monkeypatch):
    monkeypatch.setattr("fedblocks.edge_client.backbone.default_quantiser", lambda: OURS)
    backbone = opened(checkpoint, tmp_path, resident=0)
    digest, before = backbone.digest, backbone.block(1).gate_up
    file = layer_file(tmp_path, 1)
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    file.write_bytes({"flipped": bytes(data), "torn": bytes(data[:100])}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    assert torch.equal(backbone.block(1).gate_up, before)
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


def test_no_more_decoded_layers_stay_in_memory_than_were_asked_for(checkpoint, tmp_path):
    backbone = opened(checkpoint, tmp_path, resident=2)
    kept = [backbone.block(layer) for layer in (0, 1, 2)]
    assert backbone.block(2) is kept[2]
    assert backbone.block(1) is kept[1]
    assert backbone.block(0) is not kept[0]
    assert torch.equal(backbone.block(0).down, kept[0].down)


@pytest.mark.parametrize("hidden", [80, 96])
def test_widths_that_bitsandbytes_decodes_wrongly_are_right_here(tiny_checkpoint, tmp_path, hidden):
    checkpoint = Checkpoint.open(
        tiny_checkpoint(tmp_path, layers=1, hidden=hidden, intermediate=208, heads=2, kv_heads=1)
    )
    for i, quantiser in enumerate((default_quantiser(), OURS)):
        backbone = opened(checkpoint, tmp_path / str(i), quantiser=quantiser)
        for name, tensor in backbone.block_weights(0).items():
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
    theirs = opened(checkpoint, tmp_path / "a", quantiser=bitsandbytes_quantiser()).stored(0)
    for name, ours in opened(checkpoint, tmp_path / "b").stored(0).items():
        if hasattr(ours, "packed"):
            assert (ours.packed == theirs[name].packed).float().mean() > 0.999


def test_a_file_in_the_place_of_the_folder_is_an_error_that_names_it(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackboneError, match="choose another cache folder"):
        opened(checkpoint, tmp_path / "file")


def test_the_dense_backbone_holds_the_checkpoint_itself(checkpoint):
    backbone = DenseBackbone(checkpoint, BASE_HASH)
    for name, tensor in backbone.block(1, torch.bfloat16).named(backbone.shape).items():
        assert torch.equal(tensor, checkpoint.layer_tensors(1)[name])
    assert backbone.block(1, torch.bfloat16) is backbone.block(1, torch.bfloat16)
    assert backbone.digest != DenseBackbone(checkpoint, "0" * 64).digest
