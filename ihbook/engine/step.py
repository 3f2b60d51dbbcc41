"""One optimiser step of a family, in forty lines. It reads only its arguments, and updates the weights and moments in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ihbook import metrics
from ihbook.clamps.compose import Plan
from ihbook.config import ModelConfig, RunConfig
from ihbook.model import Params
from ihbook.task import Batch

BETAS, EPSILON = (0.9, 0.999), 1e-8
Moments = dict[str, Params]  # the optimiser's state, by kind and weight


def initial_moments(params: Params, run: RunConfig) -> Moments:
    """The optimiser's state before the first step; SGD has none."""
    kinds = ("exp_avg", "exp_avg_sq") if run.optimiser == "adam" else ()
    return {kind: {name: torch.zeros_like(p) for name, p in params.items()} for kind in kinds}


def train_step(params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig,
               scalars: Tensor) -> Tensor:
    """Take a step of Adam (SGD without moments) in place, each run on its own batch; return the losses before it, `[run]`, nats.

    `scalars` `[3]` holds the learning rate and Adam's two bias corrections, 1 − β^step; one compiled program serves all values.
    """
    with torch.enable_grad():
        values = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = metrics.cross_entropy(plan(values, batch, config, query_only=True).logits, batch)
        # Runs share no weight: the sum's gradient is each run's own. Unused weights (clamps) get 0.
        gradients = torch.autograd.grad(losses.sum(), list(values.values()),
                                        allow_unused=True, materialize_grads=True)
    update(params, moments, dict(zip(values, gradients, strict=True)), scalars)
    return losses.detach()


def update(params: Params, moments: Moments, gradients: Params, scalars: Tensor) -> None:
    """The optimiser's part of `train_step`."""
    lr, correction, correction_sq = scalars.unbind()
    for name, p in params.items():
        g = gradients[name]
        if not moments:
            p.sub_(lr * g)
            continue
        m, v = moments["exp_avg"][name], moments["exp_avg_sq"][name]
        m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        p.sub_(lr * (m / correction) / ((v / correction_sq).sqrt() + EPSILON))


def scalars_of(rates: Sequence[float], steps: Sequence[int], device: str | torch.device) -> Tensor:
    """The `scalars` of `train_step`, `[step, 3]`, for `steps` counted from 0 and their learning rates."""
    rows = [[lr, *(1 - beta ** (i + 1) for beta in BETAS)] for lr, i in zip(rates, steps, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Program:
    """What a family runs: `step`, as `train_step` (the next call may overwrite its losses); `evaluate`, as `metrics.summed`.
    `prepare` takes a step's arguments and gets the step ready, where that takes long and no other process is doing so."""

    step: Callable[..., Tensor]
    evaluate: Callable[..., dict[str, Tensor]]
    prepare: Callable[..., None] = lambda *arguments: None


PLAIN = Program(train_step, metrics.summed)
