"""What has the run brought this site? Its own score on its own held-out part, first and last.

Only what the site measured itself goes in: before training in some rounds, and of the final state.
It is kept in ``summary.json`` in the client's folder of the run, so that a session which resumes one still knows the
first score; it stays on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.protocol.codec import from_plain, to_plain
from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import Measurement

SUMMARY_FILE: Final = "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnScore:
    """One published version on the site's held-out part."""

    round: int
    version: int
    """0 is the base model."""
    num_items: int
    accuracy: float
    """Share of the examples whose target tokens are all the most probable ones."""
    nll_per_token: float
    """nats per target token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The content of ``summary.json``."""

    run_id: str
    base_name: str
    client_name: str
    num_train: int
    num_held_out: int
    held_out_sha256: str
    """Of the held-out part's tokens: scores on another one are not comparable, and are dropped."""
    updates_counted: int = 0
    first: OwnScore | None = None
    last: OwnScore | None = None
    exit_code: int | None = None
    """None while ``join`` runs, or after a kill."""

    def line(self) -> str:
        """The site's own score in one line."""
        first, last = self.first, self.last
        if first is None or last is None:
            why = "not measured yet" if self.num_held_out else "no rows are held out"
            return f"own held-out part: {why}"
        head = f"own held-out part ({last.num_items} examples):"
        if first == last:
            return (
                f"{head} accuracy {last.accuracy:.3f}  nll {last.nll_per_token:.3f} nats/token  "
                f"(version {last.version}; measured once)"
            )
        return (
            f"{head} accuracy {first.accuracy:.3f} -> {last.accuracy:.3f}  nll {first.nll_per_token:.3f} -> "
            f"{last.nll_per_token:.3f} nats/token  (version {first.version} -> {last.version})"
        )


class SummaryFile:
    """Keeps the summary on disk, durably where there is room.

    Args:
        folder: the client's folder of the run.
        start: the summary of a session that has measured nothing; what an earlier session on the same run and the same
            held-out part found goes before it.
    """

    def __init__(self, folder: Path, start: Summary) -> None:
        self._path = folder / SUMMARY_FILE
        earlier = self._read()
        if earlier is not None and (earlier.run_id, earlier.held_out_sha256) == (start.run_id, start.held_out_sha256):
            start = replace(
                start, first=earlier.first, last=earlier.last, updates_counted=earlier.updates_counted, exit_code=None
            )
        self.summary = start

    def measured(self, measurements: Iterable[Measurement], *, round: int) -> None:
        """Take the site's own score out of what a task measured, if it is in there."""
        for m in measurements:
            if m.measure != "validation" or not m.num_items or not m.num_tokens:
                continue
            score = OwnScore(
                round=round,
                version=m.version,
                num_items=m.num_items,
                accuracy=m.num_correct / m.num_items,
                nll_per_token=m.nll_sum / m.num_tokens,
            )
            self._put(replace(self.summary, first=self.summary.first or score, last=score))

    def counted(self) -> None:
        """An update of this site was acknowledged."""
        self._put(replace(self.summary, updates_counted=self.summary.updates_counted + 1))

    def ended(self, exit_code: int) -> None:
        """``join`` ends."""
        self._put(replace(self.summary, exit_code=exit_code))

    def _put(self, summary: Summary) -> None:
        self.summary = summary
        with contextlib.suppress(OSError):  # a full disk costs the file, not the round
            write_durably(self._path, json.dumps(to_plain(summary), indent=2).encode())

    def _read(self) -> Summary | None:
        try:
            return from_plain(Summary, json.loads(self._path.read_bytes()), where=str(self._path))
        except (OSError, ValueError, RemoteProtocolError):
            return None


def held_out_sha256(samples: Sequence[TokenisedSample]) -> str:
    """Two held-out parts share it only if they are the same samples in the same order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids).to_bytes(4, "little"))
        digest.update(sample.ids.tobytes())
        digest.update(sample.label_mask.tobytes())
    return digest.hexdigest()
