"""Runs with their data and first weights, checked; and the keys that say which runs can train together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from ihbook import engine, task
from ihbook.banks import load_bank
from ihbook.clamps import Clamp, Shape, Write, compose
from ihbook.config import BankConfig, RunConfig
from ihbook.metrics import check_names
from ihbook.model import Source, Weights, initial_weights
from ihbook.task import Bank, Batch, Splits


def check_device(device: str | torch.device) -> None:
    """Raise ValueError for a device that this machine does not have."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known; choose 'cpu' or 'cuda'") from error
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if str(chosen) not in ["cpu", *(["cuda"] if gpus else []), *gpus]:
        raise ValueError(f"device={device!r} is not at hand on this machine; choose {' or '.join(['cpu', *gpus])}")


def prepare(runs: Sequence[RunConfig], bank: Bank | None = None, device: str | torch.device = "cpu") -> list[Prepared]:
    """Load the data and the first weights of runs, and check them; `bank` replaces the banks of all. Raises ValueError for a run
    that can't be trained, TypeError for a run without a digest, and what `load_bank` raises."""
    if isinstance(runs, RunConfig):
        raise ValueError("runs is one RunConfig; give a list of them, [run]")
    if not runs:
        raise ValueError("there are no runs to train; give at least one RunConfig")
    if bank is not None and not isinstance(bank, Bank):
        raise ValueError(f"bank is a {type(bank).__name__}; ihbook.from_array makes a Bank of an array")
    check_device(device)
    banks: dict[BankConfig, Bank] = {}
    for run in runs:
        if run.bank not in banks:
            banks[run.bank] = bank or load_bank(run.bank)
    split, evaluation_sets = cache(task.split), cache(task.evaluation_sets)  # runs share one copy of what they have in common
    return [Prepared.of(run, banks[run.bank], split, evaluation_sets) for run in runs]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run with its data and first weights, checked. `digest` names the run on this bank."""

    run: RunConfig
    bank: Bank
    splits: Splits
    eval_sets: dict[str, Batch]
    weights: Weights
    digest: str

    @classmethod
    def of(cls, run: RunConfig, bank: Bank, split: Callable[..., Splits] = task.split,
           evaluation_sets: Callable[..., dict[str, Batch]] = task.evaluation_sets) -> Prepared:
        splits = split(bank, run.task)
        weights = run.initial or initial_weights(run.model, bank.dim, run.task.n_labels, run.init_seed)
        if (weights.config.architecture, weights.d_exemplar, weights.n_labels) != (
                run.model.architecture, bank.dim, run.task.n_labels):
            raise ValueError(f"the initial weights are {weights.config} for exemplar dim {weights.d_exemplar} and "
                             f"n_labels={weights.n_labels}; the run is {run.model}, dim {bank.dim}, n_labels="
                             f"{run.task.n_labels}; give weights that match, or none")
        if any(tensor.dtype != torch.float32 for tensor in weights.tensors.values()):
            raise ValueError("the initial weights are not float32, as runs are; give Weights of tensors made so by .float()")
        compose.check(run.clamps, shape_of(run), weights)
        if run.model.positions == "learned" and shape_of(run).n_positions > run.model.max_positions:
            raise ValueError(f"n_pairs={run.task.n_pairs} makes {shape_of(run).n_positions} positions, but max_positions="
                             f"{run.model.max_positions}; raise it")
        check_names(run.metrics)
        eval_sets = (evaluation_sets(splits, run.eval_seed, run.eval_size, run.eval_sets)
                     if run.eval_every or run.heads_every else {})
        return cls(run, bank, splits, eval_sets, weights, f"{run.digest}-{bank.digest[:16]}")

    @property
    def family_key(self) -> tuple:
        """What runs must have in common to train as one family."""
        run = self.run
        length = run.n_sequences if run.schedule == "cosine" else None
        return (run.model, run.task.n_pairs, run.task.n_labels, bool(run.task.noise), self.bank.dim, run.batch_size,
                run.optimiser, run.lr, run.warmup, run.schedule, length, run.eval_size, tuple(self.eval_sets), run.metrics)

    @cached_property
    def clamp_signatures(self) -> dict[frozenset, tuple[Clamp, ...]]:
        """The lists of clamps that hold at some time, keyed by what a program is compiled for (`clamp_signature`)."""
        held = [compose.active(self.run.clamps, at) for at in [0, *compose.edges(self.run.clamps)]]
        return {clamp_signature(clamps, shape_of(self.run)): clamps for clamps in held}

    @property
    def extra_pass_key(self) -> frozenset:
        """The keys of `clamp_signatures` if a clamp needs an extra pass, so that such runs are grouped apart; otherwise empty."""
        extra = any(getattr(compose.bare(clamp), "extra_pass", False) for clamp in self.run.clamps)
        return frozenset(self.clamp_signatures) if extra else frozenset()

    @property
    def compile_key(self) -> tuple:
        """What runs with one `family_key` must also have in common to use one compiled program, which is made for fixed sizes."""
        return self.extra_pass_key, self.run.task, self.bank.digest

    @property
    def drawn_bank(self) -> bool:
        """Whether another process can draw this bank from the run; it can't draw a bank that the caller gave."""
        return self.run.bank.name in ("glyphs", "gaussian", "onehot") and self.bank is load_bank(self.run.bank)


def shape_of(run: RunConfig) -> Shape:
    """The sizes that a run's clamps need."""
    return Shape(run.model.n_layers, run.model.n_heads, run.task.n_pairs)


def clamp_signature(clamps: Sequence[Clamp], shape: Shape) -> frozenset:
    """The part of a run's clamps that a program is made for: sites, manner and sources. Entries and numbers are data."""

    def term_of(write: Write, coefficient: Tensor, source: Source | None) -> tuple:
        return source, *coefficient.shape[write.where.ndim:]

    return frozenset((w.name, w.layer, w.how, tuple(term_of(w, torch.as_tensor(number), source) for number, source in w.terms
                                                    if torch.as_tensor(number).any()))
                     for clamp in clamps for w in clamp.writes(shape))


def family_digest(family: Sequence[Prepared]) -> str:
    """The name of a family's folder: 24 hex digits of its runs, their banks and `engine.VERSION`."""
    return hashlib.sha256(json.dumps([engine.VERSION, [prepared.digest for prepared in family]]).encode()).hexdigest()[:24]
