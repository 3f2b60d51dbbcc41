"""Train blocks in processes of this machine, one per core. Each process compiles for itself; none outlives this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from loky.backend import get_context
from loky.process_executor import ProcessPoolExecutor

from ihbook.engine import family
from ihbook.engine.blocks import Block, shares
from ihbook.engine.progress import Report, now_and_then

IDLE_SECONDS = 10.0  # an idle process ends after this time, also if this process was killed


def train_in_processes(blocks: Sequence[Block], directory: Path, n: int, stopped: Callable[[], bool],
                       report: Report) -> Iterator[Block]:
    """Share the blocks among `n` processes; yield each block when it is finished, and end early when `stopped` is true.

    Raises what a process raised, or RuntimeError where a process was killed.
    """
    context = get_context("loky")
    stop, messages = context.Event(), context.SimpleQueue()
    executor = ProcessPoolExecutor(n, timeout=IDLE_SECONDS, context=context, env={"OMP_NUM_THREADS": "1"}, initializer=_begin,
                                   initargs=(stop, messages, os.getpid(), family.SAVE_SECONDS))

    def told() -> Iterator[Block]:
        while not messages.empty():
            finished, run_steps, losses = messages.get()
            report(run_steps, losses)
            if finished is not None:
                yield blocks[finished]

    try:
        futures = [executor.submit(_train_share, [(i, blocks[i]) for i in share], directory)
                   for share in shares(blocks, n) if share]
        while not all(future.done() for future in futures):
            if stopped() or any(future.done() and future.exception() for future in futures):
                stop.set()  # the others save their states too
            yield from told()
            time.sleep(0.1)
        yield from told()
        for future in futures:
            _raise_from(future, stopped)
    finally:
        stop.set()  # a process that is told to stop saves its state and ends
        executor.shutdown()


def _raise_from(future: Future, stopped: Callable[[], bool]) -> None:
    """Raise what a share raised, except where the signal that stops this call also killed the process."""
    try:
        future.result()
    except BrokenProcessPool as error:
        if not stopped():
            raise RuntimeError("a training process was killed, perhaps for want of memory; a call with a directory, or "
                               "store.fetch, goes on from what it last saved") from error


_here: tuple[Any, Any, int] | None = None  # in a training process: the stop event, the queue, and the parent's id


def _begin(stop: Any, messages: Any, parent: int, save_seconds: float) -> None:
    """Set up a training process. It ignores Ctrl-C, which reaches it too, and SIGTERM: the parent decides when it stops."""
    global _here
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _here, family.SAVE_SECONDS = (stop, messages, parent), save_seconds


def _train_share(share: list[tuple[int, Block]], directory: Path) -> None:
    """Train blocks one after another, and report progress; save the state and end early if told to stop or the parent is gone."""
    stop, messages, parent = _here
    waiting, last = 0, time.monotonic()

    def orphaned() -> bool:
        return os.getppid() != parent

    def report(run_steps: int, losses: tuple[float, float] | None) -> None:
        nonlocal waiting, last
        waiting += run_steps
        if time.monotonic() - last > 0.5 and losses:
            messages.put((None, waiting, losses))
            waiting, last = 0, time.monotonic()

    for i, block in share:
        finished = family.train_family(block.family, block.folder(directory), "cpu", block.compile, compile_with=block.compile_with,
                                       stopped=lambda: stop.is_set() or orphaned(), report=now_and_then(report))
        if orphaned():
            os._exit(1)  # no parent reads the queue
        if finished is None:
            return
        messages.put((i, waiting, None))
        waiting = 0
