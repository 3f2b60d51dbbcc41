"""Runs over the workers of a Dask cluster: each is sent families as large as it is made for, and sends its results back whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ihbook.train import BLOCK

if TYPE_CHECKING:
    from distributed import Client

GPU = 32  # cores that a GPU counts for


@dataclass(frozen=True)
class Worker:
    """A worker of a cluster: how many threads it was started with, and whether it has a GPU."""

    address: str
    threads: int
    gpu: bool

    @property
    def strength(self) -> int:
        return GPU if self.gpu else self.threads

    @property
    def family(self) -> int:
        """The most runs that are sent to it at once."""
        return BLOCK["cuda" if self.gpu else "cpu"]


def connect(address: str, seconds: float = 5.0) -> Client:
    """A client of the Dask scheduler at `address`, such as "tcp://10.0.0.1:8786".

    Raises OSError where none answers within `seconds`, ImportError where Dask is not installed.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("Dask is not installed; pip install distributed") from error
    try:
        return Client(address, timeout=seconds)
    except (OSError, ValueError) as error:
        raise OSError(f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler`, workers with "
                      f"`dask worker {address}`, or correct the address") from error


def workers(client: Client) -> list[Worker]:
    """The workers that a client's cluster has now. Raises OSError where there are none."""
    gpus = client.run(torch.cuda.is_available)
    found = [Worker(address, threads, gpus.get(address, False)) for address, threads in sorted(client.nthreads().items())]
    if not found:
        where = client.scheduler.address
        raise OSError(f"the scheduler at {where} has no workers; start some with `dask worker {where}`")
    return found


def shares(groups: Sequence[Sequence[int]], work: Sequence[int], among: Sequence[Worker]) -> list[tuple[Worker, list[int]]]:
    """What to send to whom: indices of runs of one group together, the longest first, to the worker that would be done soonest."""
    load = dict.fromkeys(among, 0.0)
    found = []
    for group in groups:
        waiting = sorted(group, key=lambda i: -work[i])
        while waiting:
            worker = min(among, key=lambda each: (load[each] + work[waiting[0]]) / each.strength)
            share, waiting = waiting[:worker.family], waiting[worker.family:]
            load[worker] += sum(work[i] for i in share)
            found.append((worker, share))
    return found


def run(client: Client, function: Callable[..., Any], jobs: Sequence[tuple[Worker, tuple]]) -> Iterator[tuple[int, Any]]:
    """Call `function` with each job's arguments on its worker, or where that is lost, on another; yields each job's number and
    what came of it, as they are finished. What is left is cancelled when the caller stops."""
    from distributed import as_completed

    futures = {client.submit(function, *arguments, workers=[worker.address], allow_other_workers=True, pure=False): i
               for i, (worker, arguments) in enumerate(jobs)}
    try:
        for future, result in as_completed(futures, with_results=True):
            yield futures[future], result
    finally:
        client.cancel(list(futures))
