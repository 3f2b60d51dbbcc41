"""Runs over the workers of a Dask cluster: each is sent families as large as it is made for, and sends its results back whole."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ihbook.train import BLOCK, PLAIN_BLOCK

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Worker:
    """A worker of a cluster: how many threads it was started with, and whether it has a GPU."""

    address: str
    threads: int
    gpu: bool

    @property
    def jobs(self) -> int:
        """How many families it trains at a time."""
        return 1 if self.gpu else self.threads

    @property
    def family(self) -> int:
        """The most runs that are sent to it as one family."""
        return BLOCK["cuda"] if self.gpu else PLAIN_BLOCK


def connect(address: str, seconds: float = 5.0) -> Client:
    """A client of the Dask scheduler at `address`, such as "tcp://10.0.0.1:8786".

    Raises OSError where none answers within `seconds`, ImportError where Dask is not installed.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("Dask is not installed; pip install distributed") from error
    try:
        if not address:
            raise ValueError("an empty address")
        return Client(address, timeout=seconds)
    except (OSError, ValueError) as error:
        raise OSError(f"no Dask scheduler answers at {address!r} ({error}); start one with `dask scheduler`, workers with "
                      "`dask worker ADDRESS --nthreads 1`, or correct the address") from error


def workers(client: Client, known: Sequence[Worker] = ()) -> list[Worker]:
    """The workers that a client's cluster has now; those `known` are not asked again. Raises OSError where there are none."""
    threads, old = client.nthreads(), {worker.address: worker for worker in known}
    new = [address for address in threads if address not in old]
    gpus = client.run(torch.cuda.is_available, workers=new) if new else {}
    found = [old.get(address) or Worker(address, n, gpus[address]) for address, n in sorted(threads.items())
             if address in old or address in gpus]
    if not found:
        where = client.scheduler.address
        raise OSError(f"the scheduler at {where} has no workers; start some with `dask worker {where} --nthreads 1`")
    return found


def shares(groups: Sequence[Sequence[int]]) -> Callable[[Worker], list[int]]:
    """A function that gives a worker what to train next: items of one group, as many as a family of its; none when all is given."""
    waiting = deque(deque(group) for group in groups if group)

    def take(worker: Worker) -> list[int]:
        if not waiting:
            return []
        group = waiting[0]
        share = [group.popleft() for _ in range(min(worker.family, len(group)))]
        if not group:
            waiting.popleft()
        return share

    return take


def run(client: Client, function: Callable[..., Any], groups: Sequence[Sequence[int]],
        arguments: Callable[[list[int]], tuple]) -> Iterator[tuple[list[int], Any]]:
    """Call `function(*arguments(share))` on workers for shares of the groups; yields each share and what came of it, as they are
    finished. A worker has as many at a time as it can train; what a lost one had, another does; new ones join in.

    Raises OSError where the cluster is lost. What is left is cancelled when the caller stops.
    """
    from distributed import as_completed

    take, among, busy = shares(groups), workers(client), Counter()
    jobs: dict[Any, tuple[str, list[int]]] = {}
    done = as_completed()

    def fill() -> None:
        for worker in among:
            while busy[worker.address] < worker.jobs and (share := take(worker)):
                job = client.submit(function, *arguments(share), workers=[worker.address], allow_other_workers=True, pure=False)
                jobs[job] = worker.address, share
                busy[worker.address] += 1
                done.add(job)

    try:
        fill()
        for job in done:
            address, share = jobs.pop(job)
            busy[address] -= 1
            try:
                result = job.result()
                among = workers(client, among)
            except (CancelledError, OSError) as error:
                raise OSError(f"the cluster was lost ({type(error).__name__}: {error}); what was finished is kept, and the same "
                              "call goes on") from error
            fill()
            yield share, result
    finally:
        client.cancel(list(jobs))
