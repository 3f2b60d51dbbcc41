"""The in-context classification task: banks of characters, splits, sequences, evaluation sets (chapter 1; §2 of the paper)."""

from __future__ import annotations

import hashlib
import itertools
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ihbook.checks import one_of
from ihbook.config import TaskConfig

MAX_LABEL_SETS = 100_000


@dataclass(frozen=True, eq=False)
class Bank:
    """Characters as features, float32 `[class, exemplar, dim]`, and as images, uint8 `[class, exemplar, 28, 28]` (ink 255 on 0)
    or None. `metadata` is JSON data that says where the bank came from and how its features were made."""

    features: Tensor
    images: Tensor | None
    metadata: dict

    @cached_property
    def digest(self) -> str:
        """The sha256 of the features' shape and bytes, in hex."""
        return hashlib.sha256(repr(tuple(self.features.shape)).encode() + self.features.contiguous().numpy().tobytes()).hexdigest()

    def __repr__(self) -> str:
        return f"Bank({self.metadata.get('name', '')!r}, {self.n_classes} classes × {self.n_exemplars} exemplars × {self.dim})"

    @property
    def n_classes(self) -> int:
        return self.features.shape[0]

    @property
    def n_exemplars(self) -> int:
        return self.features.shape[1]

    @property
    def dim(self) -> int:
        return self.features.shape[2]


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences for several runs. The last id is the query. The last label is its right answer, which is never shown as a token.

    `bank` `[run or 1, n, dim]` holds exemplar features. `ids` `[run, batch, pair + 1]` (int64) point into it. `labels` are int64
    `[run, batch, pair + 1]`. `noise`, which may be None, is `[run, batch, pair + 1, dim]` and is added to the features.
    """

    bank: Tensor
    ids: Tensor
    labels: Tensor
    noise: Tensor | None = None

    @property
    def exemplars(self) -> Tensor:
        """Features of exemplars and query, noise included, `[run, batch, pair + 1, dim]`."""
        if len(self.bank) == 1:
            features = self.bank[0][self.ids]
        else:
            features = torch.stack([bank[ids] for bank, ids in zip(self.bank, self.ids, strict=True)])
        return features if self.noise is None else features + self.noise

    @property
    def targets(self) -> Tensor:
        """The query's right label, int64 `[run, batch]`."""
        return self.labels[:, :, -1]

    @property
    def in_context(self) -> Tensor:
        """Whether each context label is the right one, bool `[run, batch, pair]`."""
        return self.labels[:, :, :-1] == self.labels[:, :, -1:]

    def __len__(self) -> int:
        return self.ids.shape[1]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(self.bank, change(self.ids), change(self.labels), None if self.noise is None else change(self.noise))

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of at most `size` sequences."""
        parts = [x.split(size, 1) for x in (self.ids, self.labels, *([] if self.noise is None else [self.noise]))]
        return [Batch(self.bank, *part) for part in zip(*parts, strict=True)]

    def expand(self, n_runs: int) -> Batch:
        """The same sequences for each of `n_runs` runs, as views of a batch of one run."""
        return self._each(lambda x: x.expand(n_runs, *x.shape[1:]))

    def to(self, device: str | torch.device) -> Batch:
        return replace(self._each(lambda x: x.to(device)), bank=self.bank.to(device))


def from_exemplars(exemplars: Tensor, labels: Tensor) -> Batch:
    """A batch for one run. Raises ValueError unless the shapes are `[batch, pair + 1, dim]` and `[batch, pair + 1]`."""
    if exemplars.ndim != 3 or labels.shape != exemplars.shape[:2]:
        raise ValueError(f"exemplars {tuple(exemplars.shape)} and labels {tuple(labels.shape)} do not match; they must "
                         "be [batch, pair + 1, dim] and [batch, pair + 1]")
    ids = torch.arange(labels.numel()).view(1, *labels.shape)
    return Batch(exemplars.flatten(0, 1)[None], ids, labels.long()[None])


def concatenate(batches: list[Batch]) -> Batch:
    """One batch of many runs from batches of one run each; a bank that they share is stored once."""
    shared = all(b.bank is batches[0].bank for b in batches)
    if shared:
        bank = batches[0].bank
    else:  # smaller banks are padded; no id points into the padding
        longest = max(b.bank.shape[1] for b in batches)
        bank = torch.cat([torch.nn.functional.pad(b.bank, (0, 0, 0, longest - b.bank.shape[1])) for b in batches])
    noise = [b.noise for b in batches]
    return Batch(bank, torch.cat([b.ids for b in batches]), torch.cat([b.labels for b in batches]),
                 None if noise[0] is None else torch.cat(noise))


@dataclass(frozen=True, eq=False)
class Splits:
    """What trains and what is held out. `features` `[id, dim]` is the flattened bank, where an id is class · n_exemplars +
    exemplar. The `*_ids` `[class, exemplar]` point into it; `train_sets` and `test_sets` `[set, way]` are sets of labels."""

    task: TaskConfig
    features: Tensor
    train_ids: Tensor
    exemplar_ids: Tensor
    class_ids: Tensor
    train_sets: Tensor
    test_sets: Tensor

    @cached_property
    def train_bank(self) -> Tensor:
        """The exemplars that train, `[1, n_classes, dim]`: one tensor that all training batches share."""
        return self.features[self.train_ids[:, 0]][None]


def split(bank: Bank, task: TaskConfig) -> Splits:
    """The first classes train, and the last ones test. Exemplar 0 trains, and the others are held out. `label_sets` splits the
    labels. Raises ValueError where the bank is too small, or where `label_sets` does."""
    if (needed := task.n_classes + task.n_test_classes) > bank.n_classes:
        most = bank.n_classes - task.n_test_classes
        remedy = (f"n_classes can be at most {most}" if most >= task.n_ways else
                  f"lower n_test_classes, such as n_classes={bank.n_classes // 2}, n_test_classes={bank.n_classes // 2}")
        raise ValueError(f"n_classes={task.n_classes} and n_test_classes={task.n_test_classes} need {needed} classes, but the "
                         f"bank {bank.metadata.get('name', '')!r} has {bank.n_classes}; with it {remedy}")
    ids = torch.arange(bank.n_classes * bank.n_exemplars).view(bank.n_classes, bank.n_exemplars)
    train, test = label_sets(task)
    return Splits(task, bank.features.flatten(0, 1), ids[:task.n_classes, :1], ids[:task.n_classes, 1:],
                  ids[-task.n_test_classes:, :1], train, test)


def label_sets(task: TaskConfig) -> tuple[Tensor, Tensor]:
    """Training and held-out label sets, int64 `[set, way]`; every label is in some training set. Raises ValueError where there
    are too many sets to list, or where no split with the sizes asked for trains every label."""
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
    """A random generator that `key` alone decides, so that no stream depends on another or on where a run was resumed."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample(splits: Splits, n: int, generator: torch.Generator, *, ids: Tensor | None = None,
           label_sets: Tensor | None = None) -> Batch:
    """Draw `n` sequences for one run, `[1, n, pair + 1]`; the default is a training batch.

    `ids` `[class, exemplar]` are the exemplars to draw from and become the batch's bank. `label_sets` `[set, way]` are the label
    sets to draw from. Classes are drawn without replacement, with weights rank^-zipf in the order of `ids`. Pairs come in random
    order. The query has the class of a random pair. Each exemplar is drawn afresh, so the query may repeat one of the context.
    """
    task = splits.task
    ids = splits.train_ids if ids is None else ids
    label_sets = splits.train_sets if label_sets is None else label_sets
    ways, copies = task.n_ways, task.burstiness
    n_classes = len(ids)
    if task.zipf:
        weights = torch.arange(1, n_classes + 1, dtype=torch.float64) ** -task.zipf
        classes = torch.multinomial(weights.expand(n, -1), ways, generator=generator)  # frequent classes tend to come first
        classes = classes.gather(1, torch.rand(n, ways, generator=generator).argsort(1))
    else:
        classes = torch.randint(0, n_classes, (n, ways), generator=generator)
        for way in range(1, ways):  # uniform over the classes not yet taken, without permuting every class
            classes[:, way] = torch.randint(0, n_classes - way, (n,), generator=generator)
            for taken in classes[:, :way].sort(1).values.unbind(1):
                classes[:, way] += classes[:, way] >= taken
    labels = label_sets[torch.randint(0, len(label_sets), (n,), generator=generator)]
    labels = labels.gather(1, torch.rand(n, ways, generator=generator).argsort(1))
    slots = torch.arange(ways).repeat_interleave(copies).expand(n, -1)
    if copies > 1:
        slots = slots.gather(1, torch.rand(n, ways * copies, generator=generator).argsort(1))
    query = slots.gather(1, torch.randint(0, task.n_pairs, (n, 1), generator=generator))
    slots = torch.cat([slots, query], 1)
    which = torch.randint(0, ids.shape[1], slots.shape, generator=generator)
    drawn = classes.gather(1, slots) * ids.shape[1] + which
    noise = None
    if task.noise:
        noise = task.noise * torch.randn(1, *drawn.shape, splits.features.shape[1], generator=generator)
    return Batch(splits.features[ids.flatten()][None], drawn[None], labels.gather(1, slots)[None], noise)


def training_batch(splits: Splits, data_seed: int, chunk: int, n: int) -> Batch:
    """Chunk number `chunk` of a run's training stream, `n` sequences; it depends on these arguments alone."""
    batch = sample(splits, n, seeded("train", data_seed, chunk))
    return Batch(splits.train_bank, batch.ids, batch.labels, batch.noise)


@dataclass(frozen=True)
class EvalSet:
    """An evaluation set: its `name`, the `words` for it in the book's figures (which show a reader's own by its name), and the two
    fields of `Splits` (an `*_ids` and a `*_sets`) that its sequences are drawn from. Raises ValueError for other fields. A reader's
    own is an `EvalSet`, or any frozen dataclass that has a `name` and a method `draw(splits, n, generator)` that returns a `Batch`
    of one run (see Extending)."""

    name: str
    words: str
    ids: str
    label_sets: str

    def __post_init__(self):
        one_of(f"EvalSet {self.name!r}: ids", self.ids, ("train_ids", "exemplar_ids", "class_ids"))
        one_of(f"EvalSet {self.name!r}: label_sets", self.label_sets, ("train_sets", "test_sets"))

    def draw(self, splits: Splits, n: int, generator: torch.Generator) -> Batch | None:
        """`n` sequences for one run, `[1, n, pair + 1]`; None where the splits leave nothing to draw from."""
        ids, label_sets = getattr(splits, self.ids), getattr(splits, self.label_sets)
        return sample(splits, n, generator, ids=ids, label_sets=label_sets) if ids.numel() and len(label_sets) else None


EVAL_SETS = (
    EvalSet("train", "training sequences", "train_ids", "train_sets"),
    EvalSet("test_relabel", "held-out label pairs", "train_ids", "test_sets"),
    EvalSet("test_exemplars", "held-out exemplars", "exemplar_ids", "train_sets"),
    EvalSet("test_classes", "held-out classes", "class_ids", "train_sets"),
)


def evaluation_sets(splits: Splits, eval_seed: int, size: int = 1000, more: Sequence[EvalSet] = ()) -> dict[str, Batch]:
    """The four fixed sets and a reader's `more`, by name, each of `size` sequences for one run. Sets that the splits leave empty
    are left out: `test_relabel` where no labels are held out, `test_exemplars` where a class has one exemplar. Raises ValueError
    where two sets have the same name, or where a reader's set draws another shape."""
    names = [each.name for each in (*EVAL_SETS, *more)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"eval_sets: two evaluation sets are named {twice.pop()!r}; give each a name of its own")
    drawn = {each.name: each.draw(splits, size, seeded(each.name, eval_seed)) for each in (*EVAL_SETS, *more)}
    found = {name: batch for name, batch in drawn.items() if batch is not None}
    for name, batch in found.items():
        expected, n = [1, size, splits.task.n_pairs + 1], splits.task.n_labels
        what = f"ids {[*batch.ids.shape]}, labels {[*batch.labels.shape]}" if isinstance(batch, Batch) else reprlib.repr(batch)
        if what != f"ids {expected}, labels {expected}":
            raise ValueError(f"the evaluation set {name!r} drew {what}; it must draw a Batch of one run, ids and labels {expected}")
        if min(batch.labels.min(), batch.ids.min()) < 0 or batch.labels.max() >= n or batch.ids.max() >= batch.bank.shape[1]:
            raise ValueError(f"the evaluation set {name!r} drew labels that are not from 0 to {n - 1}, or ids beyond its bank")
    return found


def every_training_sequence(splits: Splits) -> Batch:
    """All distinct training sequences of a noiseless two-pair task, once each: C·(C−1)·2·sets·2 (78,400 for C=50, L=5).
    Raises ValueError for other tasks, whose sequences can't all be listed."""
    task = splits.task
    if task.n_pairs != 2 or task.noise:
        raise ValueError(f"n_pairs={task.n_pairs}, noise={task.noise}: only noiseless sequences of 2 pairs are "
                         "enumerated; draw a sample with `ihbook.task.sample` instead")
    classes = torch.tensor(list(itertools.permutations(range(task.n_classes), 2)))
    labels = torch.cat([splits.train_sets, splits.train_sets.flip(1)])
    a, b, query = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in (len(classes), len(labels), 2)),
                                                       indexing="ij"))
    slots = torch.stack([torch.zeros_like(query), torch.ones_like(query), query], 1)
    return Batch(splits.train_bank, classes[a].gather(1, slots)[None], labels[b].gather(1, slots)[None])
