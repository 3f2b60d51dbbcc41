"""What is measured: losses, induction strength, previous-token attention, the time of the phase change."""

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
from ihbook.model import Activations, Params, Weights, stack
from ihbook.task import Batch

THRESHOLD = 0.4 * math.log(2)  # nats; 0.4 times the loss of knowing which two labels are in context, but not which is right
TOGETHER, CHUNK = 8, 1024  # finished networks, and their sequences, that are measured at once: what a core's caches hold

METRICS = ("loss", "accuracy", "probability", "in_context_loss", "in_context_accuracy", "in_context_probability",
           "context_probability")


class Metric(Protocol):
    """A reader's own metric: any frozen dataclass with a `name` that can be called (see Extending)."""

    name: str

    def __call__(self, acts: Activations, batch: Batch) -> Tensor:
        """Each sequence's value, `[run, batch]`. Of the last layer, `acts` has the query alone (all but `k` and `v`)."""


def query_metrics(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Each sequence's metrics at the query, `[run, batch]`, from `logits` `[run, batch, label]`.

    loss (nats), accuracy, probability of the right label; the same three with the labels not in context masked out
    (`in_context_…`); and `context_probability`, all that is given to labels in context (chapter 1).
    """
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
    """Attention from the query to the right label tokens minus that to the wrong ones, `[run, batch, head]`.

    `pattern` `[run, batch, head, q_pos, k_pos]`, whose last row is the query's. Figure 3b is its mean over sequences.
    """
    sign = torch.where(batch.in_context, 1.0, -1.0).to(pattern.dtype).unsqueeze(2)
    return (pattern[:, :, :, -1, 1::2] * sign).sum(3)


def previous_token_attention(pattern: Tensor) -> Tensor:
    """Mean attention of label tokens to the token before them, `[run, batch, head]`. The pattern must have every row."""
    n = pattern.shape[-1]
    labels = torch.arange(1, n, 2, device=pattern.device)
    return pattern[..., labels, labels - 1].mean(-1)


@torch.no_grad()
def summed(params: Params, batch: Batch, config: ModelConfig, plan: compose.Plan, more: Sequence[Metric] = ()) -> dict[str, Tensor]:
    """Sums over a batch's sequences of `query_metrics` and a reader's `more`, `[run]`, and of each head's `strength` and
    `previous_token`, `[run, layer, head]` (no `previous_token` of the last layer), under `plan`.

    Raises ValueError where a reader's metric has another shape or the name of another one.
    """
    acts = plan(params, batch, config, query_only=True)
    batch = batch.expand(len(acts.logits))
    patterns = [acts["pattern", i].expand(len(acts.logits), -1, -1, -1, -1) for i in range(config.n_layers)]
    values = query_metrics(acts.logits, batch)
    for metric in more:
        value = metric(acts, batch)
        if metric.name in (*values, "strength", "previous_token") or value.shape[1:] != (len(batch),):
            raise ValueError(f"metrics: {metric.name!r} has values {list(value.shape)}; they must be [run, batch], here "
                             f"{list(values['loss'].shape)}, and the name its own")
        values[metric.name] = value.expand_as(values["loss"])
    values["strength"] = torch.stack([induction_strength(p, batch) for p in patterns], 2)
    if len(patterns) > 1:
        values["previous_token"] = torch.stack([previous_token_attention(p) for p in patterns[:-1]], 2)
    return {name: value.sum(1) for name, value in values.items()}


def evaluate(params: Params, batch: Batch, config: ModelConfig, plan: compose.Plan, more: Sequence[Metric] = (), *,
             chunk: int = 4096, summed: Callable[..., dict[str, Tensor]] = summed) -> dict[str, Tensor]:
    """Means over a batch's sequences of what `summed` sums, `chunk` sequences at a time, float64.

    `previous_token` is NaN for the last layer, of which only the query's row is computed.
    """
    totals: dict[str, Tensor] = {}
    for part in batch.split(chunk):
        for name, value in summed(params, part, config, plan, tuple(more)).items():
            totals[name] = totals.get(name, 0) + value.double()
    means = {name: total / len(batch) for name, total in totals.items()}
    missing = torch.full_like(means["strength"][:, :1], math.nan)
    means["previous_token"] = torch.cat([*([means["previous_token"]] if "previous_token" in means else []), missing], 1)
    return means


def measure(weights: Weights | Sequence[Weights], batch: Batch, clamps: Sequence[Sequence[Clamp]] = ((),), *,
            metrics: Sequence[Metric] = (), chunk: int = CHUNK) -> dict[str, Tensor]:
    """`evaluate` for finished networks: one network under each list of clamps, or each network under its own, `[list, …]`.

    `batch` is of one run and serves all; `metrics` are a reader's own. `chunk` sequences are computed at once, over all networks; a
    prefix that several networks share counts half. Raises ValueError where the numbers of networks and clamps do not match.
    """
    found = [(evaluate(params, every, config, plan, metrics, chunk=max(1, 2 * chunk // (len(every.ids) + n))), n)
             for params, every, config, plan, n in _clamped(weights, batch, clamps)]
    return {name: torch.cat([each[name].expand(n, *each[name].shape[1:]) for each, n in found]) for name in found[0][0]}


@torch.no_grad()
def correct(weights: Weights | Sequence[Weights], batch: Batch, clamps: Sequence[Sequence] = ((),), *,
            chunk: int = CHUNK) -> Tensor:
    """Whether each network answers each sequence right, bool `[run, batch]`; networks and clamps as in `measure` (Table 2)."""
    return torch.cat([
        torch.cat([plan(params, part, config, query_only=True).logits.argmax(2) == part.targets
                   for part in every.split(max(1, 2 * chunk // (len(every.ids) + n)))], 1).expand(n, -1)
        for params, every, config, plan, n in _clamped(weights, batch, clamps)])


def gradients(weights: Weights, batch: Batch, clamps: Sequence = ()) -> Params:
    """The gradient of the mean loss of one network's sequences with respect to each weight, under clamps; no run axis."""
    [(params, batch, config, plan, _)] = _clamped(weights, batch, [clamps])
    found = torch.func.grad(lambda p: cross_entropy(plan(p, batch, config, query_only=True).logits, batch).sum())(params)
    return {name: g[0] for name, g in found.items()}


def composition_scores(weights: Weights, part: str, layer: int = 1) -> Tensor:
    """How much of what each head of the layer before writes this layer's `part` ("queries", "keys" or "values") could read:
    ‖W_in W_out‖_F / (‖W_in‖_F ‖W_out‖_F), `[head, head of the layer before]` (Figure 11)."""
    one_of("part", part, ("queries", "keys", "values"))
    config = weights.config
    if not 1 <= layer < config.n_layers:
        raise ValueError(f"layer={layer} has no layer before it; choose 1 to {config.n_layers - 1}")
    read = weights.tensors[f"layers.{layer}.attn.qkv.weight"].chunk(3)[("queries", "keys", "values").index(part)]
    read = read.unflatten(0, (config.n_heads, config.d_head))
    write = weights.tensors[f"layers.{layer - 1}.attn.proj.weight"].unflatten(1, (config.n_heads, config.d_head)).transpose(0, 1)
    together = torch.einsum("jad,ide->jiae", read, write).flatten(2).norm(dim=2)
    return together / (read.flatten(1).norm(dim=1)[:, None] * write.flatten(1).norm(dim=1))


def _clamped(weights: Weights | Sequence[Weights], batch: Batch,
             clamps: Sequence[Sequence]) -> Iterator[tuple[Params, Batch, ModelConfig, compose.Plan, int]]:
    """Finished networks, each under its clamps, `TOGETHER` of them as one program: parameters, sequences, how many these are.

    One network under many clamps has a run axis of 1, which becomes as long as the clamps only where they differ: what comes
    before is computed once for all of them. Not so under a clamp that does not declare `broadcasts`.
    """
    networks = [weights] * len(clamps) if isinstance(weights, Weights) else list(weights)
    lists = list(clamps) * len(networks) if len(clamps) == 1 else list(clamps)
    if len(networks) != len(lists):
        raise ValueError(f"{len(networks)} networks and {len(lists)} lists of clamps; give one list each, or one for all")
    if not networks:
        raise ValueError("there is nothing to measure; give at least one network and one list of clamps, which may be empty")
    if unlike := {network.config for network in networks} - {networks[0].config}:
        raise ValueError(f"the networks are {networks[0].config} and {unlike.pop()}; measure each architecture by itself")
    config, n_pairs = networks[0].config, batch.labels.shape[2] - 1
    shape = Shape(config.n_layers, config.n_heads, n_pairs)
    for network, each in zip(networks, lists, strict=True):
        compose.check(each, shape, network)
    for i in range(0, len(lists), TOGETHER):
        some = [compose.active(each, math.inf) for each in lists[i:i + TOGETHER]]
        plan = compose.make_plan(some, config, n_pairs, dtype=networks[0].tensors["unembed.bias"].dtype)
        broadcasts = all(getattr(clamp, "broadcasts", False) for each in some for clamp in each)
        shared = broadcasts and isinstance(weights, Weights) and plan.donor is None
        params = stack([weights] if shared else networks[i:i + TOGETHER])
        yield params, batch.expand(len(params["unembed.bias"])), config, plan, len(some)


def phase_change(curve: pd.DataFrame, threshold: float = THRESHOLD, *, eval_set: str = "train") -> float:
    """Sequences seen when the loss first falls below `threshold` (nats), interpolated linearly; NaN if it never does.

    `curve` is one run's metrics table: columns sequences, eval_set, metric, value.
    """
    rows = curve[(curve["eval_set"] == eval_set) & (curve["metric"] == "loss")].sort_values("sequences")
    return crossing(rows.set_index("sequences")["value"], threshold)


def threshold(n_ways: int) -> float:
    """The paper's sign of the phase change, in nats, where `n_ways` different labels stand in context: 0.4 times the loss of
    guessing among them."""
    return 0.4 * math.log(n_ways)


def crossing(values: pd.Series, level: float) -> float:
    """Where values, by their index, first fall below a level, interpolated linearly; NaN if they never do."""
    x, y = values.index.to_numpy(float), values.to_numpy(float)
    below = (y < level).nonzero()[0]
    if not len(below):
        return math.nan
    i = below[0]
    return float(x[0] if i == 0 else x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - level) / (y[i - 1] - y[i]))


def plateau(losses: pd.Series, change: float) -> tuple[float, float, float]:
    """Of losses (nats) by sequences seen: their median in the second quarter of the time to the phase change, by how much they fall
    in that quarter, and in the half around `change` (Figure 3a), interpolated linearly. NaN where there is no change."""
    if math.isnan(change):
        return math.nan, math.nan, math.nan
    a, b, c, d = np.interp([change / 4, change / 2, change * 3 / 4, change * 5 / 4], losses.index, losses)
    early = losses[(losses.index >= change / 4) & (losses.index <= change / 2)]
    return float(np.median([a, b, *early])), float(a - b), float(c - d)


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The training loss of each run, `[run]`, nats: the mean over its batch of cross-entropy at the query."""
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none").mean(1)
