"""What is measured: losses, induction strength, previous-token attention, composition scores, the time of the phase change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ihbook.checks import one_of
from ihbook.clamps import Clamp, Shape, compose
from ihbook.config import ModelConfig
from ihbook.model import Activations, Params, Weights, by_head, exemplar_table, stack
from ihbook.task import Batch

TOGETHER, CHUNK = 32, 1024  # finished networks, and sequences, measured at once: as many as a core's caches hold

METRICS = ("loss", "accuracy", "probability", "in_context_loss", "in_context_accuracy", "in_context_probability",
           "context_probability")


class Metric(Protocol):
    """A reader's own metric: any frozen dataclass that has a `name` and can be called (see Extending)."""

    name: str

    def __call__(self, acts: Activations, batch: Batch) -> Tensor:
        """The value of each sequence, `[run, batch]`. `acts` comes from a `query_only` pass (see `model.forward`)."""


def query_metrics(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Metrics of each sequence at the query, `[run, batch]`, from `logits` `[run, batch, label]` (chapter 1): loss (nats),
    accuracy and probability of the right label; the same three with the labels not in context masked out (`in_context_…`); and
    `context_probability`, the total probability of the labels in context."""
    seen = (batch.labels[:, :, :-1, None] == torch.arange(logits.shape[2], device=logits.device)).any(2)
    target = batch.targets.unsqueeze(2)
    result = {}
    for prefix, masked in (("", logits), ("in_context_", logits.masked_fill(~seen, -math.inf))):
        log_p = masked.log_softmax(2).gather(2, target).squeeze(2)
        result[prefix + "loss"] = -log_p
        result[prefix + "accuracy"] = (masked.argmax(2) == batch.targets).to(logits.dtype)
        result[prefix + "probability"] = log_p.exp()
    result["context_probability"] = (logits.softmax(2) * seen).sum(2)
    return result


def induction_strength(pattern: Tensor, batch: Batch) -> Tensor:
    """Attention from the query to the right label tokens minus that to the wrong ones, `[run, batch, head]`. Figure 3b is its
    mean over sequences. The last row of `pattern` `[run, batch, head, q_pos, k_pos]` must be the query's."""
    sign = torch.where(batch.in_context, 1.0, -1.0).to(pattern.dtype).unsqueeze(2)
    return (pattern[:, :, :, -1, 1::2] * sign).sum(3)


def previous_token_attention(pattern: Tensor) -> Tensor:
    """Mean attention of label tokens to the tokens before them, `[run, batch, head]`. `pattern` must have every row."""
    n = pattern.shape[-1]
    labels = torch.arange(1, n, 2, device=pattern.device)
    return pattern[..., labels, labels - 1].mean(-1)


def check_names(more: Sequence[Metric]) -> None:
    """Raise ValueError where two metrics, or one of `more` and one of the book's, have the same name."""
    names = [*METRICS, "strength", "previous_token", *(metric.name for metric in more)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"metrics: another metric is named {name!r}; give each a name of its own")


@torch.no_grad()
def summed(params: Params, batch: Batch, config: ModelConfig, plan: compose.Plan, more: Sequence[Metric] = (),
           table: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over a batch's sequences under `plan`: of `query_metrics` and of a reader's `more`, `[run]`; and of each head's
    `strength` and `previous_token`, `[run, layer, head]` (no `previous_token` for the last layer). `table` as in `model.forward`.
    Raises ValueError where a reader's metric has another shape or the name of another metric."""
    acts = plan(params, batch, config, query_only=True, table=table)
    batch = batch.expand(len(acts.logits))
    patterns = [acts["pattern", i].expand(len(acts.logits), -1, -1, -1, -1) for i in range(config.n_layers)]
    values = query_metrics(acts.logits, batch)
    check_names(more)
    for metric in more:
        value = metric(acts, batch)
        if value.shape[1:] != (len(batch),):
            raise ValueError(f"metrics: {metric.name!r} has values {list(value.shape)}; they must be [run, batch], here "
                             f"{list(values['loss'].shape)}")
        values[metric.name] = value.expand_as(values["loss"])
    values["strength"] = torch.stack([induction_strength(p, batch) for p in patterns], 2)
    if len(patterns) > 1:
        values["previous_token"] = torch.stack([previous_token_attention(p) for p in patterns[:-1]], 2)
    return {name: value.sum(1) for name, value in values.items()}


def evaluate(params: Params, batch: Batch, config: ModelConfig, plan: compose.Plan, more: Sequence[Metric] = (), *,
             chunk: int = 4096, summed: Callable[..., dict[str, Tensor]] = summed) -> dict[str, Tensor]:
    """Means over a batch's sequences of what `summed` sums, float64, computed `chunk` sequences at a time. `previous_token` is
    NaN for the last layer, where only the query's row is computed."""
    more, table = tuple(more), None
    if batch.noise is None and batch.bank.shape[1] <= batch.ids[0].numel():
        with torch.no_grad():
            table = exemplar_table(params, batch)  # once for all parts
    parts = [summed(params, part, config, plan, more, table) for part in batch.split(chunk)]
    means = {name: torch.stack([part[name] for part in parts]).double().sum(0) / len(batch) for name in parts[0]}
    missing = torch.full_like(means["strength"][:, :1], math.nan)
    means["previous_token"] = torch.cat([*([means["previous_token"]] if "previous_token" in means else []), missing], 1)
    return means


def measure(weights: Weights | Sequence[Weights], batch: Batch, clamps: Sequence[Sequence[Clamp]] = ((),), *,
            metrics: Sequence[Metric] = (), chunk: int = CHUNK) -> dict[str, Tensor]:
    """`evaluate` for finished networks, `[list, …]`: one network under each list of clamps, or each network under its own list.

    `batch` is of one run and serves all; `metrics` are a reader's own. `chunk` sequences are computed at once, counted over all
    networks; a prefix that several networks share counts half. Raises ValueError where the numbers of networks and lists differ,
    the architectures differ, or a clamp does not fit.
    """
    found = [(evaluate(params, every, config, plan, metrics, chunk=max(1, 2 * chunk // (len(every.ids) + n))), n)
             for params, every, config, plan, n in _clamped(weights, batch, clamps)]
    return {name: torch.cat([each[name].expand(n, *each[name].shape[1:]) for each, n in found]) for name in found[0][0]}


@torch.no_grad()
def correct(weights: Weights | Sequence[Weights], batch: Batch, clamps: Sequence[Sequence] = ((),), *,
            chunk: int = CHUNK) -> Tensor:
    """Whether each network answers each sequence right, bool `[list, batch]`; arguments as in `measure` (Tables 2, 3)."""
    return torch.cat([
        torch.cat([plan(params, part, config, query_only=True).logits.argmax(2) == part.targets
                   for part in every.split(max(1, 2 * chunk // (len(every.ids) + n)))], 1).expand(n, -1)
        for params, every, config, plan, n in _clamped(weights, batch, clamps)])


def gradients(weights: Weights, batch: Batch, clamps: Sequence = ()) -> Params:
    """The gradient of one network's mean loss (nats) with respect to each weight, under clamps; without a run axis."""
    [(params, batch, config, plan, _)] = _clamped(weights, batch, [clamps])
    found = torch.func.grad(lambda p: cross_entropy(plan(p, batch, config, query_only=True).logits, batch).sum())(params)
    return {name: g[0] for name, g in found.items()}


def composition_scores(weights: Weights, part: str, layer: int = 1) -> Tensor:
    """Composition scores ‖W_in W_out‖_F / (‖W_in‖_F ‖W_out‖_F), `[head, head of the layer before]` (Figure 11): how much of the
    earlier head's output the later head's `part` ("queries", "keys" or "values") can read. Raises ValueError for another `part`
    or `layer`."""
    parts = ("queries", "keys", "values")
    one_of("part", part, parts)
    config = weights.config
    if not 1 <= layer < config.n_layers:
        raise ValueError(f"layer={layer} has no layer before it; choose 1 to {config.n_layers - 1}")
    read = by_head(weights.tensors, layer, config)[parts.index(part)]
    *_, write = by_head(weights.tensors, layer - 1, config)
    together = torch.einsum("jad,ide->jiae", read, write).flatten(2).norm(dim=2)
    return together / (read.flatten(1).norm(dim=1)[:, None] * write.flatten(1).norm(dim=1))


def _clamped(weights: Weights | Sequence[Weights], batch: Batch,
             clamps: Sequence[Sequence]) -> Iterator[tuple[Params, Batch, ModelConfig, compose.Plan, int]]:
    """Finished networks, each under its clamps, `TOGETHER` per program: parameters, sequences, config, plan, number of networks.

    One network under many clamps has a run axis of 1, which grows to the number of clamps only where they differ: everything
    before is computed once. This does not hold with a donor, or under a clamp that does not declare `broadcasts`.
    """
    networks = [weights] * len(clamps) if isinstance(weights, Weights) else list(weights)
    lists = list(clamps) * len(networks) if len(clamps) == 1 else list(clamps)
    if len(networks) != len(lists):
        raise ValueError(f"{len(networks)} networks and {len(lists)} lists of clamps; give one list each, or one for all")
    if not networks:
        raise ValueError("there is nothing to measure; give at least one network and one list of clamps, which may be empty")
    if unlike := {network.config.architecture for network in networks} - {networks[0].config.architecture}:
        raise ValueError(f"the networks are {networks[0].config} and {unlike.pop()}; measure each architecture by itself")
    config, n_pairs = networks[0].config, batch.labels.shape[2] - 1
    shape = Shape(config.n_layers, config.n_heads, n_pairs)
    compose.check_batch(networks[0], batch)  # `stack` refuses others of another width or label count
    for network, each in zip(networks, lists, strict=True):
        compose.check(each, shape, network)
    for i in range(0, len(lists), TOGETHER):
        some = [compose.active(each, math.inf) for each in lists[i:i + TOGETHER]]
        plan = compose.make_plan(some, config, n_pairs, dtype=networks[0].tensors["unembed.bias"].dtype)
        broadcasts = all(getattr(clamp, "broadcasts", False) for each in some for clamp in each)
        shared = broadcasts and isinstance(weights, Weights) and plan.donor is None
        params = stack([weights] if shared else networks[i:i + TOGETHER])
        yield params, batch.expand(len(params["unembed.bias"])), config, plan, len(some)


def threshold(n_ways: int) -> float:
    """The paper's threshold of the phase change, nats: 0.4 times the loss of a guess among the `n_ways` labels in context."""
    return 0.4 * math.log(n_ways)


def phase_change(curve: pd.DataFrame, level: float = threshold(2), *, eval_set: str = "train", metric: str = "loss") -> float:
    """Sequences seen when the loss (or another `metric`) first falls below `level` (nats), interpolated linearly; NaN if it never
    does. The usual level is for two labels in context; with more, give `threshold` of their number. `curve` is one run's metrics
    table with the columns sequences, eval_set, metric and value (Figure 4b)."""
    rows = curve[(curve["eval_set"] == eval_set) & (curve["metric"] == metric)].sort_values("sequences")
    return crossing(rows.set_index("sequences")["value"], level)


def crossing(values: pd.Series, level: float) -> float:
    """The index at which `values` first fall below `level`, interpolated linearly; NaN if they never do."""
    x, y = values.index.to_numpy(float), values.to_numpy(float)
    below = (y < level).nonzero()[0]
    if not len(below):
        return math.nan
    i = below[0]
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - level) / (y[i - 1] - y[i]))


def plateau(losses: pd.Series, change: float) -> tuple[float, float, float]:
    """The median of `losses` (nats, indexed by sequences seen) in the second quarter of the time to `change`, their fall in that
    quarter, and their fall from 3/4 to 5/4 of `change` (Figure 3a), interpolated linearly. NaN where there is no change."""
    if math.isnan(change):
        return math.nan, math.nan, math.nan
    a, b, c, d = np.interp([change / 4, change / 2, change * 3 / 4, change * 5 / 4], losses.index, losses)
    early = losses[(losses.index >= change / 4) & (losses.index <= change / 2)]
    return float(np.median([a, b, *early])), float(a - b), float(c - d)


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The training loss of each run, `[run]`, nats: the mean over its batch of the cross-entropy at the query."""
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none").mean(1)
