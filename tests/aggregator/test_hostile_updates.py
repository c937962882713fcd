"""F1, F2 and F15 of field.md, case by case: refused by its code, counted, and the state is that of a run without it.

What can be known from the announcement is refused before one byte of payload is let in.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedblocks.protocol.messages import AttemptId, Delta
from fedblocks.protocol.tensors import delta_layout

Update = tuple[Delta, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing wrong with an update, and the answer."""

    code: str
    spoil: Callable[[Any, Delta, bytes], Update]
    let_in: bool = False
    """True where only the payload's bytes can tell."""
    ends_attempt: bool = True


def with_scale(value: float) -> Callable[[Any, Delta, bytes], Update]:
    """The first tensor is a vector: its scale is the first fp32 of the payload."""
    return lambda site, delta, payload: sealed(delta, struct.pack("<f", value) + payload[4:])


def saying(**changes: Any) -> Callable[[Any, Delta, bytes], Update]:
    return lambda site, delta, payload: (replace(delta, **changes), payload)


def sealed(delta: Delta, payload: bytes) -> Update:
    """With the hash and the length of what is sent."""
    sha256 = hashlib.sha256(payload).hexdigest()
    return replace(delta, payload_bytes=len(payload), payload_sha256=sha256), payload


def with_another_row_mask(site: Any, delta: Delta, payload: bytes) -> Update:
    shape = site.world.plan.shape
    blocks = sorted({header.block for header in delta.tensors})
    layout = delta_layout(delta.tensors, shape=shape, blocks=blocks, format=delta.format, density=delta.density)
    matrix = next(slot for slot in layout.slots if len(slot.spec.shape) > 1)
    at = matrix.offset
    return sealed(delta, payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :])


def of_a_block_that_is_not_assigned(site: Any, delta: Delta, payload: bytes) -> Update:
    return replace(delta, tensors=(*delta.tensors[:-1], replace(delta.tensors[-1], block=7))), payload


def without_its_last_block(site: Any, delta: Delta, payload: bytes) -> Update:
    last = max(header.block for header in delta.tensors)
    return replace(delta, tensors=tuple(h for h in delta.tensors if h.block != last)), payload


def with_a_vector_of_two_rows(site: Any, delta: Delta, payload: bytes) -> Update:
    return replace(delta, tensors=(replace(delta.tensors[0], rows_sent=2), *delta.tensors[1:])), payload


def with_more_rows_than_the_density_allows(site: Any, delta: Delta, payload: bytes) -> Update:
    shape = site.world.plan.shape
    matrix = next(i for i, s in enumerate(shape.block_tensors()) if len(s.shape) > 1)
    headers = list(delta.tensors)
    headers[matrix] = replace(headers[matrix], rows_sent=shape.block_tensors()[matrix].shape[0])
    return replace(delta, tensors=tuple(headers)), payload


def of_one_step_too_many(site: Any, delta: Delta, payload: bytes) -> Update:
    return replace(delta, steps=site.tasks[-1].steps + 1), payload


def with_a_flipped_bit(site: Any, delta: Delta, payload: bytes) -> Update:
    return delta, payload[:-1] + bytes([payload[-1] ^ 1])


def cut_short(site: Any, delta: Delta, payload: bytes) -> Update:
    return delta, payload[:-1]


def trained_from_another_version(site: Any, delta: Delta, payload: bytes) -> Update:
    return replace(delta, version=delta.version + 1), payload


F1 = {
    "a scale that is NaN": Case(code="non_finite", spoil=with_scale(math.nan), let_in=True),
    "a scale that is +Inf": Case(code="non_finite", spoil=with_scale(math.inf), let_in=True),
    "a scale that is -Inf": Case(code="non_finite", spoil=with_scale(-math.inf), let_in=True),
    "a scale that no encoder makes": Case(code="malformed", spoil=with_scale(-1.0), let_in=True),
    "shape (2,) where (1,) is due": Case(code="shape_mismatch", spoil=with_a_vector_of_two_rows),
    "more rows than are due": Case(code="shape_mismatch", spoil=with_more_rows_than_the_density_allows),
    "a block that is not assigned": Case(code="not_assigned", spoil=of_a_block_that_is_not_assigned),
    "another width": Case(code="not_assigned", spoil=saying(width=0.5)),
    "an assigned block is missing": Case(code="incomplete", spoil=without_its_last_block),
    "num_examples of 10^12": Case(code="bad_weight", spoil=saying(num_examples=10**12)),
    "num_examples of -1": Case(code="bad_weight", spoil=saying(num_examples=-1)),
    "num_examples of 0": Case(code="bad_weight", spoil=saying(num_examples=0)),
    "no step": Case(code="bad_steps", spoil=saying(steps=0)),
    "one step too many": Case(code="bad_steps", spoil=of_one_step_too_many),
    "a norm of a million": Case(code="over_norm", spoil=with_scale(1e6), let_in=True),
    "another density": Case(code="dtype_mismatch", spoil=saying(density=0.5)),
    "one byte announced too many": Case(
        code="length_mismatch", spoil=lambda s, d, p: (replace(d, payload_bytes=d.payload_bytes + 1), p)
    ),
    "one byte too few": Case(code="length_mismatch", spoil=cut_short, let_in=True),
    "a row mask of another count": Case(code="length_mismatch", spoil=with_another_row_mask, let_in=True),
    "a flipped bit": Case(code="checksum_mismatch", spoil=with_a_flipped_bit, let_in=True),
    "2^40 bytes": Case(code="too_large", spoil=saying(payload_bytes=2**40)),
    "minus one byte": Case(code="malformed", spoil=saying(payload_bytes=-1)),
    "an attempt never issued": Case(
        code="unknown_attempt", spoil=saying(attempt_id=AttemptId("forged")), ends_attempt=False
    ),
    "a round that is none": Case(code="unknown_attempt", spoil=saying(round=99)),
    "a version from elsewhere": Case(code="stale_round", spoil=trained_from_another_version),
}


def first_round(world: Any) -> dict[str, Any]:
    return json.loads((world.path / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("case", F1.values(), ids=[name.replace(" ", "-") for name in F1])
def test_f1_a_bad_update_is_refused_by_its_code_counted_and_leaves_the_state_as_if_it_were_absent(
    make_world: Callable[..., Any], without_eve_sha256: str, case: Case
) -> None:
    world = make_world("ann", "bob", "eve")
    world.join()
    eve = world.sites["eve"]
    world.endpoint.announce(eve.key, *case.spoil(eve, *eve.train(eve.tasks[-1])))
    world.step()
    eve.receive()
    let_in = world.endpoint.bytes_by_key[eve.key].received > 0
    if not case.ends_attempt:
        eve.fail("internal")
    world.round("ann", "bob")

    assert [r.code for r in eve.refused] == [case.code]
    assert world.ledger.refusals() == {eve.key: {case.code: 1}}
    assert let_in is case.let_in
    assert list((world.path / "incoming").iterdir()) == []
    assert first_round(world)["num_accepted"] == 2
    assert first_round(world)["state_sha256"] == without_eve_sha256


def test_f1_blocks_of_another_site_are_welcome_if_they_were_assigned(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", "bob", overrides=("allocation.policy=random",))
    world.join()
    assigned = {name: site.tasks[-1].blocks for name, site in world.sites.items()}
    world.round()
    assert first_round(world)["num_accepted"] == 2
    assert world.ledger.refusals() == {}
    trained = {block for blocks in assigned.values() for block in blocks}
    covered = {int(block) for block, count in first_round(world)["coverage"].items() if count}
    assert covered == trained


def test_f15_a_block_that_nobody_trained_has_coverage_0_and_keeps_its_bits(make_world: Callable[..., Any]) -> None:
    world = make_world("ann", overrides=("allocation.policy=random", "run.seed=1"))
    world.join()
    world.step(11.0)
    world.receive()
    trained = set(world.sites["ann"].tasks[-1].blocks)
    holes = set(world.plan.block_ids) - trained
    assert holes, "this seed gives all blocks to one client; take another"
    world.round()
    record = first_round(world)
    assert {int(b) for b, share in record["coverage_weight"].items() if share == 0} == holes
    published, _, _ = world.folder.load_version(1)
    assert set(published) == trained


def test_f14_a_wall_clock_that_jumps_by_days_or_stands_still_changes_nothing(
    make_world: Callable[..., Any], undisturbed_sha256: str
) -> None:
    world = make_world("ann", "bob", overrides=("run.max_rounds=3",))
    world.join()
    for jump_s in (86_400.0, -2 * 86_400.0, 0.0):
        world.wall_s += jump_s
        if not world.aggregator.finished:
            world.step(0.5)
            for site in world.sites.values():
                done = {*site.acked, *(r.attempt_id for r in site.refused)}
                if site.tasks and site.tasks[-1].attempt_id not in done:
                    site.work()
            world.step(0.5)
            world.receive()
    world.finish()
    assert world.aggregator.published_sha256 == undisturbed_sha256
    assert world.ledger.refusals() == {}
