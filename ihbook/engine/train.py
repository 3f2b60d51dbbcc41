"""Train many runs, on this machine with one process per core or on the workers of a Dask cluster, under one progress bar."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ihbook.config import RunConfig
from ihbook.engine import cluster, folders
from ihbook.engine.blocks import Block, n_processes, plan_blocks
from ihbook.engine.family import train_family
from ihbook.engine.prepared import prepare
from ihbook.engine.processes import train_in_processes
from ihbook.engine.progress import Report, now_and_then, progress_bar, stop_signals
from ihbook.engine.results import Result
from ihbook.task import Bank

if TYPE_CHECKING:
    from distributed import Client


def train(runs: Sequence[RunConfig], *, bank: Bank | None = None, directory: str | Path | None = None,
          device: str | torch.device = "cpu", compile: bool | None = None, progress: bool = True,
          client: Client | None = None) -> list[Result]:
    """Train every run, from scratch or from the state saved in `directory`; return the results in the order of `runs`.

    Runs that can share a program train as one family, with a leading run axis; except for rounding, a result does not depend on
    the other runs in the call. `bank` replaces the banks of all runs. `compile` (default: where it pays) compiles the program, or
    on a GPU captures its step. With a `directory`, the state is saved there every 45 seconds, and on Ctrl-C or SIGTERM before
    KeyboardInterrupt is raised; the same call then resumes, bit for bit as if it had not stopped. With a Dask `client`
    (`cluster.connect`), its workers train the runs instead, on the devices that they have, and their results are verified;
    `store.fetch` also stores each of these results as it arrives.

    Raises ValueError for a run that can't be trained, before any trains, or a `directory` with a `client`; OSError where a folder
    can't be written or the cluster is lost; RuntimeError where a process was killed or a worker has another version or bank.
    """
    if client is not None and directory is not None:
        raise ValueError(f"directory={str(directory)!r} with a client: workers save no state there; leave one out, or use "
                         "store.fetch, which keeps what workers have finished")
    prepared = prepare(runs, bank, device)
    results: list[Result | None] = [None] * len(runs)
    with tempfile.TemporaryDirectory() as temporary:
        if client is not None:
            for i, files in cluster.train_on_workers(client, prepared, progress):
                folder = Path(temporary) / str(i)
                folders.unpack(files, folder, prepared[i])
                results[i] = _in_memory(folders.read(folder, runs[i]))
            return results
        folder = Path(directory or temporary)
        blocks = plan_blocks(prepared, folder, device, compile)
        try:
            for block, finished in train_blocks(blocks, folder, device, progress):
                for i, result in zip(block.places, finished, strict=True):
                    results[i] = _in_memory(result)
        except KeyboardInterrupt:
            if directory is None:
                raise KeyboardInterrupt("stopped, and nothing is kept; a call with a directory, or store.fetch, goes on") from None
            raise
        for block in blocks:  # only now, so that a stopped call keeps the blocks that it has finished
            shutil.rmtree(block.folder(folder))
    return results


def _in_memory(result: Result) -> Result:
    """A result whose checkpoints are in memory, so that it does not need its folder."""
    return replace(result, checkpoints=dict(result.checkpoints))


def train_blocks(blocks: Sequence[Block], directory: Path, device: str | torch.device,
                 progress: bool) -> Iterator[tuple[Block, list[Result]]]:
    """Train every block; yield each with its results when it is finished. The caller then removes its folder in `directory`.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the states are saved; RuntimeError where a process was killed.
    """
    for block in blocks:
        block.announce(directory)
    n_finished = 0
    with (progress_bar(sum(len(block.family) for block in blocks), sum(block.run_steps for block in blocks), progress) as report,
          stop_signals() as stopped):
        for block in _in_turn(blocks, directory, device, stopped, report):
            yield block, train_family(block.family, block.folder(directory), device)  # only loads the results
            n_finished += 1
    if n_finished < len(blocks):
        raise KeyboardInterrupt(f"stopped; the state is saved in {directory}, and the same call goes on from there")


def _in_turn(blocks: Sequence[Block], directory: Path, device: str | torch.device, stopped: Callable[[], bool],
             report: Report) -> Iterator[Block]:
    """Train the blocks, in processes where that pays; yield each when it is finished, and end early when `stopped` is true."""
    if (n := n_processes(blocks, device)) > 1:
        yield from train_in_processes(blocks, directory, n, stopped, report)
        return
    for block in blocks:
        if not stopped() and train_family(block.family, block.folder(directory), device, block.compile, stopped=stopped,
                                          compile_with=block.compile_with, report=now_and_then(report)) is not None:
            yield block


def seeds(run: RunConfig, n: int) -> list[RunConfig]:
    """`n` copies of the run; copy `i`, counted from 0, adds `i` to the run's init seed and to its data seed."""
    return [replace(run, init_seed=run.init_seed + i, data_seed=run.data_seed + i) for i in range(n)]
