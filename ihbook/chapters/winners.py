"""Who wins: runs with one seed's initial weights and another's order of the data, scores of heads before training, and heads that
change networks (chapter 12)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ihbook import metrics, model
from ihbook.chapters import experiments, windows
from ihbook.clamps import Ablate
from ihbook.config import RunConfig
from ihbook.engine.results import Result
from ihbook.model import Weights
from ihbook.task import Batch, Splits

LENGTH = 6e5  # sequences of the paper's scale: long enough for the phase change, and for a winner to stand out


def factorial(settings: experiments.Settings) -> dict[tuple[int, int], RunConfig]:
    """The full network with each seed's initial weights and each seed's order of the data, by (weights, order)."""
    run = settings.run(LENGTH, heads_every=5000)
    return {(w, d): replace(run, init_seed=w, data_seed=d) for w in settings.seeds for d in settings.seeds}


def faster(settings: experiments.Settings, factor: float = 10) -> dict[tuple[int, int], RunConfig]:
    """A control of `factorial`: the same at a learning rate that is `factor` times as high, in 1.5 / `factor` times the length."""
    def short(length: float) -> int:
        return max(settings.run().batch_size, round(length / factor))

    return {key: replace(run, lr=factor * run.lr, heads_every=0, n_sequences=short(1.5 * run.n_sequences),
                         eval_every=short(run.eval_every)) for key, run in factorial(settings).items()}


def moved_by_order(times: pd.DataFrame) -> float:
    """The largest relative distance of a time from the median of its row: how far another order of the data moves it."""
    return float((times.div(times.median(axis=1), axis=0) - 1).abs().max().max())


def initial(run: RunConfig, d_exemplar: int) -> Weights:
    """The weights that a run starts from."""
    return run.initial or model.initial_weights(run.model, d_exemplar, run.task.n_labels, run.init_seed)


def place(of_heads: pd.Series, head: int) -> float:
    """A head's place by a number that is largest for the first: 0 for the first of all, 1 for the last; NaN if it is alone. Heads
    that are equal share a place."""
    others, mine = of_heads.drop(head), of_heads[head]
    return float((others > mine).sum() + 0.5 * (others == mine).sum()) / len(others) if len(others) else math.nan


def agreement(winners: Sequence[int]) -> float:
    """The share of pairs with the same winner; NaN where there is no pair."""
    pairs = list(itertools.combinations(winners, 2))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else math.nan


def same_side(times: pd.DataFrame) -> list[float]:
    """For each row, the share of pairs of columns under which it is on the same side of another row (before it, or after it), mean
    over the other rows: (1 + Kendall's correlation) / 2 between columns, one number per row. Chance gives 0.5. A run that never
    gets there is the slowest. NaN where there are fewer than two rows or columns."""
    table = times.fillna(math.inf).to_numpy(float)
    columns = list(itertools.combinations(range(table.shape[1]), 2))
    found = []
    for row in range(len(table)):
        before = [table[row] < table[other] for other in range(len(table)) if other != row]
        shares = [each[a] == each[b] for each in before for a, b in columns]
        found.append(float(np.mean(shares)) if shares else math.nan)
    return found


def variance_shares(table: pd.DataFrame) -> dict[str, float]:
    """The shares of a table's variance that go with its rows (weights), its columns (order), and neither, as components of a model
    with random effects; estimates below 0 are 0. NaN where something is missing, or there are fewer than two rows or columns."""
    x = table.to_numpy(float)
    n, m = x.shape
    if min(n, m) < 2 or not np.isfinite(x).all():
        return dict.fromkeys(("weights", "order", "neither"), math.nan)
    rows, columns = x.mean(1, keepdims=True) - x.mean(), x.mean(0, keepdims=True) - x.mean()
    rest = ((x - x.mean() - rows - columns) ** 2).sum() / ((n - 1) * (m - 1))
    found = {"weights": max(0.0, ((rows**2).sum() * m / (n - 1) - rest) / m),
             "order": max(0.0, ((columns**2).sum() * n / (m - 1) - rest) / n), "neither": rest}
    total = sum(found.values())
    return {name: part / total if total else math.nan for name, part in found.items()}


def intervals(table: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]] | None:
    """95% intervals of `variance_shares`, where rows are drawn anew: whole networks, each with its times under all orders. None for
    fewer than six networks, with which an interval says nothing."""
    if len(table) < 6:
        return None
    rng = np.random.default_rng(seed)
    drawn = pd.DataFrame([variance_shares(table.iloc[rng.integers(len(table), size=len(table))]) for _ in range(n_resamples)])
    return {name: (drawn[name].quantile(0.025), drawn[name].quantile(0.975)) for name in drawn}


def _on_diagonal(table: Tensor) -> Tensor:
    """How much the diagonal of `[..., n, n]` stands out: its mean minus that of the rest, in standard deviations."""
    n = table.shape[-1]
    diagonal = table.diagonal(dim1=-2, dim2=-1)
    rest = (table.sum((-2, -1)) - diagonal.sum(-1)) / (n * n - n)
    return (diagonal.mean(-1) - rest) / table.flatten(-2).std(-1)


@torch.no_grad()
def scores(weights: Weights, splits: Splits, sequences: Batch, batch: Batch) -> pd.DataFrame:
    """What may predict, before the first step, how strong each head of Layer 2 becomes, one row per head. `strength` on
    `sequences`, which must be many, as the heads hardly differ; `composition`, the largest key composition score with a head of
    Layer 1; `match`, how much its scores prefer a character to others, where the best head of Layer 1 has moved it; `copy`, how
    much its output prefers the label that it reads; `gradient`, the norm of its weights' gradient on `batch`. Positions and the
    other heads are left out of `match` and `copy`."""
    characters = splits.train_bank[0]
    embed = weights.tensors["exemplar_embed.weight"]
    x = F.layer_norm(characters.to(embed) @ embed.T + weights.tensors["exemplar_embed.bias"], (embed.shape[0],))
    labels = F.layer_norm(weights.tensors["label_embed.weight"].T, (embed.shape[0],))
    (_, _, v1, o1), (q, k, v, o) = (model.by_head(weights.tensors, layer, weights.config) for layer in (0, 1))
    moved = F.layer_norm(torch.einsum("jmd,jdn,cn->jcm", o1, v1, x), (embed.shape[0],))
    queries, offered = torch.einsum("hdm,cm->hcd", q, x), torch.einsum("hdm,jcm->hjcd", k, moved)
    match = _on_diagonal(torch.einsum("hcd,hjed->hjce", queries, offered)).amax(1)
    written = torch.einsum("lm,hmd,hdn,an->hal", weights.tensors["unembed.weight"], o, v, labels)
    strength = metrics.measure(weights, sequences)["strength"][0, 1]
    with torch.enable_grad():
        gradient = [math.hypot(*list(experiments.gradient_norms(weights, batch, h).values())[:4]) for h in range(len(q))]
    return pd.DataFrame({"strength": strength.tolist(), "composition": metrics.composition_scores(weights, "keys").amax(1).tolist(),
                         "match": match.tolist(), "copy": _on_diagonal(written).tolist(), "gradient": gradient})


def best_elsewhere(places: pd.DataFrame) -> list[tuple[str, float]]:
    """For each network (row), the score (column), or its opposite (−), with the lowest mean place of the winner on the *other*
    networks, and its place on this one: a selection that the network has no part in. NaN for a network without others."""
    both = places.join((1 - places).add_prefix("−"))
    found = []
    for network in both.index:
        others = both.drop(network).mean()
        name = "" if others.isna().all() else others.idxmin()
        found.append((name, both.loc[network, name] if name else math.nan))
    return found


def with_head(weights: Weights, head: int, donor: Weights, from_head: int,
              layer: int = 1) -> Weights:
    """The weights with one head's queries, keys, values and output replaced by those of a head of `donor`'s same layer."""
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    mine, theirs = (model.by_head(each, layer, weights.config) for each in (tensors, donor.tensors))
    for part, given in zip(mine, theirs, strict=True):
        part[head] = given[from_head]
    return replace(weights, tensors=tensors)


def kept_away(run: RunConfig, head: int, change: float) -> RunConfig:
    """The run with this head of Layer 2 ablated from the start for the time of the phase change, and a third longer in all."""
    longer = replace(run, n_sequences=round(run.n_sequences * 4 / 3))
    return windows.helped(longer, [Ablate((1, head))], windows.snap(run, 0, change))


def winner(result: Result) -> int:
    """The strongest head of Layer 2 at the end."""
    return int(experiments.strengths(result).idxmax())
