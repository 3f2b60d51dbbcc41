"""What a run is: frozen values that decide every number, and a digest that names them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

BANKS = ("glyphs", "omniglot", "authors", "gaussian", "onehot")
EMBEDDINGS = ("auto", "resnet18", "random")
POSITIONS = ("rotary", "sinusoidal", "learned", "none")
OPTIMISERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine")


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless `value` is a number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ValueError(f"{name}={value!r} must be a number of at least {least}")


def whole(name: str, value: int, least: int) -> None:
    """Raise ValueError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


@dataclass(frozen=True)
class BankConfig:
    """An exemplar bank (`experiments.md` §1): which characters, and how they become features.

    `path` is the user's own file or folder (`omniglot`, `authors`); None downloads into the cache.
    `n_classes`, `dim` and `seed` shape the generated banks; `seed` also shuffles Omniglot's class order.
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
        for name in ("n_classes", "n_exemplars", "dim"):
            whole(name, getattr(self, name), 1)
        whole("bank seed", self.seed, 0)
