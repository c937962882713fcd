"""How does the run's model get into ONNX Runtime? As one graph whose logits were compared with torch's.

The run's checkpoint is built and checked as for ``--to hf``, in a temporary folder. transformers' model of it, in fp32,
is recorded by torch's tracing exporter: as exact as the one on ``torch.export`` for all families that can be expanded,
ten times as fast, and without another package. What is recorded is the path of one input, so two kinds of rotary
scaling, whose frequencies change with the length of the text, are refused.

An encoder's graph ends in its embedding and its labels' logits instead (``onnx_outputs.py``).

Before the folder gets its name ONNX Runtime computes texts of the base in it, of other lengths and batch sizes than the
recorded one, alone and padded on either side: every logit of a real token must be within ``MAX_DIFFERENCE`` of torch's.
Weights in 4 bits are made from that graph, and what they cost is measured against it and said.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedblocks.edge_client.anchor import AnchorSet
from fedblocks.edge_client.checkpoint import Checkpoint
from fedblocks.edge_client.export import (
    EXPORT_RECORD,
    SENTENCE_FILES,
    ExportError,
    ExportSummary,
    export_run,
    read_head,
)
from fedblocks.edge_client.onnx_outputs import Recorded, counted, recorded
from fedblocks.edge_client.rotary import RotarySettings
from fedblocks.protocol.durable import sync_folder
from fedblocks.protocol.expansion import base_fields
from fedblocks.protocol.run_config import ConfigError

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

Ids = npt.NDArray[np.int32]
Array = npt.NDArray[Any]
Inputs = Sequence[tuple[Array, Array]]
"""Token ids and attention mask of each batch, int64 (B, T)."""

OPSET: Final = 18
MAX_DIFFERENCE: Final = 1e-4
"""Of a logit of a real token, ONNX Runtime's from torch's, both in fp32."""
MODEL_FILE: Final = "model.onnx"
INLINE_BYTES: Final = 2_000_000_000
"""A larger graph keeps its weights in a file beside it: protobuf ends at 2 GiB."""
INT4_BLOCK: Final = 32
"""Weights that share a scale."""
LOSS_TEXTS: Final = 32
"""Texts that the loss of 4-bit weights is measured on; kl_val of the default anchor set has 64."""

_LENGTHS: Final = (1, 7, 24, 64)
"""Tokens of the texts that are compared; none is the recorded length."""
_RECORDED: Final = (2, 9)
"""Batch and length of the input whose path is recorded."""
_LONGEST_COMPARED: Final = 4_104
"""Tokens: one window of the usual size and a little more; attention takes the square of it in memory."""
_OLDEST_TRANSFORMERS: Final = 5
_LENGTH_DEPENDENT_ROTARY: Final = ("dynamic", "longrope")
_ROWS: Final = 256
"""Rows of logits that are looked at together in double precision."""
_WHAT_WORKS: Final = "a Hugging Face folder works: fedblocks export --to hf"
_OWN_FILES: Final = ("MODEL_CARD.md", EXPORT_RECORD, "model.safetensors.index.json")
"""Files of the checkpoint's folder that are not taken over beside its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Loss:
    """What 4-bit weights change, measured in ONNX Runtime against the same graph in fp32, on texts of the base."""

    kl_nats_per_token: float
    """KL(fp32 ‖ int4) over the full vocabulary."""
    kl_standard_error: float
    """Over texts."""
    agreement: float
    """Share of positions at which both put the same token first."""
    num_tokens: int
    num_matrices: int
    """That are held in 4 bits: those of all layers. Embeddings, norms and the output projection stay fp32."""
    block_size: int = INT4_BLOCK

    @property
    def lines(self) -> tuple[str, str]:
        """For people."""
        return (
            f"KL to the fp32 export: {self.kl_nats_per_token:.4f} +- {self.kl_standard_error:.4f} nats per token",
            f"same first choice as the fp32 export: {100 * self.agreement:.1f} % of {self.num_tokens} tokens",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSummary:
    """What was written."""

    path: Path
    checkpoint: ExportSummary
    """Of the checkpoint that the graph was made from; its folder is gone."""
    max_abs_logit_difference: float
    """ONNX Runtime's from torch's, fp32 weights."""
    max_abs_logit: float
    """Of torch's, on the same tokens."""
    longest_text: int
    """Tokens of the longest text that was compared."""
    int4: Int4Loss | None
    bytes: int
    """Of all files together."""


def export_run_onnx(
    run: Path, *, model: str | Path, out: Path, strength: float | None = None, int4: bool = False
) -> OnnxSummary:
    """Exports the last published state of a finished run as an ONNX graph in the new folder ``out``.

    The graph takes ``input_ids`` and ``attention_mask``, int64 (B, T) with any B and T, and gives ``logits``, fp32
    (B, T, V).

    Args:
        run: the run folder, or a copy of it with its ``resources``.
        model: folder or hub id of the run's base.
        strength: default: the one that the run chose within its forgetting budget.
        int4: hold the matrices of all layers in 4 bits, in groups of ``INT4_BLOCK`` weights.

    Raises:
        ConfigError: the run has not published a final state, or has no anchor texts to compare on.
        ExportError: a package is missing, ``out`` exists, the disk is too small, torch cannot record the model, or ONNX
            Runtime's logits are not torch's; nothing is left behind.
        ValueError, ExpansionError, CheckpointError: as :func:`fedblocks.edge_client.export.export_run`.
    """
    _require_packages(int4)
    if out.exists():
        raise ExportError(f"{out}: exists already; remove it or export to another folder")
    base = Checkpoint.open(model)
    if base.shape.encoder and int4:
        raise ExportError(f"{out}: --int4 is for decoders, whose loss by it can be measured; leave it out")
    _require_recordable(base)
    texts = _texts(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=out.parent) as temporary:
        work = Path(temporary)
        made = export_run(run, model=model, out=work / "hf", strength=strength)
        written = work / "onnx"
        written.mkdir()
        summary = _write(written, made, out=out, texts=texts, int4=int4)
        for file in written.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        sync_folder(written)
        written.rename(out)
    sync_folder(out.parent)
    return summary


def _write(written: Path, made: ExportSummary, *, out: Path, texts: Sequence[Ids], int4: bool) -> OnnxSummary:
    """Graph, tokenizer, configuration, record and card in the folder ``written``, from the checkpoint ``made``."""
    checkpoint, work = Checkpoint.open(made.path), written.parent
    _require_disk(checkpoint, work, out)
    inputs = _inputs(checkpoint, texts)
    path = work / "recorded" / MODEL_FILE
    what = recorded(checkpoint)
    wanted = _record(checkpoint, what, inputs, path)
    plain = work / "fp32" / MODEL_FILE if int4 else written / MODEL_FILE
    _save(_load(path), plain)
    shutil.rmtree(path.parent)
    difference, largest = _largest_difference(_session(plain), what, inputs, wanted)
    if not difference <= MAX_DIFFERENCE:  # so that not a number is refused as well
        raise ExportError(
            f"{out}: ONNX Runtime's {what.outputs[-1]} differ from torch's by up to {difference:.3g} (the largest is "
            f"{largest:.3g}), expected at most {MAX_DIFFERENCE:g}. Nothing was written; {_WHAT_WORKS}"
        )
    loss = None
    if int4:
        small, count = _to_int4(plain)
        _save(small, written / MODEL_FILE)
        loss = _int4_loss(_session(plain), _session(written / MODEL_FILE), texts[:LOSS_TEXTS], count)
        if not math.isfinite(loss.kl_nats_per_token):
            raise ExportError(
                f"{out}: with 4-bit weights the logits are not finite. Nothing was written; leave out --int4"
            )
    for file in made.path.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (*_OWN_FILES, *SENTENCE_FILES):
            shutil.copyfile(file, written / file.name)
    summary = OnnxSummary(
        path=out,
        checkpoint=made,
        max_abs_logit_difference=difference,
        max_abs_logit=largest,
        longest_text=max(ids.shape[1] for ids, _ in inputs),
        int4=loss,
        bytes=0,
    )
    record = json.loads((made.path / EXPORT_RECORD).read_text(encoding="utf-8"))
    del record["base_tensor_sha256"]  # of files that are not in this folder
    record["onnx"] = {
        "opset": OPSET,
        "max_abs_logit_difference": difference,
        "max_abs_logit": largest,
        "int4": asdict(loss) if loss else None,
    }
    head = read_head(made.path)
    if head is not None:
        record["labels"] = list(head.labels)
    (written / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (written / "MODEL_CARD.md").write_text(_model_card(checkpoint, summary), encoding="utf-8")
    return replace(summary, bytes=sum(file.stat().st_size for file in written.iterdir()))


def _require_packages(int4: bool) -> None:
    wanted = ("onnx", "onnxruntime", "onnx_ir") if int4 else ("onnx", "onnxruntime")
    missing = [name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--to onnx needs packages that are not installed: {', '.join(missing)}; pip install 'fedblocks[onnx]'"
        )
    transformers = importlib.metadata.version("transformers")
    if int(transformers.partition(".")[0]) < _OLDEST_TRANSFORMERS:
        raise ExportError(
            f"--to onnx needs transformers {_OLDEST_TRANSFORMERS} or newer, found {transformers}, whose masks "
            "torch cannot record; pip install 'fedblocks[onnx]'"
        )


def _require_recordable(checkpoint: Checkpoint) -> None:
    if checkpoint.shape.encoder:
        return
    kind = RotarySettings.from_config(checkpoint.config, checkpoint.shape.head_dim).kind
    if kind in _LENGTH_DEPENDENT_ROTARY:
        raise ExportError(
            f"{checkpoint.folder}: its rotary embedding is of kind {kind}, whose frequencies change with the length of "
            f"the text; an ONNX graph would keep those of one length. Nothing was written; {_WHAT_WORKS}"
        )


def _require_disk(checkpoint: Checkpoint, work: Path, out: Path) -> None:
    """Room for the recorded graph, which holds a tied matrix twice, beside the one that is kept, both in fp32."""
    shape = checkpoint.shape
    twice = shape.vocab_size * shape.hidden_size if shape.tied_embeddings else 0
    needed = 4 * (2 * sum(math.prod(stored.shape) for stored in checkpoint.stored.values()) + twice)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise ExportError(f"{out}: the export needs {needed} bytes and the disk has {free}; free some space")


def _texts(run: Path) -> tuple[Ids, ...]:
    """The anchor texts of the run that no client trained on."""
    path = run / "resources" / "anchor.bin"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: an ONNX export is checked on the run's texts; give the run folder whole"
        )
    anchors = AnchorSet.from_bytes(path.read_bytes())
    return tuple(anchors.sequences[i] for i in anchors.kl_val_indices) or anchors.sequences


def _inputs(checkpoint: Checkpoint, texts: Sequence[Ids]) -> Inputs:
    """Texts of several lengths, each alone, then together, padded on the right and on the left.

    Where layers look at a window of tokens only, the longest text is longer than it.
    """
    stream = np.concatenate(texts)
    longest = min(int(checkpoint.config.get("max_position_embeddings", _LONGEST_COMPARED)), _LONGEST_COMPARED)
    window = base_fields(checkpoint.config).get("sliding_window")
    lengths = sorted({min(n, longest) for n in (*_LENGTHS, *((window + 8,) if window else ()))})
    pieces = [np.resize(np.roll(stream, -7 * i), n).astype(np.int64) for i, n in enumerate(lengths)]
    inputs = [(piece[None], np.ones((1, len(piece)), np.int64)) for piece in pieces]
    padded = pieces[: len(_LENGTHS)]
    for side in ("right", "left"):
        ids = np.zeros((len(padded), max(map(len, padded))), np.int64)
        mask = np.zeros_like(ids)
        for row, piece in enumerate(padded):
            place = slice(len(piece)) if side == "right" else slice(-len(piece), None)
            ids[row, place], mask[row, place] = piece, 1
        inputs.append((ids, mask))
    return inputs


@torch.no_grad()
def _record(checkpoint: Checkpoint, what: Recorded, inputs: Inputs, path: Path) -> list[list[Array]]:
    """Writes the graph; torch's own outputs for the inputs, fp32."""
    wanted = [
        [value.numpy() for value in what.module(torch.from_numpy(ids), torch.from_numpy(mask))] for ids, mask in inputs
    ]
    path.parent.mkdir()
    ids = torch.zeros(_RECORDED, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    axes = {0: "batch", 1: "length"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's age, and Python values that are equal for every input
            torch.onnx.export(
                what.module,
                (ids, mask),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["input_ids", "attention_mask"],
                output_names=list(what.outputs),
                dynamic_axes={
                    "input_ids": axes,
                    "attention_mask": axes,
                    **{name: axes if what.per_token else {0: "batch"} for name in what.outputs},
                },
            )
    except Exception as e:
        raise ExportError(
            f"{checkpoint.shape.family} model of {checkpoint.shape.num_layers} layers: torch {torch.__version__} "
            f"cannot write it as ONNX ({_first_line(e)}). "
            f"Nothing was written; {_WHAT_WORKS}"
        ) from e
    return wanted


def _load(path: Path) -> ModelProto:
    """The recorded graph; where embedding and output projection are one matrix, the graph holds it once."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    tables = [stored.get(n.input[0]) for n in graph.node if n.op_type == "Gather" and n.input[1] == "input_ids"]
    index, last = next(((i, node) for i, node in enumerate(graph.node) if "logits" in node.output), (0, None))
    table, projection = tables[0] if tables else None, stored.get(last.input[-1]) if last is not None else None
    if table is None or projection is None or list(table.dims) != list(projection.dims)[::-1]:
        return model
    if np.array_equal(numpy_helper.to_array(table).T, numpy_helper.to_array(projection)):
        name = projection.name
        graph.initializer.remove(projection)
        graph.node.insert(
            index, helper.make_node("Transpose", [table.name], [name], name="tied_projection", perm=[1, 0])
        )
    return model


def _save(model: ModelProto, path: Path) -> None:
    """Writes the graph; a large one with its weights in ``model.onnx.data``, and ``model`` without them afterwards."""
    import onnx
    from onnx import helper

    path.parent.mkdir(exist_ok=True)
    num_bytes = sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )
    if num_bytes > INLINE_BYTES:
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save_model(model, str(path))


def _to_int4(path: Path) -> tuple[ModelProto, int]:
    """The graph with the matrices of all layers in 4 bits, rounded to nearest, and their number."""
    import onnx

    quantiser = _quantiser()
    model = onnx.load(str(path))
    last = next(node.name for node in model.graph.node if "logits" in node.output)
    rounded = quantiser.MatMulNBitsQuantizer(
        model,
        algo_config=quantiser.DefaultWeightOnlyQuantConfig(block_size=INT4_BLOCK, is_symmetric=True),
        nodes_to_exclude=[last],
    )
    rounded.process()
    result = rounded.model.model
    return result, sum(node.op_type == "MatMulNBits" for node in result.graph.node)


def _quantiser() -> ModuleType:
    """ONNX Runtime's module, whose import would turn on the log of the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return matmul_nbits_quantizer


def _session(path: Path) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the graph that torch {torch.__version__} wrote "
            f"({_first_line(e)}). Nothing was written; {_WHAT_WORKS}"
        ) from e


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:300]}"


def _outputs(session: InferenceSession, names: Sequence[str], ids: Array, mask: Array) -> list[Array]:
    return session.run(list(names), {"input_ids": ids, "attention_mask": mask})


def _largest_difference(
    session: InferenceSession, what: Recorded, inputs: Inputs, wanted: Sequence[Sequence[Array]]
) -> tuple[float, float]:
    """Of the session's outputs from the wanted ones, and of those alone, where they count; NaN if one of them is."""
    differences: list[float] = []
    sizes: list[float] = []
    for (ids, mask), expected in zip(inputs, wanted, strict=True):
        found = _outputs(session, what.outputs, ids, mask)
        for one, two in zip(found, expected, strict=True):
            differences.append(float(np.abs(counted(what, one, mask) - counted(what, two, mask)).max()))
            sizes.append(float(np.abs(counted(what, two, mask)).max()))
    return float(np.max(differences)), float(np.max(sizes))


def _int4_loss(plain: InferenceSession, small: InferenceSession, texts: Sequence[Ids], num_matrices: int) -> Int4Loss:
    """KL and agreement at every position that predicts a next token, as ``evaluate.kl_full`` counts them."""
    sums: list[float] = []
    counts: list[int] = []
    agree = 0
    for text in texts:
        ids = text[None].astype(np.int64)
        p, q = (torch.from_numpy(_outputs(s, ["logits"], ids, np.ones_like(ids))[0][0, :-1]) for s in (plain, small))
        kl = 0.0
        for p_rows, q_rows in zip(p.split(_ROWS), q.split(_ROWS), strict=True):
            log_p, log_q = torch.log_softmax(p_rows.double(), -1), torch.log_softmax(q_rows.double(), -1)
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        sums.append(kl)
        counts.append(len(p))
    total = sum(counts)
    mean = sum(sums) / total
    variance = sum((kl - n * mean) ** 2 for kl, n in zip(sums, counts, strict=True)) / total**2
    return Int4Loss(
        kl_nats_per_token=mean,
        kl_standard_error=math.sqrt(variance),
        agreement=agree / total,
        num_tokens=total,
        num_matrices=num_matrices,
    )


def _model_card(checkpoint: Checkpoint, summary: OnnxSummary) -> str:
    made, loss = summary.checkpoint, summary.int4
    weights = "fp32"
    if loss:
        weights = (
            f"{loss.num_matrices} matrices of the layers in 4 bits, {loss.block_size} weights to a scale, "
            "rounded to nearest; the rest in fp32"
        )
    lost = ""
    if loss:
        lost = f"""
## What 4 bits cost

Measured in ONNX Runtime against the same graph in fp32, on texts that the base wrote:

* {loss.lines[0]}
* {loss.lines[1]}
"""
    figures = "\n".join(f"* {name}: {value}" for name, value in made.measured.items())
    gives = (
        f"`logits` (fp32, batch by\n  length by {checkpoint.shape.vocab_size}); there is no cache of keys and values"
    )
    same = "with the output projections of the blocks at 0 its logits equal the\n  base's bit for bit"
    if checkpoint.shape.encoder:
        gives = f"`embedding` (fp32, batch by\n  {checkpoint.shape.hidden_size}) of length 1"
        gives += f", and `logits` of the labels in `{EXPORT_RECORD}`"
        same = "without its blocks, and with the base's norms, it equals the base bit\n  for bit"
    return f"""# A {checkpoint.shape.family} model with {made.num_blocks} expanded blocks, for ONNX Runtime

Trained by federated block expansion: layers were added and trained, and the base model was never changed.

* `{MODEL_FILE}`, opset {OPSET}: `input_ids` and `attention_mask` (int64, batch by length) give {gives}
* Weights: {weights}
* Base hash (all tensors, sizes, tokenizer): `{made.base_hash}`
* Layers: {made.num_layers - made.num_blocks} of the base + {made.num_blocks} = {made.num_layers}
* Strength: {made.strength:g} (0 is the base, 1 is as trained)
* Expansion plan: digest `{made.plan_digest}`, written out in `{EXPORT_RECORD}`

## Checked during the export

* The checkpoint that the graph was made from: {same}.
* The graph in fp32: ONNX Runtime's outputs differ from torch's by at most {summary.max_abs_logit_difference:.2g}
  (the largest value is {summary.max_abs_logit:.3g}), on texts of up to {summary.longest_text} tokens, alone and padded
  on either side. More than {MAX_DIFFERENCE:g} is not written.
{lost}
## Measured of the run, before this export

{figures or "No figures came with this export."}
"""
