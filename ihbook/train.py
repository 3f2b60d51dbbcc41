"""Training many runs: blocks that share a program, here or in one process a core, under one progress bar."""

from __future__ import annotations

import itertools
import json
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
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import cloudpickle
import torch
from torch import Tensor
from tqdm import tqdm

from ihbook import family as families
from ihbook import folders, spread
from ihbook.banks import Bank
from ihbook.clamps import Clamp
from ihbook.config import RunConfig
from ihbook.family import Prepared, Result, prepare
from ihbook.step import BLOCK, COMPILE_FROM, PLAIN_BLOCK

if TYPE_CHECKING:
    from distributed import Client

COMPILING = 40_000  # run-steps that a core trains in the time in which it compiles a program
SHARE_FROM = 6_000  # run-steps in all: a process takes some seconds to start


@dataclass(frozen=True, eq=False)
class Block:
    """Runs that train as one program, compiled or not, and their places among those asked for. `also`: see `train_family`."""

    family: list[Prepared]
    places: list[int]
    compile: bool
    also: tuple[tuple[Clamp, ...], ...] = ()

    @property
    def run_steps(self) -> int:
        return sum(each.config.n_steps for each in self.family)

    def folder(self, directory: Path) -> Path:
        return directory / families.family_digest(self.family)


def train(runs: Sequence[RunConfig], *, bank: Bank | None = None, directory: str | Path | None = None,
          device: str | torch.device = "cpu", compile: bool | None = None, progress: bool = True,
          executor: Client | None = None) -> list[Result]:
    """Train every run from scratch, or from where `directory` says that it stopped; results in the order of `runs`.

    Runs that can share a program train together, with a leading run axis; a run's result does not depend on which
    others are in the call, but for rounding. `bank` serves all runs in place of their own. `compile` (default: where it
    pays) compiles the program, or on a GPU captures its steps. With a `directory`, state is saved there every 45 seconds, and
    on Ctrl-C or SIGTERM before KeyboardInterrupt is raised; the same call then goes on, bit for bit as if it had not stopped.
    With a Dask client as `executor` (`spread.connect`), its workers train the runs instead, on the devices that they have, and
    what they send back is verified; `store.fetch` keeps such runs as they come.

    Raises ValueError for a run that can't be trained, before any is; OSError where a folder can't be written or a cluster is lost.
    """
    if executor is not None and directory is not None:
        raise ValueError(f"directory={str(directory)!r} with an executor: workers save no state there; leave one out, or use "
                         "store.fetch, which keeps what workers have finished")
    results: list[Result | None] = [None] * len(runs)
    prepared = prepare(runs, bank, device)
    with tempfile.TemporaryDirectory() as temporary:
        if executor is not None:
            for i, files in spread.train(executor, prepared, progress):
                folder = Path(temporary) / str(i)
                folders.unpack(files, folder, prepared[i])
                result = folders.read(folder, runs[i])
                results[i] = replace(result, checkpoints=dict(result.checkpoints))
            return results
        folder = Path(directory or temporary)
        blocks = plan_blocks(prepared, folder, device, compile)
        try:
            for block, finished in train_blocks(blocks, folder, device, progress):
                for i, result in zip(block.places, finished, strict=True):
                    results[i] = replace(result, checkpoints=dict(result.checkpoints))
        except KeyboardInterrupt:
            if directory is None:
                raise KeyboardInterrupt("stopped, and nothing is kept; a call with a directory, or store.fetch, goes on") from None
            raise
        for block in blocks:  # only now: a call that is stopped must not lose the blocks that it had finished
            shutil.rmtree(block.folder(folder))
    return results


def plan_blocks(prepared: Sequence[Prepared], directory: Path, device: str | torch.device = "cpu",
                compile: bool | None = None, asked: Sequence[Prepared] = ()) -> list[Block]:
    """Which runs train as one program: those that a stopped call left in `directory` as it had them, and of the others,
    blocks of runs that can, of like length, the longest first; compiled where it pays, or as `compile` says.

    On a CPU blocks are small, and no core is left without one. One compiled program serves all clamps that runs with one
    `program` have among `asked` (default: `prepared`), but for those that need further passes. Blocks of one compiled program
    come one after the other.
    """
    kind = torch.device(device).type
    forms: dict[tuple, dict[frozenset, tuple]] = defaultdict(dict)
    for each in asked or prepared:
        forms[each.program, each.passes] |= each.forms
    waiting = dict(enumerate(prepared))
    stopped = list(_stopped(waiting, directory, compile))
    work: dict[tuple, int] = defaultdict(int)
    for each in waiting.values():
        work[each.program] += each.config.n_steps
    compiled = {program: n >= COMPILE_FROM[kind] if compile is None else compile for program, n in work.items()}
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, each in waiting.items():
        apart = (each.sizes if kind == "cpu" else each.sizes[:1]) if compiled[each.program] else ()
        groups[each.program, *apart].append(i)
    size = {program: PLAIN_BLOCK if kind == "cpu" and not compiled[program] else BLOCK[kind] for program in work}
    n_blocks = len(stopped) + sum(-(-len(members) // size[program]) for (program, *_), members in groups.items())
    planned = []
    for (program, *_), members in groups.items():
        members.sort(key=lambda i: -prepared[i].config.n_steps)
        n = -(-len(members) // size[program])
        if kind == "cpu" and work[program] >= SHARE_FROM and (n_blocks < n_cores() or not compiled[program]):
            cores = min(len(members), n_cores())  # an equal share each
            n = -(-n // cores) * cores
        even = -(-len(members) // n)
        planned += [(members[start:start + even], compiled[program]) for start in range(0, len(members), even)]
    blocks = [Block([prepared[i] for i in places], places, compile) for places, compile in [*stopped, *planned]]
    if kind != "cpu":
        return blocks
    return [replace(block, also=tuple(forms[block.family[0].program, block.family[0].passes].values())) if block.compile else block
            for block in blocks]


def _stopped(waiting: dict[int, Prepared], directory: Path, compile: bool | None) -> Iterator[tuple[list[int], bool]]:
    """The places of the blocks that a stopped call announced in `directory`, all of whose runs are `waiting`, where they are
    taken out; and whether they are compiled."""
    for path in sorted(directory.glob("*/family.json")):
        try:
            book = json.loads(path.read_text())
            wanted, was_compiled = list(book["runs"]), bool(book["compile"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one: its runs are planned, and trained, anew
        places: list[int] = []
        for digest in wanted:
            places += [i for i, each in waiting.items() if each.digest == digest and i not in places][:1]
        block = Block([waiting[i] for i in places], places, was_compiled)
        if places and len(places) == len(wanted) and block.folder(directory) == path.parent:
            for i in places:
                del waiting[i]
            yield places, was_compiled if compile is None else compile


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_blocks(blocks: Sequence[Block], directory: Path, device: str | torch.device,
                 progress: bool) -> Iterator[tuple[Block, list[Result]]]:
    """Train every block, and yield each with its results as it is finished; its folder in `directory` is the caller's then.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the states are saved; RuntimeError where a process failed.
    """
    for block in blocks:
        families.announce(block.family, block.folder(directory), block.compile)
    with ExitStack() as stack:
        screen = stack.enter_context(_screen())
        bar = stack.enter_context(tqdm(
            total=sum(block.run_steps for block in blocks), desc=f"{sum(len(block.family) for block in blocks)} runs",
            disable=not progress, leave=False, unit="run-step", smoothing=0.05, file=screen,
            mininterval=0.5 if screen.isatty() else 5.0))

        def report(run_steps: int, losses: tuple[float, float] | None) -> None:
            if losses:
                low, high = (f"{loss:.3f}" for loss in losses)
                bar.set_postfix_str(f"loss {low}" + (f" to {high}" if low != high else ""), refresh=False)
            bar.update(run_steps)

        finished = 0
        stopped = stack.enter_context(_stop_signals())
        for block in _in_turn(blocks, directory, device, stopped, report):
            yield block, families.train_family(block.family, block.folder(directory), device)  # reads what is finished
            finished += 1
    if finished < len(blocks):
        raise KeyboardInterrupt(f"stopped; the state is saved in {directory}, and the same call goes on from there")


@contextmanager
def _screen() -> Iterator[TextIO]:
    """Where progress is shown: standard error, or what a build of the book names, whose notebooks' own goes unseen."""
    path = os.environ.get("IHBOOK_PROGRESS")
    if not path:
        yield sys.stderr
        return
    with open(path, "a") as file:
        yield file


def _in_turn(blocks: Sequence[Block], directory: Path, device: str | torch.device, stopped: Callable[[], bool],
             report: Callable) -> Iterator[Block]:
    """Train the blocks; yields each that is finished, and ends early where `stopped` says so."""
    n = min(len(blocks), n_cores())
    if torch.device(device).type == "cpu" and n > 1 and sum(block.run_steps for block in blocks) >= SHARE_FROM:
        yield from _in_processes(blocks, directory, n, stopped, report)
        return
    for block in blocks:
        if not stopped() and families.train_family(block.family, block.folder(directory), device, block.compile, stopped=stopped,
                                                   also=block.also, report=_range(report)) is not None:
            yield block


def _range(report: Callable) -> Callable[[int, Tensor | None], None]:
    """`report` now and then with the lowest and highest of the losses, which a GPU is not asked for at every step."""
    calls = itertools.count()

    def told(run_steps: int, losses: Tensor | None) -> None:
        now = losses is not None and next(calls) % 200 == 0
        report(run_steps, (losses.min().item(), losses.max().item()) if now else None)

    return told


def _in_processes(blocks: Sequence[Block], directory: Path, n: int, stopped: Callable[[], bool],
                  report: Callable) -> Iterator[Block]:
    """Share the blocks among `n` processes, each keeping its compiled programs from block to block."""
    shares = _shares(blocks, n)
    messages: queue.Queue = queue.Queue()
    with ExitStack() as stack:
        processes = [stack.enter_context(_process([(i, blocks[i]) for i in share], directory, messages))
                     for share in shares if share]
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
                yield blocks[value]
            elif kind == "progress":
                report(*value)
            elif kind == "failed":
                raise value
            else:
                running -= 1


def _shares(blocks: Sequence[Block], n: int) -> list[list[int]]:
    """Indices of `blocks` in at most `n` stretches, the longest of them as short as can be. Neighbours may have a compiled program
    in common, which every stretch compiles once."""

    def stretches(limit: int) -> list[list[int]]:
        shares, work, programs = [[]], 0, set()
        for i, block in enumerate(blocks):
            first = block.family[0]
            program = (first.program, *first.sizes) if block.compile else None
            cost = block.run_steps + COMPILING * (program not in {None, *programs})
            if shares[-1] and work + cost > limit:
                shares.append([])
                work, programs, cost = 0, set(), block.run_steps + COMPILING * block.compile
            shares[-1].append(i)
            work += cost
            programs.add(program)
        return shares

    longest = sum(block.run_steps + COMPILING for block in blocks)
    return stretches(bisect_left(range(longest), True, key=lambda limit: len(stretches(limit)) <= n))


@contextmanager
def _process(share: list[tuple[int, Block]], directory: Path, messages: queue.Queue) -> Iterator[subprocess.Popen]:
    """A process that trains a share of the blocks, and a thread that passes on what it says. It never outlives this one."""
    process = subprocess.Popen([sys.executable, "-m", "ihbook.train"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    settings = (sys.path, families.SAVE_SECONDS)

    def listen() -> None:
        try:
            process.stdin.write(pickle.dumps(settings) + cloudpickle.dumps((share, directory)))
            process.stdin.flush()
            while True:
                messages.put(pickle.load(process.stdout))
        except Exception as error:  # the end of its messages, or one that can't be read: either way it is not listened to again
            process.stdout.close()
            if code := process.wait():
                why = "" if isinstance(error, EOFError) else f", and what it said can't be read ({error})"
                messages.put(("failed", RuntimeError(f"a training process ended with status {code}{why}; a call with a directory, "
                                                     "or store.fetch, goes on from what it last saved")))
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
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # only messages go to the pipe, whatever else prints
    sys.path[:], families.SAVE_SECONDS = pickle.load(sys.stdin.buffer)
    share, directory = pickle.load(sys.stdin.buffer)
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

    for i, block in share:
        try:
            if families.train_family(block.family, block.folder(directory), "cpu", block.compile, also=block.also,
                                     stopped=closed.is_set, report=_range(report)) is None:
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
