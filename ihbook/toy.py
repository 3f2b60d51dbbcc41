"""The paper's toy model of subcircuits that need each other: a product of three vectors, some of them clamped (Figures 5a, 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from ihbook.checks import at_least, whole

NAMES = ("a", "b", "c")


def loss(vectors: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """½ · mean((a*⊗b*⊗c* − a⊗b⊗c)²) of each run, `[run]`, from vectors `[run, dim]`; it needs inner products only."""
    def inner(v: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return torch.stack([(v[name] * w[name]).sum(1) for name in NAMES]).prod(0)

    size = truth["a"].shape[1] ** 3
    squares = inner(truth, truth) - 2 * inner(vectors, truth) + inner(vectors, vectors)
    return 0.5 * squares / size


def measures(vectors: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far each run's vectors `[run, dim]` are, `[run]` each. `misaligned_a`, … is 1 − cos² of a vector and its truth; `norm_a`,
    … its norm and `along_a`, … its component along the truth, both in units of the truth's norm. `loss_given_b_and_c` is the loss
    with b and c set to the truth, under the better sign (a product leaves its factors' signs open)."""
    columns = {f"misaligned_{name}": 1 - torch.cosine_similarity(vectors[name], truth[name]) ** 2 for name in NAMES}
    for name in NAMES:
        own, target = vectors[name], truth[name]
        columns[f"norm_{name}"] = own.norm(dim=1) / target.norm(dim=1)
        columns[f"along_{name}"] = (own * target).sum(1) / (target * target).sum(1)
    given = (loss({**truth, "a": sign * vectors["a"]}, truth) for sign in (1, -1))
    return columns | {"loss_given_b_and_c": torch.minimum(*given)}


def descend(seeds: Sequence[int] = (1,), clamped: Sequence[str] | Mapping[str, float | Sequence[float]] = (), *,
          start: float | Sequence[float] = 0, until: float | Sequence[float] = math.inf, n_dims: int = 20, n_iterations: int = 1000,
          lr: float = 1.0) -> pd.DataFrame:
    """Gradient descent on `loss` from N(0, I), one run per seed; vectors in `clamped` are the truth throughout (Figures 5a, 9).

    `clamped={"c": 0.5}` gives a strength from 0 to 1, one for all runs or one per run: in place of c, the product has strength ·
    truth + (1 − strength) · the learnt c. Clamps hold from iteration `start` on, and no longer at `until`, one for all runs or one
    per run (chapter 11). Raises ValueError for another name in `clamped`, or a number out of range.

    The table has one row per run and iteration, 0 to `n_iterations`, measured before the step: iteration; run (the seed); `loss`;
    `relative_loss`, the loss divided by that of learning nothing (of a product that is 0); and `measures` of the vectors.
    """
    strength = dict(clamped) if isinstance(clamped, Mapping) else dict.fromkeys(clamped, 1.0)
    if unknown := sorted(set(strength) - set(NAMES)):
        raise ValueError(f"clamped={clamped!r} names {unknown[0]!r}; the vectors are a, b and c")
    for name, value in strength.items():
        each = torch.as_tensor(value, dtype=torch.float64)
        if each.shape not in ((), (len(seeds),)) or not ((each >= 0) & (each <= 1)).all():
            raise ValueError(f"clamped: the strength of {name} is {value!r}; it must be from 0 to 1, one for all runs or one each")
        strength[name] = each.view(-1, 1)
    first, last = (torch.as_tensor(value, dtype=torch.float64) for value in (start, until))
    for name, value, each in (("start", start, first), ("until", until, last)):
        if each.shape not in ((), (len(seeds),)) or not (each >= 0).all():
            raise ValueError(f"{name}={value!r} must be a number of iterations from 0 up, one for all runs or one each")
    whole("n_dims", n_dims, 1)
    whole("n_iterations", n_iterations, 1)
    at_least("lr", lr, 0)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> dict[str, Tensor]:
        return {name: torch.stack([torch.randn(n_dims, generator=g, dtype=torch.float64) for g in generators]) for name in NAMES}

    truth, vectors = draw(), draw()

    def seen(own: dict[str, Tensor], iteration: int) -> dict[str, Tensor]:
        on = ((first <= iteration) & (iteration < last)).view(-1, 1)
        return own | {name: s * on * truth[name] + (1 - s * on) * own[name]
                      for name, s in strength.items()}

    nothing = loss({name: torch.zeros_like(v) for name, v in truth.items()}, truth)

    def summed(own: dict[str, Tensor], iteration: int) -> tuple[Tensor, Tensor]:
        values = loss(seen(own, iteration), truth)
        return values.sum(), values

    gradient = torch.func.grad(summed, has_aux=True)
    kept = []
    for iteration in range(n_iterations + 1):
        gradients, value = gradient(vectors, iteration)
        losses = {"loss": value.clamp(min=0), "relative_loss": (value / nothing).clamp(min=0)}
        kept.append(losses | measures(seen(vectors, iteration), truth))
        vectors |= {name: vectors[name] - lr * gradients[name] for name in NAMES}
    rows = pd.MultiIndex.from_product([range(n_iterations + 1), list(seeds)], names=["iteration", "run"])
    return pd.DataFrame({name: torch.cat([each[name] for each in kept]).numpy() for name in kept[0]}, index=rows).reset_index()
