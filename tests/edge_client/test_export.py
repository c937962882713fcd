"""Does the export load anywhere, hold the base untouched, and refuse to be written when it is not what it claims?"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedblocks.edge_client import export as module
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.export import (
    EXPORT_RECORD,
    ExportError,
    ExportSummary,
    base_names,
    build_base_hf,
    build_expanded_hf,
    export_hf,
    export_run,
    load_final,
    trained_part,
)
from fedblocks.protocol.expansion import ExpansionError, ExpansionPlan, plan_expansion
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.state import state_sha256
from fedblocks.protocol.tensors import flatten

Factory = Callable[..., Path]
State = dict[int, dict[str, np.ndarray]]

TOKENS = [[1, 5, 9, 77, 30, 31, 64, 100], [1, 127, 4, 4, 60, 8, 9, 10]]

#: What a user's own script would do, in a process where fedblocks cannot be imported.
USERS_SCRIPT = """
import json, sys
sys.modules["fedblocks"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = torch.tensor(json.loads(sys.argv[1]))
result = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    with torch.no_grad():
        result[folder] = model(tokens).logits
torch.save(result, sys.argv[2])
"""


def make_plan(checkpoint: Checkpoint, placement: Any = "thirds", num_blocks: int = 3) -> ExpansionPlan:
    return plan_expansion(
        base_hash=base_hash(checkpoint.folder), config=checkpoint.config, placement=placement, num_blocks=num_blocks
    )


def random_state(plan: ExpansionPlan, scale: float = 0.1) -> State:
    rng = np.random.default_rng(11)
    return {
        block_id: {
            spec.name: rng.normal(scale=scale, size=spec.shape).astype(np.float32)
            for spec in plan.shape.block_tensors()
        }
        for block_id in plan.block_ids
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    checkpoint: Checkpoint
    plan: ExpansionPlan
    state: State
    summary: ExportSummary
    reloaded: torch.Tensor
    """Logits of the user's process."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Factory) -> dict[str, Exported]:
    """Each family in fp32 and bf16, with blocks below and with blocks on top only; reloaded in one other process."""
    parent = tmp_path_factory.mktemp("exports")
    made: dict[str, dict[str, Any]] = {}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        for dtype in ("float32", "bfloat16"):
            for placement, num_blocks, strength in (("thirds", 3, 0.7), ("top", 2, 1.0)):
                tied = placement == "thirds"
                folder = tiny_checkpoint(parent, family, dtype=dtype, tied=tied, shards=1 if tied else 2)
                checkpoint = Checkpoint.open(folder)
                plan = make_plan(checkpoint, placement, num_blocks)
                state = random_state(plan)
                key = f"{family} {dtype} {placement}"
                summary = export_hf(
                    checkpoint=checkpoint,
                    plan=plan,
                    state=state,
                    strength=strength,
                    out=parent / key.replace(" ", "-"),
                    measured={"KL to the base, nats per token": 0.0123456789, "rounds": 12},
                )
                made[key] = {"checkpoint": checkpoint, "plan": plan, "state": state, "summary": summary}
    result = parent / "logits.pt"
    folders = [str(parts["summary"].path) for parts in made.values()]
    subprocess.run(
        [sys.executable, "-c", USERS_SCRIPT, json.dumps(TOKENS), str(result), *folders],
        check=True,
        cwd=parent,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    reloaded = torch.load(result)
    return {key: Exported(**parts, reloaded=reloaded[str(parts["summary"].path)]) for key, parts in made.items()}


@pytest.fixture(
    params=[
        f"{family} {dtype} {placement}"
        for family in ("llama", "mistral", "qwen2", "qwen3")
        for dtype in ("float32", "bfloat16")
        for placement in ("thirds", "top")
    ]
)
def exported(request: pytest.FixtureRequest, exports: dict[str, Exported]) -> Exported:
    return exports[request.param]


def test_another_process_without_our_package_gets_the_logits_of_the_model_in_memory(exported: Exported) -> None:
    e = exported
    ours = build_expanded_hf(e.checkpoint, e.plan, e.state, e.summary.strength, e.checkpoint.dtype)
    assert e.reloaded.dtype == e.checkpoint.dtype
    assert torch.equal(logits(ours), e.reloaded)
    assert not torch.equal(logits(build_base_hf(e.checkpoint, e.checkpoint.dtype)), e.reloaded)


def test_every_base_tensor_is_there_with_its_own_bytes(exported: Exported) -> None:
    written: dict[str, torch.Tensor] = {}
    for file in exported.summary.path.glob("*.safetensors"):
        written |= load_file(file)
    index = json.loads((exported.summary.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    names = base_names(exported.checkpoint, exported.plan)
    for name, new_name in names.items():
        original = exported.checkpoint.tensor(name)
        assert written[new_name].dtype == original.dtype
        assert torch.equal(written[new_name].view(torch.uint8), original.view(torch.uint8))
    record = json.loads((exported.summary.path / EXPORT_RECORD).read_text())
    hashes = {
        name: hashlib.sha256(b"".join(map(bytes, exported.checkpoint.chunks(name)))).hexdigest() for name in names
    }
    assert record["base_tensor_sha256"] == hashes
    blocks = set(written) - set(names.values())
    assert len(blocks) == len(exported.plan.blocks) * len(exported.plan.shape.block_tensors())


def test_with_blocks_on_top_only_the_base_files_are_copied_byte_for_byte(exports: dict[str, Exported]) -> None:
    for key, e in exports.items():
        base_files = [sha256(file) for file in e.checkpoint.files]
        files = [sha256(file) for file in sorted(e.summary.path.glob("*.safetensors"))]
        assert len(files) == len(base_files) + 1
        assert e.summary.base_files_copied == ("top" in key)
        assert (files[:-1] == base_files) == ("top" in key)


def test_the_base_is_not_linked_so_that_writing_into_the_export_leaves_it_alone(exports: dict[str, Exported]) -> None:
    e = exports["llama float32 top"]
    assert all(file.stat().st_nlink == 1 for file in e.checkpoint.files)


def test_a_library_that_knows_the_format_reads_the_shards(exported: Exported) -> None:
    for file in exported.summary.path.glob("*.safetensors"):
        raw = file.read_bytes()
        assert int.from_bytes(raw[:8], "little") % 8 == 0
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_the_summary_the_record_and_the_card_say_what_was_exported(exported: Exported) -> None:
    e = exported
    assert e.summary.max_abs_logit_difference_at_zero == 0.0
    assert e.summary.bytes == sum(file.stat().st_size for file in e.summary.path.iterdir())
    assert e.summary.num_layers == 4 + len(e.plan.blocks)
    card = (e.summary.path / "MODEL_CARD.md").read_text()
    for text in (e.plan.base_hash, e.plan.digest(), f"Strength: {e.summary.strength:g} ", "0.0123457", "rounds: 12"):
        assert text in card
    record = json.loads((e.summary.path / EXPORT_RECORD).read_text())
    assert ExpansionPlan.from_plain(record["plan"]) == e.plan
    assert (record["strength"], record["measured"]["rounds"]) == (e.summary.strength, 12)
    assert (e.summary.path / "tokenizer.json").read_bytes() == (e.checkpoint.folder / "tokenizer.json").read_bytes()
    config = json.loads((e.summary.path / "config.json").read_text())
    assert config["num_hidden_layers"] == e.summary.num_layers
    assert "auto_map" not in config


def test_an_export_at_strength_0_is_the_base(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, dtype="bfloat16"))
    plan = make_plan(checkpoint)
    out = tmp_path / "out"
    export_hf(checkpoint=checkpoint, plan=plan, state=random_state(plan), strength=0.0, out=out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert torch.equal(logits(model), logits(build_base_hf(checkpoint, torch.bfloat16)))
    assert "fedblocks evaluate" in (out / "MODEL_CARD.md").read_text()


def test_blocks_take_the_types_of_their_source_where_the_base_mixes_types(
    tmp_path: Path, tiny_checkpoint: Factory
) -> None:
    from safetensors.torch import save_file

    folder = tiny_checkpoint(tmp_path, dtype="bfloat16", hidden=65, heads=5, kv_heads=5, config={"head_dim": 14})
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: t.float() if name.endswith("norm.weight") else t for name, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    plan = make_plan(checkpoint)
    out = tmp_path / "out"
    export_hf(checkpoint=checkpoint, plan=plan, state=random_state(plan), strength=1.0, out=out)
    written = Checkpoint.open(out)
    layer = plan.position(0)
    assert written.stored[written.layer_name(layer, "input_layernorm.weight")].dtype == "F32"
    assert written.stored[written.layer_name(layer, "mlp.up_proj.weight")].dtype == "BF16"
    for file in out.glob("*.safetensors"):
        assert load_file(file)
    for spec in written.stored.values():
        assert spec.offset % {"F32": 4, "BF16": 2}[spec.dtype] == 0


@pytest.fixture
def small(tmp_path: Path, tiny_checkpoint: Factory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path, dtype="float16"))


def test_a_model_that_is_not_the_base_at_strength_0_is_not_written(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.expand_config
    monkeypatch.setattr(module, "expand_config", lambda config, plan: real(config, plan) | {"rms_norm_eps": 1e-2})
    out = tmp_path / "sub" / "out"
    with pytest.raises(ExpansionError, match="does not give the base's output") as e:
        export_hf(checkpoint=small, plan=make_plan(small), state={}, strength=1.0, out=out)
    assert e.value.code == "E_IDENTITY"
    assert list(out.parent.iterdir()) == []


def test_a_base_tensor_that_the_disk_changed_is_noticed(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._write_safetensors

    def damaged(file: Path, entries: Any, parts: Any) -> None:
        real(file, entries, parts)
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)

    monkeypatch.setattr(module, "_write_safetensors", damaged)
    with pytest.raises(ExpansionError, match="is not the base's") as e:
        export_hf(checkpoint=small, plan=make_plan(small), state={}, strength=1.0, out=tmp_path / "out")
    assert e.value.code == "E_IDENTITY"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(small: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ExportError, match="exists already") as e:
        export_hf(checkpoint=small, plan=make_plan(small), state={}, strength=1.0, out=out)
    assert e.value.exit_code == 2
    assert [file.name for file in out.iterdir()] == ["mine"]


def test_another_base_of_the_same_shape_is_refused_with_exit_code_4(
    small: Checkpoint, tmp_path: Path, tiny_checkpoint: Factory
) -> None:
    other = Checkpoint.open(tiny_checkpoint(tmp_path, dtype="float16", seed=1))
    with pytest.raises(ExportError, match="this is another base") as e:
        export_hf(checkpoint=other, plan=make_plan(small), state={}, strength=1.0, out=tmp_path / "out")
    assert e.value.exit_code == 4


def test_values_that_the_base_type_cannot_hold_are_refused(small: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(small)
    state = {0: {"mlp.down_proj.weight": np.full((64, 192), 1e5, np.float32)}}
    with pytest.raises(ExportError, match="too large for the base's F16; export with a smaller strength"):
        export_hf(checkpoint=small, plan=plan, state=state, strength=1.0, out=tmp_path / "out")
    export_hf(checkpoint=small, plan=plan, state=state, strength=0.5, out=tmp_path / "out")


def test_a_full_disk_is_told_before_anything_is_written(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ExportError, match="the disk has 1000; free some space"):
        export_hf(checkpoint=small, plan=make_plan(small), state={}, strength=1.0, out=tmp_path / "out")


def test_the_final_state_of_a_run_folder_is_exported(small: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(small)
    state = random_state(plan)
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "plan.json").write_text(plan.to_json())
    with pytest.raises(ConfigError, match="the run has not finished"):
        export_run(run, model=small.folder, out=tmp_path / "out", strength=1.0)
    flat = {f"{block_id}/{name}": value for block_id, block in state.items() for name, value in block.items()}
    safetensors.numpy.save_file(flat, run / "state" / "final.safetensors")
    export_run(run, model=small.folder, out=tmp_path / "out", strength=0.5)
    export_hf(checkpoint=small, plan=plan, state=state, strength=0.5, out=tmp_path / "direct")
    for file in (tmp_path / "direct").iterdir():
        assert sha256(file) == sha256(tmp_path / "out" / file.name)


def test_a_final_state_that_the_disk_has_damaged_is_not_exported(small: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(small)
    state = random_state(plan)
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "plan.json").write_text(plan.to_json())
    path = run / "state" / "final.safetensors"
    data = safetensors.numpy.save(flatten(state))
    (run / "state" / "final.json").write_text(json.dumps({"state_sha256": state_sha256(plan.units, state)}))
    for damaged, says in ((data[:-1] + bytes([data[-1] ^ 1]), "holds state"), (data[:-9], "is damaged")):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{says}.*: fedblocks serve {run}"):
            load_final(run)
    path.write_bytes(data)
    assert load_final(run)[1].keys() == state.keys()


def test_the_strength_that_the_run_chose_is_exported_with_what_was_measured_of_it(
    small: Checkpoint, tmp_path: Path
) -> None:
    plan = make_plan(small)
    state = random_state(plan)
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "plan.json").write_text(plan.to_json())
    flat = {f"{block_id}/{name}": value for block_id, block in state.items() for name, value in block.items()}
    safetensors.numpy.save_file(flat, run / "state" / "final.safetensors")
    usual = {"kl_error": 0.001, "accuracy": 0.8, "nll": 1.0, "retention": None, "refused": ""}
    points = [{"strength": 0.5, "kl": 0.02, **usual}, {"strength": 1.0, "kl": 0.2, **usual, "refused": "KL 0.2"}]
    record = {"strength": 0.5, "strengths": points, "kl_budget": 0.03}
    (run / "state" / "final.json").write_text(json.dumps(record))
    summary = export_run(run, model=small.folder, out=tmp_path / "chosen")
    assert summary.strength == 0.5
    assert "KL to the base, nats per token: 0.0200 +- 0.0010" in (tmp_path / "chosen" / "MODEL_CARD.md").read_text()
    own = export_run(run, model=small.folder, out=tmp_path / "own", strength=1.0)
    assert (own.strength, own.measured["not within the budget"]) == (1.0, "KL 0.2")
    assert export_run(run, model=small.folder, out=tmp_path / "other", strength=0.7).measured == {}


def test_a_block_that_nobody_trained_is_left_out_and_the_model_computes_the_same(
    small: Checkpoint, tmp_path: Path
) -> None:
    plan = make_plan(small)
    kept, idle = plan.block_ids[0], plan.block_ids[-1]
    state = {kept: random_state(plan)[kept], idle: {"mlp.down_proj.weight": np.zeros((64, 192), np.float32)}}
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "plan.json").write_text(plan.to_json())
    flat = {f"{block_id}/{name}": value for block_id, block in state.items() for name, value in block.items()}
    safetensors.numpy.save_file(flat, run / "state" / "final.safetensors")
    summary = export_run(run, model=small.folder, out=tmp_path / "out", strength=1.0)
    assert summary.left_out == tuple(b for b in plan.block_ids if b != kept)
    assert summary.num_layers == plan.shape.num_layers + 1
    export_hf(checkpoint=small, plan=plan, state=state, strength=1.0, out=tmp_path / "all")
    ids = torch.randint(0, plan.shape.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    from transformers import AutoModelForCausalLM

    found = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("out", "all")]
    assert torch.equal(*found)
    assert trained_part(plan, {}) == plan


@pytest.mark.shared
def test_the_story_model_beside_the_checkout_is_exported_and_tells_the_base_story(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2].parent / "shared/data/models/stories260K"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    checkpoint = Checkpoint.open(folder)
    plan = make_plan(checkpoint)
    summary = export_hf(checkpoint=checkpoint, plan=plan, state=random_state(plan), strength=0.0, out=tmp_path / "out")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(summary.path)
    batch = tokenizer("Once upon a time", return_tensors="pt")
    stories = [
        tokenizer.decode(
            AutoModelForCausalLM.from_pretrained(path).generate(
                **batch, do_sample=False, max_new_tokens=40, pad_token_id=2
            )[0]
        )
        for path in (summary.path, folder)
    ]
    assert stories[0] == stories[1]
