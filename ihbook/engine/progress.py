"""The progress bar of a training call, and the signals that stop the call."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

Report = Callable[[int, tuple[float, float] | None], None]  # run-steps since the last report, lowest and highest loss (nats)


@contextmanager
def progress_bar(n_runs: int, run_steps: int, progress: bool) -> Iterator[Report]:
    """Show a progress bar, and yield its `Report`; the bar disappears at the end."""
    with ExitStack() as stack:
        screen = stack.enter_context(_screen())
        bar = stack.enter_context(tqdm(total=run_steps, desc=f"{n_runs} runs", disable=not progress, leave=False, unit="run-step",
                                       smoothing=0.05, file=screen, mininterval=0.5 if screen.isatty() else 5.0))

        def report(run_steps: int, losses: tuple[float, float] | None) -> None:
            if losses:
                low, high = (f"{loss:.3f}" for loss in losses)
                bar.set_postfix_str(f"loss {low}" + (f" to {high}" if low != high else ""), refresh=False)
            bar.update(run_steps)

        yield report


@contextmanager
def _screen() -> Iterator[TextIO]:
    """Where progress is shown: standard error, or the file IHBOOK_PROGRESS, since a build hides its notebooks' standard error."""
    path = os.environ.get("IHBOOK_PROGRESS")
    if not path:
        yield sys.stderr
        return
    with open(path, "a") as file:
        yield file


def now_and_then(report: Report) -> Callable[[int, Tensor | None], None]:
    """`report` as `train_family` calls it. It gets losses only at every 200th step, since reading them from a GPU is slow."""
    calls = itertools.count()

    def told(run_steps: int, losses: Tensor | None) -> None:
        now = losses is not None and next(calls) % 200 == 0
        report(run_steps, (losses.min().item(), losses.max().item()) if now else None)

    return told


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C and SIGTERM only set a flag, so that every step is completed; yield the function that reads the flag."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping.is_set
        return
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
