"""What does the aggregator need to know of a model that it never loads? ``fedblocks init`` writes it into a run folder.

The run folder is made on any machine that has the base model and torch, and is then copied to the aggregator's box:
configuration, hashes, expansion plan, anchor texts sampled from the base, and the general validation file.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import DataError, TextEncoder, read_rows
from fedblocks.edge_client.encoder_files import read_anchor_texts, read_labels
from fedblocks.edge_client.encoder_model import check_pooling, classification_head
from fedblocks.edge_client.export import verify_identity
from fedblocks.edge_client.starter import starter_folder
from fedblocks.protocol import run_config
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import DataFormat, ResourceInfo
from fedblocks.protocol.method_plan import plan_of
from fedblocks.protocol.run_config import ConfigError, RunConfig

#: Largest general validation file: it travels to every client that evaluates.
MAX_GENERAL_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What ``init`` made."""

    folder: Path
    run_id: str
    base_name: str
    base_hash: str
    plan: ExpansionPlan
    num_anchor_tokens: int
    anchor_origin: str
    """Where the anchor texts are from, in words."""


def init_run(
    *,
    model: Path,
    out: Path,
    general: Path | None,
    overrides: Sequence[str] = (),
    anchor_sequences: int = 512,
    anchor_tokens: int = 256,
    labels: Path | None = None,
    anchor_texts: Path | None = None,
) -> RunSummary:
    """Write the run folder ``out`` (mode 0700) for the base model in the folder ``model``.

    Args:
        labels: of an encoder's run (``encoder_files.read_labels``).
        anchor_texts: of an encoder's run, in the place of texts sampled from the base.

    Raises:
        ConfigError: ``out`` exists already, or an override cannot be used.
        ExpansionError: the model's family cannot be expanded.
        DataError: the general validation file, the labels or the anchor texts cannot be used.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; choose another folder, or serve it: fedblocks serve {out}")
    config = run_config.from_mapping({}, overrides)
    checkpoint = Checkpoint.open(model)
    encoder = checkpoint.shape.encoder
    _check_arguments(checkpoint, config, overrides, general=general, labels=labels, anchor_texts=anchor_texts)
    content_hash = base_hash(checkpoint.folder)
    plan = plan_of(config, base_hash=content_hash, model_config=checkpoint.config)
    if plan.blocks:
        verify_identity(checkpoint, plan)
    known_labels = () if labels is None else read_labels(labels)
    if encoder:
        plan = replace(plan, extra=classification_head(checkpoint.shape.hidden_size, len(known_labels)))
    files = {"plan.json": plan.to_json().encode()}
    if general is not None:
        files["general.jsonl"] = _general_file(general)
    if anchor_texts is not None:
        form = DataFormat(max_tokens=min(anchor_tokens, config.data.max_tokens), append_eos=False, join=" ")
        tokenizer = TextEncoder(checkpoint.folder, form)
        anchor = read_anchor_texts(anchor_texts, tokenizer, most=anchor_sequences)
    else:
        anchor = sample_anchor(
            checkpoint, num_sequences=anchor_sequences, num_tokens=anchor_tokens, seed=config.run.seed
        )
    files["anchor.bin"] = anchor.to_bytes()

    base_name = name_of(model)
    run_id = f"{base_name[:40]}-{secrets.token_hex(4)}"
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(0o700)
    for folder in ("resources", "base"):
        (out / folder).mkdir()
    for name, content in files.items():
        write_durably(out / "resources" / name, content)
    write_durably(out / "plan.json", files["plan.json"])
    write_durably(out / "base" / "config.json", json.dumps(checkpoint.config, indent=2).encode())
    write_durably(out / "run.toml", run_config.to_toml(config, encoder=encoder).encode())
    resources = [
        ResourceInfo(name=name, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in sorted(files.items())
    ]
    description = {
        "run_id": run_id,
        "base_name": base_name,
        "base_hash": content_hash,
        "tokenizer_hash": checkpoint.tokenizer_hash,
        "created_unix_s": time.time(),
        "resources": to_plain(resources),
        "anchor_sequences": len(anchor.sequences),
        "anchor_tokens": max(map(len, anchor.sequences)),
        **({"labels": list(known_labels)} if encoder else {}),
    }
    write_durably(out / "run.json", json.dumps(description, indent=2).encode())
    return RunSummary(
        folder=out,
        run_id=run_id,
        base_name=base_name,
        base_hash=content_hash,
        plan=plan,
        num_anchor_tokens=anchor.num_tokens,
        anchor_origin="sampled from the base" if anchor_texts is None else f"of {anchor_texts}",
    )


def _check_arguments(
    checkpoint: Checkpoint,
    config: RunConfig,
    overrides: Sequence[str],
    *,
    general: Path | None,
    labels: Path | None,
    anchor_texts: Path | None,
) -> None:
    """What only the other kind of model has, and what an encoder's run cannot do without.

    Raises:
        ConfigError: the first that is wrong.
    """
    encoder = checkpoint.shape.encoder
    foreign = run_config.foreign_override(overrides, encoder=encoder)
    if foreign is not None:
        raise ConfigError(f"{foreign}: {run_config.foreign_key_text(foreign)}")
    if not encoder:
        for option, given in (("--labels", labels), ("--anchor-texts", anchor_texts)):
            if given is not None:
                raise ConfigError(
                    f"{option} {given}: is for encoders; a {checkpoint.shape.family} model learns from the texts' own "
                    "tokens and writes its anchor texts itself; leave it out"
                )
        return
    if config.run.method not in ("fedbe", "llamapro", "fedhft"):
        raise ConfigError(
            f"run.method is {config.run.method!r}, and a {checkpoint.shape.family} model is an encoder: its run "
            "trains its head and expanded blocks or personal pairs; take 'fedbe', 'llamapro' or 'fedhft'"
        )
    if labels is None or anchor_texts is None:
        missing = "--labels FILE (rows with a label, or one label on each line)"
        if labels is not None:
            missing = "--anchor-texts FILE (texts, one on each line or as JSONL rows, that the embedding is held to)"
        raise ConfigError(f"a {checkpoint.shape.family} model is an encoder; its run also needs {missing}")
    if general is not None:
        raise ConfigError(
            f"--general {general}: an encoder's general ability is not measured during the run; give the file to "
            "fedblocks evaluate --general (rows with sentence1, sentence2 and score)"
        )
    check_pooling(checkpoint.folder)
    positions = int(checkpoint.config["max_position_embeddings"])
    if config.data.max_tokens > positions:
        raise ConfigError(
            f"data.max_tokens is {config.data.max_tokens}, this model has {positions} positions; "
            f"--set data.max_tokens={positions}"
        )
    if config.expansion.placement == "adaptive":
        raise ConfigError(
            "expansion.placement is 'adaptive', whose trial of every slot is for decoders; take 'thirds', 'top' or "
            "'interleaved'"
        )
    if config.expansion.placement == "top" and config.most_blocks > config.expansion.blocks:
        raise ConfigError(
            f"expansion.max_blocks is {config.expansion.max_blocks} with placement 'top': an encoder's run does not "
            "grow into a slot that holds a block already; take placement 'thirds', or all blocks at the start"
        )


def name_of(model: Path) -> str:
    """What people call the base model in this folder: the folder's name, and not what its config says it was loaded
    from (``_name_or_path`` of a fine-tuned model names its parent).

    The bundled model is the ``starter``; a snapshot of the Hugging Face cache (``models--ORG--NAME/snapshots/HASH``) is
    called NAME.
    """
    folder = model.resolve()
    if folder == starter_folder().resolve():
        return "starter"
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _general_file(path: Path) -> bytes:
    read_rows(path)
    content = path.read_bytes()
    if len(content) > MAX_GENERAL_BYTES:
        raise DataError(
            f"{path}: {len(content)} bytes, at most {MAX_GENERAL_BYTES} travel to the clients; give a smaller sample"
        )
    return content
