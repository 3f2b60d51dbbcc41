"""Training many runs: on this machine, one process per core, or by the workers of a Dask cluster; under one progress bar."""

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
    """Train every run from scratch, or from where `directory` says that it stopped; results in the order of `runs`.

    Runs that can share a program train together, with a leading run axis; a run's result does not depend on which others are in
    the call, but for rounding. `bank` serves all runs in place of their own. `compile` (default: where it pays) compiles the
    program, or on a GPU captures its steps. With a `directory`, state is saved there every 45 seconds, and on Ctrl-C or SIGTERM
    before KeyboardInterrupt is raised; the same call then goes on, bit for bit as if it had not stopped. With a Dask `client`
    (`cluster.connect`), its workers train the runs instead, on the devices that they have, and what they send back is verified;
    `store.fetch` keeps such runs as they come.

    Raises ValueError for a run that can't be trained, before any is; OSError where a folder can't be written or a cluster is lost.
    """
    if client is not None and directory is not None:
        raise ValueError(f"directory={str(directory)!r} with a client: workers save no state there; leave one out, or use "
                         "store.fetch, which keeps what workers have finished")
    results: list[Result | None] = [None] * len(runs)
    prepared = prepare(runs, bank, device)
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
        for block in blocks:  # only now: a call that is stopped must not lose the blocks that it had finished
            shutil.rmtree(block.folder(folder))
    return results


def _in_memory(result: Result) -> Result:
    """A result whose checkpoints do not need its folder."""
    return replace(result, checkpoints=dict(result.checkpoints))


def train_blocks(blocks: Sequence[Block], directory: Path, device: str | torch.device,
                 progress: bool) -> Iterator[tuple[Block, list[Result]]]:
    """Train every block, and yield each with its results as it is finished; its folder in `directory` is the caller's then.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the states are saved; RuntimeError where a process was killed.
    """
    for block in blocks:
        block.announce(directory)
    n_finished = 0
    with (progress_bar(sum(len(block.family) for block in blocks), sum(block.run_steps for block in blocks), progress) as report,
          stop_signals() as stopped):
        for block in _in_turn(blocks, directory, device, stopped, report):
            yield block, train_family(block.family, block.folder(directory), device)  # reads what is finished
            n_finished += 1
    if n_finished < len(blocks):
        raise KeyboardInterrupt(f"stopped; the state is saved in {directory}, and the same call goes on from there")


def _in_turn(blocks: Sequence[Block], directory: Path, device: str | torch.device, stopped: Callable[[], bool],
             report: Report) -> Iterator[Block]:
    """Train the blocks, in processes where that pays; yields each that is finished, and ends early when `stopped` says so."""
    if (n := n_processes(blocks, device)) > 1:
        yield from train_in_processes(blocks, directory, n, stopped, report)
        return
    for block in blocks:
        if not stopped() and train_family(block.family, block.folder(directory), device, block.compile, stopped=stopped,
                                          compile_with=block.compile_with, report=now_and_then(report)) is not None:
            yield block


def seeds(run: RunConfig, n: int) -> list[RunConfig]:
    """The run with `n` consecutive init seeds from its own, each with a data stream of its own."""
    return [replace(run, init_seed=run.init_seed + i, data_seed=run.data_seed + i) for i in range(n)]
