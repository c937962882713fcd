"""What does the aggregator remember of its clients, and what does it tell its operator?

Everything here ends in the ledger; texts that came from a peer are made harmless before anybody reads them on a
terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from fedblocks.aggregator import registry
from fedblocks.aggregator.endpoint import ByteCount
from fedblocks.aggregator.ledger import CONTENT_CODES, STRANGERS, Ledger
from fedblocks.aggregator.registry import KnownClient
from fedblocks.protocol.errors import RefusalCode
from fedblocks.protocol.messages import ClientKey

MAX_LINE: Final = 500


class Books:
    """The clients' records and the operator's lines.

    Args:
        clock: monotonic seconds.
        wall_clock: Unix seconds, for the books only.
        on_event: takes each line for the operator.
        quarantine_after: content refusals after which a client gets no task; 0: never.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        quarantine_after: int,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        on_event: Callable[[str], None],
    ) -> None:
        self._ledger = ledger
        self._quarantine_after = quarantine_after
        self._clock = clock
        self._wall_clock = wall_clock
        self._on_event = on_event
        self.clients: dict[ClientKey, KnownClient] = {
            c.client_key: registry.client_from_record(c.record) for c in ledger.clients()
        }
        """All that ever said Hello; changed only by :meth:`save` and :meth:`count_bytes`."""
        self.said_s = clock()
        """When the operator was last told something."""
        self._counted: dict[ClientKey, ByteCount] = {}
        self._round_bytes: dict[ClientKey, tuple[int, int]] = {}
        self._refusals: Counter[tuple[ClientKey, RefusalCode]] = Counter()
        self._refusal_texts: dict[tuple[ClientKey, RefusalCode], str] = {}

    @property
    def now_unix_s(self) -> float:
        """Wall-clock time, for the books only."""
        return self._wall_clock()

    def name(self, key: ClientKey | None) -> str:
        """How people know this client."""
        if key is None:
            return "a peer without a key"
        return self.clients[key].name if key in self.clients else f"key {key}"

    def save(self, client: KnownClient) -> None:
        """The newest record of a client."""
        self.clients[client.key] = client
        self._ledger.save_client(client.key, client.name, client, unix_s=self._wall_clock())

    def save_all(self) -> None:
        """Every record, in the transaction of a round."""
        for client in self.clients.values():
            self.save(client)

    def forget_caches(self) -> None:
        """The cut has moved: every client computes the hidden states of its texts again."""
        for key, client in self.clients.items():
            self.clients[key] = replace(client, trained_sequences=0, anchored_sequences=0)

    def say(self, line: str) -> None:
        """One line for the operator."""
        self.said_s = self._clock()
        self._on_event(harmless(line))

    def note(self, text: str) -> None:
        """One line for the operator and for the ledger."""
        self._ledger.add_note(harmless(text), unix_s=self._wall_clock())
        self.say(text)

    def refused(self, key: ClientKey, code: RefusalCode, text: str) -> None:
        """A refusal of ours, counted and told at once."""
        known = key in self.clients
        count = self._ledger.add_refusal(key if known else STRANGERS, code, text, unix_s=self._wall_clock())
        self.note(f"refused {self.name(key)} ({code}): {text}")
        if known and code in CONTENT_CODES:
            self._tell_quarantine(key, count - 1, count)

    def _tell_quarantine(self, key: ClientKey, before: int, count: int) -> None:
        if before < self._quarantine_after <= count:
            name = self.name(key)
            self.note(
                f"{name} gets no task any more after {count} refusals; when its cause is known: "
                f"fedblocks keys release RUN {name}"
            )

    def refused_by_endpoint(self, key: ClientKey | None, code: RefusalCode, text: str) -> None:
        """A refusal on the wire: there may be very many, so they are written together by :meth:`write_refusals`."""
        known = key if key is not None and key in self.clients else STRANGERS
        self._refusals[known, code] += 1
        self._refusal_texts[known, code] = text

    @property
    def has_refusals(self) -> bool:
        """True if :meth:`write_refusals` has something to write."""
        return bool(self._refusals)

    def write_refusals(self) -> None:
        """What the endpoint refused since the last time, into the ledger and one line per client and code."""
        for (key, code), count in self._refusals.items():
            text = self._refusal_texts[key, code]
            total = self._ledger.add_refusal(key, code, text, count=count, unix_s=self._wall_clock())
            name = self.name(key) if key != STRANGERS else "a stranger"
            self.say(f"refused {name} ({code}, {count}x): {text}")
            if key != STRANGERS and code in CONTENT_CODES:
                self._tell_quarantine(key, total - count, total)
        self._refusals.clear()
        self._refusal_texts.clear()

    def count_bytes(self, bytes_by_key: Mapping[ClientKey, ByteCount]) -> None:
        """Move what the endpoint counted since the last time into the clients' records."""
        for key, count in bytes_by_key.items():
            client = self.clients.get(key)
            if client is None:
                continue
            before = self._counted.get(key, ByteCount())
            up, down = count.received - before.received, count.sent - before.sent
            self._counted[key] = ByteCount(received=count.received, sent=count.sent)
            self.clients[key] = replace(
                client, received_bytes=client.received_bytes + up, sent_bytes=client.sent_bytes + down
            )
            earlier = self._round_bytes.get(key, (0, 0))
            self._round_bytes[key] = (earlier[0] + up, earlier[1] + down)

    def take_round_bytes(self) -> dict[ClientKey, tuple[int, int]]:
        """(bytes up, bytes down) of each client since the last call."""
        taken, self._round_bytes = self._round_bytes, {}
        return taken


def harmless(text: str) -> str:
    """One printable line of bounded length: a peer's words must not drive a terminal."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…"
