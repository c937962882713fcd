"""What leaves the run as a model? A plain Hugging Face folder that needs none of our code.

It holds the grown configuration, safetensors and the base's tokenizer files. The tensors of the base keep their bytes
(only the layer number in their names moves); the expanded blocks come in one shard of their own, in the type of the
layers that they were copied from. Strength g multiplies the out-tensors in fp32 before that rounding.

Before the folder gets its name it is loaded as any user would load it, its out-tensors are set to zero, and its logits
must equal those of the base bit for bit (methods.md, W3): then g = 0 is the base, and no base tensor was touched.

An encoder's layers below its blocks emit their output without gamma and beta; these are in a small file beside the
weights. Without its blocks and with those norms back it must be the base bit for bit, and at g = 0 that is what is
written. A run's classification head goes into a file of its own: it is no part of the model's class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file

import fedblocks
from fedblocks.edge_client.affine_migration import OUTPUT_NORM, normalised_layers, plain_norm
from fedblocks.edge_client.changed_base import changed_tensors
from fedblocks.edge_client.checkpoint import (
    TORCH_DTYPE,
    Checkpoint,
    at_strength,
    base_hash,
    initial_block,
    initial_tensor,
)
from fedblocks.profiles.units import EXTRA_UNIT, PersonalPairs, block_units
from fedblocks.protocol.errors import LocalProtocolError
from fedblocks.protocol.expansion import ExpansionError, ExpansionPlan, expand_config, family_of
from fedblocks.protocol.priors import prior_of
from fedblocks.protocol.run_config import ConfigError
from fedblocks.protocol.state import state_sha256
from fedblocks.protocol.tensors import unflatten

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = Mapping[int, Mapping[str, np.ndarray]]
"""Block id -> tensor name -> accumulated delta, fp32; whatever is missing is zero."""

#: Files of the base that belong to its tokenizer and its text generation.
_COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
#: What sentence-transformers reads beside the model.
SENTENCE_FILES: Final = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
EXPORT_RECORD: Final = "fedblocks_export.json"
BASE_NORMS: Final = "fedblocks_base_norms.safetensors"
"""The norms of an encoder's base that its export has not, by their names in the base."""
HEAD_FILE: Final = "fedblocks_head.safetensors"
"""``weight`` [classes, hidden] and ``bias``, fp32; the labels are JSON in the metadata. It reads the normalised mean
embedding times the root of its size."""
_COPY_BYTES: Final = 1 << 20
ENCODER_TOLERANCE: Final = 1e-5
"""Largest change of a hidden state by affine migration in fp32 (methods.md 2.6)."""


class ExportError(Exception):
    """The export was not written; the text says why and what to do.

    Attributes:
        exit_code: 2, or 4 if the checkpoint is not the base of the plan.
    """

    def __init__(self, text: str, *, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """The classification head of an encoder's run."""

    weight: np.ndarray  # (classes, hidden) fp32
    bias: np.ndarray  # (classes,)
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What was written."""

    path: Path
    strength: float
    base_hash: str
    plan_digest: str
    num_layers: int
    """Of the exported model, L + M."""
    num_blocks: int
    measured: Mapping[str, float | str]
    """What the clients measured of the run at this strength."""
    left_out: tuple[int, ...]
    """Expanded blocks of the run that nobody has trained: without them the model computes the same."""
    bytes: int
    """Of all files together."""
    base_files_copied: bool
    """True if the base's weight files are in the export byte for byte; otherwise their tensors are, renamed."""
    base_tensors_sha256: str
    """SHA-256 over the list of the base tensors' names and hashes, in the order of their names (the base's names)."""
    max_abs_logit_difference_at_zero: float
    """Of the export with all out-tensors at zero, from the base; always 0.0, an export that differs is not written.
    Of an encoder: without its blocks and with the base's norms, of the hidden states."""


def block_values(
    checkpoint: Checkpoint, plan: ExpansionPlan, state: State, block_id: int, strength: float
) -> dict[str, torch.Tensor]:
    """The value of a block in fp32: initial value plus accumulated delta, out-tensors times ``strength``.

    Args:
        strength: g in [0, 1] (methods.md 9).

    Returns:
        suffix -> fp32 tensor, in the order of ``block_tensors()``.

    Raises:
        ValueError: the strength is out of range, or the state is not one of this plan.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, expected a number from 0 (the base) to 1 (as trained)")
    unknown = sorted(set(state) - set(plan.block_ids))
    if unknown:
        raise ValueError(f"the state has blocks {unknown}, the expansion plan only {list(plan.block_ids)}")
    values = initial_block(checkpoint, plan, block_id)
    deltas = state.get(block_id, {})
    odd = sorted(set(deltas) - set(values))
    if odd:
        raise ValueError(f"block {block_id}: the state has tensors {odd}, which a {plan.shape.family} block has not")
    for spec in plan.shape.block_tensors():
        delta = deltas.get(spec.name)
        if delta is not None:
            if delta.shape != spec.shape or delta.dtype != np.float32:
                raise ValueError(
                    f"block {block_id}: the delta of {spec.name} is {delta.dtype} {list(delta.shape)}, "
                    f"expected float32 {list(spec.shape)}"
                )
            if not np.isfinite(delta).all():
                raise ValueError(f"block {block_id}: the delta of {spec.name} has values that are not finite")
            values[spec.name] += torch.from_numpy(np.ascontiguousarray(delta))
        values[spec.name] = at_strength(
            values[spec.name],
            lambda spec=spec: initial_tensor(checkpoint, plan, block_id, spec),
            spec,
            strength,
        )
    return values


def build_expanded_hf(
    checkpoint: Checkpoint, plan: ExpansionPlan, state: State, strength: float, dtype: torch.dtype
) -> PreTrainedModel:
    """The grown model as a transformers model in evaluation mode, built from the grown configuration, never patched.

    Args:
        dtype: type of all its weights; the blocks are computed in fp32 and rounded to it once.

    Raises:
        ValueError: as :func:`block_values`.
    """
    weights: dict[str, torch.Tensor] = {}
    changed = changed_norms(checkpoint, plan)
    for name, new_name in base_names(checkpoint, plan).items():
        weights[new_name] = changed.get(name, checkpoint.tensor(name)).to(dtype)
    for block_id in plan.block_ids:
        layer = plan.position(block_id)
        for suffix, value in block_values(checkpoint, plan, state, block_id, strength).items():
            weights[checkpoint.layer_name(layer, suffix)] = value.to(dtype)
    return _build(expand_config(checkpoint.config, plan), weights, dtype)


def build_base_hf(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The base as a transformers model in evaluation mode."""
    return _build(checkpoint.config, {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.names()}, dtype)


def base_names(checkpoint: Checkpoint, plan: ExpansionPlan) -> dict[str, str]:
    """Name of each base tensor -> its name in the grown model."""
    names = {name: name for name in checkpoint.names()}
    prefix = family_of(checkpoint.config).layer_prefix + "."
    new_index = {entry.index: i for i, entry in enumerate(plan.stack()) if entry.kind == "base"}
    for name in names:
        if name.startswith(prefix):
            layer, suffix = name.removeprefix(prefix).split(".", 1)
            names[name] = checkpoint.layer_name(new_index[int(layer)], suffix)
    return names


def changed_norms(checkpoint: Checkpoint, plan: ExpansionPlan) -> dict[str, torch.Tensor]:
    """Name of each base tensor that is another one in the grown model -> that one, in the stored type: the output norms
    of an encoder's layers below its blocks. None of a decoder."""
    return {
        name: plain_norm(kind, checkpoint.tensor(name))
        for layer in sorted(normalised_layers(plan))
        for kind in ("weight", "bias")
        for name in (checkpoint.layer_name(layer, f"{OUTPUT_NORM}.{kind}"),)
    }


def verify_identity(checkpoint: Checkpoint, plan: ExpansionPlan) -> None:
    """Fails unless the grown model at its initial values gives the base's logits bit for bit, or an encoder's hidden
    states to 1e-5 (methods.md 2.3).

    Raises:
        ExpansionError: with code ``E_IDENTITY``.
    """
    # In half precision the rounding of an encoder's norms alone is larger than the tolerance.
    dtype = torch.float32 if plan.shape.encoder else checkpoint.dtype
    tolerance = ENCODER_TOLERANCE if plan.shape.encoder else 0.0
    base = build_base_hf(checkpoint, dtype)
    grown = build_expanded_hf(checkpoint, plan, {}, 1.0, dtype)
    what = f"the model grown from {checkpoint.folder} by {len(plan.blocks)} blocks"
    _require_equal(base, grown, what, tolerance=tolerance)


def export_hf(
    *,
    checkpoint: Checkpoint,
    plan: ExpansionPlan,
    state: State,
    strength: float,
    out: Path,
    measured: Mapping[str, float | str] | None = None,
    head: Head | None = None,
) -> ExportSummary:
    """Writes the model to the new folder ``out`` and checks it.

    Args:
        measured: figures for the model card, in words -> value.
        head: of an encoder's run.

    Raises:
        ValueError: as :func:`block_values`.
        ExportError: the checkpoint is not the plan's base, ``out`` exists, the disk is too small, or a value does not
            fit the base's type.
        ExpansionError: ``E_IDENTITY``, the export without its blocks is not the base; nothing is left behind.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; remove it or export to another folder")
    found = base_hash(checkpoint.folder)
    if found != plan.base_hash:
        raise ExportError(
            f"{checkpoint.folder}: this is another base (hash {found[:16]}...) than the one the run was trained on "
            f"({plan.base_hash[:16]}...); give the folder of that base",
            exit_code=4,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if plan.blocks:
        dropped = plan.shape.encoder and strength == 0
        changed = {name: partial(_itself, norm) for name, norm in changed_norms(checkpoint, plan).items()}
    else:
        changed = changed_tensors(checkpoint, plan, state, strength)
        dropped = not changed
    placed = () if dropped else plan.block_ids
    blocks = {block_id: _stored_block(checkpoint, plan, state, block_id, strength) for block_id in placed}
    if dropped and plan.blocks:
        block_values(checkpoint, plan, state, plan.block_ids[0], strength)  # refuses what is no state of the plan
    needed = sum(file.stat().st_size for file in checkpoint.files) + sum(
        tensor.nbytes for block in blocks.values() for tensor in block.values()
    )
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ExportError(f"{out}: the export needs {needed} bytes and the disk has {free}; free some space")
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        on_top = dropped or (plan.base_cut == plan.shape.num_layers and not changed)
        if dropped:
            _copy_base(temporary, checkpoint)
        else:
            _write_weights(temporary, checkpoint, plan, blocks, copy_files=on_top, changed=changed)
            _write_json(temporary / "config.json", expand_config(checkpoint.config, plan))
        for name in (*_COMPANIONS, *(SENTENCE_FILES if plan.shape.encoder else ())):
            if (checkpoint.folder / name).is_file():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint.folder / name, temporary / name)
        if head is not None:
            _write_head(temporary / HEAD_FILE, head)
        hashes = _verify(temporary, checkpoint, None if dropped else plan, changed)
        listed = json.dumps(sorted(hashes.items())).encode()
        summary = ExportSummary(
            path=out,
            strength=strength,
            base_hash=plan.base_hash,
            plan_digest=plan.digest(),
            num_layers=plan.shape.num_layers + len(blocks),
            num_blocks=len(blocks),
            measured=dict(measured or {}),
            left_out=plan.block_ids if dropped else (),
            bytes=_num_bytes(temporary),
            base_files_copied=on_top,
            base_tensors_sha256=hashlib.sha256(listed).hexdigest(),
            max_abs_logit_difference_at_zero=0.0,
        )
        record = {
            "fedblocks": fedblocks.__version__,
            "strength": strength,
            "plan": plan.to_plain(),
            "measured": dict(measured or {}),
            "base_tensor_sha256": hashes,
        }
        _write_json(temporary / EXPORT_RECORD, record)
        (temporary / "MODEL_CARD.md").write_text(_model_card(checkpoint, plan, summary, measured or {}))
        summary = dataclasses.replace(summary, bytes=_num_bytes(temporary))
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        temporary.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well
    return summary


def export_run(
    run: Path, *, model: str | Path, out: Path, strength: float | None = None, client: str = ""
) -> ExportSummary:
    """Exports the last published state of a finished run, with what its clients measured of it in the model card.

    Args:
        run: the run folder, or a copy of it.
        model: folder or hub id of the run's base.
        strength: default: the one that the run chose within its forgetting budget.
        client: name of the site whose own model it is, in a run with clusters; default: the one for all.

    Raises:
        ConfigError: the run has not published a final state, or this site has no model of its own.
        ValueError, ExportError, ExpansionError, CheckpointError: as :func:`export_hf` and :meth:`Checkpoint.open`.
    """
    plan, state = load_final(run, client)
    trained = trained_part(plan, state)
    head = head_of(run, plan, state)
    state = {unit: state[unit] for unit in block_units(trained.unit_ids) if unit in state}
    final = load_final_record(run)
    strength = strength_of(run, strength)
    summary = export_hf(
        checkpoint=Checkpoint.open(model),
        plan=trained,
        state=state,
        strength=strength,
        out=out,
        measured=measured_at(final, strength),
        head=head,
    )
    placed = trained.block_ids if summary.num_blocks else ()
    return replace(summary, left_out=tuple(block for block in plan.block_ids if block not in placed))


def head_of(run: Path, plan: ExpansionPlan, state: State) -> Head | None:
    """The classification head of an encoder's run as it was published last; None of a decoder's."""
    if plan.extra is None:
        return None
    labels = json.loads((run / "run.json").read_text(encoding="utf-8"))["labels"]
    found = state.get(EXTRA_UNIT, {})
    weight, bias = (
        np.array(found[spec.name]) if spec.name in found else np.zeros(spec.shape, dtype=np.float32)
        for spec in plan.extra.tensors
    )
    return Head(weight=weight, bias=bias, labels=tuple(labels))


def load_final_record(run: Path) -> dict[str, Any]:
    """The run's final.json; empty if there is none."""
    path = run / "state" / "final.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def strength_of(run: Path, strength: float | None = None) -> float:
    """The strength that is wanted of a run: as given, else the one that it chose within its forgetting budget."""
    return float(load_final_record(run).get("strength", 1.0)) if strength is None else strength


def measured_at(final: Mapping[str, Any], strength: float) -> dict[str, float | str]:
    """What the clients measured of the final state at this strength, for people; empty if nobody did."""
    point = next((p for p in final.get("strengths", ()) if p["strength"] == strength), None)
    if point is None:
        return {}
    found: dict[str, float | str] = {}
    if point["kl"] is not None:
        drift = final.get("forgetting") == "drift"
        unit = "" if drift else ", nats per token"
        what = "drift from the base's embeddings" if drift else f"KL to the base{unit}"
        found[what] = f"{point['kl']:.4f} +- {point['kl_error']:.4f}"
        found[f"forgetting budget{unit}"] = "none" if final["kl_budget"] is None else final["kl_budget"]
    for name, key in (("accuracy", "accuracy"), ("NLL per token", "nll"), ("retention", "retention")):
        if point[key] is not None:
            found[f"{name} on the clients' validation rows" if key != "retention" else "retention"] = point[key]
    if point["refused"]:
        found["not within the budget"] = point["refused"]
    return found


def trained_part(plan: ExpansionPlan, state: State) -> ExpansionPlan:
    """The plan without the blocks whose accumulated delta is zero; all of it where that would leave none.

    A block that nobody has trained is the identity (methods.md 6.7): the model computes the same without it, faster.
    But the topmost block of an encoder's slot has the base's norm, which those below it then lack: a slot stays whole.
    """
    ids = {b.block_id for b in plan.blocks if any(np.any(delta) for delta in state.get(b.block_id, {}).values())}
    if plan.shape.encoder:
        ids = {block for slot in plan.slots().values() if ids & set(slot) for block in slot}
    trained = tuple(b for b in plan.blocks if b.block_id in ids)
    return replace(plan, blocks=trained) if trained else plan


_WRITTEN_AGAIN: Final = "the aggregator writes it again at its next start: fedblocks serve"


def load_final(run: Path, client: str = "") -> tuple[ExpansionPlan, dict[int, dict[str, np.ndarray]]]:
    """Plan, without the blocks that never became active, and last published state of a run folder.

    Args:
        client: name of the site whose own state it is, mixed from the clusters; default: the one for all.

    Raises:
        ConfigError: the run has not published a final state, or this site has none of its own; or the file is not the
            one that the run ended with.
    """
    path = run / "state" / "final.safetensors"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: the run has not finished; see fedblocks status {run}")
    plan = ExpansionPlan.from_json((run / "plan.json").read_text(encoding="utf-8"))
    record = load_final_record(run)
    active = record.get("active_blocks") or plan.block_ids  # older releases had no growth
    if client:
        own = unflatten(_own_state(run, client))
        if isinstance(plan.trainable, PersonalPairs):
            own = prior_of(own, plan.units).state
        return plan.reduced(active), own
    try:
        state = unflatten(load_file(path))
        found = state_sha256(plan.units.held(), state)
    except (SafetensorError, LocalProtocolError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}; {_WRITTEN_AGAIN} {run}") from error
    if (ended := record.get("state_sha256", found)) != found:
        what = f"it holds state {found[:12]}…, the run ended with {ended[:12]}…"
        raise ConfigError(f"{path} is damaged: {what}; {_WRITTEN_AGAIN} {run}")
    return plan.reduced(active), state


def _own_state(run: Path, client: str) -> dict[str, np.ndarray]:
    """The clusters' final states weighted by the client's memberships: the state that it ended with, bit for bit."""
    known = load_final_record(run).get("memberships", {})
    if client not in known:
        expected = (
            f"one of {', '.join(sorted(known))}" if known else "none: the run has one model (mixture.clusters = 1)"
        )
        raise ConfigError(f"{client!r} has no model of its own in {run}, expected {expected}")
    total: dict[str, np.ndarray] = {}
    for number, share in enumerate(known[client]):
        for name, value in load_file(run / "state" / f"final.cluster-{number}.safetensors").items():
            part = value.astype(np.float64) * share
            total[name] = total[name] + part if name in total else part
    return {name: value.astype(np.float32) for name, value in total.items()}


def _stored_block(
    checkpoint: Checkpoint, plan: ExpansionPlan, state: State, block_id: int, strength: float
) -> dict[str, torch.Tensor]:
    """The block as the export stores it: name in the grown model -> tensor in the type of its source."""
    layer, source = plan.position(block_id), plan.block(block_id).source_layer
    stored: dict[str, torch.Tensor] = {}
    for suffix, value in block_values(checkpoint, plan, state, block_id, strength).items():
        dtype = checkpoint.stored[checkpoint.layer_name(source, suffix)].dtype
        rounded = value.to(TORCH_DTYPE[dtype])
        if not torch.isfinite(rounded).all():
            raise ExportError(
                f"block {block_id}: {suffix} has values up to {value.abs().max().item():.3g}, too large for the base's "
                f"{dtype}; export with a smaller strength"
            )
        stored[checkpoint.layer_name(layer, suffix)] = rounded
    return stored


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    plan: ExpansionPlan,
    blocks: Mapping[int, Mapping[str, torch.Tensor]],
    *,
    copy_files: bool,
    changed: Mapping[str, Callable[[], torch.Tensor]],
) -> None:
    """One shard per weight file of the base, one with the blocks where there are any, and the index.

    With ``copy_files`` (no base tensor changes its name) the base's files are copied byte for byte. They are not
    hard-linked: a later ``save_pretrained`` into the exported folder would write through the link into the base.
    """
    new_names = base_names(checkpoint, plan)
    norms = changed_norms(checkpoint, plan)
    total = len(checkpoint.files) + bool(blocks)
    weight_map: dict[str, str] = {}
    for i, file in enumerate(checkpoint.files):
        shard = f"model-{i + 1:05d}-of-{total:05d}.safetensors"
        # Wide types first, so that each tensor begins at a multiple of its element's size.
        inside = sorted(
            (name for name in checkpoint.names() if checkpoint.stored[name].file == file),
            key=lambda name: (-TORCH_DTYPE[checkpoint.stored[name].dtype].itemsize, name),
        )
        if copy_files:
            shutil.copyfile(file, folder / shard)
        else:
            entries = {
                new_names[name]: (checkpoint.stored[name].dtype, checkpoint.stored[name].shape) for name in inside
            }
            parts = (
                chunk
                for name in inside
                for chunk in ((_bytes_of(changed[name]()),) if name in changed else checkpoint.chunks(name))
            )
            _write_safetensors(folder / shard, entries, parts)
        weight_map |= {new_names[name]: shard for name in inside}
    shard = f"model-{total:05d}-of-{total:05d}.safetensors"
    tensors = dict(
        sorted(
            (item for block in blocks.values() for item in block.items()),
            key=lambda item: (-item[1].dtype.itemsize, item[0]),
        )
    )
    names = {dtype: name for name, dtype in TORCH_DTYPE.items()}
    if blocks:
        _write_safetensors(
            folder / shard,
            {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()},
            (_bytes_of(tensor) for tensor in tensors.values()),
        )
    if norms:
        save_file({name: checkpoint.tensor(name) for name in norms}, folder / BASE_NORMS)
    weight_map |= dict.fromkeys(tensors, shard)
    size = sum(checkpoint.stored[name].num_bytes for name in new_names) + sum(t.nbytes for t in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _copy_base(folder: Path, checkpoint: Checkpoint) -> None:
    """Configuration and weight files as they are."""
    index = checkpoint.folder / "model.safetensors.index.json"
    for file in (checkpoint.folder / "config.json", *checkpoint.files, *([index] if index.is_file() else [])):
        shutil.copyfile(file, folder / file.name)


def _write_head(file: Path, head: Head) -> None:
    tensors = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
    save_file(tensors, file, metadata={"labels": json.dumps(head.labels)})


def read_head(folder: Path) -> Head | None:
    """The classification head beside an exported encoder; None if it has none."""
    from safetensors import safe_open

    if not (folder / HEAD_FILE).is_file():
        return None
    with safe_open(folder / HEAD_FILE, framework="numpy") as file:
        labels = json.loads(file.metadata()["labels"])
        return Head(weight=file.get_tensor("weight"), bias=file.get_tensor("bias"), labels=tuple(labels))


def base_of_export(folder: Path) -> dict[str, torch.Tensor]:
    """The base's tensors in an exported encoder: its blocks dropped, its norms restored; name in the base -> tensor.

    What is left out is only what the model's class does not have.

    Raises:
        ExportError: the run has changed the base's own tensors.
    """
    grown = Checkpoint.open(folder)
    record = json.loads((folder / EXPORT_RECORD).read_bytes())
    plan = ExpansionPlan.from_plain(record["plan"])
    if not plan.blocks and record["strength"] != 0:
        raise ExportError(f"{folder}: its run changed the base's own tensors; take what they were from the base")
    if grown.shape == plan.shape:  # exported at strength 0
        return {name: grown.tensor(name) for name in grown.names()}
    return _without_blocks(folder, grown, plan)


def _without_blocks(folder: Path, grown: Checkpoint, plan: ExpansionPlan) -> dict[str, torch.Tensor]:
    """The tensors of the base that an encoder was grown from, by their names there."""
    prefix = grown.layer_name(0, "").rstrip(".").removesuffix("0")
    old_index = {i: entry.index for i, entry in enumerate(plan.stack()) if entry.kind == "base"}
    tensors: dict[str, torch.Tensor] = {}
    for name in grown.names():
        if not name.startswith(prefix):
            tensors[name] = grown.tensor(name)
            continue
        layer, suffix = name.removeprefix(prefix).split(".", 1)
        if int(layer) in old_index:
            tensors[grown.layer_name(old_index[int(layer)], suffix)] = grown.tensor(name)
    return {**tensors, **load_torch_file(folder / BASE_NORMS)}


def _write_safetensors(
    file: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]], parts: Iterator[memoryview]
) -> None:
    """A safetensors file of these tensors in this order, their bytes streamed; tensors are never held together."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * TORCH_DTYPE[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the format asks
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for part in parts:
            f.write(part)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _verify(
    folder: Path, checkpoint: Checkpoint, plan: ExpansionPlan | None, changed: Collection[str]
) -> dict[str, str]:
    """Reads the written folder back: base tensors unmodified, and without its blocks the base's logits.

    Args:
        plan: None for a folder that is the base itself.
        changed: base tensors that are to be others.

    Returns:
        SHA-256 of each base tensor's bytes, by its name in the base.
    """
    written = Checkpoint.open(folder)
    hashes: dict[str, str] = {}
    names = base_names(checkpoint, plan) if plan is not None else {name: name for name in checkpoint.names()}
    for name, new_name in names.items():
        hashes[name] = _tensor_hash(checkpoint, name)
        if name not in changed and _tensor_hash(written, new_name) != hashes[name]:
            raise ExpansionError("E_IDENTITY", f"{folder}: tensor {new_name} is not the base's {name}; the disk failed")
    if checkpoint.shape.encoder:
        _verify_encoder(folder, checkpoint, written, plan, changed)
        return hashes
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        grown = AutoModelForCausalLM.from_pretrained(folder, dtype=checkpoint.dtype, trust_remote_code=False).eval()
        base = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=checkpoint.dtype, trust_remote_code=False
        ).eval()
    parameters = dict(grown.named_parameters())
    with torch.no_grad():
        for block_id in () if plan is None else plan.block_ids:
            for spec in checkpoint.shape.block_tensors():
                if spec.is_out:
                    parameters[checkpoint.layer_name(plan.position(block_id), spec.name)].zero_()
        for name in changed:
            parameters[names[name]].copy_(checkpoint.tensor(name))
    _require_equal(base, grown, "the export with its blocks at strength 0, and with the base's own tensors,")
    return hashes


def _verify_encoder(
    folder: Path, checkpoint: Checkpoint, written: Checkpoint, plan: ExpansionPlan | None, changed: Collection[str]
) -> None:
    """The folder loads as a user would load it, and without its blocks, the norms restored, it is the base's bits; so
    it is with the base's values in the place of those that were changed."""
    from transformers import AutoModel

    with _quiet_transformers():
        loaded = AutoModel.from_pretrained(folder, dtype=checkpoint.dtype, trust_remote_code=False).eval()
        base = AutoModel.from_pretrained(checkpoint.folder, dtype=checkpoint.dtype, trust_remote_code=False).eval()
    if plan is not None:
        if plan.blocks:
            restored = _without_blocks(folder, written, plan)
        else:
            restored = {name: (checkpoint if name in changed else written).tensor(name) for name in written.names()}
        weights = {name: tensor.to(checkpoint.dtype) for name, tensor in restored.items()}
        loaded = _build(checkpoint.config, weights, checkpoint.dtype)
    _require_equal(base, loaded, "the export without its blocks, with the base's norms,")


def _tensor_hash(checkpoint: Checkpoint, name: str) -> str:
    digest = hashlib.sha256()
    for chunk in checkpoint.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()


def _require_equal(base: PreTrainedModel, grown: PreTrainedModel, what: str, *, tolerance: float = 0.0) -> None:
    """Compares logits, or the hidden states of an encoder's real tokens, on a small fixed batch: 3 sequences of 24
    tokens, whole, left and right padded."""
    vocab = base.config.vocab_size
    tokens = (torch.arange(3 * 24) * 7919 + 13).remainder(vocab).view(3, 24)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    mask[2, -9:] = 0

    def output(model: PreTrainedModel) -> torch.Tensor:
        found = model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state[mask.bool()]

    with torch.no_grad():
        expected, got = output(base), output(grown)
    difference = (expected.float() - got.float()).abs()
    if not (torch.equal(expected, got) or difference.max().item() <= tolerance):
        raise ExpansionError(
            "E_IDENTITY",
            f"{what} does not give the base's output: it differs by up to {difference.max().item():.3g} "
            f"in {int((difference != 0).sum())} of {difference.numel()} places (not a number counts); expected "
            f"{f'at most {tolerance:g}' if tolerance else 'equal bits'}. Nothing was written; please report the model "
            "and the versions of torch and transformers",
        )


def _build(config: Mapping[str, Any], weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    hf_config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    classes = MODEL_MAPPING if family_of(config).residual == "post-norm" else MODEL_FOR_CAUSAL_LM_MAPPING
    with _quiet_transformers():
        model = classes[type(hf_config)].from_pretrained(None, config=hf_config, state_dict=weights, dtype=dtype)
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar for the loading of weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _model_card(
    checkpoint: Checkpoint, plan: ExpansionPlan, summary: ExportSummary, measured: Mapping[str, float | str]
) -> str:
    loader = "AutoModel" if plan.shape.encoder else "AutoModelForCausalLM"
    figures = "\n".join(f"* {name}: {_figure(value)}" for name, value in measured.items())
    return f"""# A {plan.shape.family} model with {summary.num_blocks} expanded blocks

{_trained_by(plan)}
The folder loads with `{loader}.from_pretrained`; it needs no other code.

* Base hash (all tensors, sizes, tokenizer): `{plan.base_hash}`
* Base tensors: {len(checkpoint.stored)}, {_base_files(plan, summary)};
  SHA-256 over their hashes `{summary.base_tensors_sha256}`, each hash in `{EXPORT_RECORD}`
* Layers: {plan.shape.num_layers} of the base + {summary.num_blocks} = {summary.num_layers}
* Strength: {summary.strength:g} (0 is the base, 1 is as trained)
* Plan: {plan.trainable_text()}, digest `{summary.plan_digest}`

{_blocks_table(plan) if summary.num_blocks else ""}
## Checked during the export

{_checked(plan, summary)}

## Measured

{figures or "No figures came with this export: run `fedblocks evaluate` on it."}
"""


def _trained_by(plan: ExpansionPlan) -> str:
    if plan.blocks:
        return "Trained by federated block expansion: layers were added and trained, and the base was never changed."
    return "Trained in a federation that changes the base's own tensors, and has no other layers."


def _base_files(plan: ExpansionPlan, summary: ExportSummary) -> str:
    if summary.base_files_copied:
        return "copied byte for byte"
    return "their bytes kept, layers renumbered" if plan.blocks else "those that were not trained with their bytes"


def _blocks_table(plan: ExpansionPlan) -> str:
    rows = "\n".join(
        f"| {block.block_id} | {plan.position(block.block_id)} | {block.source_layer} | {block.after_layer} |"
        for block in plan.blocks
    )
    return f"""| block | layer in this model | copy of base layer | after base layer |
|---|---|---|---|
{rows}
"""


def _checked(plan: ExpansionPlan, summary: ExportSummary) -> str:
    difference = summary.max_abs_logit_difference_at_zero
    if not plan.blocks:
        return f"""* With the base's values in the place of those that were trained the logits equal the base's bit for
  bit (largest difference {difference}).
* Every other tensor of the base is in this folder with its own bytes."""
    if not plan.shape.encoder:
        return f"""* With the output projections of the blocks at 0 the logits equal the base's bit for bit
  (largest difference {difference}).
* Every tensor of the base is in this folder with its own bytes."""
    if summary.num_blocks == 0:
        return "* This is the base: every file of its weights is here byte for byte."
    layers = ", ".join(map(str, plan.slots()))
    return f"""* Without the blocks, and with the norms of `{BASE_NORMS}` back, the hidden states equal the base's
  bit for bit (largest difference {difference}).
* Every tensor of the base is in this folder with its own bytes, but for the output norms of its layers {layers}, whose
  scale and offset have moved into the blocks above them; these are in `{BASE_NORMS}`.
* A classification head, where there is one, is in `{HEAD_FILE}`; what is said about the base is about the embedding."""


def _figure(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
