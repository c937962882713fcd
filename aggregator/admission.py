"""Is an update accepted? Pure checks of its announcement and of its bytes, in the order of methods.md 8.1.

The announcement (the Delta message) is checked before a single byte of payload is let in, the payload tensor by tensor
from its spooled file, in constant memory.
The first failing check, in the order of ``REFUSAL_CODES``, is the answer.
What the codec (malformed, unknown_field), the handshake (version_skew, model_mismatch, not_enrolled, revoked) and the
disk (no_space) refuse never comes here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedblocks.aggregator.aggregation import MAX_STALENESS
from fedblocks.profiles.units import Units, unit_parameters
from fedblocks.protocol.errors import REFUSAL_CODES, RemoteProtocolError
from fedblocks.protocol.messages import Assignment, Delta, Refused
from fedblocks.protocol.tensors import DeltaLayout, TensorSlot, check_tensor, delta_layout

#: An AdamW step moves a value by at most 2.35·lr and the residual cap is 3·lr·tau, so an honest client stays below
#: 5.4·lr·tau (methods.md 8.1).
NORM_FACTOR: Final = 8.0
HASH_CHUNK_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the operator allows, whatever a client announces."""

    max_payload_bytes: int
    """The largest payload that any assignment of this run can ask for."""
    max_num_examples: int
    """The operator's cap on n_k."""
    max_learning_rate: float
    """The largest learning rate that the run's method can hand out."""


def largest_payload_bytes(shape: Units, blocks: Iterable[int]) -> int:
    """Bytes of these blocks in fp32: no assignment of the run can ask for more."""
    return 4 * sum(unit_parameters(shape, block) for block in blocks)


def check_announcement(
    delta: Delta,
    *,
    assignment: Assignment | None,
    shape: Units,
    limits: Limits,
    quota_bytes: int,
    declared_num_examples: int,
    version: int,
    accepted_sha256: str | None,
) -> Refused | None:
    """None if the payload may come, else the refusal.

    An update whose bytes were accepted before (``accepted_sha256 == delta.payload_sha256``) is to be acknowledged again
    by the caller without asking here.

    Args:
        assignment: what was issued to this client under ``delta.attempt_id``; None if nothing was.
        quota_bytes: what the client may still upload in this round.
        declared_num_examples: the site's examples according to its Hello.
        version: the published version now.
        accepted_sha256: hash of what was accepted for this very assignment, if anything was.
    """
    try:
        _check_size(delta, limits, quota_bytes)
        if assignment is None or delta.round != assignment.round:
            raise RemoteProtocolError(
                f"attempt {delta.attempt_id[:60]!r} of round {delta.round} was not issued to this client",
                code="unknown_attempt",
            )
        if len(delta.train.gradient_energy) != len(assignment.blocks):
            raise RemoteProtocolError(
                f"{len(delta.train.gradient_energy)} gradient energies, expected one for each of the "
                f"{len(assignment.blocks)} assigned blocks"
            )
        _check_freshness(delta, assignment, version)
        if accepted_sha256 is not None:
            raise RemoteProtocolError(
                f"attempt {delta.attempt_id!r} was accepted with hash {accepted_sha256}, now it has "
                f"{delta.payload_sha256[:64]}; an update is sent unchanged or not again",
                code="conflict",
            )
        _check_content(delta, assignment, shape)
        _check_claims(delta, assignment, limits, declared_num_examples)
    except RemoteProtocolError as error:
        return _refused(delta, error)
    return None


def _check_size(delta: Delta, limits: Limits, quota_bytes: int) -> None:
    if delta.payload_bytes < 0:
        raise RemoteProtocolError(f"payload_bytes is {delta.payload_bytes}, expected 0 or more")
    if delta.payload_bytes > limits.max_payload_bytes:
        raise RemoteProtocolError(
            f"{delta.payload_bytes} bytes announced, no update of this run has more than {limits.max_payload_bytes}",
            code="too_large",
        )
    if delta.payload_bytes > quota_bytes:
        raise RemoteProtocolError(
            f"{delta.payload_bytes} bytes announced, {max(0, quota_bytes)} are left of this round's quota; "
            "send it in the next round",
            code="over_quota",
        )


def _check_freshness(delta: Delta, assignment: Assignment, version: int) -> None:
    if delta.version != assignment.state.to_version:
        raise RemoteProtocolError(
            f"trained from version {delta.version}, expected {assignment.state.to_version} as assigned",
            code="stale_round",
        )
    if version - delta.version > MAX_STALENESS:
        raise RemoteProtocolError(
            f"round {delta.round} started from version {delta.version}, the model is at {version}; updates count up to "
            f"{MAX_STALENESS} version late",
            code="stale_round",
        )


def _check_content(delta: Delta, assignment: Assignment, shape: Units) -> None:
    """The tensors are those of the assignment, in its width and format, and the length is theirs."""
    other_width = _width_fault(delta, assignment)
    try:
        layout = _layout(delta, assignment, shape)
    except RemoteProtocolError as error:
        raise _first([error, other_width]) or error from None
    if other_width is not None:
        raise other_width
    if (delta.format, delta.density) != (assignment.delta_format, assignment.delta_density):
        raise RemoteProtocolError(
            f"format {delta.format} at density {delta.density}, expected {assignment.delta_format} at "
            f"{assignment.delta_density} as assigned",
            code="dtype_mismatch",
        )
    if delta.payload_bytes != layout.total_bytes:
        raise RemoteProtocolError(
            f"{delta.payload_bytes} bytes announced, its tensors take {layout.total_bytes}", code="length_mismatch"
        )


def _layout(delta: Delta, assignment: Assignment, shape: Units) -> DeltaLayout:
    return delta_layout(
        delta.tensors,
        shape=shape,
        blocks=assignment.blocks,
        format=delta.format,
        density=delta.density,
        width=assignment.width,
    )


def _width_fault(delta: Delta, assignment: Assignment) -> RemoteProtocolError | None:
    if delta.width == assignment.width:
        return None
    return RemoteProtocolError(f"width is {delta.width}, expected {assignment.width} as assigned", code="not_assigned")


def _first(faults: Iterable[RemoteProtocolError | None]) -> RemoteProtocolError | None:
    """The fault that comes first in ``REFUSAL_CODES``; None if there is none."""
    found = [fault for fault in faults if fault is not None]
    return min(found, key=lambda fault: REFUSAL_CODES.index(fault.code), default=None)


def _check_claims(delta: Delta, assignment: Assignment, limits: Limits, declared_num_examples: int) -> None:
    most = min(declared_num_examples, limits.max_num_examples)
    if not 1 <= delta.num_examples <= most:
        raise RemoteProtocolError(
            f"num_examples is {delta.num_examples}, expected 1 to {most} (declared at join: {declared_num_examples}, "
            f"the operator's cap: {limits.max_num_examples})",
            code="bad_weight",
        )
    if not 1 <= delta.steps <= assignment.steps:
        raise RemoteProtocolError(
            f"steps is {delta.steps}, expected 1 to {assignment.steps} as assigned", code="bad_steps"
        )
    if delta.train.mode.micro_batch_size > assignment.batch_size:
        raise RemoteProtocolError(
            f"mode: {delta.train.mode.micro_batch_size} sequences at a time, the assigned batch has "
            f"{assignment.batch_size}"
        )


def check_payload(
    delta: Delta, assignment: Assignment, payload: memoryview, *, shape: Units, limits: Limits, hashed: bool = False
) -> Refused | None:
    """None if the bytes are a valid update of ``assignment``, else the refusal; reads one tensor at a time.

    ``delta`` must have passed :func:`check_announcement`; ``payload`` is best a mapping of the spooled file.

    Args:
        hashed: whoever let the bytes in has held their SHA-256 against the announced one.
    """
    if len(payload) != delta.payload_bytes:
        error = RemoteProtocolError(
            f"{len(payload)} bytes arrived, {delta.payload_bytes} were announced", code="length_mismatch"
        )
        return _refused(delta, error)
    limit = NORM_FACTOR * limits.max_learning_rate * assignment.steps
    slots = _layout(delta, assignment, shape).slots
    checksum_fault = None if hashed else _checksum_fault(delta, payload)
    fault = _first([checksum_fault, *(_tensor_fault(delta, s, payload, limit) for s in slots)])
    return None if fault is None else _refused(delta, fault)


def _checksum_fault(delta: Delta, payload: memoryview) -> RemoteProtocolError | None:
    digest = hashlib.sha256()
    for start in range(0, len(payload), HASH_CHUNK_BYTES):
        digest.update(payload[start : start + HASH_CHUNK_BYTES])
    if digest.hexdigest() == delta.payload_sha256:
        return None
    return RemoteProtocolError(
        f"the payload has hash {digest.hexdigest()}, {delta.payload_sha256[:64]} was announced",
        code="checksum_mismatch",
    )


def _tensor_fault(delta: Delta, slot: TensorSlot, payload: memoryview, limit: float) -> RemoteProtocolError | None:
    try:
        check_tensor(
            slot.spec, slot.rows_sent, slot.of(payload), format=delta.format, density=delta.density, limit=limit
        )
    except RemoteProtocolError as error:
        return RemoteProtocolError(f"block {slot.block}: {error}", code=error.code)
    return None


def _refused(delta: Delta, error: RemoteProtocolError) -> Refused:
    return Refused(code=error.code, text=str(error), attempt_id=delta.attempt_id)
