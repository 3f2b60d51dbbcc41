"""Sequences of the in-context classification task: splits, sampling, evaluation sets, the complete enumeration (chapter 1)."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ihbook.banks import Bank
from ihbook.config import TaskConfig

EVAL_SETS = ("train", "test_relabel", "test_exemplars", "test_classes")
MAX_LABEL_SETS = 100_000


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences for several runs. The last id is the query, and the last label its right answer, never shown as a token.

    `bank` `[run or 1, n, dim]` holds exemplar features; `ids` `[run, batch, pair + 1]` (int64) point into it;
    `labels` `[run, batch, pair + 1]` (int64); `noise` None or `[run, batch, pair + 1, dim]`, added to the features.
    """

    bank: Tensor
    ids: Tensor
    labels: Tensor
    noise: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.bank, self.ids, self.labels, *([] if self.noise is None else [self.noise])]

    def filled(self, tensors: Iterator[Tensor]) -> Batch:
        """A batch that holds the next of `tensors` instead."""
        return Batch(*(next(tensors) for _ in self.tensors))

    @property
    def exemplars(self) -> Tensor:
        """Features `[run, batch, pair + 1, dim]`."""
        if len(self.bank) == 1:
            features = self.bank[0][self.ids]
        else:
            features = torch.stack([bank[ids] for bank, ids in zip(self.bank, self.ids, strict=True)])
        return features if self.noise is None else features + self.noise

    @property
    def targets(self) -> Tensor:
        """The query's right label, `[run, batch]`."""
        return self.labels[:, :, -1]

    @property
    def in_context(self) -> Tensor:
        """Whether each context label is the right one, bool `[run, batch, pair]`."""
        return self.labels[:, :, :-1] == self.labels[:, :, -1:]

    def __len__(self) -> int:
        return self.ids.shape[1]

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of at most `size` sequences."""
        return [Batch(self.bank, self.ids[:, i:i + size], self.labels[:, i:i + size],
                      None if self.noise is None else self.noise[:, i:i + size]) for i in range(0, len(self), size)]

    def expand(self, n_runs: int) -> Batch:
        """The same sequences for each of `n_runs` runs (views, from a batch of one run)."""
        noise = None if self.noise is None else self.noise.expand(n_runs, -1, -1, -1)
        return Batch(self.bank, self.ids.expand(n_runs, -1, -1), self.labels.expand(n_runs, -1, -1), noise)

    def to(self, device: str | torch.device) -> Batch:
        noise = None if self.noise is None else self.noise.to(device)
        return Batch(self.bank.to(device), self.ids.to(device), self.labels.to(device), noise)


def from_exemplars(exemplars: Tensor, labels: Tensor) -> Batch:
    """A batch for one run from features `[batch, pair + 1, dim]` and labels `[batch, pair + 1]`."""
    if exemplars.ndim != 3 or labels.shape != exemplars.shape[:2]:
        raise ValueError(f"exemplars {tuple(exemplars.shape)} and labels {tuple(labels.shape)} do not match; they must "
                         "be [batch, pair + 1, dim] and [batch, pair + 1]")
    ids = torch.arange(labels.numel()).view(1, *labels.shape)
    return Batch(exemplars.flatten(0, 1)[None], ids, labels.long()[None])


def concatenate(batches: list[Batch]) -> Batch:
    """Batches of one run each, as one batch of many runs; a bank they share is stored once."""
    shared = all(b.bank is batches[0].bank for b in batches)
    if shared:
        bank = batches[0].bank
    else:  # runs with smaller banks are padded: their ids never reach the padding
        longest = max(b.bank.shape[1] for b in batches)
        bank = torch.cat([torch.nn.functional.pad(b.bank, (0, 0, 0, longest - b.bank.shape[1])) for b in batches])
    noise = [b.noise for b in batches]
    return Batch(bank, torch.cat([b.ids for b in batches]), torch.cat([b.labels for b in batches]),
                 None if noise[0] is None else torch.cat(noise))


@dataclass(frozen=True, eq=False)
class Splits:
    """What trains and what is held out. Ids point into the flattened bank: class · n_exemplars + exemplar.

    `train_sets` and `test_sets` `[set, way]` are label sets, `*_ids` `[class, exemplar]`.
    """

    task: TaskConfig
    features: Tensor
    train_ids: Tensor
    exemplar_ids: Tensor
    class_ids: Tensor
    train_sets: Tensor
    test_sets: Tensor

    @cached_property
    def train_bank(self) -> Tensor:
        """`[1, n_classes, dim]`: the exemplars that train, one tensor that batches share."""
        return self.features[self.train_ids[:, 0]][None]


def split(bank: Bank, task: TaskConfig) -> Splits:
    """First classes train, last are test; exemplar 0 trains, the others are held out; label sets by `label_sets`.

    Raises ValueError where the bank is too small.
    """
    needed = task.n_classes + task.n_test_classes
    if needed > bank.n_classes:
        raise ValueError(f"n_classes={task.n_classes} and n_test_classes={task.n_test_classes} need {needed} classes, but the "
                         f"bank {bank.metadata.get('name', '')!r} has {bank.n_classes}; with it n_classes can be at most "
                         f"{bank.n_classes - task.n_test_classes}")
    ids = torch.arange(bank.n_classes * bank.n_exemplars).view(bank.n_classes, bank.n_exemplars)
    train, test = label_sets(task)
    return Splits(task, bank.features.flatten(0, 1), ids[:task.n_classes, :1], ids[:task.n_classes, 1:],
                  ids[-task.n_test_classes:, :1], train, test)


def label_sets(task: TaskConfig) -> tuple[Tensor, Tensor]:
    """Training and held-out label sets, int64 `[set, way]`, every label being in some training set.

    Raises ValueError where there are too many sets to list, or none of the sizes asked for has every label.
    """
    n_sets = math.comb(task.n_labels, task.n_ways)
    if n_sets > MAX_LABEL_SETS:
        raise ValueError(f"n_labels={task.n_labels} in sets of {task.n_ways} make {n_sets} label sets, more than "
                         f"{MAX_LABEL_SETS}; lower n_labels or n_pairs, or raise burstiness")
    every = list(itertools.combinations(range(task.n_labels), task.n_ways))
    if task.label_sets is not None:
        chosen = set(task.label_sets)
        train = [group for group in every if group in chosen]
        test = [group for group in every if group not in chosen]
    else:
        n_train = n_sets - round(task.held_out * n_sets)
        if n_train * task.n_ways < task.n_labels:
            raise ValueError(f"held_out={task.held_out} leaves {n_train} of {n_sets} label sets to train, too few to show "
                             f"all of n_labels={task.n_labels}; lower held_out")
        generator = seeded("label sets", task.label_seed)
        for _ in range(1000):
            order = [every[i] for i in torch.randperm(n_sets, generator=generator)]
            train, test = sorted(order[:n_train]), sorted(order[n_train:])
            if len(set().union(*train)) == task.n_labels:
                break
    if task.label_sets is not None and (missing := set(range(task.n_labels)) - set().union(*train)):
        raise ValueError(f"label_sets has no set with the labels {sorted(missing)} of n_labels={task.n_labels}; add one, or lower "
                         "n_labels")
    if len(set().union(*train)) < task.n_labels:
        raise ValueError(f"n_labels={task.n_labels} can't be split with held_out={task.held_out} and label_seed="
                         f"{task.label_seed} so that every label trains; lower held_out")
    return (torch.tensor(train).view(-1, task.n_ways), torch.tensor(test, dtype=torch.long).view(-1, task.n_ways))


def seeded(*key: str | int) -> torch.Generator:
    """A generator of its own for each key, so that no stream depends on another, or on where a run was resumed."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample(splits: Splits, n: int, generator: torch.Generator, *, exemplars: Tensor | None = None,
           sets: Tensor | None = None) -> Batch:
    """Draw `n` sequences for one run, `[1, n, pair + 1]`; the default is a training batch.

    `exemplars` `[class, exemplar]` are the ids to draw from, and become the batch's bank; `sets` `[set, way]` the label
    sets. Classes have probability ∝ rank^-zipf, in the order of `exemplars`; pairs come in random order; the query is
    of a random pair's class, its exemplar drawn afresh.
    """
    task = splits.task
    exemplars = splits.train_ids if exemplars is None else exemplars
    sets = splits.train_sets if sets is None else sets
    ways, copies = task.n_ways, task.burstiness
    n_classes = len(exemplars)
    if task.zipf:
        weights = torch.arange(1, n_classes + 1, dtype=torch.float64) ** -task.zipf
        classes = torch.multinomial(weights.expand(n, -1), ways, generator=generator)  # the most frequent come first
        classes = classes.gather(1, torch.rand(n, ways, generator=generator).argsort(1))
    else:
        classes = torch.randint(0, n_classes, (n, ways), generator=generator)
        for way in range(1, ways):  # a uniform draw among those not yet taken, without a permutation of every class
            classes[:, way] = torch.randint(0, n_classes - way, (n,), generator=generator)
            for taken in classes[:, :way].sort(1).values.unbind(1):
                classes[:, way] += classes[:, way] >= taken
    labels = sets[torch.randint(0, len(sets), (n,), generator=generator)]
    labels = labels.gather(1, torch.rand(n, ways, generator=generator).argsort(1))
    slots = torch.arange(ways).repeat_interleave(copies).expand(n, -1)
    if copies > 1:
        slots = slots.gather(1, torch.rand(n, ways * copies, generator=generator).argsort(1))
    query = slots.gather(1, torch.randint(0, task.n_pairs, (n, 1), generator=generator))
    slots = torch.cat([slots, query], 1)
    which = torch.randint(0, exemplars.shape[1], slots.shape, generator=generator)
    ids = classes.gather(1, slots) * exemplars.shape[1] + which
    noise = None
    if task.noise:
        noise = task.noise * torch.randn(1, *ids.shape, splits.features.shape[1], generator=generator)
    return Batch(splits.features[exemplars.flatten()][None], ids[None], labels.gather(1, slots)[None], noise)


def training_batch(splits: Splits, data_seed: int, chunk: int, n: int) -> Batch:
    """Chunk number `chunk` of a run's training stream, `n` sequences: a pure function of its arguments."""
    batch = sample(splits, n, seeded("train", data_seed, chunk))
    return Batch(splits.train_bank, batch.ids, batch.labels, batch.noise)


def evaluation_sets(splits: Splits, eval_seed: int, size: int = 1000) -> dict[str, Batch]:
    """The four fixed sets of `size` sequences, for one run. Sets that the split leaves empty are left out:
    `test_relabel` where no labels are held out, `test_exemplars` where a class has one exemplar."""
    sources = {
        "train": (splits.train_ids, splits.train_sets),
        "test_relabel": (splits.train_ids, splits.test_sets),
        "test_exemplars": (splits.exemplar_ids, splits.train_sets),
        "test_classes": (splits.class_ids, splits.train_sets),
    }
    return {name: sample(splits, size, seeded(name, eval_seed), exemplars=exemplars, sets=sets)
            for name, (exemplars, sets) in sources.items() if exemplars.numel() and len(sets)}


def every_training_sequence(splits: Splits) -> Batch:
    """All distinct training sequences of a two-pair task, once each: C·(C−1)·2·sets·2 (78,400 for C=50, L=5).

    Raises ValueError for other tasks, whose sequences are too many to list.
    """
    task = splits.task
    if task.n_pairs != 2 or task.noise:
        raise ValueError(f"n_pairs={task.n_pairs}, noise={task.noise}: only noiseless sequences of 2 pairs are "
                         "enumerated; draw a sample with `ihbook.data.sample` instead")
    classes = torch.tensor(list(itertools.permutations(range(task.n_classes), 2)))
    labels = torch.cat([splits.train_sets, splits.train_sets.flip(1)])
    a, b, query = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in (len(classes), len(labels), 2)),
                                                       indexing="ij"))
    slots = torch.stack([torch.zeros_like(query), torch.ones_like(query), query], 1)
    return Batch(splits.train_bank, classes[a].gather(1, slots)[None], labels[b].gather(1, slots)[None])
