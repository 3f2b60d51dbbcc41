"""Training: families of runs as one program, with evaluations, checkpoints, interrupt and resume."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ihbook import clamps as clamping
from ihbook import data, metrics
from ihbook.banks import Bank, load_bank
from ihbook.config import BankConfig, RunConfig
from ihbook.data import Batch
from ihbook.model import Params, Weights, initial_weights, stack

VERSION = 1  # raise it when a change of code changes a run's numbers: stored states of other versions are not read
CHUNK_STEPS = 256  # steps sampled at once; part of what a training stream is, so a change of it changes results
SAVE_SECONDS = 45.0


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
    checkpoints: dict[int, Weights]


@dataclass
class _State:
    """Where a family stands: everything that a resumed run needs. Run axes are over `alive`, indices into the family."""

    step: int
    alive: list[int]
    params: Params
    moments: dict[str, dict[str, Tensor]]  # the optimiser's state, by kind and weight
    metrics: list[tuple] = field(default_factory=list)  # run, sequences, eval_set, metric, value
    heads: list[tuple] = field(default_factory=list)  # run, sequences, layer, head, strength, previous_token
    saved: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)  # (run, sequences) -> weights


def train(runs: Sequence[RunConfig], *, bank: Bank | None = None, directory: str | Path | None = None,
          device: str | torch.device = "cpu", progress: bool = True) -> list[Result]:
    """Train every run from scratch, or from where `directory` says that it stopped; results in the order of `runs`.

    Runs that can share a program train together, with a leading run axis; a run's result does not depend on which
    others are in the call, but for rounding. `bank` serves all runs in place of their own. With a `directory`, state is
    saved there every 45 seconds, and on Ctrl-C or SIGTERM before KeyboardInterrupt is raised; the same call then goes
    on, bit for bit as if it had not stopped, and a finished call returns what it saved. Raises ValueError for a run
    that can't be trained, before any is.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("there are no runs to train; give at least one RunConfig")
    banks: dict[BankConfig, Bank] = {}
    for run in runs:
        if run.bank not in banks:
            banks[run.bank] = bank or load_bank(run.bank)
    prepared = [_Prepared.of(run, banks[run.bank]) for run in runs]
    families: dict[tuple, list[int]] = defaultdict(list)
    for i, each in enumerate(prepared):
        families[each.program].append(i)
    results: list[Result | None] = [None] * len(runs)
    for number, members in enumerate(families.values(), 1):
        title = f"family {number}/{len(families)}" if len(families) > 1 else "training"
        family = [prepared[i] for i in members]
        finished = _train_family(family, Path(directory) if directory else None, device, title if progress else None)
        for i, result in zip(members, finished, strict=True):
            results[i] = result
    return results


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A run with its data and first weights, checked."""

    config: RunConfig
    bank: Bank
    splits: data.Splits
    evals: dict[str, Batch]
    weights: Weights

    @classmethod
    def of(cls, run: RunConfig, bank: Bank) -> _Prepared:
        shape = clamping.Shape(run.model.n_layers, run.model.n_heads, run.task.n_pairs)
        clamping.check(run.clamps, shape)
        splits = data.split(bank, run.task)
        weights = run.initial or initial_weights(run.model, bank.dim, run.task.n_labels, run.init_seed)
        if (weights.config, weights.d_exemplar, weights.n_labels) != (run.model, bank.dim, run.task.n_labels):
            raise ValueError(f"the initial weights are {weights.config} for exemplar dim {weights.d_exemplar} and "
                             f"n_labels={weights.n_labels}; the run is {run.model}, dim {bank.dim}, n_labels="
                             f"{run.task.n_labels}; give weights that match, or none")
        n_positions = 2 * run.task.n_pairs + 1
        if run.model.positions == "learned" and n_positions > run.model.max_positions:
            raise ValueError(f"n_pairs={run.task.n_pairs} makes {n_positions} positions, but max_positions="
                             f"{run.model.max_positions}; raise it")
        evals = (data.evaluation_sets(splits, run.eval_seed, run.eval_size)
                 if run.eval_every or run.heads_every else {})
        return cls(run, bank, splits, evals, weights)

    @property
    def program(self) -> tuple:
        """What runs must have in common to train together."""
        run = self.config
        length = run.n_sequences if run.schedule == "cosine" else None
        return (run.model, run.task.n_pairs, run.task.n_labels, bool(run.task.noise), self.bank.dim, run.batch_size,
                run.optimiser, run.lr, run.warmup, run.schedule, length, run.eval_size, tuple(self.evals))

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


def _train_family(family: list[_Prepared], directory: Path | None, device: str | torch.device,
                  title: str | None) -> list[Result]:
    first = family[0].config
    path = directory / f"{_family_digest(family)}.safetensors" if directory else None
    state = _load(path, family, device) if path else None
    if state is None:
        params = stack([each.weights for each in family], device)
        state = _State(0, list(range(len(family))), params, {})
    last = max(each.config.n_steps for each in family)
    optimiser = _optimiser(state, first)
    schedule = _Schedule(family, device)
    saved_at = time.monotonic()
    total = sum(each.config.n_steps for each in family)
    done = sum(min(state.step, each.config.n_steps) for each in family)
    bar = tqdm(total=total, initial=done, desc=title, disable=title is None, leave=False, unit="run-step", mininterval=0.5)
    with bar, _stop_signals(path is not None) as stopped:
        while True:
            seen = state.step * first.batch_size
            leaving = [r for r in state.alive if family[r].config.n_steps == state.step]
            _record(state, schedule, leaving)
            if leaving:
                _leave(state, optimiser, leaving)
                optimiser = _optimiser(state, first)
            if not state.alive or stopped():
                break
            if path and time.monotonic() - saved_at > SAVE_SECONDS:
                _save(path, state, optimiser)
                saved_at = time.monotonic()
            batch = schedule.batch(state)
            for group in optimiser.param_groups:
                group["lr"] = rate(first, seen)
            losses = _step(state.params, batch, first, schedule.plan(state), optimiser)
            state.step += 1
            bar.update(len(state.alive))
            if state.step % 200 == 0:
                low, high = f"{losses.min():.3f}", f"{losses.max():.3f}"
                bar.set_postfix_str(f"loss {low}" + (f" to {high}" if len(losses) > 1 else ""), refresh=False)
        if path:
            _save(path, state, optimiser)
    if state.step < last:
        raise KeyboardInterrupt(f"stopped at {state.step * first.batch_size} of {last * first.batch_size} sequences; the "
                                f"state is saved in {path}, and the same call goes on from there")
    return [_result(r, each, state) for r, each in enumerate(family)]


def _step(params: Params, batch: Batch, run: RunConfig, plan: clamping.Plan, optimiser: torch.optim.Optimizer) -> Tensor:
    """One optimiser step of every run on its own batch; the losses before it, `[run]`."""
    acts = plan(params, batch, run.model, query_only=True)
    losses = metrics.cross_entropy(acts.logits, batch)
    optimiser.zero_grad()
    losses.sum().backward()  # the runs share no weight, so that the sum's gradient is each run's own
    optimiser.step()
    return losses.detach()


def _optimiser(state: _State, run: RunConfig) -> torch.optim.Optimizer:
    """Adam or SGD over the family's stacked weights, with the state's moments."""
    weights = [p.requires_grad_() for p in state.params.values()]
    if run.optimiser == "sgd" or not weights[0].numel():
        return torch.optim.SGD(weights, lr=run.lr)
    optimiser = torch.optim.Adam(weights, lr=run.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for name, p in state.params.items() if state.moments else []:
        optimiser.state[p] = {"step": torch.tensor(float(state.step)),
                              **{kind: moments[name] for kind, moments in state.moments.items()}}
    return optimiser


def _moments(state: _State, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    if not optimiser.state:
        return {}
    return {kind: {name: optimiser.state[p][kind] for name, p in state.params.items()} for kind in ("exp_avg", "exp_avg_sq")}


def _leave(state: _State, optimiser: torch.optim.Optimizer, leaving: list[int]) -> None:
    """Take runs out of the family's tensors."""
    keep = [i for i, r in enumerate(state.alive) if r not in leaving]
    state.moments = {kind: {name: m[keep] for name, m in moments.items()}
                     for kind, moments in _moments(state, optimiser).items()}
    state.params = {name: p.detach()[keep].clone() for name, p in state.params.items()}
    state.alive = [state.alive[i] for i in keep]


class _Schedule:
    """What a family's steps read: batches, plans and evaluation sets, made when first needed and kept while they last."""

    def __init__(self, family: list[_Prepared], device: str | torch.device):
        self.family, self.device = family, device
        self._chunk: tuple[tuple, Batch] | None = None
        self._plan: tuple[tuple, clamping.Plan] | None = None
        self._evals: dict[str, tuple[list[int], Batch]] = {}

    def batch(self, state: _State) -> Batch:
        """The step's batches, one a run."""
        size = self.family[0].config.batch_size
        number, within = divmod(state.step, CHUNK_STEPS)
        key = (number, *state.alive)
        if self._chunk is None or self._chunk[0] != key:
            chunks = [data.training_batch(self.family[r].splits, self.family[r].config.data_seed, number, CHUNK_STEPS * size)
                      for r in state.alive]
            self._chunk = (key, data.concatenate(chunks).to(self.device))
        chunk = self._chunk[1]
        part = slice(within * size, (within + 1) * size)
        noise = None if chunk.noise is None else chunk.noise[:, part]
        return Batch(chunk.bank, chunk.ids[:, part], chunk.labels[:, part], noise)

    def plan(self, state: _State, runs: list[int] | None = None) -> clamping.Plan:
        """The clamps that hold at this step, of the runs that are alive (or of `runs`, uncached)."""
        first = self.family[0].config
        seen = state.step * first.batch_size
        active = tuple(clamping.active(self.family[r].config.clamps, seen) for r in (runs or state.alive))
        if runs is None and self._plan is not None and self._plan[0] == active:
            return self._plan[1]
        plan = clamping.plan(active, first.model, first.task.n_pairs, device=self.device)
        if runs is None:
            self._plan = (active, plan)
        return plan

    def evals(self, name: str, runs: list[int]) -> Batch:
        """An evaluation set of each of `runs`."""
        if name not in self._evals or self._evals[name][0] != runs:
            batch = data.concatenate([self.family[r].evals[name] for r in runs]).to(self.device)
            self._evals[name] = (runs, batch)
        return self._evals[name][1]


def _record(state: _State, schedule: _Schedule, leaving: list[int]) -> None:
    """Evaluate the runs whose time it is, and keep checkpoints. A resumed run has recorded its last step already."""
    family, step = schedule.family, state.step
    size = family[0].config.batch_size
    seen = step * size
    recorded = {(row[0], row[2]) for row in itertools.takewhile(lambda row: row[1] == seen, reversed(state.metrics))}
    for name in family[0].evals:
        runs = [r for r in state.alive if (r, name) not in recorded
                and (r in leaving or due(family[r].config.eval_every, step, size)
                     or (name == "train" and due(family[r].config.heads_every, step, size)))]
        if not runs:
            continue
        rows = [state.alive.index(r) for r in runs]
        params = state.params if runs == state.alive else {key: p[rows] for key, p in state.params.items()}
        plan = schedule.plan(state, None if runs == state.alive else runs)
        values = metrics.evaluate(params, schedule.evals(name, runs), family[0].config.model, plan, heads=name == "train")
        strength, previous = (values.pop(key, None) for key in ("strength", "previous_token"))
        for i, r in enumerate(runs):
            state.metrics += [(r, seen, name, metric, value[i].item()) for metric, value in values.items()]
            if strength is not None:
                state.heads += [(r, seen, layer, head, strength[i, layer, head].item(), previous[i, layer, head].item())
                                for layer in range(strength.shape[1]) for head in range(strength.shape[2])]
    for i, r in enumerate(state.alive):
        if r in leaving or due(family[r].config.checkpoint_every, step, size):
            state.saved[r, seen] = {name: p[i].detach().cpu().clone() for name, p in state.params.items()}


def _result(r: int, each: _Prepared, state: _State) -> Result:
    weights = {seen: Weights(each.config.model, tensors) for (run, seen), tensors in sorted(state.saved.items(), key=lambda
               item: item[0]) if run == r}
    final = weights[each.config.n_steps * each.config.batch_size]
    columns = ["sequences", "eval_set", "metric", "value"]
    table = pd.DataFrame([row[1:] for row in state.metrics if row[0] == r], columns=columns)
    heads = pd.DataFrame([row[1:] for row in state.heads if row[0] == r],
                         columns=["sequences", "layer", "head", "strength", "previous_token"])
    return Result(each.config, table, heads, final, weights if each.config.checkpoint_every else {})


def _family_digest(family: list[_Prepared]) -> str:
    return hashlib.sha256(json.dumps([VERSION, [each.digest for each in family]]).encode()).hexdigest()[:24]


def _save(path: Path, state: _State, optimiser: torch.optim.Optimizer) -> None:
    """Write the state, whole or not at all."""
    tensors = {f"params/{name}": p.detach() for name, p in state.params.items()}
    for kind, moments in _moments(state, optimiser).items():
        tensors |= {f"{kind}/{name}": m for name, m in moments.items()}
    for (run, seen), weights in state.saved.items():
        tensors |= {f"saved/{run}/{seen}/{name}": w for name, w in weights.items()}
    book = {"step": state.step, "alive": state.alive, "metrics": state.metrics, "heads": state.heads}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: t.contiguous().cpu() for k, t in tensors.items() if t.numel()}, partial,
                  metadata={"state": json.dumps(book)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(f"can't save the training state to {path} ({error}); free space there, make it writable, or choose "
                      "another directory") from error


def _load(path: Path, family: list[_Prepared], device: str | torch.device) -> _State | None:
    """The saved state, or None where there is none. A damaged one is reported, and training starts anew."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            book = json.loads(file.metadata()["state"])
            parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
            saved: dict[tuple[int, int], dict[str, Tensor]] = defaultdict(dict)
            for key in file.keys():  # noqa: SIM118, not a dict
                part, name = key.split("/", 1)
                if part == "saved":
                    run, seen, name = name.split("/", 2)
                    saved[int(run), int(seen)][name] = file.get_tensor(key)
                else:
                    # A copy lies where tensors lie: kernels may round otherwise at another alignment.
                    parts[part][name] = file.get_tensor(key).clone().to(device)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        warnings.warn(f"the saved state {path} is damaged ({error}); training these runs anew", stacklevel=2)
        return None
    names = family[0].weights.tensors  # in the order of the architecture, which files do not keep
    order = {kind: {n: tensors[n] for n in names} for kind, tensors in parts.items()}
    params = order.pop("params", None) or {n: torch.empty(0) for n in names}
    return _State(book["step"], book["alive"], params, order, [tuple(row) for row in book["metrics"]],
                  [tuple(row) for row in book["heads"]], dict(saved))


@contextmanager
def _stop_signals(wanted: bool) -> Iterator[Callable[[], bool]]:
    """While inside, Ctrl-C and SIGTERM only ask to stop, so that no step is left half done."""
    asked = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_directory() -> Path:
    """Where the book keeps its runs: the folder that IHBOOK_STORE names, or the platform's place for user data."""
    return Path(os.environ.get("IHBOOK_STORE") or platformdirs.user_data_dir("ihbook"))


def seeds(run: RunConfig, n: int) -> list[RunConfig]:
    """The run with `n` consecutive init seeds from its own, each with a data stream of its own."""
    return [replace(run, init_seed=run.init_seed + i, data_seed=run.data_seed + i) for i in range(n)]
