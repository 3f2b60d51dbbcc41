"""Training many runs: blocks that share a program, here or in one process a core, under one progress bar."""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import cloudpickle
import torch
from torch import Tensor
from tqdm import tqdm

from ihbook import family as families
from ihbook import step
from ihbook.banks import Bank
from ihbook.config import RunConfig
from ihbook.family import Prepared, Result, prepare

BLOCK = {"cpu": 2, "cuda": 512}  # runs in one program: on a CPU, as many as a core's caches hold
Block = list[tuple[int, Prepared]]  # runs that train as one program, each with its place among those asked for
Job = tuple[list[Prepared], Path]  # a family and its folder


def train(runs: Sequence[RunConfig], *, bank: Bank | None = None, directory: str | Path | None = None,
          device: str | torch.device = "cpu", compile: bool | None = None, progress: bool = True) -> list[Result]:
    """Train every run from scratch, or from where `directory` says that it stopped; results in the order of `runs`.

    Runs that can share a program train together, with a leading run axis; a run's result does not depend on which
    others are in the call, but for rounding. `bank` serves all runs in place of their own. `compile` (default: where it
    pays) compiles the program. With a `directory`, state is saved there every 45 seconds, and on Ctrl-C or SIGTERM
    before KeyboardInterrupt is raised; the same call then goes on, bit for bit as if it had not stopped.
    Raises ValueError for a run that can't be trained, before any is.
    """
    results: list[Result | None] = [None] * len(runs)
    finished_folders = []
    with tempfile.TemporaryDirectory() as temporary:
        blocks = plan_blocks(prepare(runs, bank, device), device)
        for block, folder, finished in train_blocks(blocks, Path(directory or temporary), device, compile, progress):
            for (i, _), result in zip(block, finished, strict=True):
                results[i] = replace(result, checkpoints=dict(result.checkpoints))
            finished_folders.append(folder)
        for folder in finished_folders:  # only now: a call that is stopped must not lose the blocks that it had finished
            shutil.rmtree(folder)
    return results


def plan_blocks(prepared: Sequence[Prepared], device: str | torch.device = "cpu") -> list[Block]:
    """Which runs train as one program, with their places: blocks of those that can, of like length, the longest first.

    On a CPU blocks are small, as many runs as a core's cache holds, and long ones enough for every core to have one.
    """
    groups: dict[tuple, Block] = defaultdict(list)
    for i, each in enumerate(prepared):
        groups[each.program].append((i, each))
    kind = torch.device(device).type
    blocks = []
    for members in groups.values():
        members.sort(key=lambda member: -member[1].config.n_steps)
        n = -(-len(members) // BLOCK[kind])
        if kind == "cpu" and members[0][1].config.n_steps >= step.COMPILE_FROM:
            cores = min(len(members), n_cores())
            n = -(-n // cores) * cores
        even = -(-len(members) // n)
        blocks += [members[start:start + even] for start in range(0, len(members), even)]
    return blocks


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_blocks(blocks: Sequence[Block], directory: Path, device: str | torch.device, compile: bool | None,
                 progress: bool) -> Iterator[tuple[Block, Path, list[Result]]]:
    """Train every block, and yield each with its folder and results as it is finished.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the states are saved; RuntimeError where a process failed.
    """
    jobs = [([each for _, each in block], directory / families.family_digest([each for _, each in block])) for block in blocks]
    total = sum(each.config.n_steps for family, _ in jobs for each in family)
    bar = tqdm(total=total, desc=f"{sum(map(len, blocks))} runs", disable=not progress, leave=False, unit="run-step",
               mininterval=0.5 if sys.stderr.isatty() else 3.0, smoothing=0.05)

    def report(run_steps: int, losses: tuple[float, float] | None) -> None:
        if losses:
            low, high = (f"{loss:.3f}" for loss in losses)
            bar.set_postfix_str(f"loss {low}" + (f" to {high}" if low != high else ""), refresh=False)
        bar.update(run_steps)

    finished = 0
    with bar, _stop_signals() as stopped:
        for i in _in_turn(jobs, device, compile, stopped, report):
            family, folder = jobs[i]
            yield blocks[i], folder, families.train_family(family, folder, device, compile=False)  # reads what is finished
            finished += 1
    if finished < len(jobs):
        raise KeyboardInterrupt(f"stopped; the state is saved in {directory}, and the same call goes on from there")


def _in_turn(jobs: Sequence[Job], device: str | torch.device, compile: bool | None, stopped: Callable[[], bool],
             report: Callable) -> Iterator[int]:
    """Train the jobs; yields the place of each that is finished, and ends early where `stopped` says so."""
    long = [i for i, (family, _) in enumerate(jobs) if max(each.config.n_steps for each in family) >= step.COMPILE_FROM]
    n = min(len(long), n_cores()) if torch.device(device).type == "cpu" else 1
    if n > 1:
        yield from _in_processes(jobs, long, n, compile, stopped, report)
    for i in range(len(jobs)):
        if not (n > 1 and i in long) and not stopped():
            family, folder = jobs[i]
            if families.train_family(family, folder, device, compile, stopped=stopped, report=_range(report)) is not None:
                yield i


def _range(report: Callable) -> Callable[[int, Tensor | None], None]:
    """`report` with the lowest and highest of the losses."""
    return lambda run_steps, losses: report(run_steps, None if losses is None else (losses.min().item(), losses.max().item()))


def _in_processes(jobs: Sequence[Job], long: list[int], n: int, compile: bool | None, stopped: Callable[[], bool],
                  report: Callable) -> Iterator[int]:
    """Share `long` among `n` processes, each keeping its compiled programs from job to job."""
    shares: list[list[int]] = [[] for _ in range(n)]
    for i in sorted(long, key=lambda i: -_run_steps(jobs[i])):
        min(shares, key=lambda share: sum(_run_steps(jobs[j]) for j in share)).append(i)
    messages: queue.Queue = queue.Queue()
    with ExitStack() as stack:
        processes = [stack.enter_context(_process([(i, *jobs[i]) for i in share], compile, messages)) for share in shares]
        running = len(processes)
        while running:
            if stopped():
                for process in processes:
                    process.stdin.close()  # a process that finds its standard input closed saves its state and ends
            try:
                kind, value = messages.get(timeout=0.2)
            except queue.Empty:
                continue
            if kind == "done":
                yield value
            elif kind == "progress":
                report(*value)
            elif kind == "failed":
                raise value
            else:
                running -= 1


def _run_steps(job: Job) -> int:
    return sum(each.config.n_steps for each in job[0])


@contextmanager
def _process(share: list, compile: bool | None, messages: queue.Queue) -> Iterator[subprocess.Popen]:
    """A process that trains a share of the jobs, and a thread that passes on what it says. It never outlives this one."""
    process = subprocess.Popen([sys.executable, "-m", "ihbook.train"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    settings = (sys.path, families.SAVE_SECONDS, step.COMPILE_FROM)

    def listen() -> None:
        try:
            process.stdin.write(pickle.dumps(settings) + cloudpickle.dumps((share, compile)))
            process.stdin.flush()
            while True:
                messages.put(pickle.load(process.stdout))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            code = process.wait()
            if code:
                messages.put(("failed", RuntimeError(f"a training process ended with status {code}; what it last saved is kept, "
                                                     "and the same call goes on from there")))
            messages.put(("ended", None))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield process
    finally:
        if not process.stdin.closed:
            process.stdin.close()
        process.wait()
        thread.join()


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """While inside, Ctrl-C and SIGTERM only ask to stop, so that no step is left half done."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main() -> None:
    """The other end of `_process`."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # only messages go to the pipe
    sys.path[:], families.SAVE_SECONDS, step.COMPILE_FROM = pickle.load(sys.stdin.buffer)
    share, compile = pickle.load(sys.stdin.buffer)
    closed = threading.Event()

    def wait_for_the_end() -> None:
        os.read(0, 1)  # nothing more is ever sent: this returns when the other end closes, or dies
        closed.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    lock, done, last = threading.Lock(), 0, time.monotonic()

    def say(kind: str, value: object) -> None:
        with lock:
            pickle.dump((kind, value), out)
            out.flush()

    def report(run_steps: int, losses: tuple[float, float] | None) -> None:
        nonlocal done, last
        done += run_steps
        if time.monotonic() - last > 0.5 and losses:
            say("progress", (done, losses))
            done, last = 0, time.monotonic()

    for i, family, folder in share:
        try:
            if families.train_family(family, folder, "cpu", compile, stopped=closed.is_set, report=_range(report)) is None:
                return
        except (OSError, ValueError) as error:
            say("failed", error)
            return
        say("progress", (done, None))
        done = 0
        say("done", i)


def seeds(run: RunConfig, n: int) -> list[RunConfig]:
    """The run with `n` consecutive init seeds from its own, each with a data stream of its own."""
    return [replace(run, init_seed=run.init_seed + i, data_seed=run.data_seed + i) for i in range(n)]


if __name__ == "__main__":
    _main()
