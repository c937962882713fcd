"""Does ONNX Runtime compute the exported model, and is a graph that it computes otherwise refused?"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from typer.testing import CliRunner

from fedblocks.cli import app
from fedblocks.edge_client import onnx_export as module
from fedblocks.edge_client.anchor import AnchorSet
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.export import EXPORT_RECORD, ExportError, build_base_hf, export_run
from fedblocks.edge_client.onnx_export import OnnxSummary, export_run_onnx
from fedblocks.edge_client.starter import starter_folder
from fedblocks.protocol.expansion import plan_expansion
from fedblocks.protocol.run_config import ConfigError

Factory = Callable[..., Path]

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnx_ir")),
    reason="the extra onnx is not installed: pip install 'fedblocks[onnx]'",
)

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama untied bf16 scaled": {
        "family": "llama",
        "tied": False,
        "dtype": "bfloat16",
        "config": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    },
    "mistral windowed": {"family": "mistral", "config": {"sliding_window": 20}},
    "qwen2 windowed by layer": {
        "family": "qwen2",
        "config": {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1},
    },
    "qwen3": {"family": "qwen3", "tied": False},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    run: Path
    base: Checkpoint
    summary: OnnxSummary


def make_run(parent: Path, base: Checkpoint, num_blocks: int = 1, scale: float = 0.1) -> Path:
    """A finished run with random deltas and random texts."""
    plan = plan_expansion(
        base_hash=base_hash(base.folder), config=base.config, placement="thirds", num_blocks=num_blocks
    )
    rng = np.random.default_rng(11)
    flat = {
        f"{block}/{spec.name}": rng.normal(scale=scale, size=spec.shape).astype(np.float32)
        for block in plan.block_ids
        for spec in plan.shape.block_tensors()
    }
    texts = tuple(rng.integers(4, plan.shape.vocab_size, n).astype(np.int32) for n in range(20, 36))
    run = parent / f"run-{base.folder.name}"
    for folder in ("state", "resources"):
        (run / folder).mkdir(parents=True)
    (run / "plan.json").write_text(plan.to_json())
    (run / "resources" / "anchor.bin").write_bytes(AnchorSet(sequences=texts, seed=0).to_bytes())
    safetensors.numpy.save_file(flat, run / "state" / "final.safetensors")
    return run


def onnx_logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


def hf_logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids, attention_mask=mask).logits


@pytest.fixture(scope="module", params=list(BASES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: Any, tiny_checkpoint: Factory) -> Exported:
    parent = tmp_path_factory.mktemp("onnx")
    base = Checkpoint.open(tiny_checkpoint(parent, layers=2, **BASES[request.param]))
    run = make_run(parent, base)
    return Exported(run=run, base=base, summary=export_run_onnx(run, model=base.folder, out=parent / "out"))


@pytest.fixture
def small(tmp_path: Path, tiny_checkpoint: Factory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path, layers=1))


@needs_onnx
def test_onnx_runtime_gives_the_logits_of_the_folder_that_transformers_loads(exported: Exported, tmp_path) -> None:
    e = exported
    ids = torch.randint(4, 128, (3, 90), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 40:], mask[2, :33] = 0, 0
    export_run(e.run, model=e.base.folder, out=tmp_path / "hf")
    found, expected = onnx_logits(e.summary.path, ids, mask), hf_logits(tmp_path / "hf", ids, mask)
    assert (found - expected)[mask == 1].abs().max() <= 1e-4
    with torch.no_grad():
        before = build_base_hf(e.base, torch.float32)(ids, attention_mask=mask).logits
    assert (found - before)[mask == 1].abs().max() > 0.1


@needs_onnx
def test_a_matrix_that_embeds_and_projects_is_held_once(exported: Exported) -> None:
    import onnx

    graph = onnx.load(exported.summary.path / "model.onnx").graph
    tables = [tensor.name for tensor in graph.initializer if 128 in tensor.dims]
    assert len(tables) == (1 if exported.base.config["tie_word_embeddings"] else 2)


@needs_onnx
def test_the_folder_holds_tokenizer_configuration_record_and_card_and_no_other_weights(exported: Exported) -> None:
    path, summary = exported.summary.path, exported.summary
    assert {file.name for file in path.iterdir()} == {
        *("model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "MODEL_CARD.md", EXPORT_RECORD)
    }
    assert [folder.name for folder in path.parent.iterdir() if folder.name.startswith(".")] == []
    assert summary.bytes == sum(file.stat().st_size for file in path.iterdir())
    assert 0 < summary.max_abs_logit_difference <= 1e-4 < summary.max_abs_logit
    assert (
        f"differ from torch's by at most {summary.max_abs_logit_difference:.2g}" in (path / "MODEL_CARD.md").read_text()
    )
    record = json.loads((path / EXPORT_RECORD).read_text())
    assert record["onnx"]["max_abs_logit_difference"] == summary.max_abs_logit_difference
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 3


@needs_onnx
def test_where_layers_have_a_window_a_text_that_is_longer_is_compared(exported: Exported) -> None:
    window = {"mistral": 20, "qwen2": 70}.get(exported.base.shape.family)
    assert exported.summary.longest_text == max(64, (window or 0) + 8)


@needs_onnx
def test_the_bundled_starter_is_exported(tmp_path: Path) -> None:
    base = Checkpoint.open(starter_folder())
    run = make_run(tmp_path, base, num_blocks=3, scale=0.02)
    summary = export_run_onnx(run, model=base.folder, out=tmp_path / "out", strength=0.5)
    export_run(run, model=base.folder, out=tmp_path / "hf", strength=0.5)
    ids = torch.randint(4, 256, (2, 100), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    difference = onnx_logits(summary.path, ids, mask) - hf_logits(tmp_path / "hf", ids, mask)
    assert difference.abs().max() <= 1e-4
    assert summary.checkpoint.strength == 0.5


@needs_onnx
def test_4_bit_weights_are_said_with_what_they_cost(small: Checkpoint, tmp_path: Path) -> None:
    import onnx

    run = make_run(tmp_path, small)
    plain = export_run_onnx(run, model=small.folder, out=tmp_path / "fp32")
    summary = export_run_onnx(run, model=small.folder, out=tmp_path / "int4", int4=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "int4" / "model.onnx").graph.node]
    assert (kinds.count("MatMulNBits"), summary.int4.num_matrices) == (14, 14)
    assert summary.bytes < 0.6 * plain.bytes
    anchors = AnchorSet.from_bytes((run / "resources" / "anchor.bin").read_bytes())
    kl, num_tokens, agree = 0.0, 0, 0
    for i in anchors.kl_val_indices:
        ids = torch.from_numpy(anchors.sequences[i].astype(np.int64))[None]
        p, q = (
            onnx_logits(tmp_path / name, ids, torch.ones_like(ids))[0, :-1].double().log_softmax(-1)
            for name in ("fp32", "int4")
        )
        kl += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        num_tokens += len(p)
    assert summary.int4.num_tokens == num_tokens
    assert summary.int4.kl_nats_per_token == pytest.approx(kl / num_tokens, rel=1e-6)
    assert summary.int4.agreement == agree / num_tokens < 1
    assert summary.int4.kl_nats_per_token > 1e-4
    card = (tmp_path / "int4" / "MODEL_CARD.md").read_text()
    assert all(line in card for line in summary.int4.lines)
    assert "4 bits" not in (tmp_path / "fp32" / "MODEL_CARD.md").read_text()


@needs_onnx
def test_the_import_of_the_quantiser_leaves_the_log_of_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", raising=False)
    module._quantiser()
    assert (root.handlers, root.level) == ([], level)


@needs_onnx
def test_a_large_graph_keeps_its_weights_in_a_file_beside_it(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, small)
    inside = export_run_onnx(run, model=small.folder, out=tmp_path / "inside")
    monkeypatch.setattr(module, "INLINE_BYTES", 100_000)
    export_run_onnx(run, model=small.folder, out=tmp_path / "beside", int4=False)
    assert (tmp_path / "beside" / "model.onnx.data").stat().st_size > 100_000
    ids = torch.arange(4, 30)[None]
    found = [onnx_logits(tmp_path / name, ids, torch.ones_like(ids)) for name in (inside.path.name, "beside")]
    assert torch.equal(*found)


@needs_onnx
def test_a_graph_that_computes_something_else_is_not_written(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnx import numpy_helper

    real = module._load

    def damaged(path: Path) -> Any:
        model = real(path)
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))
        return model

    monkeypatch.setattr(module, "_load", damaged)
    out = tmp_path / "sub" / "out"
    with pytest.raises(ExportError, match=r"differ from torch's by up to .* expected at most 0\.0001") as e:
        export_run_onnx(make_run(tmp_path, small), model=small.folder, out=out)
    assert e.value.exit_code == 2
    assert list(out.parent.iterdir()) == []


@needs_onnx
def test_logits_that_are_not_numbers_are_not_a_small_difference(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = np.float32(np.nan)
    monkeypatch.setattr(module, "_outputs", lambda session, names, ids, mask: [np.full((*ids.shape, 128), nothing)])
    with pytest.raises(ExportError, match="differ from torch's by up to nan"):
        export_run_onnx(make_run(tmp_path, small), model=small.folder, out=tmp_path / "out")


@needs_onnx
def test_what_torch_cannot_record_is_told_in_one_line_with_what_works(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise torch.onnx.errors.UnsupportedOperatorError("aten::odd", 18, None)

    monkeypatch.setattr(torch.onnx, "export", failing)
    out = tmp_path / "sub" / "out"
    with pytest.raises(ExportError, match="aten::odd") as e:
        export_run_onnx(make_run(tmp_path, small), model=small.folder, out=out)
    assert "\n" not in str(e.value)
    assert str(e.value).endswith("Nothing was written; a Hugging Face folder works: fedblocks export --to hf")
    assert list(out.parent.iterdir()) == []


@needs_onnx
def test_what_onnx_runtime_cannot_load_is_told_in_one_line_with_what_works(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot load the graph .* --to hf") as e:
        module._session(tmp_path / "model.onnx")
    assert "\n" not in str(e.value)


@needs_onnx
def test_4_bit_weights_that_give_no_numbers_are_not_written(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._outputs

    def spoilt(session: Any, names: Any, ids: Any, mask: Any) -> Any:
        (found,) = real(session, names, ids, mask)
        return [found if Path(session._model_path).parent.name == "fp32" else found * np.float32(np.nan)]

    monkeypatch.setattr(module, "_outputs", spoilt)
    out = tmp_path / "sub" / "out"
    with pytest.raises(ExportError, match="with 4-bit weights the logits are not finite"):
        export_run_onnx(make_run(tmp_path, small), model=small.folder, out=out, int4=True)
    assert list(out.parent.iterdir()) == []


@needs_onnx
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_scaling_that_changes_with_the_length_is_refused(
    kind: str, tmp_path: Path, tiny_checkpoint: Factory
) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    scaling = {"rope_type": kind, "factor": 2.0} | (factors if kind == "longrope" else {})
    base = Checkpoint.open(tiny_checkpoint(tmp_path, layers=1, config={"rope_scaling": scaling}))
    with pytest.raises(ExportError, match=f"of kind {kind}, .* --to hf"):
        export_run_onnx(make_run(tmp_path, base), model=base.folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_onnx
def test_a_folder_that_exists_is_left_alone(small: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ExportError, match="exists already"):
        export_run_onnx(make_run(tmp_path, small), model=small.folder, out=out)
    assert [file.name for file in out.iterdir()] == ["mine"]


@needs_onnx
def test_a_disk_without_room_for_the_graph_is_told(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    written = sum(file.stat().st_size for file in small.files)
    room = usage._replace(free=3 * written)  # for the checkpoint of two layers, not for two graphs of it
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: room)
    out = tmp_path / "sub" / "out"
    with pytest.raises(ExportError, match=r"the export needs \d+ bytes and the disk has \d+; free some space"):
        export_run_onnx(make_run(tmp_path, small), model=small.folder, out=out)
    assert list(out.parent.iterdir()) == []


@needs_onnx
def test_a_run_folder_without_its_texts_is_told(small: Checkpoint, tmp_path: Path) -> None:
    run = make_run(tmp_path, small)
    (run / "resources" / "anchor.bin").unlink()
    with pytest.raises(ConfigError, match=r"anchor\.bin does not exist.* give the run folder whole"):
        export_run_onnx(run, model=small.folder, out=tmp_path / "out")


def test_without_the_extra_the_line_to_install_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"onnx, onnxruntime, onnx-ir; pip install 'fedblocks\[onnx\]'") as e:
        export_run_onnx(tmp_path / "run", model=tmp_path, out=tmp_path / "out", int4=True)
    assert e.value.exit_code == 2


@needs_onnx
def test_a_transformers_that_cannot_be_recorded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "4.57.6")
    with pytest.raises(ExportError, match=r"needs transformers 5 or newer, found 4\.57\.6.*fedblocks\[onnx\]"):
        export_run_onnx(tmp_path / "run", model=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "told"), [(("--to", "gguf"), "expected hf or onnx"), (("--to", "hf", "--int4"), "need --to onnx")]
)
def test_the_command_line_refuses_what_does_not_go_together(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--model", "m", "--out", str(tmp_path / "o"), *words])
    assert result.exit_code == 2
    assert told in result.output


@needs_onnx
def test_the_command_line_says_the_difference_and_what_4_bits_cost(small: Checkpoint, tmp_path: Path) -> None:
    run, out = make_run(tmp_path, small), tmp_path / "out"
    words = ["export", str(run), "--model", str(small.folder), "--to", "onnx", "--int4", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"wrote {out / 'model.onnx'} at strength 1; in fp32 ONNX Runtime's outputs differ" in result.output
    assert "4-bit weights, KL to the fp32 export: 0." in result.output
    assert "4-bit weights, same first choice as the fp32 export: " in result.output
