"""What does Flower's ServerApp do? It serves a run folder, as ``fedblocks serve`` does, through Flower's nodes.

Who trains what, whether an update counts and what becomes of it is decided in :func:`serve`, behind a
:class:`TurnEndpoint`; the strategy only carries turns: ``configure_*`` gives those that are due as messages,
``aggregate_*`` hands the replies back, one by one as they come. So a round ends at our deadline, not with its slowest
node, and the ledger in the run folder holds the run: another ``flwr run`` goes on where this one stopped.
Flower's own loop over rounds is not used: it waits for all nodes, and keeps all replies in memory.
Nor are its retries trusted: towards a SuperLink that is gone they have no end, and hold the thread that hears signals.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from logging import INFO
from pathlib import Path
from traceback import format_exception_only
from typing import Any, Final, TypeVar

from fedblocks.aggregator.auth import Registry
from fedblocks.aggregator.run_folder import RunFolder
from fedblocks.aggregator.server import EXIT_INTERRUPTED, POLL_S, serve
from fedblocks.aggregator.turns import TurnEndpoint, TurnKind
from fedblocks.flower import FRAMES, RECORD, require_flower

require_flower()

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.common.logger import log  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import Result, Strategy  # noqa: E402

#: A SuperLink that answers nothing for so long is given up; Flower tries again meanwhile.
LOST_S: Final = 600.0
#: The same once this process was told to stop: it is, when the SuperLink that started it dies.
LOST_STOPPING_S: Final = 10.0
#: In the run folder: how a ServerApp was interrupted. Flower gives it no terminal, and what it logs goes to the
#: SuperLink, which may be what is gone.
END_LOG: Final = "flower.log"

Answer = TypeVar("Answer")


class InterruptedRunError(RuntimeError):
    """The run is not over; another ``flwr run`` on the same folder goes on."""


class BlockStrategy(Strategy):
    """Our rounds over Flower's nodes.

    Args:
        run: the run folder, on the machine of the ServerApp.
        overrides: ``section.key=value``.
    """

    def __init__(self, run: Path, overrides: Sequence[str] = ()) -> None:
        self._run = run
        self._overrides = overrides
        self._endpoint: TurnEndpoint | None = None
        self._asked: dict[str, int] = {}
        """Node of each message that is not answered."""
        self._stop = threading.Event()
        self._lost: str | None = None
        """Why the SuperLink is asked no more."""

    @property
    def endpoint(self) -> TurnEndpoint:
        """Where the turns come from; made by ``start``."""
        assert self._endpoint is not None
        return self._endpoint

    def summary(self) -> None:
        """Say what is served."""
        log(INFO, "fedblocks run %s", self._run)

    def start(
        self, grid: Grid, *_: Any, **__: Any
    ) -> Result:  # the arguments of Flower's own loop have no meaning here
        """Serve the run until it is over.

        Raises:
            InterruptedRunError: it was stopped before that, or the SuperLink was lost.
            RunFolderError, ConfigError, LedgerError: with the cause and what to do.
        """

        def make_endpoint(folder: RunFolder, members: Registry) -> TurnEndpoint:
            self._endpoint = TurnEndpoint(
                lambda _: self._exchange(grid),
                registry=members,
                vouch_s=folder.config.server.heartbeat_interval_s,
                say=_say,
            )
            return self._endpoint

        self.summary()
        try:
            code = serve(self._run, self._overrides, on_event=_say, stop=self._stop, make_endpoint=make_endpoint)
            if code:
                raise InterruptedRunError(self._goes_on(f"stopped with exit code {code}"))
        except InterruptedRunError as error:
            with contextlib.suppress(OSError), (self._run / END_LOG).open("a", encoding="utf-8") as log_file:
                print(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), error, file=log_file)
            raise
        return Result()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The turns with a task to train."""
        return self._messages("train")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The turns with something to measure."""
        return self._messages("evaluate")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand replies to the aggregator, which checks, keeps and, at the end of the round, folds what is in them."""
        for reply in replies:
            node = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if reply.has_error():
                self.endpoint.failed(node, reply.error.reason or f"Flower's error {reply.error.code}")
                continue
            frames = reply.content.config_records.get(RECORD, {}).get(FRAMES)
            if isinstance(frames, list) and all(isinstance(frame, bytes) for frame in frames):
                self.endpoint.heard(node, frames)
            else:
                self.endpoint.failed(node, f"a reply without the record {RECORD!r}")
        return None, None

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The same: a reply says by itself what it answers."""
        self.aggregate_train(server_round, replies)
        return None

    def _exchange(self, grid: Grid) -> None:
        self.endpoint.seen(self._reach(lambda: list(grid.get_node_ids())))
        nothing = (0, ArrayRecord(), ConfigRecord(), grid)
        for messages in (self.configure_train(*nothing), self.configure_evaluate(*nothing), self._messages("query")):
            for message in messages:
                pushed = self._reach(lambda message=message: next(iter(grid.push_messages([message])), None))
                if pushed is None:
                    self.endpoint.failed(message.metadata.dst_node_id, "the SuperLink did not take the message")
                else:
                    self._asked[pushed] = message.metadata.dst_node_id
        if self._asked:
            self.aggregate_train(0, self._reach(lambda: list(grid.pull_messages(list(self._asked)))))

    def _reach(self, call: Callable[[], Answer]) -> Answer:
        """What the SuperLink answers, asked in a thread of its own, so that this one hears of signals meanwhile.

        Raises:
            InterruptedRunError: no answer is to be had any more; then nothing is asked again.
        """
        if self._lost is None:
            answer: Future[Answer] = Future()
            threading.Thread(target=_ask, args=(call, answer), daemon=True).start()
            self._lost = self._why_lost(answer)
            if self._lost is None:
                return answer.result()
        raise InterruptedRunError(self._goes_on(f"{self._lost}; stopped with exit code {EXIT_INTERRUPTED}"))

    def _why_lost(self, answer: Future[Any]) -> str | None:
        """Waits for the answer; None if there is one."""
        began_s = stopped_s = time.monotonic()
        while not wait([answer], timeout=POLL_S).done:
            now_s = time.monotonic()
            if not self._stop.is_set():
                stopped_s = now_s
            if now_s - began_s > LOST_S or now_s - stopped_s > LOST_STOPPING_S:
                return f"the SuperLink has not answered for {now_s - began_s:.0f} s"
        error = answer.exception()
        if error is None:
            return None
        return f"the SuperLink serves this run no more ({format_exception_only(error)[-1].splitlines()[0]})"

    def _goes_on(self, what: str) -> str:
        return f"{what}; flwr run on {self._run} again goes on"

    def _messages(self, kind: TurnKind) -> Iterable[Message]:
        for turn in self.endpoint.take(kind):
            content = RecordDict({RECORD: ConfigRecord({FRAMES: turn.frames})})
            yield Message(content, turn.node, kind, group_id=str(turn.round or ""))


def _ask(call: Callable[[], Answer], answer: Future[Answer]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:  # noqa: BLE001 - raised again by who waits; Flower's own are no Exceptions
        answer.set_exception(error)


def _say(line: str) -> None:
    log(INFO, "%s", line)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """``flwr run APP --run-config 'run="RUN"'``.

    Raises:
        ValueError: no run folder is named.
    """
    run = str(context.run_config.get("run", ""))
    if not run:
        raise ValueError("no run folder is named; flwr run APP --run-config 'run=\"/path/of/the/run\"'")
    BlockStrategy(Path(run)).start(grid)
