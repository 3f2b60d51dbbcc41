"""A family of runs as one program: its state, evaluations and checkpoints; it stops, is saved, and goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ihbook import compose, data, metrics, step
from ihbook.banks import Bank, load_bank
from ihbook.clamps import Clamp, Graft, Preserve, Shape
from ihbook.config import BankConfig, RunConfig
from ihbook.data import Batch
from ihbook.model import FEW, Params, Weights, initial_weights, load_weights, save_weights, stack

VERSION = 5  # raise it when a change of code changes a run's numbers: what other versions stored is not read
CHUNK_STEPS = 256  # steps sampled at once; part of what a training stream is, so a change of it changes results
EVAL_CHUNK = 250  # sequences evaluated at once, of every run
SAVE_SECONDS = 45.0


class Checkpoints(Mapping[int, Weights]):
    """A run's weights by sequences seen, read from a folder when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, sequences: int) -> Weights:
        if sequences not in set(self):
            raise KeyError(f"no checkpoint at {sequences} sequences; there are {sorted(self)}")
        return load_weights(self.folder / f"{sequences}.safetensors")

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(p.stem) for p in self.folder.glob("[0-9]*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. Tables are tidy; `sequences` counts the sequences seen.

    `metrics`: sequences, eval_set, metric, value (see `metrics.query_metrics`). `heads`: sequences, layer, head,
    strength, previous_token, on the `train` evaluation set. `checkpoints`: weights by sequences seen.
    """

    config: RunConfig
    metrics: pd.DataFrame
    heads: pd.DataFrame
    weights: Weights
    checkpoints: Mapping[int, Weights]


@dataclass
class _State:
    """Where a family stands: everything that a resumed run needs. Run axes are over `alive`, indices into the family."""

    step: int
    alive: list[int]
    params: Params
    moments: step.Moments
    metrics: list[Tensor] = field(default_factory=list)  # float64 [row, 5]: run, sequences, eval_set, metric, value
    heads: list[Tensor] = field(default_factory=list)  # float64 [row, 6]: run, sequences, layer, head, strength, previous_token


def check_device(device: str | torch.device) -> None:
    """Raise ValueError for a device that is not at hand."""
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known; choose 'cpu' or 'cuda'") from error
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if str(asked) not in ["cpu", *(["cuda"] if gpus else []), *gpus]:
        raise ValueError(f"device={device!r} is not at hand on this machine; choose {' or '.join(['cpu', *gpus])}")


def prepare(runs: Sequence[RunConfig], bank: Bank | None = None, device: str | torch.device = "cpu") -> list[Prepared]:
    """Runs with their data and first weights. Raises ValueError for one that can't be trained."""
    if not runs:
        raise ValueError("there are no runs to train; give at least one RunConfig")
    check_device(device)
    banks: dict[BankConfig, Bank] = {}
    for run in runs:
        if run.bank not in banks:
            banks[run.bank] = bank or load_bank(run.bank)
    splits, evals = _shared(data.split), _shared(data.evaluation_sets)
    return [Prepared.of(run, banks[run.bank], splits, evals) for run in runs]


def _shared(function: Callable) -> Callable:
    """`function`, which gives the same object for the same arguments: what runs share is then stored and computed once."""
    made: dict[tuple, object] = {}

    def call(first: object, *rest: object) -> object:
        key = id(first), *rest
        if key not in made:
            made[key] = first, function(first, *rest)  # `first` is kept, so that no other object can have its id
        return made[key][1]

    return call


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run with its data and first weights, checked."""

    config: RunConfig
    bank: Bank
    splits: data.Splits
    evals: dict[str, Batch]
    weights: Weights

    @classmethod
    def of(cls, run: RunConfig, bank: Bank, split: Callable = data.split,
           evaluation_sets: Callable = data.evaluation_sets) -> Prepared:
        shape = Shape(run.model.n_layers, run.model.n_heads, run.task.n_pairs)
        splits = split(bank, run.task)
        weights = run.initial or initial_weights(run.model, bank.dim, run.task.n_labels, run.init_seed)
        if (weights.config, weights.d_exemplar, weights.n_labels) != (run.model, bank.dim, run.task.n_labels):
            raise ValueError(f"the initial weights are {weights.config} for exemplar dim {weights.d_exemplar} and "
                             f"n_labels={weights.n_labels}; the run is {run.model}, dim {bank.dim}, n_labels="
                             f"{run.task.n_labels}; give weights that match, or none")
        if any(tensor.dtype != torch.float32 for tensor in weights.tensors.values()):
            raise ValueError("the initial weights are not float32, as runs are; give Weights of tensors made so by .float()")
        compose.check(run.clamps, shape, weights)
        n_positions = 2 * run.task.n_pairs + 1
        if run.model.positions == "learned" and n_positions > run.model.max_positions:
            raise ValueError(f"n_pairs={run.task.n_pairs} makes {n_positions} positions, but max_positions="
                             f"{run.model.max_positions}; raise it")
        evals = (evaluation_sets(splits, run.eval_seed, run.eval_size)
                 if run.eval_every or run.heads_every else {})
        return cls(run, bank, splits, evals, weights)

    @property
    def program(self) -> tuple:
        """What runs must have in common to train together."""
        run = self.config
        length = run.n_sequences if run.schedule == "cosine" else None
        return (run.model, run.task.n_pairs, run.task.n_labels, bool(run.task.noise), self.bank.dim, run.batch_size,
                run.optimiser, run.lr, run.warmup, run.schedule, length, run.eval_size, tuple(self.evals))

    @cached_property
    def forms(self) -> dict[frozenset, tuple[Clamp, ...]]:
        """The clamps that hold at one time or another, by what a compiled program is made for (`compose.signature`)."""
        run = self.config
        shape = Shape(run.model.n_layers, run.model.n_heads, run.task.n_pairs)
        held = [compose.active(run.clamps, at) for at in [0, *compose.edges(run.clamps)]]
        return {compose.signature(clamps, shape): clamps for clamps in held}

    @property
    def passes(self) -> frozenset:
        """`forms` where clamps need a further pass of a network, which other runs should not pay for; else nothing."""
        further = any(isinstance(compose.bare(clamp), (Graft, Preserve)) for clamp in self.config.clamps)
        return frozenset(self.forms) if further else frozenset()

    @property
    def sizes(self) -> tuple:
        """What runs of one `program` must also have in common to use one compiled program, which is made for passes and sizes."""
        return self.passes, self.config.task, self.bank.digest

    @property
    def drawn_bank(self) -> bool:
        """Whether another process would draw the same bank from the config, which a bank of the caller's own may not be."""
        return self.config.bank.name in ("glyphs", "gaussian", "onehot") and self.bank is load_bank(self.config.bank)

    @property
    def digest(self) -> str:
        return f"{self.config.digest}-{self.bank.digest[:16]}"


def rate(run: RunConfig, sequences: int) -> float:
    """The learning rate of the step that starts at `sequences` seen: linear warm-up, then constant or cosine to 0."""
    if sequences < run.warmup:
        return run.lr * (sequences + run.batch_size) / (run.warmup + run.batch_size)
    if run.schedule == "constant":
        return run.lr
    done = (sequences - run.warmup) / max(1, run.n_sequences - run.warmup)
    return run.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def due(every: int, step: int, batch_size: int) -> bool:
    """Whether `step` is the first at or past a multiple of `every` sequences seen."""
    seen = step * batch_size
    return bool(every) and (step == 0 or seen // every > (seen - batch_size) // every)


def train_family(family: Sequence[Prepared], folder: Path, device: str | torch.device = "cpu", compile: bool = False, *,
                 also: Sequence[Sequence[Clamp]] = (), stopped: Callable[[], bool] = lambda: False,
                 report: Callable[[int, Tensor | None], None] = lambda run_steps, losses: None) -> list[Result] | None:
    """Train a block of `train.plan_blocks` as one program. `folder` keeps its state and its checkpoints, which results read.

    Its program is made for the clamps in `also` too (`compose.plan`). `stopped` is asked between steps; where it says so,
    the state is saved and None returned. `report` is told the run-steps done since it was last told, and the step's losses,
    of the runs that are left. Raises OSError where `folder` can't be written.
    """
    first = family[0].config
    state = _load(folder, family, device)
    if state is None:
        params = stack([each.weights for each in family], device)
        state = _State(0, list(range(len(family))), params, step.moments_of(params, first))
    n_steps = [each.config.n_steps for each in family]
    report(sum(min(state.step, n) for n in n_steps), None)
    program = step.program(compile, device)
    schedule = _Schedule(family, device, program, also)
    saved_at = time.monotonic()
    with _alone_on(device):
        while state.alive:
            leaving = [r for r in state.alive if n_steps[r] == state.step]
            _record(state, schedule, leaving, folder)
            if leaving:
                _leave(state, leaving)
            if not state.alive or stopped():
                _save(folder, state)
                break
            if time.monotonic() - saved_at > SAVE_SECONDS:
                _save(folder, state)
                saved_at = time.monotonic()
            batch, scalars = schedule.batch(state)
            losses = program.train(state.params, state.moments, batch, schedule.plan(state), first.model, scalars)
            state.step += 1
            report(len(state.alive), losses)
    return None if state.alive else [_result(r, each, state, folder) for r, each in enumerate(family)]


def _leave(state: _State, leaving: list[int]) -> None:
    """Take runs out of the family's tensors."""
    keep = [i for i, r in enumerate(state.alive) if r not in leaving]
    state.moments = {kind: {name: m[keep] for name, m in moments.items()} for kind, moments in state.moments.items()}
    state.params = {name: p[keep] for name, p in state.params.items()}
    state.alive = [state.alive[i] for i in keep]


class _Schedule:
    """What a family's steps read: batches, plans and evaluation sets, made when first needed and kept while they last."""

    def __init__(self, family: Sequence[Prepared], device: str | torch.device, program: step.Program,
                 also: Sequence[Sequence[Clamp]] = ()):
        self.family, self.device, self.program = family, device, program
        self.also = also
        self._chunk: tuple[tuple, list[Batch], list[Tensor]] | None = None
        self._plan: tuple[tuple, compose.Plan] | None = None
        self._evals: dict[str, tuple[list[int], Batch]] = {}
        configs = [each.config for each in family]
        self.sizes = {batch.bank.shape[1] for each in family for batch in each.evals.values()}
        self.rhythms = {every for c in configs for every in (c.eval_every, c.heads_every, c.checkpoint_every) if every}
        self.edges = sorted({edge for c in configs for edge in compose.edges(c.clamps)})

    def batch(self, state: _State) -> tuple[Batch, Tensor]:
        """The step's batches, one a run, and the optimiser's scalars (`step.scalars_of`)."""
        run = self.family[0].config
        number, within = divmod(state.step, CHUNK_STEPS)
        key = (number, *state.alive)
        if self._chunk is None or self._chunk[0] != key:
            whole = data.concatenate([data.training_batch(self.family[r].splits, self.family[r].config.data_seed, number,
                                                          CHUNK_STEPS * run.batch_size) for r in state.alive]).to(self.device)
            steps = range(number * CHUNK_STEPS, (number + 1) * CHUNK_STEPS)
            scalars = step.scalars_of([rate(run, i * run.batch_size) for i in steps], steps, self.device)
            self._chunk = (key, whole.split(run.batch_size), list(scalars))
        return self._chunk[1][within], self._chunk[2][within]

    def plan(self, state: _State, runs: list[int] | None = None) -> compose.Plan:
        """The clamps that hold at this step, of the runs that are alive (or of `runs`, uncached)."""
        first = self.family[0].config
        seen = state.step * first.batch_size
        key = (bisect_right(self.edges, seen), *state.alive)
        if runs is None and self._plan is not None and self._plan[0] == key:
            return self._plan[1]
        active = tuple(compose.active(self.family[r].config.clamps, seen) for r in (runs or state.alive))
        plan = compose.plan(active, first.model, first.task.n_pairs, also=self.also, device=self.device)
        if runs is None:
            self._plan = (key, plan)
        return plan

    def evals(self, name: str, runs: list[int]) -> Batch:
        """An evaluation set of each of `runs`."""
        if name not in self._evals or self._evals[name][0] != runs:
            batch = data.concatenate([self.family[r].evals[name] for r in runs])
            n = batch.bank.shape[1]
            most = max([size for size in self.sizes if n <= size <= FEW], default=n)  # for banks of one size, one program
            batch = replace(batch, bank=torch.nn.functional.pad(batch.bank, (0, 0, 0, most - n)))
            self._evals[name] = (runs, batch.to(self.device))
        return self._evals[name][1]


def _record(state: _State, schedule: _Schedule, leaving: list[int], folder: Path) -> None:
    """Evaluate the runs whose time it is, and keep checkpoints. A resumed run has recorded its last step already."""
    family, model = schedule.family, schedule.family[0].config.model
    size = family[0].config.batch_size
    if not leaving and not any(due(every, state.step, size) for every in schedule.rhythms):
        return
    seen = state.step * size
    recorded = {(int(row[0]), int(row[2])) for rows in itertools.takewhile(lambda rows: rows[0, 1] == seen, reversed(state.metrics))
                for row in rows}
    for number, name in enumerate(family[0].evals):
        runs = [r for r in state.alive if (r, number) not in recorded
                and (r in leaving or due(family[r].config.eval_every, state.step, size)
                     or (name == "train" and due(family[r].config.heads_every, state.step, size)))]
        if not runs:
            continue
        rows = [state.alive.index(r) for r in runs]
        params = state.params if runs == state.alive else {key: p[rows] for key, p in state.params.items()}
        plan = schedule.plan(state, None if runs == state.alive else runs)
        values = metrics.evaluate(params, schedule.evals(name, runs), model, plan, chunk=EVAL_CHUNK,
                                  summed=schedule.program.evaluate)
        values = {metric: value.cpu() for metric, value in values.items()}
        table = torch.stack([values[name] for name in metrics.NAMES], 1)
        state.metrics.append(_rows(runs, seen, [[number], range(len(metrics.NAMES))], table))
        if name == "train":
            state.heads.append(_rows(runs, seen, [range(model.n_layers), range(model.n_heads)], values["strength"],
                                     values["previous_token"]))
    for i, r in enumerate(state.alive):
        names = ["final"] * (r in leaving)
        if due(family[r].config.checkpoint_every, state.step, size) or (r in leaving and family[r].config.checkpoint_every):
            names.append(str(seen))
        for name in names:
            weights = Weights(model, {key: p[i] for key, p in state.params.items()})
            with writing(folder / f"run-{r}" / f"{name}.safetensors") as partial:
                save_weights(weights, partial)


def _rows(runs: Sequence[int], seen: int, axes: Sequence[Sequence[int]], *values: Tensor) -> Tensor:
    """Rows of a table, float64: for every run and combination of `axes`, these numbers and each of `values` `[run, *axes]`."""
    keys = torch.cartesian_prod(*(torch.tensor(list(axis)) for axis in (runs, [seen], *axes)))
    return torch.cat([keys.double(), *(v.flatten()[:, None].double() for v in values)], 1)


def _table(blocks: list[Tensor], r: int, columns: list[str], names: Mapping[str, list[str]]) -> pd.DataFrame:
    """One run's rows as a tidy table: whole numbers as such, and names for the numbers in the columns of `names`."""
    rows = torch.cat([torch.empty(0, len(columns) + 1, dtype=torch.float64), *blocks])
    table = pd.DataFrame(rows[rows[:, 0] == r][:, 1:].numpy(), columns=columns)
    whole = [c for c in columns if c in ("sequences", "eval_set", "metric", "layer", "head")]
    table[whole] = table[whole].astype("int64")
    return table.assign(**{column: table[column].map(dict(enumerate(of))).astype("str") for column, of in names.items()})


def _result(r: int, each: Prepared, state: _State, folder: Path) -> Result:
    table = _table(state.metrics, r, ["sequences", "eval_set", "metric", "value"],
                   {"eval_set": list(each.evals), "metric": list(metrics.NAMES)})
    heads = _table(state.heads, r, ["sequences", "layer", "head", "strength", "previous_token"], {})
    checkpoints = Checkpoints(folder / f"run-{r}")
    return Result(each.config, table, heads, load_weights(checkpoints.folder / "final.safetensors"), checkpoints)


def announce(family: Sequence[Prepared], folder: Path, compile: bool) -> None:
    """Write down, before it trains, what a family is, so that a call that goes on goes on with the same one."""
    with writing(folder / "family.json") as partial:
        partial.write_text(json.dumps({"runs": [each.digest for each in family], "compile": compile}))


def family_digest(family: Sequence[Prepared]) -> str:
    """Names a family's folder: the same runs on the same banks, trained by the same version."""
    return hashlib.sha256(json.dumps([VERSION, [each.digest for each in family]]).encode()).hexdigest()[:24]


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, moved there when done; OSError says the remedy, and nothing is left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise OSError(f"can't write {path} ({error}); free space there, make it writable, or choose another directory "
                      "(IHBOOK_STORE names the book's)") from error


def _save(folder: Path, state: _State) -> None:
    """Write the state, whole or not at all."""
    tensors = {f"params/{name}": p for name, p in state.params.items() if state.alive}
    for kind, moments in state.moments.items():
        tensors |= {f"{kind}/{name}": m for name, m in moments.items() if state.alive}
    for table in ("metrics", "heads"):
        if rows := getattr(state, table):
            tensors[f"tables/{table}"] = torch.cat(rows)
    tensors = {key: t.contiguous().cpu() for key, t in tensors.items()} or {"none": torch.zeros(1)}
    with writing(folder / "state.safetensors") as partial:
        save_file(tensors, partial, metadata={"step": str(state.step), "alive": json.dumps(state.alive)})


def _load(folder: Path, family: Sequence[Prepared], device: str | torch.device) -> _State | None:
    """The saved state, or None where there is none. A damaged one is reported, and training starts anew."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            step, alive = int(file.metadata()["step"]), json.loads(file.metadata()["alive"])
            parts: dict[str, Params] = defaultdict(dict)
            for key in sorted(set(file.keys()) - {"none"}):
                part, name = key.split("/", 1)
                # A copy lies where tensors lie: kernels may round otherwise at another alignment.
                parts[part][name] = file.get_tensor(key).clone().to("cpu" if part == "tables" else device)
        tables = {name: list(rows.split(_runs_of_equal(rows[:, 1]))) for name, rows in parts.pop("tables", {}).items()}
        names = family[0].weights.tensors if alive else ()  # in the order of the architecture, which files do not keep
        parts = {part: {name: tensors[name] for name in names} for part, tensors in parts.items()}
        return _State(step, alive, parts.pop("params", {}), parts, **tables)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        warnings.warn(f"the saved state {path} is damaged ({error}); training these runs anew", stacklevel=2)
        return None


def _runs_of_equal(x: Tensor) -> list[int]:
    """The lengths of the stretches of equal numbers in `x`."""
    return torch.unique_consecutive(x, return_counts=True)[1].tolist()


@contextmanager
def _alone_on(device: str | torch.device) -> Iterator[None]:
    """While inside, PyTorch computes on this GPU, or on one core: tensors this small gain nothing from a second, and threads that
    wait for each other at every operation are ten times slower on a machine that has other work."""
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
