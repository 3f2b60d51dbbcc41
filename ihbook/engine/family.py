"""The training loop of a family: batches, clamps, steps, and evaluations when they are due; it can stop, be saved, and resume."""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ihbook import metrics, task
from ihbook.clamps import Clamp, compose
from ihbook.config import RunConfig
from ihbook.engine.checkpoints import save_weights
from ihbook.engine.compiled import program_for
from ihbook.engine.prepared import Prepared
from ihbook.engine.results import Result, metric_names, result_of, rows_of
from ihbook.engine.state import FamilyState, leave, load_state, save_state
from ihbook.engine.step import Program, initial_moments, scalars_of
from ihbook.model import FEW, Weights, stack
from ihbook.task import Batch

CHUNK_STEPS = 256  # steps sampled at once; it is part of the training stream, so changing it changes results
EVAL_CHUNK = 250  # sequences evaluated at once, per run
SAVE_SECONDS = 45.0


def rate(run: RunConfig, sequences: int) -> float:
    """The learning rate of the step that starts at `sequences` seen: linear warm-up, then constant or cosine to 0."""
    if sequences < run.warmup:
        return run.lr * (sequences + run.batch_size) / (run.warmup + run.batch_size)
    if run.schedule == "constant":
        return run.lr
    done = (sequences - run.warmup) / max(1, run.n_sequences - run.warmup)
    return run.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def due(every: int, steps_done: int, batch_size: int) -> bool:
    """Whether `steps_done` is the first number of steps at or past a multiple of `every` sequences seen; 0 means never."""
    seen = steps_done * batch_size
    return bool(every) and (steps_done == 0 or seen // every > (seen - batch_size) // every)


def train_family(family: Sequence[Prepared], folder: Path, device: str | torch.device = "cpu", compile: bool = False, *,
                 compile_with: Sequence[Sequence[Clamp]] = (), stopped: Callable[[], bool] = lambda: False,
                 report: Callable[[int, Tensor | None], None] = lambda run_steps, losses: None) -> list[Result] | None:
    """Train a family (runs with one `family_key`) as one program; return the results, or None if it was stopped.

    `folder` keeps the state, from which a call resumes, and the checkpoints, which the results read. The program also serves the
    clamps in `compile_with` (`compose.make_plan`). `stopped` is asked between steps; if true, the state is saved. `report` gets
    the run-steps since its last call and the losses (nats) of the runs alive. Raises OSError where `folder` can't be written.
    """
    first = family[0].run
    state = load_state(folder, family, device)
    if state is None:
        params = stack([prepared.weights for prepared in family], device)
        state = FamilyState(0, list(range(len(family))), params, initial_moments(params, first))
    n_steps = [prepared.run.n_steps for prepared in family]
    report(sum(min(state.steps_done, n) for n in n_steps), None)
    program = program_for(compile, device)
    schedule = Schedule(family, device, program, compile_with)
    saved_at = time.monotonic()
    with _alone_on(device):
        if state.steps_done < max(n_steps) and not stopped():  # first, so that two processes compile a program each
            batch, scalars = schedule.batch(state)
            program.prepare(state.params, state.moments, batch, schedule.plan(state), first.model, scalars)
        while state.alive:
            leaving = [r for r in state.alive if n_steps[r] == state.steps_done]
            if not leaving and stopped():  # before an evaluation, which may have to be compiled
                save_state(folder, state)
                break
            _record(state, schedule, leaving, folder)
            if leaving:
                leave(state, leaving)
            if not state.alive:
                save_state(folder, state)
                break
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save_state(folder, state)
                saved_at = time.monotonic()
            batch, scalars = schedule.batch(state)
            losses = program.step(state.params, state.moments, batch, schedule.plan(state), first.model, scalars)
            state.steps_done += 1
            report(len(state.alive), losses)
    return None if state.alive else [result_of(r, prepared, state, folder) for r, prepared in enumerate(family)]


class Schedule:
    """What a family's steps read: batches, plans and evaluation sets. Each is made when first needed and kept while valid."""

    def __init__(self, family: Sequence[Prepared], device: str | torch.device, program: Program,
                 compile_with: Sequence[Sequence[Clamp]] = ()):
        self.family, self.device, self.program = family, device, program
        self.compile_with = compile_with
        self._chunk: tuple[tuple, list[Batch], list[Tensor]] | None = None
        self._plan: tuple[tuple, compose.Plan] | None = None
        self._eval_sets: dict[str, tuple[list[int], Batch]] = {}
        runs = [prepared.run for prepared in family]
        self.bank_sizes = {batch.bank.shape[1] for prepared in family for batch in prepared.eval_sets.values()}
        self.rhythms = {every for run in runs for every in (run.eval_every, run.heads_every, run.checkpoint_every) if every}
        self.edges = sorted({edge for run in runs for edge in compose.edges(run.clamps)})

    def batch(self, state: FamilyState) -> tuple[Batch, Tensor]:
        """The step's batch, with the sequences of every run alive, and the optimiser's scalars (`step.scalars_of`)."""
        run = self.family[0].run
        chunk, within = divmod(state.steps_done, CHUNK_STEPS)
        key = (chunk, *state.alive)
        if self._chunk is None or self._chunk[0] != key:
            whole = task.concatenate([task.training_batch(self.family[r].splits, self.family[r].run.data_seed, chunk,
                                                          CHUNK_STEPS * run.batch_size) for r in state.alive]).to(self.device)
            steps = range(chunk * CHUNK_STEPS, (chunk + 1) * CHUNK_STEPS)
            scalars = scalars_of([rate(run, i * run.batch_size) for i in steps], steps, self.device)
            self._chunk = (key, whole.split(run.batch_size), list(scalars))
        return self._chunk[1][within], self._chunk[2][within]

    def plan(self, state: FamilyState, some: list[int] | None = None) -> compose.Plan:
        """The plan of the clamps that hold at this step, for the runs alive (or for the runs `some`; that is not cached)."""
        first = self.family[0].run
        seen = state.steps_done * first.batch_size
        key = (bisect_right(self.edges, seen), *state.alive)
        if some is None and self._plan is not None and self._plan[0] == key:
            return self._plan[1]
        active = tuple(compose.active(self.family[r].run.clamps, seen) for r in (some or state.alive))
        plan = compose.make_plan(active, first.model, first.task.n_pairs, compile_with=self.compile_with, device=self.device)
        if some is None:
            self._plan = (key, plan)
        return plan

    def eval_set(self, name: str, some: list[int]) -> Batch:
        """The evaluation set `name` of each run in `some`, as one batch."""
        if name not in self._eval_sets or self._eval_sets[name][0] != some:
            batch = task.concatenate([self.family[r].eval_sets[name] for r in some])
            n = batch.bank.shape[1]
            most = max([size for size in self.bank_sizes if n <= size <= FEW], default=n)  # banks of one size share a program
            batch = replace(batch, bank=torch.nn.functional.pad(batch.bank, (0, 0, 0, most - n)))
            self._eval_sets[name] = (some, batch.to(self.device))
        return self._eval_sets[name][1]


def _record(state: FamilyState, schedule: Schedule, leaving: list[int], folder: Path) -> None:
    """Evaluate the runs that are due, and save their checkpoints. What a resumed run has recorded is not evaluated again."""
    family, first = schedule.family, schedule.family[0].run
    size, model, names = first.batch_size, first.model, metric_names(first)
    if not leaving and not any(due(every, state.steps_done, size) for every in schedule.rhythms):
        return
    seen = state.steps_done * size
    recorded = {(int(row[0]), int(row[2])) for rows in itertools.takewhile(lambda rows: rows[0, 1] == seen, reversed(state.metrics))
                for row in rows}
    for number, name in enumerate(family[0].eval_sets):
        some = [r for r in state.alive if (r, number) not in recorded
                and (r in leaving or due(family[r].run.eval_every, state.steps_done, size)
                     or (name == "train" and due(family[r].run.heads_every, state.steps_done, size)))]
        if not some:
            continue
        rows = [state.alive.index(r) for r in some]
        params = state.params if some == state.alive else {key: p[rows] for key, p in state.params.items()}
        plan = schedule.plan(state, None if some == state.alive else some)
        values = metrics.evaluate(params, schedule.eval_set(name, some), model, plan, first.metrics, chunk=EVAL_CHUNK,
                                  summed=schedule.program.evaluate)
        values = {metric: value.cpu() for metric, value in values.items()}
        state.metrics.append(rows_of(some, seen, [[number], range(len(names))], torch.stack([values[name] for name in names], 1)))
        if name == "train":
            state.heads.append(rows_of(some, seen, [range(model.n_layers), range(model.n_heads)], values["strength"],
                                       values["previous_token"]))
    for i, r in enumerate(state.alive):
        checkpoints = ["final"] * (r in leaving)
        every = family[r].run.checkpoint_every
        if due(every, state.steps_done, size) or (r in leaving and every):
            checkpoints.append(str(seen))
        for name in checkpoints:
            weights = Weights(model, {key: p[i] for key, p in state.params.items()})
            place = f"run-{r}/{name}.safetensors"
            save_weights(weights, folder / place)
            state.checkpoints[place] = weights.content_digest


@contextmanager
def _alone_on(device: str | torch.device) -> Iterator[None]:
    """Make PyTorch compute on this GPU, or on one core: tensors this small gain nothing from a second core, and on a busy machine
    threads that wait for each other at every operation are ten times slower."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
