"""What does our aggregator answer to the same bad updates? Its decoder and its checks, as an update goes through them.

The good updates are of one block in fp32; a bad one differs from them as its case says. Ours have no free keys: another
key is a block that was not assigned.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from light_clients import TINY, Update, write_run
from peers.cases import CASES
from timed_assignment import assignment

from fedblocks.aggregator.admission import Limits, check_announcement, check_payload, largest_payload_bytes
from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.codec import decode_body, pack, to_plain
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import Assignment, Delta

LEARNING_RATE: Final = 1e-3
DECLARED: Final = 100


def answers() -> dict[str, str]:
    """Case -> the refusal's code, or "accepted"."""
    with tempfile.TemporaryDirectory() as folder:
        plan = write_run(Path(folder) / "run", TINY)
    task = replace(
        assignment(
            plan.unit_ids, mode=ExecutionMode(), steps=4, batch_size=8, anchor_batch_size=0, learning_rate=LEARNING_RATE
        ),
        delta_format="fp32",
        delta_density=1.0,
    )
    good = Update.of(plan, task)
    plain, payload = to_plain(good.answer(task)), good.payload
    if (found := verdict(plan, task, plain, payload)) != "accepted":
        raise RuntimeError(f"the good update was answered with {found}, expected it to be accepted")
    return {name: verdict(plan, task, *spoilt(name, plain, payload)) for name in CASES}


def spoilt(name: str, plain: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """The announcement and the bytes of a case."""
    case, tensors = CASES[name], plain["tensors"]
    values = np.frombuffer(payload, dtype="<f4").copy()
    sent = case.get("x", case.get("y", []))
    if "y" in case:
        return {**plain, "tensors": [{**header, "block": header["block"] + 7} for header in tensors]}, payload
    if len(sent) != 2:
        at = max(range(len(tensors)), key=lambda i: tensors[i]["rows_sent"])  # a matrix: vectors count as one row
        wrong = {**tensors[at], "rows_sent": tensors[at]["rows_sent"] + len(sent) - 2}
        return {**plain, "tensors": [*tensors[:at], wrong, *tensors[at + 1 :]]}, payload
    if case["weight"] != 1.0:
        weight = case["weight"]
        return {**plain, "num_examples": weight if math.isnan(weight) else int(weight)}, payload
    # The case's factor on what an honest client may send at most; NaN and infinity stay what they are.
    values[0] = np.float32(sent[0] * LEARNING_RATE)
    changed = values.tobytes()
    return {**plain, "payload_sha256": hashlib.sha256(changed).hexdigest()}, changed


def verdict(plan: ExpansionPlan, task: Assignment, plain: dict[str, Any], payload: bytes) -> str:
    """The first check that fails: the decoder's, that of the announcement, that of the bytes."""
    shape = plan.shape
    limits = Limits(
        max_payload_bytes=largest_payload_bytes(shape, plan.unit_ids),
        max_num_examples=10**9,
        max_learning_rate=LEARNING_RATE,
    )
    try:
        delta = decode_body("delta", pack(plain))
    except RemoteProtocolError as error:
        return error.code
    assert isinstance(delta, Delta)
    refused = check_announcement(
        delta,
        assignment=task,
        shape=shape,
        limits=limits,
        quota_bytes=limits.max_payload_bytes,
        declared_num_examples=DECLARED,
        version=task.state.to_version,
        accepted_sha256=None,
    ) or check_payload(delta, task, memoryview(payload), shape=shape, limits=limits)
    return "accepted" if refused is None else refused.code
