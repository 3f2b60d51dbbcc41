"""What a run is: frozen values that decide every number."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass, field, replace
from typing import Any

from ihbook.checks import at_least, between, flag, one_of, positive, whole
from ihbook.digest import digest

BANKS = ("glyphs", "omniglot", "authors", "gaussian", "onehot")
EMBEDDINGS = ("auto", "resnet18", "random")
POSITIONS = ("rotary", "sinusoidal", "learned", "none")
OPTIMISERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class BankConfig:
    """An exemplar bank: which characters it has, and how they become features. Raises ValueError for an impossible value.

    `path` is the user's own file or folder (`omniglot`, `authors`); None downloads into the cache. `n_classes`, `dim` and `seed`
    shape the generated banks; `seed` also shuffles Omniglot's class order.
    """

    name: str = "glyphs"
    path: str | None = None
    n_classes: int = 1623
    n_exemplars: int = 5
    dim: int = 512
    seed: int = 0
    embedding: str = "auto"

    def __post_init__(self):
        one_of("bank", self.name, BANKS)
        one_of("embedding", self.embedding, EMBEDDINGS)
        if self.path is not None and not isinstance(self.path, (str, os.PathLike)):
            raise ValueError(f"path={self.path!r} must be a path, or None")
        object.__setattr__(self, "path", self.path and os.fspath(self.path))
        for name in ("n_classes", "n_exemplars", "dim"):
            whole(name, getattr(self, name), 1)
        whole("bank seed", self.seed, 0)


@dataclass(frozen=True)
class TaskConfig:
    """The in-context classification task (chapter 1). Raises ValueError for an impossible value.

    A sequence has `n_pairs` exemplar-label pairs and a query. The pairs show `n_ways` = `n_pairs / burstiness` different classes,
    each `burstiness` times, with `n_ways` different labels. The query has one of these classes. A fraction `held_out` of all sets
    of `n_ways` labels, drawn with `label_seed`, never trains; `label_sets` names the training sets outright instead. `zipf` is
    the exponent of Zipfian class frequencies; `noise` is the standard deviation of Gaussian noise on the features.
    """

    n_classes: int = 50
    n_test_classes: int = 100
    n_labels: int = 5
    n_pairs: int = 2
    burstiness: int = 1
    zipf: float = 0.0
    noise: float = 0.0
    held_out: float = 0.2
    label_seed: int = 0
    label_sets: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        whole("n_classes", self.n_classes, 1)
        whole("n_test_classes", self.n_test_classes, 1)
        whole("n_labels", self.n_labels, 2)
        whole("n_pairs", self.n_pairs, 1)
        whole("burstiness", self.burstiness, 1)
        whole("label_seed", self.label_seed, 0)
        at_least("zipf", self.zipf, 0)
        at_least("noise", self.noise, 0)
        if self.n_pairs % self.burstiness or self.n_ways < 2:
            raise ValueError(f"burstiness={self.burstiness} must divide n_pairs={self.n_pairs} into at least 2 classes")
        for name, pool in (("n_labels", self.n_labels), ("n_classes", self.n_classes),
                           ("n_test_classes", self.n_test_classes)):
            if pool < self.n_ways:
                raise ValueError(f"{name}={pool} is fewer than the {self.n_ways} different ones that a sequence of "
                                 f"n_pairs={self.n_pairs} needs; raise {name} or lower n_pairs")
        at_least("held_out", self.held_out, 0)
        if self.held_out >= 1:
            raise ValueError(f"held_out={self.held_out!r} leaves no labels to train; choose a fraction below 1")
        if self.label_sets is not None:
            try:
                sets = tuple(tuple(sorted(operator.index(label) for label in group)) for group in self.label_sets)
            except TypeError as error:
                raise ValueError(f"label_sets={self.label_sets!r} must be sets of whole numbers, such as [(0, 1)]") from error
            if not sets:
                raise ValueError("label_sets=() leaves no labels to train; give at least one set, or None for the usual ones")
            for group in sets:
                if len(set(group)) != self.n_ways or group[0] < 0 or group[-1] >= self.n_labels:
                    raise ValueError(f"label_sets has {group}; each must be {self.n_ways} different labels from 0 to "
                                     f"{self.n_labels - 1}")
            object.__setattr__(self, "label_sets", sets)

    @property
    def n_ways(self) -> int:
        """The number of different classes, and of different labels, in one sequence."""
        return self.n_pairs // self.burstiness


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's architecture (chapter 2). The data give the exemplar dim and the number of labels. `mlp_ratio` is the
    MLP's width divided by `d_model`, at most 1000; 0 means attention only. `init_scale` multiplies every initial matrix but the
    label and position tables. `max_positions` is a learned position table's length. Raises ValueError for an impossible value."""

    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 8
    positions: str = "rotary"
    rotary_base: float = 10000.0
    max_positions: int = 32
    layer_norm: bool = True
    mlp_ratio: float = 0.0
    init_scale: float = 1.0

    def __post_init__(self):
        for name in ("n_layers", "d_model", "n_heads", "max_positions"):
            whole(name, getattr(self, name), 1)
        one_of("positions", self.positions, POSITIONS)
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={self.d_model}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions turn pairs of features, but d_model={self.d_model} / n_heads="
                             f"{self.n_heads} is odd; change one, or choose other positions")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, not {self.d_model}")
        between("mlp_ratio", self.mlp_ratio, 0, 1000)  # beyond that no memory suffices
        if self.mlp_ratio and not self.d_mlp:
            raise ValueError(f"mlp_ratio={self.mlp_ratio!r} of d_model={self.d_model} leaves no hidden feature; raise it")
        for name in ("rotary_base", "init_scale"):
            positive(name, getattr(self, name))
        flag("layer_norm", self.layer_norm)

    @property
    def architecture(self) -> ModelConfig:
        """The config without what only initial weights show: networks that share it stack, graft and start from each other."""
        return replace(self, init_scale=1.0)

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def d_mlp(self) -> int:
        return round(self.mlp_ratio * self.d_model)


@dataclass(frozen=True)
class RunConfig:
    """A run: everything that decides its result. All lengths are in sequences seen.

    `clamps` hold throughout training and at every evaluation (`ihbook.clamps`). `initial` holds the weights to start from
    (`ihbook.model.Weights`); None draws them with `init_seed`. Evaluations come before the first step, at the first step at or
    past each multiple of `eval_every`, and after the last step; 0 means never. Checkpoints follow `checkpoint_every` in the same
    way. `heads_every` evaluates the `train` set, with each head's strength, more often than that. `warmup` raises the learning
    rate linearly to `lr`; the schedule "cosine" then lowers it to 0. `metrics` and `eval_sets` are a reader's own, measured
    beside the book's (`ihbook.metrics.Metric`, `ihbook.task.EvalSet`). Raises ValueError that names the impossible field.
    """

    bank: BankConfig = field(default_factory=BankConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    clamps: tuple[Any, ...] = ()
    initial: Any = None
    init_seed: int = 5
    data_seed: int = 0
    eval_seed: int = 0
    n_sequences: int = 1_000_000
    batch_size: int = 32
    optimiser: str = "adam"
    lr: float = 1e-5
    warmup: int = 0
    schedule: str = "constant"
    eval_every: int = 5000
    eval_size: int = 1000
    heads_every: int = 0
    checkpoint_every: int = 0
    metrics: tuple[Any, ...] = ()
    eval_sets: tuple[Any, ...] = ()

    def __post_init__(self):
        for name, kind in (("bank", BankConfig), ("task", TaskConfig), ("model", ModelConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a {kind.__name__}, such as {kind.__name__}()")
        if self.initial is not None and not hasattr(self.initial, "content_digest"):
            raise ValueError(f"initial must be Weights (ihbook.load_weights reads them) or None, and is a "
                             f"{type(self.initial).__name__}")
        for name, method in (("clamps", None), ("metrics", "__call__"), ("eval_sets", "draw")):
            try:
                object.__setattr__(self, name, tuple(getattr(self, name)))
            except TypeError as error:
                raise ValueError(f"{name}={getattr(self, name)!r} is not a list; give a list, {name}=[...]") from error
            for each in getattr(self, name):
                if isinstance(each, type):
                    raise ValueError(f"{name} has the class {each.__name__}; give one made of it, {each.__name__}(...)")
                if type(each).__hash__ is None:
                    raise ValueError(f"{name} has {each!r}, which can change; make {type(each).__name__} a frozen dataclass")
                if method and not (isinstance(getattr(each, "name", None), str) and hasattr(each, method)):
                    raise ValueError(f"{name} has {each!r}; each needs a `name`, a string, and a method {method}")
        for name in ("init_seed", "data_seed", "eval_seed", "warmup", "eval_every", "heads_every", "checkpoint_every"):
            whole(name, getattr(self, name), 0)
        for name in ("n_sequences", "batch_size", "eval_size"):
            whole(name, getattr(self, name), 1)
        one_of("optimiser", self.optimiser, OPTIMISERS)
        one_of("schedule", self.schedule, SCHEDULES)
        positive("lr", self.lr)

    @property
    def n_steps(self) -> int:
        """The number of optimiser steps: just enough to see `n_sequences`."""
        return -(-self.n_sequences // self.batch_size)

    @property
    def digest(self) -> str:
        """Sixteen hex digits, the same in every process and on every machine. Raises TypeError where `digest.encode` does."""
        return digest(self)[:16]
