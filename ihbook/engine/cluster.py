"""Train runs on the workers of a Dask cluster: each worker gets families of a size that suits it, and returns whole results."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ihbook.config import RunConfig
from ihbook.engine import folders
from ihbook.engine.compiled import BLOCK, PLAIN_BLOCK, pays
from ihbook.engine.family import train_family
from ihbook.engine.prepared import Prepared, prepare
from ihbook.task import Bank

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Worker:
    """A worker of a Dask cluster: its address, its number of threads, and whether it has a GPU."""

    address: str
    threads: int
    gpu: bool

    @property
    def jobs(self) -> int:
        """The number of families that it trains at a time."""
        return 1 if self.gpu else self.threads

    @property
    def family_size(self) -> int:
        """The largest number of runs that one of its families may have."""
        return BLOCK["cuda"] if self.gpu else PLAIN_BLOCK


def connect(address: str, seconds: float = 5.0) -> Client:
    """Connect to the Dask scheduler at `address`, such as `"tcp://10.0.0.1:8786"`, and return a client.

    Raises OSError where no scheduler answers within `seconds`, ImportError where Dask is not installed.
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
    """The workers that the client's cluster has now; `known` workers are not queried again. Raises OSError where it has none."""
    threads, old = client.nthreads(), {worker.address: worker for worker in known}
    new = [address for address in threads if address not in old]
    gpus = client.run(torch.cuda.is_available, workers=new) if new else {}
    found = [old.get(address) or Worker(address, n, gpus[address]) for address, n in sorted(threads.items())
             if address in old or address in gpus]
    if not found:
        where = client.scheduler.address
        raise OSError(f"the scheduler at {where} has no workers; start some with `dask worker {where} --nthreads 1`")
    return found


def share_out(groups: Sequence[Sequence[int]]) -> Callable[[Worker], list[int]]:
    """A function that takes a worker's next share: at most `family_size` items of one group, or none when all are taken."""
    waiting = deque(deque(group) for group in groups if group)

    def take(worker: Worker) -> list[int]:
        if not waiting:
            return []
        group = waiting[0]
        share = [group.popleft() for _ in range(min(worker.family_size, len(group)))]
        if not group:
            waiting.popleft()
        return share

    return take


def call_on_workers(client: Client, function: Callable[..., Any], groups: Sequence[Sequence[int]],
                    arguments: Callable[[list[int]], tuple]) -> Iterator[tuple[list[int], Any]]:
    """Call `function(*arguments(share), stop)` on workers for shares of the groups; yield each share with its result, as they
    finish. A worker has at most `jobs` shares at a time. If a worker is lost, another takes its shares. New workers join in.

    Raises OSError where there are no workers or the cluster is lost, and what `function` raises. When the caller stops, shares
    that have not begun are cancelled, and the `distributed.Event` named `stop` tells the others to end.
    """
    from distributed import Event, as_completed

    take, among, busy = share_out(groups), workers(client), Counter()
    jobs: dict[Any, tuple[str, list[int]]] = {}
    done, stop = as_completed(), f"ihbook-{uuid.uuid4()}"

    def fill() -> None:
        for worker in among:
            while busy[worker.address] < worker.jobs and (share := take(worker)):
                job = client.submit(function, *arguments(share), stop, workers=[worker.address], allow_other_workers=True,
                                    pure=False)
                jobs[job] = worker.address, share
                busy[worker.address] += 1
                done.add(job)

    try:
        fill()
        for job in done:
            address, share = jobs.pop(job)
            busy[address] -= 1
            if job.status == "error":  # raises what the function raised
                job.result()
            try:
                result = job.result()
                among = workers(client, among)
            except (CancelledError, OSError) as error:
                raise OSError(f"the cluster was lost ({type(error).__name__}: {error}); what was finished is kept, and the same "
                              "call goes on") from error
            fill()
            yield share, result
    finally:
        if jobs:
            with suppress(OSError, TimeoutError):  # a lost cluster can't be told
                Event(stop, client=client).set()
            client.cancel(list(jobs))


def train_on_workers(client: Client, wanted: Sequence[Prepared], progress: bool = True) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Train runs on the client's workers; yield the index of each in `wanted` and its files (`folders.unpack`), as they finish.

    Raises OSError where there are no workers or the cluster is lost, RuntimeError where a worker draws another bank.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, prepared in sorted(enumerate(wanted), key=lambda item: -item[1].run.n_steps):
        groups[prepared.family_key, frozenset(prepared.clamp_signatures), prepared.bank.digest].append(i)
    banks = {prepared.bank.digest: prepared.bank for prepared in wanted if not prepared.drawn_bank}
    sent_banks = {digest: client.scatter(bank, broadcast=True) for digest, bank in banks.items()}

    def arguments(share: list[int]) -> tuple:
        digest = wanted[share[0]].bank.digest
        return [wanted[i].run for i in share], sent_banks.get(digest), digest

    with tqdm(total=len(wanted), desc="runs", disable=not progress, leave=False) as bar:
        for share, sent in call_on_workers(client, train_on_this_worker, list(groups.values()), arguments):
            for i, files in zip(share, sent, strict=True):
                bar.update()
                yield i, files


def train_on_this_worker(runs: Sequence[RunConfig], bank: Bank | None, digest: str,
                         stop: str | None = None) -> list[dict[str, bytes]]:
    """Train runs as one family on this worker, on one core or its GPU; return the files of each, or nothing if stopped. `bank` is
    given where the worker can't draw it. Raises RuntimeError where the bank's digest is not `digest`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # never reset: families in other threads of this worker need it too
    family = prepare(runs, bank, device)
    if family[0].bank.digest != digest:
        raise RuntimeError("this worker draws other characters than the machine that asks; install the same packages on both")
    compiled = pays([prepared.run.n_steps for prepared in family], device)
    with tempfile.TemporaryDirectory() as root:
        results = train_family(family, Path(root) / "training", device, compiled, stopped=_told(stop))
        if results is None:
            return []
        sent = []
        for prepared, result in zip(family, results, strict=True):
            folder = Path(tempfile.mkdtemp(dir=root))
            folders.write(folder, prepared, result)
            sent.append(folders.pack(folder))
        return sent


def _told(stop: str | None) -> Callable[[], bool]:
    """A function that asks, at most every two seconds, whether the event named `stop` is set; it says no where there is none."""
    if stop is None:
        return lambda: False
    from distributed import Event

    event, looked = Event(stop), time.monotonic()

    def told() -> bool:
        nonlocal looked
        if time.monotonic() - looked < 2:
            return False
        looked = time.monotonic()
        return event.is_set()

    return told
