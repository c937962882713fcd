"""Is a checkpoint read exactly, hashed by its content, and refused when it is not what it should be?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedblocks.edge_client import checkpoint as module
from fedblocks.edge_client.checkpoint import (
    Checkpoint,
    CheckpointError,
    HubUnreachableError,
    base_hash,
    initial_block,
)
from fedblocks.protocol.expansion import ExpansionError, plan_expansion

Factory = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint(tmp_path)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Reading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_that_the_safetensors_library_reads(
    tmp_path: Path, tiny_checkpoint: Factory, dtype: str, shards: int
) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2", dtype=dtype, shards=shards)
    checkpoint = Checkpoint.open(folder)
    seen: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                expected = f.get_tensor(name)
                got = checkpoint.tensor(name)
                assert got.dtype == expected.dtype == checkpoint.dtype
                assert torch.equal(got, expected)
                assert (
                    b"".join(bytes(c) for c in checkpoint.chunks(name)) == expected.view(torch.uint8).numpy().tobytes()
                )
                seen.add(name)
    assert checkpoint.names() == tuple(sorted(seen))


def test_a_tensor_longer_than_one_chunk_is_whole(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    folder = tiny_checkpoint(tmp_path, layers=3, vocab=5000)
    checkpoint = Checkpoint.open(folder)
    name = "model.embed_tokens.weight"
    chunks = [bytes(c) for c in checkpoint.chunks(name)]
    assert [len(c) for c in chunks] == [1 << 20, 5000 * 64 * 4 - (1 << 20)]
    assert b"".join(chunks) == checkpoint.tensor(name).numpy().tobytes()


def test_a_buffer_is_read_into_again_and_must_match(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    buffer = torch.empty(192, 64)
    for layer in range(4):
        name = checkpoint.layer_name(layer, "mlp.up_proj.weight")
        checkpoint.read_into(name, buffer)
        assert torch.equal(buffer, checkpoint.tensor(name))
    for wrong in (buffer.half(), torch.empty(191, 64), torch.empty(64, 192).t()):
        with pytest.raises(ValueError, match="needs a contiguous F32 tensor"):
            checkpoint.read_into(checkpoint.layer_name(0, "mlp.up_proj.weight"), wrong)


EMBEDDING = "model.embed_tokens.weight"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(0, 127), max_size=40))
def test_rows_are_those_of_the_whole_matrix_in_any_order_with_repeats(folder: Path, indices: list[int]) -> None:
    checkpoint = Checkpoint.open(folder)
    got = checkpoint.rows(EMBEDDING, np.array(indices, dtype=np.int64), torch.float32)
    assert got.shape == (len(indices), 64)
    assert torch.equal(got, checkpoint.tensor(EMBEDDING)[indices])


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_cast_as_the_whole_matrix_would_be(
    tmp_path: Path, tiny_checkpoint: Factory, stored: str, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, dtype=stored, shards=2))
    indices = np.array([5, 127, 0, 5])
    expected = checkpoint.tensor(EMBEDDING).to(dtype)[torch.from_numpy(indices)]
    got = checkpoint.rows(EMBEDDING, indices, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_only_these_rows_are_read_and_neighbours_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(folder)
    start, real, calls = checkpoint.stored[EMBEDDING].offset, os.preadv, []

    def noted(fd: int, buffers: Any, offset: int) -> int:
        calls.append(((offset - start) // 256, len(buffers[0]) // 256))  # first row, rows
        return real(fd, buffers, offset)

    monkeypatch.setattr(module.os, "preadv", noted)
    checkpoint.rows(EMBEDDING, np.array([9, 3, 127, 4, 3, 0, 5]), torch.float32)
    assert calls == [(0, 1), (3, 3), (9, 1), (127, 1)]
    calls.clear()
    assert checkpoint.rows(EMBEDDING, np.array([], dtype=np.int64), torch.float32).shape == (0, 64)
    assert calls == []


@pytest.mark.parametrize(("indices", "wrong"), [([0, -1], "-1"), ([127, 128], "128"), ([-5, 500], "-5")])
def test_an_index_that_is_no_row_is_refused(folder: Path, indices: list[int], wrong: str) -> None:
    with pytest.raises(IndexError, match=f"index {wrong} of model.embed_tokens.weight, expected 0 to 127"):
        Checkpoint.open(folder).rows(EMBEDDING, np.array(indices), torch.float32)


def test_rows_of_what_is_no_matrix_or_of_a_changed_file_are_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(ValueError, match="expected a matrix"):
        checkpoint.rows("model.norm.weight", np.array([0]), torch.float32)
    with pytest.raises(KeyError):
        checkpoint.rows("model.norm", np.array([0]), torch.float32)
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.rows(EMBEDDING, np.array([0]), torch.float32)


def test_a_layer_has_the_tensors_of_the_shape_in_its_order(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    layer = checkpoint.layer_tensors(2)
    assert [(n, tuple(t.shape)) for n, t in layer.items()] == [
        (s.name, s.shape) for s in checkpoint.shape.block_tensors()
    ]
    assert torch.equal(layer["self_attn.q_proj.weight"], checkpoint.tensor("model.layers.2.self_attn.q_proj.weight"))


def test_a_weight_file_that_changes_while_in_use_is_noticed(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.tensor("model.norm.weight")


# The base hash


def test_another_shard_layout_is_the_same_base(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    hashes = {base_hash(tiny_checkpoint(tmp_path, shards=shards)) for shards in (1, 2, 3)}
    assert len(hashes) == 1


def test_comments_and_unrelated_fields_leave_the_base_hash(folder: Path) -> None:
    before = base_hash(folder)
    edit_config(folder, _name_or_path="elsewhere", transformers_version="9", use_cache=False, comment="mine")
    assert base_hash(folder) == before


def test_a_checkpoint_saved_again_by_transformers_is_the_same_base(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    from transformers import AutoModelForCausalLM

    for family in ("llama", "mistral", "qwen2", "qwen3"):
        folder = tiny_checkpoint(tmp_path, family)
        again = tmp_path / f"again-{family}"
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
        shutil.copy(folder / "tokenizer.json", again)
        assert base_hash(again) == base_hash(folder)


def test_one_weight_one_shape_one_token_each_change_the_base_hash(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int32)[3] ^= 1

    variants = [tiny_checkpoint(tmp_path) for _ in range(5)]
    edit_tensors(variants[1], flip)
    edit_config(variants[2], rms_norm_eps=1e-6)
    edit_config(variants[3], rope_theta=20000.0)
    tokenizer = variants[4] / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    assert len({base_hash(folder) for folder in variants}) == 5
    assert Checkpoint.open(variants[4]).tokenizer_hash != Checkpoint.open(variants[0]).tokenizer_hash


def test_the_base_hash_is_computed_once_until_a_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = base_hash(folder, cache)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "chunks", lambda *_: pytest.fail("weights were read"))
        assert base_hash(folder, cache) == first
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert base_hash(folder, cache) != first
    for entry in cache.iterdir():
        entry.write_text("{ damaged")
    assert base_hash(folder, cache) == base_hash(folder)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert base_hash(folder, file / "below") == base_hash(folder)


# The initial value of a block (E7)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_block_begins_as_its_source_layer_with_zeroed_out_tensors(
    tmp_path: Path, tiny_checkpoint: Factory, family: str, dtype: str
) -> None:
    config = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, family, dtype=dtype, config=config))
    plan = plan_expansion(base_hash="0" * 64, config=checkpoint.config, placement="thirds", num_blocks=3)
    block = initial_block(checkpoint, plan, 2)
    assert list(block) == [spec.name for spec in checkpoint.shape.block_tensors()]
    for spec in checkpoint.shape.block_tensors():
        source = checkpoint.tensor(f"model.layers.1.{spec.name}")
        assert block[spec.name].dtype == torch.float32
        assert source.any()
        if spec.is_out:
            assert not block[spec.name].any()
        else:
            assert torch.equal(block[spec.name].to(source.dtype), source)


def test_the_initial_value_has_the_same_bits_in_every_process_and_with_every_thread_count(folder: Path) -> None:
    code = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[2]))
from fedblocks.edge_client.checkpoint import Checkpoint, initial_block
from fedblocks.protocol.expansion import plan_expansion
checkpoint = Checkpoint.open(sys.argv[1])
plan = plan_expansion(base_hash="0" * 64, config=checkpoint.config, placement="thirds", num_blocks=3)
digest = hashlib.sha256()
for block_id in plan.block_ids:
    for name, value in initial_block(checkpoint, plan, block_id).items():
        digest.update(name.encode() + value.numpy().tobytes())
print(digest.hexdigest())
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), threads], stdout=subprocess.PIPE, text=True)
        for threads in ("1", "2")
    ]
    assert len({process.communicate()[0] for process in running}) == 1
    assert all(process.returncode == 0 for process in running)


def test_a_plan_for_another_model_is_refused(folder: Path, tmp_path: Path, tiny_checkpoint: Factory) -> None:
    other = Checkpoint.open(tiny_checkpoint(tmp_path, layers=5))
    plan = plan_expansion(base_hash="0" * 64, config=other.config, placement="top", num_blocks=1)
    with pytest.raises(CheckpointError, match="the plan was made for"):
        initial_block(Checkpoint.open(folder), plan, 0)


# What is refused


def test_a_pickled_checkpoint_is_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        Checkpoint.open(folder)


def test_a_folder_without_weights_or_configuration_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder, and no hub id"):
        Checkpoint.open(tmp_path / "nowhere" / "at" / "all")


def test_a_base_without_tokenizer_json_is_told_how_to_make_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*AutoTokenizer"):
        base_hash(folder)


def test_a_hub_id_without_a_network_is_unreachable_with_exit_code_3() -> None:
    with pytest.raises(HubUnreachableError, match=r"some-org/some-model.*hub cannot be reached") as e:
        Checkpoint.open("some-org/some-model")
    assert e.value.exit_code == 3


def test_a_hub_id_is_opened_from_its_local_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(repo_id: str, **patterns: list[str]) -> str:
        asked.append(repo_id)
        assert "*.bin" not in patterns["allow_patterns"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Checkpoint.open("some-org/some-model").folder == folder
    assert asked == ["some-org/some-model"]


def test_a_model_that_cannot_be_expanded_is_refused_before_its_weights_are_read(folder: Path) -> None:
    edit_config(folder, model_type="mixtral")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ExpansionError) as e:
        Checkpoint.open(folder)
    assert e.value.code == "E_EXPAND_MOE"


def test_quantised_checkpoints_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="the weights are quantised"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.norm.weight"), "has a tensor 'model.norm.weight', this has none"),
        (lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), "layers.3.mlp.up_proj.weight', this has none"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "is no part of a llama model"),
        (lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(64)}), "is no part of a llama model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"has shape \[65\], config.json means \[64\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).double()}), "is stored as F64"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.int8)}), "is stored as I8"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_named(folder: Path, change: Any, text: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.open(folder)


def test_computed_buffers_and_a_stored_tied_head_are_tolerated(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(folder, add)
    assert "lm_head.weight" in Checkpoint.open(folder).names()


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"has a tensor 'lm_head\.weight', this has none"):
        Checkpoint.open(folder)


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i["weight_map"].pop("model.norm.weight"), "disagree about the tensor 'model.norm.weight'"),
        (lambda i: i["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}), "disagree .* 'ghost'"),
        (lambda i: i["weight_map"].update({"ghost": "../model.safetensors"}), "expected a file name"),
        (lambda i: i["weight_map"].update({"ghost": 3}), "expected a file name"),
        (
            lambda i: i["weight_map"].update({"ghost": "gone.safetensors"}),
            "gone.safetensors: this weight file is missing",
        ),
        (lambda i: i["weight_map"].clear(), "weight_map is missing or empty"),
        (lambda i: i.clear(), "weight_map is missing or empty"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, tiny_checkpoint: Factory, change: Any, text: str
) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    rewrite_index(folder, change)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.open(folder)


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: h[NORM].update(data_offsets=[-4, 252]), "has shape"),
        (lambda h: h[NORM].update(data_offsets=[0, 1 << 63]), "has shape"),
        (lambda h: h[NORM].update(data_offsets=[0, 255]), "needs 256 bytes"),
        (lambda h: h[NORM].update(data_offsets=[0.0, 256.0]), "has shape"),
        (lambda h: h[NORM].update(data_offsets=[0]), "has shape"),
        (lambda h: h[NORM].update(data_offsets=[o - 4 for o in h[NORM]["data_offsets"]]), "hole or an overlap"),
        (lambda h: h[NORM].update(data_offsets=[o + (1 << 40) for o in h[NORM]["data_offsets"]]), "hole or an overlap"),
        (lambda h: h[NORM].update(shape=[1 << 61, 1 << 61]), "needs"),
        (lambda h: h[NORM].update(shape=[True] * 64), "has shape"),
        (lambda h: h[NORM].update(shape="64"), "has shape"),
        (lambda h: h[NORM].update(dtype="F4"), "has type 'F4'"),
        (lambda h: h[NORM].update(dtype=["F32"]), "has type"),
        (lambda h: h[NORM].update(extra=1), "is not dtype, shape, data_offsets"),
        (lambda h: h.pop(NORM), "hole or an overlap|the tensors end at byte"),
        (lambda _: b"[]", "header is no map"),
        (lambda _: b"{", "header is no JSON"),
        (lambda _: b"\xff\xfe", "header is no JSON"),
        (lambda _: b"[" * 100_000, "header is no JSON"),
        (lambda h: json.dumps(h).encode()[:-1] + b', "model.norm.weight": {}}', "a name occurs twice"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(folder: Path, change: Any, text: str) -> None:
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:7],
        lambda raw: raw[:8],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:],
        lambda raw: (0).to_bytes(8, "little") + raw[8:],
    ],
)
def test_a_file_that_is_cut_or_longer_is_refused(folder: Path, damage: Any) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="no valid safetensors file"):
        Checkpoint.open(folder)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 4000), new=st.binary(min_size=1, max_size=6))
def test_any_damaged_header_is_refused_or_harmless(folder: Path, at: int, new: bytes) -> None:
    file = folder / "model.safetensors"
    original = file.read_bytes()
    try:
        file.write_bytes(original[:at] + new + original[at + len(new) :])
        try:
            checkpoint = Checkpoint.open(folder)
        except CheckpointError:
            return
        for name in checkpoint.names():
            checkpoint.tensor(name)
    finally:
        file.write_bytes(original)


def test_a_configuration_that_is_no_json_object_is_refused(folder: Path) -> None:
    for text in ("", "[]", "{"):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            Checkpoint.open(folder)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Checkpoint.open(folder).tensor(NORM)
    real = os.preadv
    monkeypatch.setattr(module.os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    assert torch.equal(Checkpoint.open(folder).tensor(NORM), expected)


@pytest.mark.shared
def test_the_story_model_beside_the_checkout_is_read() -> None:
    folder = Path(__file__).parents[2].parent / "shared/data/models/stories260K"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    assert Checkpoint.open(folder).shape.total_parameters == 260_032
    assert len(base_hash(folder)) == 64
