"""Which assignment does a benchmark give to the client's training code, where no aggregator has made one?"""

from __future__ import annotations

from fedblocks.profiles.cost import ExecutionMode
from fedblocks.protocol.messages import Assignment, AttemptId, StateUpdate


def assignment(
    blocks: tuple[int, ...],
    *,
    mode: ExecutionMode,
    steps: int,
    batch_size: int,
    anchor_batch_size: int,
    learning_rate: float,
) -> Assignment:
    """Train these blocks from the base, without a deadline or a memory budget."""
    return Assignment(
        attempt_id=AttemptId("bench"),
        round=1,
        state=StateUpdate(encoding="none", from_version=0, to_version=0, state_sha256=""),
        payload_bytes=0,
        payload_sha256="",
        blocks=blocks,
        steps=steps,
        batch_size=batch_size,
        anchor_batch_size=anchor_batch_size,
        anchor_every=1,
        anchor_weight=1.0 if anchor_batch_size else 0.0,
        learning_rate=learning_rate,
        warmup_steps=1,
        weight_decay=0.01,
        clip_norm=1.0,
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_eps=1e-8,
        optimizer_mode=mode.optimizer,
        micro_batch_size=mode.micro_batch_size,
        checkpoint_activations=mode.checkpoint,
        delta_format="int8",
        delta_density=0.25,
        seed=0,
        deadline_s=1e6,
        memory_budget_bytes=0,
        predicted_peak_bytes=0,
        predicted_seconds=0.0,
        measure=(),
    )
