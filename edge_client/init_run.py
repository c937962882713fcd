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
from dataclasses import dataclass
from pathlib import Path

from fedblocks.edge_client.anchor import sample_anchor
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import DataError, read_rows
from fedblocks.edge_client.export import verify_identity
from fedblocks.edge_client.starter import starter_folder
from fedblocks.protocol import run_config
from fedblocks.protocol.codec import to_plain
from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import ResourceInfo
from fedblocks.protocol.method_plan import plan_of
from fedblocks.protocol.run_config import ConfigError

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


def init_run(
    *,
    model: Path,
    out: Path,
    general: Path | None,
    overrides: Sequence[str] = (),
    anchor_sequences: int = 512,
    anchor_tokens: int = 256,
) -> RunSummary:
    """Write the run folder ``out`` (mode 0700) for the base model in the folder ``model``.

    Raises:
        ConfigError: ``out`` exists already, or an override cannot be used.
        ExpansionError: the model's family cannot be expanded.
        DataError: the general validation file cannot be used.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; choose another folder, or serve it: fedblocks serve {out}")
    config = run_config.from_mapping({}, overrides)
    checkpoint = Checkpoint.open(model)
    content_hash = base_hash(checkpoint.folder)
    plan = plan_of(config, base_hash=content_hash, model_config=checkpoint.config)
    if plan.blocks:
        verify_identity(checkpoint, plan)
    files = {"plan.json": plan.to_json().encode()}
    if general is not None:
        files["general.jsonl"] = _general_file(general)
    anchor = sample_anchor(checkpoint, num_sequences=anchor_sequences, num_tokens=anchor_tokens, seed=config.run.seed)
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
    write_durably(out / "run.toml", run_config.to_toml(config).encode())
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
    }
    write_durably(out / "run.json", json.dumps(description, indent=2).encode())
    return RunSummary(
        folder=out,
        run_id=run_id,
        base_name=base_name,
        base_hash=content_hash,
        plan=plan,
        num_anchor_tokens=anchor.num_tokens,
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
