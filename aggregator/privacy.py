"""What may the model tell of one client? Each client's part in a round is clipped, and their sum gets Gaussian noise.

The Gaussian mechanism for whole clients (McMahan et al., 1710.06963), off unless ``privacy.noise_multiplier`` is set.
Neighbouring runs differ in one client, whose updates are all zeros in one of them; who takes part in which round, and
what is assigned, is public. So the counts that divide a sum are public too, and the sum of a round over all blocks
changes by at most ``clip_norm`` C. It gets noise of standard deviation z·C on every value that somebody trained;
weighting by what clients say of their data, corrections for steps, and clips by each other's norms do not take place.
All that follows (server optimizer, publishing, strength) works on noisy sums and tells nothing more.

epsilon is composed by an accountant of Google's dp-accounting (Renyi divergences); there is no sampling of clients that
could amplify it. The rounds are those whose row in the ledger says that noise was added.

The noise is a function of a key that only the run's ledger holds, so that a round that is folded again after a kill
gets the same bits instead of a second sample: two noisy sums of the same updates would cancel the noise.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedblocks.aggregator.aggregation import (
    AcceptedUpdate,
    FoldResult,
    Member,
    Segment,
    by_block,
    in_order,
    rectangles_of,
    segments_of,
    weighted_sum,
)
from fedblocks.aggregator.fold_rule import FoldRule
from fedblocks.aggregator.ledger import Ledger
from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.profiles.units import Units, unit_tensors
from fedblocks.protocol.messages import ClientKey
from fedblocks.protocol.run_config import ConfigError, PrivacySection, RunConfig
from fedblocks.protocol.tensors import FloatArray, State

KEY_BYTES: Final = 32
#: Noise values made at once.
CHUNK_VALUES: Final = 1 << 16
#: Noise is a multiple of this share of its standard deviation: the last bits of a logarithm differ between machines.
GRID: Final = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyBooks:
    """The secret of a run's noise, and what it has spent so far."""

    key: bytes
    noise_multipliers: tuple[float, ...] = ()
    """Of the rounds to which noise was added, oldest first."""

    def after(self, rule: FoldRule) -> PrivacyBooks:
        """With one more round."""
        return replace(self, noise_multipliers=(*self.noise_multipliers, rule.noise_multiplier))


def open_books(config: RunConfig, ledger: Ledger) -> PrivacyBooks | None:
    """The books of the run, its key made at the first start; None where the run is not private and never was.

    Raises:
        ConfigError: the accountant is not installed, or not even one more round fits the budget.
    """
    spent = tuple(
        record.settings["fold"]["noise_multiplier"]
        for record in ledger.rounds()
        if record.phase == "folded" and record.kind == "train" and was_noisy(record.settings, record.metrics)
    )
    private = config.privacy.noise_multiplier > 0
    if not private and not spent:
        return None
    key = ledger.get_run("noise_key")
    if key is None:
        key = secrets.token_hex(KEY_BYTES)
        ledger.set_run("noise_key", key)
    books = PrivacyBooks(key=bytes.fromhex(key), noise_multipliers=spent)
    if spent and not private:
        raise ConfigError(
            f"privacy.noise_multiplier is 0, but {len(spent)} rounds of this run were private: a round without noise "
            "would void what they promised; set it again, or begin a new run"
        )
    needed = epsilon((config.privacy.noise_multiplier,), config.privacy.delta)
    if not spent and needed > config.privacy.max_epsilon:
        raise ConfigError(
            f"privacy.max_epsilon is {config.privacy.max_epsilon:g}, one round with noise_multiplier "
            f"{config.privacy.noise_multiplier:g} takes {needed:.3g}; raise one of them"
        )
    return books


def spends_too_much(books: PrivacyBooks, limits: PrivacySection) -> bool:
    """True if these rounds take more than the run may spend."""
    return epsilon(books.noise_multipliers, limits.delta) > limits.max_epsilon


def was_noisy(settings: Any, metrics: Any) -> bool:
    """True for the ledger's row of a round to whose sum noise was added."""
    return settings["fold"]["noise_multiplier"] > 0 and metrics["num_accepted"] > 0


def epsilon(noise_multipliers: Sequence[float], delta: float) -> float:
    """The epsilon of all these rounds together at this delta.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ConfigError(
            "privacy needs an accountant that is not installed: pip install 'fedblocks[privacy]'"
        ) from error
    # "Replace special" is the relation above: one client's part replaced by zeros.
    accountant: Any = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for multiplier, count in sorted(Counter(noise_multipliers).items()):
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), count)
    return float(accountant.get_epsilon(delta))


def standard_normal(key: bytes, purpose: str, count: int) -> NDArray[np.float64]:
    """``count`` normal values that nobody without the key can foretell: Box and Muller's transform of SHAKE-256."""
    values = np.empty(count + count % 2, dtype=np.float64)
    for number, start in enumerate(range(0, len(values), CHUNK_VALUES)):
        part = values[start : start + CHUNK_VALUES]
        stream = hashlib.shake_256(key + number.to_bytes(8, "big") + purpose.encode()).digest(8 * len(part))
        uniform = ((np.frombuffer(stream, dtype="<u8") >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        half = len(part) // 2
        radius = np.sqrt(-2.0 * np.log(uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        part[:half] = radius * np.cos(angle)
        part[half:] = radius * np.sin(angle)
    return np.rint(values[:count] / GRID) * GRID


def private_fold(
    updates: Sequence[AcceptedUpdate], *, shape: Units, rule: FoldRule, key: bytes, round: int
) -> FoldResult:
    """The mean update of every block that somebody trained: clipped by client, with noise, each client counting once.

    Raises:
        RemoteProtocolError: a spooled payload is not what was admitted.
    """
    ordered = in_order(updates)
    weights = [1.0] * len(ordered)
    members = by_block(ordered, weights, shape)
    factors = _clip_factors(ordered, members, shape, rule.clip_norm)
    aggregate: State = {}
    segment_coverage: dict[int, tuple[float, ...]] = {}
    for block in sorted(members):
        segments, segment_coverage[block] = segments_of(members[block], block, shape, float(len(ordered)))
        own = [factors[member.update.client, member.update.attempt_id] for member in members[block]]
        aggregate[block] = {
            spec.name: _noisy_mean(
                members[block],
                own,
                block,
                spec,
                shape,
                segments,
                noise=rule.noise_multiplier * rule.clip_norm,
                key=key,
                purpose=f"{round}/{block}/{spec.name}",
            )
            for spec in unit_tensors(shape, block)
        }
    counts: Counter[ClientKey] = Counter(update.client for update in ordered)
    return FoldResult(
        aggregate=aggregate,
        coverage={block: shares[0] for block, shares in segment_coverage.items()},
        segment_coverage=segment_coverage,
        history={},
        weights={client: float(count) for client, count in counts.items()},
        clipped=(),
    )


def _clip_factors(
    ordered: Sequence[AcceptedUpdate], members: dict[int, list[Member]], shape: Units, clip_norm: float
) -> dict[tuple[str, str], float]:
    """By which factor each update counts: its norm over all its blocks is at most C, or C/2 where its client has two
    in this round (one of them late)."""
    squares: dict[tuple[str, str], list[float]] = {}
    for block in sorted(members):
        for member in members[block]:
            payload = member.update.read_payload()
            found = squares.setdefault((member.update.client, member.update.attempt_id), [])
            found += [member.rows(payload, spec.name).sum_of_squares() for spec in unit_tensors(shape, block)]
    counts = Counter(update.client for update in ordered)
    factors: dict[tuple[str, str], float] = {}
    for update in ordered:
        norm = math.sqrt(math.fsum(squares[update.client, update.attempt_id]))
        most = clip_norm / counts[update.client]
        factors[update.client, update.attempt_id] = min(1.0, most / norm) if norm > 0 else 1.0
    return factors


def _noisy_mean(
    members: Sequence[Member],
    factors: Sequence[float],
    block: int,
    spec: TensorSpec,
    shape: Units,
    segments: Sequence[Segment],
    *,
    noise: float,
    key: bytes,
    purpose: str,
) -> FloatArray:
    """damp·(sum + noise)/count of one whole tensor; what nobody trained is 0."""
    total = weighted_sum(members, factors, spec)
    total += noise * standard_normal(key, purpose, total.size).reshape(total.shape)
    mean = np.zeros_like(total)
    for segment, rectangles in zip(segments, rectangles_of(segments, block, spec, shape), strict=True):
        for rectangle in rectangles:
            mean[rectangle] = total[rectangle] * segment.damping / segment.weight
    return mean.astype(np.float32).reshape(spec.shape)
