"""How is the line to the aggregator measured? By the run's own messages, as they go; nothing is sent for it.

    round trip   Hello to Welcome, and each heartbeat to its reply if no payload moved meanwhile
    downlink     the run's files and the tasks: from the first payload that may come until none is on its way
    uplink       an update: from its first chunk to its Ack, which the aggregator sends once it is on its disk

The client keeps running means (``profiles/link.py``) in its home folder, by the aggregator's address, and its next
Hello says them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.link import LinkRecord, says_something
from fedblocks.protocol.codec import from_plain, to_plain
from fedblocks.protocol.durable import write_durably
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.messages import AttemptId, Delta

LINKS_FILE: Final = "links.json"


class LinkMeter:
    """Takes the times of one connection after the other; every method but the constructor is the transport's.

    Args:
        known: what is known so far.
        clock: monotonic seconds.
    """

    def __init__(self, known: LinkRecord | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.record = known or LinkRecord()
        """Replaced, never changed: any thread may read it."""
        self._clock = clock
        self._greeted_s: float | None = None
        self._beat_s: float | None = None
        self._open_beats = 0
        self._updates: dict[AttemptId, tuple[int, float]] = {}
        """Bytes of each update under way, and when its first chunk left."""
        self._incoming: set[int] = set()
        self._incoming_since_s = 0.0
        self._incoming_bytes = 0

    def lost(self) -> None:
        """The connection is over, and with it all that was under way."""
        self._greeted_s = self._beat_s = None
        self._open_beats = 0
        self._updates.clear()
        self._incoming.clear()

    def greeted(self) -> None:
        """Hello has left."""
        self._greeted_s = self._clock()

    def welcomed(self) -> None:
        """Welcome has come."""
        if self._greeted_s is not None:
            self.record = self.record.with_figure("round_trip_s", self._clock() - self._greeted_s)
        self._greeted_s = None

    def beat(self) -> None:
        """A heartbeat has left."""
        self._open_beats += 1
        self._beat_s = None if self._open_beats > 1 or self._incoming or self._updates else self._clock()

    def beat_answered(self) -> None:
        """The reply to the oldest heartbeat that had none has come."""
        if self._beat_s is not None:
            self.record = self.record.with_figure("round_trip_s", self._clock() - self._beat_s)
        self._beat_s = None
        self._open_beats = max(0, self._open_beats - 1)

    def announced(self, update: Delta) -> None:
        """An update was announced, perhaps again."""
        self._updates.pop(update.attempt_id, None)

    def chunk_sent(self, update: Delta) -> None:
        """A chunk of an update has left."""
        self._beat_s = None
        self._updates.setdefault(update.attempt_id, (update.payload_bytes, self._clock()))

    def answered(self, attempt_id: AttemptId, *, accepted: bool) -> None:
        """An update's Ack has come, or a refusal."""
        num_bytes, began_s = self._updates.pop(attempt_id, (0, 0.0))
        seconds = self._clock() - began_s
        if accepted and says_something(num_bytes, seconds) and seconds > 0:
            self.record = self.record.with_figure("uplink_bytes_per_s", num_bytes / seconds)

    def payload_begins(self, number: int) -> None:
        """A payload to us may flow."""
        self._beat_s = None
        if not self._incoming:
            self._incoming_since_s, self._incoming_bytes = self._clock(), 0
        self._incoming.add(number)

    def payload_ends(self, number: int, num_bytes: int) -> None:
        """All of it is here, or it failed (0 bytes). Payloads that overlap share the line and are counted together."""
        if number not in self._incoming:
            return
        self._incoming.discard(number)
        self._incoming_bytes += num_bytes
        seconds = self._clock() - self._incoming_since_s
        if not self._incoming and says_something(self._incoming_bytes, seconds) and seconds > 0:
            self.record = self.record.with_figure("downlink_bytes_per_s", self._incoming_bytes / seconds)


def with_link(profile: DeviceProfile, record: LinkRecord) -> DeviceProfile:
    """The profile with what is known of the line in place of its own figures."""
    up, down = record.uplink_bytes_per_s, record.downlink_bytes_per_s
    return replace(
        profile,
        uplink_bytes_per_s=profile.uplink_bytes_per_s if up is None else up.value,
        downlink_bytes_per_s=profile.downlink_bytes_per_s if down is None else down.value,
    )


def read_record(home: Path, address: str) -> LinkRecord:
    """What is known of the line to this aggregator; an unreadable file is one that knows nothing."""
    try:
        return from_plain(LinkRecord, _read(home)[address], where=LINKS_FILE)
    except (KeyError, RemoteProtocolError):
        return LinkRecord()


def write_record(home: Path, address: str, record: LinkRecord) -> None:
    """Keeps it, beside the lines to other aggregators.

    Raises:
        OSError: the file cannot be written.
    """
    lines = {**_read(home), address: to_plain(record)}
    write_durably(home / LINKS_FILE, json.dumps(lines, indent=1).encode())


def _read(home: Path) -> dict[str, object]:
    try:
        found = json.loads((home / LINKS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
