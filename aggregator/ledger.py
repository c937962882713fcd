"""What has happened in this run, so that no crash can undo it? One SQLite file (WAL, synchronous=FULL).

Everything that the aggregator promised to anybody stands here before the promise is sent: an Ack goes out after the
row in ``updates`` is committed, an assignment after its row in ``assignments``, the next round after the row of the
last one says ``folded``.
Payloads and states are files beside it (``run_folder.py``), renamed into place before the row that names them.

Writers open it with :func:`open_ledger`; readers (``status``) with :func:`open_read_only`.
The schema's version is SQLite's ``user_version``; ``MIGRATIONS[n]`` takes version n to n + 1.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast

from fedblocks.aggregator.rounds import Outcome
from fedblocks.protocol.codec import from_plain, to_plain
from fedblocks.protocol.errors import RefusalCode
from fedblocks.protocol.messages import Assignment, AttemptId, ClientKey, Delta, Evaluate, Measurement, Probe, ProbeRow

RoundPhase = Literal["open", "closing", "folded"]
RoundKind = Literal["train", "probe", "final"]
"""probe: clients try where a block should go (``placement.py``); nothing is trained or published."""
Task = Assignment | Evaluate | Probe
_TASKS: Final[Mapping[str, type[Task]]] = {"train": Assignment, "evaluate": Evaluate, "probe": Probe}
_TASK_KINDS: Final = {cls: kind for kind, cls in _TASKS.items()}

_MODE_AS_ASSIGNED: Final = """
    UPDATE updates SET message = json_set(message, '$.train.mode', (
        SELECT json_object(
            'optimizer', json_extract(a.message, '$.optimizer_mode'), 'residency', 'suffix', 'frozen', 'decoded',
            'micro_batch_size', json_extract(a.message, '$.micro_batch_size'),
            'checkpoint', json(iif(json_extract(a.message, '$.checkpoint_activations'), 'true', 'false')))
        FROM assignments AS a WHERE a.attempt_id = updates.attempt_id
    ));
    """
"""Protocol version 1 had no mode in an update: the assigned one stands in its place."""

_SPEED_AS_CALIBRATION: Final = """
    UPDATE clients SET record = json_remove(json_set(record, '$.calibration', (
        SELECT iif(scale IS NULL, json('null'), json_object(
            'factors', json_array(scale, scale, scale, scale, scale),
            'covariance', json_array(
                0.2725, 0.0225, 0.0225, 0.0225, 0.0225, 0.2725, 0.0225, 0.0225, 0.0225, 0.2725, 0.0225, 0.0225,
                0.2725, 0.0225, 0.2725),
            'level', scale, 'prefix', NULL, 'measuring', NULL, 'errors', json('[]'), 'reports', 0, 'held', NULL))
        FROM (SELECT json_extract(record, '$.time_scale') AS scale)
    )), '$.time_scale');
    """
"""One running scale stood where a calibration stands now: ``Calibration.of_scale``."""

MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE clients (
        client_key TEXT PRIMARY KEY, name TEXT NOT NULL, record TEXT NOT NULL,
        content_refusals INTEGER NOT NULL DEFAULT 0, joined_unix_s REAL NOT NULL
    );
    CREATE TABLE rounds (
        round INTEGER PRIMARY KEY, kind TEXT NOT NULL, phase TEXT NOT NULL, version INTEGER NOT NULL,
        deadline_s REAL NOT NULL, elapsed_s REAL NOT NULL DEFAULT 0, extended INTEGER NOT NULL DEFAULT 0,
        plan TEXT NOT NULL, opened_unix_s REAL NOT NULL, closed_unix_s REAL,
        settings TEXT, new_version INTEGER, state_sha256 TEXT, method_state TEXT, stop_reason TEXT, metrics TEXT
    );
    CREATE TABLE assignments (
        attempt_id TEXT PRIMARY KEY, round INTEGER NOT NULL REFERENCES rounds(round), client_key TEXT NOT NULL,
        kind TEXT NOT NULL, message TEXT NOT NULL, outcome TEXT NOT NULL, detail TEXT NOT NULL DEFAULT '',
        reissued INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX assignments_by_round ON assignments(round);
    CREATE TABLE updates (
        client_key TEXT NOT NULL, round INTEGER NOT NULL, attempt_id TEXT NOT NULL REFERENCES assignments(attempt_id),
        folded_in INTEGER NOT NULL, payload_sha256 TEXT NOT NULL, payload_bytes INTEGER NOT NULL,
        message TEXT NOT NULL, received_unix_s REAL NOT NULL,
        PRIMARY KEY (client_key, round, attempt_id)
    );
    CREATE INDEX updates_by_fold ON updates(folded_in);
    CREATE TABLE refusals (
        client_key TEXT NOT NULL, code TEXT NOT NULL, count INTEGER NOT NULL, last_text TEXT NOT NULL,
        last_unix_s REAL NOT NULL, PRIMARY KEY (client_key, code)
    );
    CREATE TABLE measurements (
        attempt_id TEXT NOT NULL REFERENCES assignments(attempt_id), client_key TEXT NOT NULL, round INTEGER NOT NULL,
        measure TEXT NOT NULL, version INTEGER NOT NULL, sums TEXT NOT NULL,
        PRIMARY KEY (attempt_id, measure, version)
    );
    CREATE INDEX measurements_by_round ON measurements(round);
    CREATE TABLE notes (id INTEGER PRIMARY KEY, unix_s REAL NOT NULL, text TEXT NOT NULL);
    """,
    _MODE_AS_ASSIGNED,
    "UPDATE updates SET message = json_set(message, '$.train.kernel_falls', json('[]'));",
    "UPDATE clients SET record = json_set(record, '$.statistics.topics', json('[]'));",
    """
    UPDATE assignments SET message = json_set(message, '$.width', 1.0) WHERE json_extract(message, '$.blocks') NOT NULL;
    UPDATE updates SET message = json_set(message, '$.width', 1.0);
    """,
    """
    UPDATE clients SET record = json_set(record, '$.last_chosen_round', 0, '$.last_update_unix_s', 0.0);
    UPDATE rounds SET method_state = json_set(method_state, '$.seen', (
        SELECT json_group_array(json_object(
            'block', json_extract(value, '$.block'),
            'weights', json_array(
                json_extract(value, '$.weight'), json_extract(value, '$.weight'),
                json_extract(value, '$.weight'), json_extract(value, '$.weight')),
            'topics', json('[]')))
        FROM json_each(method_state, '$.seen')
    )) WHERE method_state NOT NULL;
    """,
    _SPEED_AS_CALIBRATION,
    "UPDATE rounds SET method_state = json_set(method_state, '$.idle', json('[]')) WHERE method_state NOT NULL;",
    """
    UPDATE rounds SET settings = json_set(
        settings, '$.rule', json_object('optimizer', 'avg', 'learning_rate', 0.0, 'steps', 1)
    ) WHERE settings NOT NULL;
    """,
    """
    CREATE TABLE measured (
        attempt_id TEXT NOT NULL REFERENCES assignments(attempt_id), client_key TEXT NOT NULL, round INTEGER NOT NULL,
        measure TEXT NOT NULL, version INTEGER NOT NULL, sums TEXT NOT NULL, strength REAL NOT NULL,
        PRIMARY KEY (attempt_id, measure, version, strength)
    );
    INSERT INTO measured SELECT attempt_id, client_key, round, measure, version,
        json_set(sums, '$.kl_square_sum', 0.0, '$.strength', 1.0), 1.0 FROM measurements;
    DROP TABLE measurements;
    ALTER TABLE measured RENAME TO measurements;
    CREATE INDEX measurements_by_round ON measurements(round);
    UPDATE assignments SET message = json_set(message, '$.strengths', json('[1.0]'))
        WHERE json_extract(message, '$.blocks') IS NULL;
    UPDATE updates SET message = json_set(message, '$.measurements', (
        SELECT json_group_array(json(json_set(value, '$.kl_square_sum', 0.0, '$.strength', 1.0)))
        FROM json_each(message, '$.measurements')
    ));
    """,
    """
    UPDATE assignments SET message = json_set(message, '$.active_blocks', json('[]'));
    UPDATE rounds SET method_state = json_set(method_state,
        '$.growth', json('{"active": [], "last_round": 0, "refused": "", "window": [], "best_accuracy": null,
                           "best_nll": null}'),
        '$.spent', json('{"seconds": 0.0, "num_bytes": 0, "joules": 0.0}')) WHERE method_state NOT NULL;
    """,
    """
    UPDATE rounds SET settings = json_set(settings, '$.fold', json_object('kind', 'mean')) WHERE settings NOT NULL;
    """,
    """
    UPDATE rounds SET settings = json_set(settings, '$.fold.clip_norm', 0.0, '$.fold.noise_multiplier', 0.0)
        WHERE settings NOT NULL;
    """,
    """
    UPDATE assignments SET message = json_set(message, '$.proximal_weight', 0.0)
        WHERE json_extract(message, '$.blocks') NOT NULL;
    """,
    """
    CREATE TABLE IF NOT EXISTS probed (
        attempt_id TEXT PRIMARY KEY REFERENCES assignments(attempt_id), client_key TEXT NOT NULL,
        round INTEGER NOT NULL, rows TEXT NOT NULL
    );
    UPDATE rounds SET method_state = json_set(method_state, '$.growth.probing', 0) WHERE method_state NOT NULL;
    """,
    """
    CREATE TABLE IF NOT EXISTS files (
        version INTEGER NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (version, name)
    );
    """,
    """
    CREATE INDEX IF NOT EXISTS updates_by_attempt ON updates(attempt_id);
    """,
)
#: Tasks, updates and measurements of the newest rounds are kept: no update counts after two.
DETAILED_ROUNDS: Final = 32
#: The curves of the newest rounds are kept; metrics.jsonl has all.
CURVE_ROUNDS: Final = 1000
#: In the table ``run``: the newest round that :meth:`Ledger.compact` has thinned, and the newest without a curve.
_THINNED: Final = "thinned_round"
_WITHOUT_CURVE: Final = "round_without_curve"

#: Refusals that say something about what a client computes; after ``server.quarantine_after`` of them it gets no task.
CONTENT_CODES: Final[frozenset[RefusalCode]] = frozenset(
    {
        "malformed",
        "unknown_field",
        "too_large",
        "conflict",
        "not_assigned",
        "incomplete",
        "shape_mismatch",
        "dtype_mismatch",
        "length_mismatch",
        "checksum_mismatch",
        "bad_weight",
        "bad_steps",
        "non_finite",
        "over_norm",
    }
)
STRANGERS: Final = ClientKey("")
"""The books of refusals of keys that never said Hello: one line for all of them, so that nobody can fill the disk."""
MAX_NOTES: Final = 1000
MAX_REFUSAL_TEXT: Final = 500


class LedgerError(RuntimeError):
    """The ledger cannot be used: made by a newer release, or of another run."""

    exit_code: int = 2


class LedgerDamagedError(LedgerError):
    """SQLite finds the file torn, or it is gone while what it named is there."""

    exit_code = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAssignment:
    attempt_id: AttemptId
    round: int
    client_key: ClientKey
    message: Task
    """As planned: its state update names the version only; the way there depends on what the client holds."""
    outcome: Outcome
    detail: str
    reissued: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUpdate:
    client_key: ClientKey
    delta: Delta
    folded_in: int
    """The round whose fold counts it: its own, or the next one for a late update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRound:
    round: int
    kind: RoundKind
    phase: RoundPhase
    version: int
    deadline_s: float
    elapsed_s: float
    extended: bool
    plan: Any
    opened_unix_s: float
    closed_unix_s: float | None
    settings: Any
    new_version: int | None
    state_sha256: str | None
    method_state: Any
    stop_reason: str | None
    metrics: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredClient:
    client_key: ClientKey
    name: str
    record: Any
    content_refusals: int
    joined_unix_s: float


class Ledger:
    """The tables, one method per thing that is written or asked."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        self._db = connection
        self._depth = 0

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Generator[None]:
        """All writes inside are durable together or not at all; a nested one is part of the outer one."""
        if self._depth == 0:
            self._db.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._depth == 0:
                self._db.execute("ROLLBACK")
            raise
        self._depth -= 1
        if self._depth == 0:
            self._db.execute("COMMIT")

    # run

    def set_run(self, name: str, value: object) -> None:
        with self.transaction():
            self._db.execute(
                "INSERT INTO run VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (name, json.dumps(value)),
            )

    def get_run(self, name: str) -> Any:
        """The value set under ``name``, None if it never was."""
        row = self._one("SELECT value FROM run WHERE name = ?", name)
        return None if row is None else json.loads(row[0])

    # clients

    def save_client(self, key: ClientKey, name: str, record: object, *, unix_s: float) -> None:
        with self.transaction():
            self._db.execute(
                "INSERT INTO clients (client_key, name, record, joined_unix_s) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (client_key) DO UPDATE SET name = excluded.name, record = excluded.record",
                (key, name, json.dumps(to_plain(record)), unix_s),
            )

    def clients(self) -> list[StoredClient]:
        """All clients that ever joined, by key."""
        rows = self._db.execute(
            "SELECT client_key, name, record, content_refusals, joined_unix_s FROM clients ORDER BY client_key"
        )
        return [
            StoredClient(
                client_key=ClientKey(key),
                name=name,
                record=json.loads(record),
                content_refusals=refusals,
                joined_unix_s=joined,
            )
            for key, name, record, refusals, joined in rows
        ]

    def quarantined(self, after: int) -> frozenset[ClientKey]:
        """Clients that get no task because of so many content refusals, until :meth:`release`; none where it is 0."""
        if after == 0:
            return frozenset()
        rows = self._db.execute("SELECT client_key FROM clients WHERE content_refusals >= ?", (after,))
        return frozenset(ClientKey(key) for (key,) in rows)

    def release(self, key: ClientKey) -> None:
        """Forget the client's content refusals (the operator's decision); the counts by code stay."""
        with self.transaction():
            self._db.execute("UPDATE clients SET content_refusals = 0 WHERE client_key = ?", (key,))

    # rounds

    def open_round(
        self,
        *,
        round: int,
        kind: RoundKind,
        version: int,
        deadline_s: float,
        plan: object,
        tasks: Iterable[tuple[ClientKey, Task]],
        unix_s: float,
    ) -> None:
        """The round and all its assignments, in one transaction, before any of them is sent."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO rounds (round, kind, phase, version, deadline_s, plan, opened_unix_s) "
                "VALUES (?, ?, 'open', ?, ?, ?, ?)",
                (round, kind, version, deadline_s, json.dumps(plan), unix_s),
            )
            for key, message in tasks:
                self.add_assignment(key, message)

    def add_assignment(self, key: ClientKey, message: Task, *, reissued: bool = False) -> None:
        kind = _TASK_KINDS[type(message)]
        with self.transaction():
            self._db.execute(
                "INSERT INTO assignments (attempt_id, round, client_key, kind, message, outcome, reissued) "
                "VALUES (?, ?, ?, ?, ?, 'open', ?)",
                (message.attempt_id, message.round, key, kind, json.dumps(to_plain(message)), int(reissued)),
            )

    def save_elapsed(self, round: int, *, elapsed_s: float, deadline_s: float, extended: bool) -> None:
        with self.transaction():
            self._db.execute(
                "UPDATE rounds SET elapsed_s = ?, deadline_s = ?, extended = ? WHERE round = ?",
                (elapsed_s, deadline_s, int(extended), round),
            )

    def start_closing(self, round: int) -> None:
        """From here on the accepted set is what it is: a later update counts in the next round."""
        with self.transaction():
            self._db.execute("UPDATE rounds SET phase = 'closing' WHERE round = ?", (round,))
            self._db.execute("UPDATE assignments SET outcome = 'late' WHERE round = ? AND outcome = 'open'", (round,))

    def commit_round(
        self,
        round: int,
        *,
        new_version: int,
        state_sha256: str,
        settings: object,
        method_state: object,
        stop_reason: str | None,
        metrics: object,
        unix_s: float,
        files: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """The round is folded and its state file is in place.

        Args:
            files: of the new version, name -> SHA-256 of the bytes.
        """
        with self.transaction():
            rows = [(new_version, name, sha256) for name, sha256 in sorted(files.items())]
            self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
            self._db.execute(
                "UPDATE rounds SET phase = 'folded', closed_unix_s = ?, settings = ?, new_version = ?, "
                "state_sha256 = ?, method_state = ?, stop_reason = ?, metrics = ? WHERE round = ?",
                (
                    unix_s,
                    json.dumps(settings),
                    new_version,
                    state_sha256,
                    json.dumps(to_plain(method_state)),
                    stop_reason,
                    json.dumps(metrics),
                    round,
                ),
            )

    def compact(self, *, last_round: int, needed_version: int) -> None:
        """Forget what nobody can ask for any more, so that the file stays as small after weeks as after a day.

        Of the rounds before the last :data:`DETAILED_ROUNDS` tasks, updates, measurements, plan and method state go,
        and the clients' rows of the metrics; of those before the last :data:`CURVE_ROUNDS` all metrics but how many
        updates were accepted. When a round was, and the hash of the state that it led to, is never forgotten.

        Args:
            needed_version: the earliest one that is read again where a file is damaged; rounds from the one on that
                made the version before it stay whole.
        """
        with self.transaction():
            done: int = self.get_run(_THINNED) or 0
            row = self._one(
                "SELECT max(round) FROM rounds WHERE round > ? AND round <= ? AND new_version < ?",
                done,
                last_round - DETAILED_ROUNDS,
                needed_version - 1,
            )
            if row is None or row[0] is None:
                return
            bound: int = row[0]
            self._db.execute("DELETE FROM measurements WHERE round <= ?", (bound,))
            self._db.execute("DELETE FROM probed WHERE round <= ?", (bound,))
            self._db.execute(
                "DELETE FROM updates WHERE attempt_id IN (SELECT attempt_id FROM assignments WHERE round <= ?)",
                (bound,),
            )
            self._db.execute("DELETE FROM assignments WHERE round <= ?", (bound,))
            self._db.execute("DELETE FROM files WHERE version < ? AND name NOT LIKE '%.qdown'", (needed_version,))
            self._rewrite_rounds(done, bound, _without_clients)
            self.set_run(_THINNED, bound)
            gone: int = self.get_run(_WITHOUT_CURVE) or 0
            without = min(bound, last_round - CURVE_ROUNDS)
            if without > gone:
                self._rewrite_rounds(gone, without, _only_the_number)
                self.set_run(_WITHOUT_CURVE, without)

    def _rewrite_rounds(self, after: int, last: int, fewer: Callable[[Mapping[str, Any]], object]) -> None:
        """Rounds ``after < round <= last`` without plan and method state, and with ``fewer`` metrics.

        Written anew: a row that shrinks where it is leaves its page to itself, one that goes makes room for others.
        """
        rows = self._db.execute("SELECT * FROM rounds WHERE round > ? AND round <= ?", (after, last)).fetchall()
        self._db.execute("DELETE FROM rounds WHERE round > ? AND round <= ?", (after, last))
        for row in rows:
            metrics = _loads(row["metrics"])
            thin = {"plan": "null", "method_state": None, "metrics": json.dumps(metrics and fewer(metrics))}
            self._db.execute(
                "INSERT INTO rounds VALUES (:round, :kind, :phase, :version, :deadline_s, :elapsed_s, :extended, "
                ":plan, :opened_unix_s, :closed_unix_s, :settings, :new_version, :state_sha256, :method_state, "
                ":stop_reason, :metrics)",
                {**dict(row), **thin},
            )

    def last_round(self) -> StoredRound | None:
        row = self._one("SELECT * FROM rounds ORDER BY round DESC LIMIT 1")
        return None if row is None else _round(row)

    def rounds(self) -> list[StoredRound]:
        return [_round(row) for row in self._db.execute("SELECT * FROM rounds ORDER BY round")]

    def folded_metrics(self, *, newest: int | None = None, whole: bool = False) -> list[Any]:
        """The metrics of folded rounds, in order; nothing else of them is read.

        Args:
            newest: so many at most; None: all that are kept.
            whole: only those with their clients.
        """
        rows = self._db.execute(
            "SELECT metrics FROM rounds WHERE kind = 'train' AND phase = 'folded' AND round > ? "
            "ORDER BY round DESC LIMIT ?",
            (self.get_run(_THINNED if whole else _WITHOUT_CURVE) or 0, -1 if newest is None else newest),
        ).fetchall()
        return [json.loads(metrics) for (metrics,) in reversed(rows)]

    def get_round(self, round: int) -> StoredRound | None:
        row = self._one("SELECT * FROM rounds WHERE round = ?", round)
        return None if row is None else _round(row)

    def round_of_version(self, version: int) -> StoredRound | None:
        """The round that made this version; None for version 0 and for one that was never committed."""
        row = self._one(
            "SELECT * FROM rounds WHERE kind = 'train' AND phase = 'folded' AND new_version = ? AND version < ?",
            version,
            version,
        )
        return None if row is None else _round(row)

    def files_of(self, version: int) -> dict[str, str]:
        """The files of a version, name -> SHA-256; empty where an older release wrote it."""
        rows = self._db.execute("SELECT name, sha256 FROM files WHERE version = ? ORDER BY name", (version,))
        return dict(rows.fetchall())

    def assignments(self, round: int) -> list[StoredAssignment]:
        """All assignments of the round, by client key; a replaced one stands before its replacement."""
        rows = self._db.execute("SELECT * FROM assignments WHERE round = ? ORDER BY client_key, reissued", (round,))
        return [_assignment(row) for row in rows]

    def assignment(self, attempt_id: AttemptId) -> StoredAssignment | None:
        row = self._one("SELECT * FROM assignments WHERE attempt_id = ?", attempt_id)
        return None if row is None else _assignment(row)

    def set_outcome(self, attempt_id: AttemptId, outcome: Outcome, detail: str = "") -> None:
        with self.transaction():
            self._db.execute(
                "UPDATE assignments SET outcome = ?, detail = ? WHERE attempt_id = ?",
                (outcome, detail[:MAX_REFUSAL_TEXT], attempt_id),
            )

    # updates

    def add_update(
        self, key: ClientKey, delta: Delta, *, measurements: Iterable[Measurement], folded_in: int, unix_s: float
    ) -> None:
        """The update counts, exactly once: a second row of the same (key, round, attempt) raises.

        Args:
            measurements: those of ``delta.measurements`` that were asked for.

        Raises:
            sqlite3.IntegrityError: it is there already.
        """
        with self.transaction():
            self._db.execute(
                "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    delta.round,
                    delta.attempt_id,
                    folded_in,
                    delta.payload_sha256,
                    delta.payload_bytes,
                    json.dumps(to_plain(delta)),
                    unix_s,
                ),
            )
            self.set_outcome(delta.attempt_id, "stored")
            self._add_measurements(key, delta.attempt_id, delta.round, measurements)

    def stored_sha256(self, key: ClientKey, round: int, attempt_id: AttemptId) -> str | None:
        """Payload hash of the durable update of this triple, None if there is none."""
        row = self._one(
            "SELECT payload_sha256 FROM updates WHERE client_key = ? AND round = ? AND attempt_id = ?",
            key,
            round,
            attempt_id,
        )
        return None if row is None else cast("str", row[0])

    def updates_of(self, folded_in: int) -> list[StoredUpdate]:
        """The accepted set of a fold, by client key, round and attempt: never by arrival."""
        rows = self._db.execute(
            "SELECT client_key, message, folded_in FROM updates WHERE folded_in = ? "
            "ORDER BY client_key, round, attempt_id",
            (folded_in,),
        )
        return [
            StoredUpdate(
                client_key=ClientKey(key),
                delta=from_plain(Delta, json.loads(message), where="ledger.updates"),
                folded_in=fold,
            )
            for key, message, fold in rows
        ]

    def num_updates(self) -> int:
        row = self._one("SELECT count(*) FROM updates")
        return 0 if row is None else int(row[0])

    # reports and refusals

    def add_report(self, key: ClientKey, attempt_id: AttemptId, measurements: Iterable[Measurement]) -> None:
        """The measurements that answer an evaluate task."""
        stored = self.assignment(attempt_id)
        assert stored is not None
        with self.transaction():
            self.set_outcome(attempt_id, "reported")
            self._add_measurements(key, attempt_id, stored.round, measurements)

    def add_probed(self, key: ClientKey, attempt_id: AttemptId, rows: Iterable[ProbeRow]) -> None:
        """The table that answers a probe task."""
        stored = self.assignment(attempt_id)
        assert stored is not None
        with self.transaction():
            self.set_outcome(attempt_id, "reported")
            self._db.execute(
                "INSERT OR REPLACE INTO probed VALUES (?, ?, ?, ?)",
                (attempt_id, key, stored.round, json.dumps([to_plain(row) for row in rows])),
            )

    def probed(self, round: int) -> list[tuple[ClientKey, tuple[ProbeRow, ...]]]:
        """The tables of a round of kind probe, by client key."""
        found = self._db.execute("SELECT client_key, rows FROM probed WHERE round = ? ORDER BY client_key", (round,))
        return [
            (ClientKey(key), tuple(from_plain(ProbeRow, row, where="ledger.probed") for row in json.loads(rows)))
            for key, rows in found
        ]

    def _add_measurements(
        self,
        key: ClientKey,
        attempt_id: AttemptId,
        round: int,
        measurements: Iterable[Measurement],
    ) -> None:
        for m in measurements:
            self._db.execute(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?)",
                (attempt_id, key, round, m.measure, m.version, json.dumps(to_plain(m)), m.strength),
            )

    def measurements(self, round: int) -> list[tuple[ClientKey, Measurement]]:
        """What was measured in this round, by client key and measure."""
        rows = self._db.execute(
            "SELECT client_key, sums FROM measurements WHERE round = ? "
            "ORDER BY client_key, measure, attempt_id, strength",
            (round,),
        )
        return [
            (ClientKey(key), from_plain(Measurement, json.loads(sums), where="ledger.measurements"))
            for key, sums in rows
        ]

    def add_refusal(self, key: ClientKey, code: RefusalCode, text: str, *, unix_s: float, count: int = 1) -> int:
        """Count a refusal, or several alike; returns the client's content refusals so far."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO refusals VALUES (?, ?, ?, ?, ?) ON CONFLICT (client_key, code) DO UPDATE SET "
                "count = count + excluded.count, last_text = excluded.last_text, last_unix_s = excluded.last_unix_s",
                (key, code, count, text[:MAX_REFUSAL_TEXT], unix_s),
            )
            if code in CONTENT_CODES:
                self._db.execute(
                    "UPDATE clients SET content_refusals = content_refusals + ? WHERE client_key = ?", (count, key)
                )
        row = self._one("SELECT content_refusals FROM clients WHERE client_key = ?", key)
        return 0 if row is None else int(row[0])

    def refusals(self) -> dict[ClientKey, dict[str, int]]:
        """Counts by client and code."""
        result: dict[ClientKey, dict[str, int]] = {}
        for key, code, count in self._db.execute(
            "SELECT client_key, code, count FROM refusals ORDER BY client_key, code"
        ):
            result.setdefault(ClientKey(key), {})[code] = count
        return result

    def last_refusals(self) -> dict[ClientKey, str]:
        """The newest refusal's text per client."""
        rows = self._db.execute("SELECT client_key, code, last_text FROM refusals ORDER BY last_unix_s, code")
        return {ClientKey(key): f"{code}: {text}" for key, code, text in rows}

    def add_note(self, text: str, *, unix_s: float) -> None:
        """One line about something unusual; the newest thousand are kept."""
        with self.transaction():
            self._db.execute("INSERT INTO notes (unix_s, text) VALUES (?, ?)", (unix_s, text))
            self._db.execute("DELETE FROM notes WHERE id <= (SELECT max(id) FROM notes) - ?", (MAX_NOTES,))

    def notes(self, *, last: int = 20) -> list[tuple[float, str]]:
        """The newest lines, oldest first."""
        rows = self._db.execute("SELECT unix_s, text FROM notes ORDER BY id DESC LIMIT ?", (last,))
        return [(unix_s, text) for unix_s, text in rows][::-1]

    # helpers

    def _one(self, sql: str, *args: object) -> tuple[Any, ...] | None:
        return cast("tuple[Any, ...] | None", self._db.execute(sql, args).fetchone())


def _assignment(row: Any) -> StoredAssignment:
    cls = _TASKS[row["kind"]]
    return StoredAssignment(
        attempt_id=AttemptId(row["attempt_id"]),
        round=row["round"],
        client_key=ClientKey(row["client_key"]),
        message=from_plain(cls, json.loads(row["message"]), where="ledger.assignments"),
        outcome=row["outcome"],
        detail=row["detail"],
        reissued=bool(row["reissued"]),
    )


def _round(row: Any) -> StoredRound:
    return StoredRound(
        round=row["round"],
        kind=row["kind"],
        phase=row["phase"],
        version=row["version"],
        deadline_s=row["deadline_s"],
        elapsed_s=row["elapsed_s"],
        extended=bool(row["extended"]),
        plan=json.loads(row["plan"]),
        opened_unix_s=row["opened_unix_s"],
        closed_unix_s=row["closed_unix_s"],
        settings=_loads(row["settings"]),
        new_version=row["new_version"],
        state_sha256=row["state_sha256"],
        method_state=_loads(row["method_state"]),
        stop_reason=row["stop_reason"],
        metrics=_loads(row["metrics"]),
    )


def _without_clients(metrics: Mapping[str, Any]) -> object:
    return {name: value for name, value in metrics.items() if name != "clients"}


def _only_the_number(metrics: Mapping[str, Any]) -> object:
    return {"num_accepted": metrics.get("num_accepted")}


def _loads(text: str | None) -> Any:
    return None if text is None else json.loads(text)


@contextmanager
def naming_damage(path: Path) -> Generator[None]:
    """What SQLite says of a damaged file becomes one line.

    Raises:
        LedgerDamagedError: the file at ``path`` is torn, or no SQLite file.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # a subclass is something else: locked, a full disk, a bug
            raise
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> LedgerDamagedError:
    return LedgerDamagedError(
        f"{path} is damaged: {' '.join(what.split())}; nothing was overwritten: put the copy of your backup in its "
        "place, without the -wal and -shm files beside it, and serve again"
    )


def open_ledger(path: Path, identity: Mapping[str, str]) -> Ledger:
    """The ledger at ``path``, made or migrated as needed.

    Args:
        identity: values that must not change within a run (``run_id``, ``base_hash``, ``plan``).

    Raises:
        LedgerError: another run's ledger, or one written by a newer release.
        LedgerDamagedError: its pages do not hang together.
    """
    if path.exists():
        _check_pages(path)
    db = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    try:
        path.chmod(0o600)
        with naming_damage(path):
            return _opened(db, path, identity)
    except BaseException:
        db.close()
        raise


def _check_pages(path: Path) -> None:
    """Read-only, so that a damaged file stays as it was found."""
    with naming_damage(path), closing(_reader(path)) as db:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _damaged(path, found)


def _reader(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, timeout=10.0)


def _opened(db: sqlite3.Connection, path: Path, identity: Mapping[str, str]) -> Ledger:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > len(MIGRATIONS):
        raise LedgerError(
            f"{path}: schema version {found}, this release knows {len(MIGRATIONS)}; use the release that wrote it"
        )
    if found < len(MIGRATIONS):
        # All of them in one transaction: a reader beside us finds the schema of no release half made.
        db.executescript(f"BEGIN; {' '.join(MIGRATIONS[found:])} PRAGMA user_version = {len(MIGRATIONS)}; COMMIT;")
    ledger = Ledger(db)
    for name, value in identity.items():
        stored = ledger.get_run(name)
        if stored is None:
            ledger.set_run(name, value)
        elif stored != value:
            raise LedgerError(
                f"{path}: {name} is {stored!r} in the ledger and {value!r} in the run folder; "
                "a ledger belongs to one run: use a new folder"
            )
    return ledger


def is_made(path: Path) -> bool:
    """True once the ledger has its tables; a file whose schema is still being written is not there yet.

    Raises:
        LedgerDamagedError: the file is no ledger any more.
    """
    if not path.exists():
        return False
    with naming_damage(path), closing(_reader(path)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
    return version > 0


def open_read_only(path: Path) -> Ledger:
    """The ledger for reading, beside a running aggregator or without one.

    Raises:
        LedgerError: there is none yet.
        LedgerDamagedError: the file is no ledger any more.
    """
    if not path.exists():
        raise LedgerError(f"{path} does not exist: this run was never served; start it with: fedblocks serve RUN")
    with naming_damage(path), closing(_reader(path)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != len(MIGRATIONS):
        raise LedgerError(
            f"{path}: schema version {version}, this release reads {len(MIGRATIONS)}; serve the run with this release, "
            "or read it with the one that wrote it"
        )
    return Ledger(_reader(path))


def release(path: Path, name: str) -> None:
    """End the quarantine of the client of this name; works while the run is served.

    Raises:
        LedgerError: there is no ledger, or no client of this name.
    """
    reader = open_read_only(path)
    keys = [client.client_key for client in reader.clients() if client.name == name]
    reader.close()
    if not keys:
        raise LedgerError(f"{path}: no client called {name[:60]!r} ever joined this run")
    ledger = Ledger(sqlite3.connect(path, isolation_level=None, timeout=10.0))
    for key in keys:
        ledger.release(key)
    ledger.close()
