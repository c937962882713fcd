"""Who does the arithmetic of a simulated fleet? This process, or some that were forked from it; the bits are the same.

Each worker has its own clients, their workbenches and one set of hidden states; the base model's 4-bit files are opened
before the fork, and all read the same ones. Sessions, sockets and the clock stay where they are: a worker is told a
task, works in the client's folder, and says what the task's end was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from fedblocks.protocol.messages import Report, Welcome
from fedblocks.virtual_client import Outcome, Task, VirtualClient


class WorkerError(RuntimeError):
    """A worker process could not do a task: a bug, not a matter of the fleet; the text holds its traceback."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A task of a client that is to be carried out."""

    client: VirtualClient
    task: Task
    payload: bytes

    @property
    def welcome(self) -> Welcome:
        """The session has one by the time it is given a task."""
        assert self.client.welcome is not None
        return self.client.welcome


class Workers(Protocol):
    """Carries out tasks that do not depend on each other."""

    def carry_out(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes in the order of the jobs."""
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...


class InThisProcess:
    """One after the other."""

    def carry_out(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes in the order of the jobs."""
        return [job.client.carry_out(job.welcome, job.task, job.payload) for job in jobs]

    def close(self) -> None:
        """Nothing was started."""


class Forked:
    """Side by side, in processes that know the clients as they were when this was made.

    Args:
        clients: in the order of their numbers; none has a task yet.
        count: of processes; client i belongs to the process i modulo ``count``.
    """

    def __init__(self, clients: Sequence[VirtualClient], count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._links: list[Connection[Any, Any]] = []
        self._processes: list[Any] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            # Earlier workers' ends are inherited too; only their owner may notice that this process has ended.
            process = context.Process(target=_work, args=(clients, theirs, [*self._links, ours]), daemon=True)
            process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(process)

    def carry_out(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes in the order of the jobs.

        Raises:
            WorkerError: a worker failed or is gone.
        """
        queues: list[list[int]] = [[] for _ in self._links]
        for place, job in enumerate(jobs):
            queues[job.client.number % len(queues)].append(place)
        outcomes: dict[int, Outcome] = {}
        for link, queue in zip(self._links, queues, strict=True):
            self._tell(link, jobs, queue)
        while any(queues):
            waiting = [link for link, queue in zip(self._links, queues, strict=True) if queue]
            for link in multiprocessing.connection.wait(waiting):
                number = self._links.index(link)  # type: ignore[arg-type]
                place = queues[number].pop(0)
                outcomes[place] = self._heard(number, jobs[place])
                self._tell(self._links[number], jobs, queues[number])
        return [outcomes[place] for place in range(len(jobs))]

    def _tell(self, link: Connection[Any, Any], jobs: Sequence[Job], queue: Sequence[int]) -> None:
        if queue:
            job = jobs[queue[0]]
            link.send((job.client.number, job.welcome, job.task, job.payload))

    def _heard(self, number: int, job: Job) -> Outcome:
        try:
            outcome, said, error = self._links[number].recv()
        except EOFError:
            raise WorkerError(f"worker {number} ended while it worked for {job.client.site.site.client_name}") from None
        if error:
            raise WorkerError(f"worker {number} failed at a task of {job.client.site.site.client_name}:\n{error}")
        site = job.client.site
        for line in said:
            site.say(line)
        update = site.store.update()
        if update is not None and update[0].attempt_id == job.task.attempt_id:
            site.summary.measured(update[0].measurements, round=job.task.round)
        for message, _ in outcome.held:
            if isinstance(message, Report):
                site.summary.measured(message.measurements, round=job.task.round)
        return outcome

    def close(self) -> None:
        """Ends the processes."""
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()


def _work(clients: Sequence[VirtualClient], link: Connection[Any, Any], others: Sequence[Connection[Any, Any]]) -> None:
    """What a worker does until the other end is closed."""
    for other in others:
        other.close()
    said: list[str] = []
    for client in clients:
        client.site.say = said.append
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            number, welcome, task, payload = link.recv()
            outcome, error = None, ""
            try:
                outcome = clients[number].carry_out(welcome, task, payload)
            except Exception:  # noqa: BLE001  (told to the other end, which raises)
                error = traceback.format_exc()
            link.send((outcome, tuple(said), error))
            said.clear()
