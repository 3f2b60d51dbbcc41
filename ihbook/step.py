"""One optimiser step, and one evaluation, of a family of runs: pure functions, plain or compiled."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ihbook import metrics
from ihbook.compose import Plan
from ihbook.config import ModelConfig, RunConfig
from ihbook.data import Batch
from ihbook.model import Params

BETAS, EPSILON = (0.9, 0.999), 1e-8
Moments = dict[str, Params]  # the optimiser's state, by kind and weight


@dataclass(frozen=True)
class Program:
    """What a family runs at every step. `train` updates params and moments in place and returns the losses before, `[run]`;
    `evaluate` is `metrics.summed`. `compiled` says how."""

    train: Callable[..., Tensor]
    evaluate: Callable[..., dict[str, Tensor]]
    compiled: bool


def moments_of(params: Params, run: RunConfig) -> Moments:
    """The optimiser's state before the first step."""
    kinds = ("exp_avg", "exp_avg_sq") if run.optimiser == "adam" else ()
    return {kind: {name: torch.zeros_like(p) for name, p in params.items()} for kind in kinds}


def train_step(params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig, scalars: Tensor) -> Tensor:
    """Adam (or SGD, where there are no moments) on every run's own batch, in place.

    `scalars` are the learning rate and Adam's two bias corrections, 1 − β^step, a tensor so that they may change freely.
    """

    def total(values: Params) -> tuple[Tensor, Tensor]:
        losses = metrics.cross_entropy(plan(values, batch, config, query_only=True).logits, batch)
        return losses.sum(), losses  # the runs share no weight, so that the sum's gradient is each run's own

    gradients, losses = torch.func.grad(total, has_aux=True)(params)
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
    return losses


def scalars_of(rates: Sequence[float], steps: Sequence[int], device: str | torch.device) -> Tensor:
    """The scalars of optimiser steps, counted from 0, and their learning rates: `[step, 3]`."""
    rows = [[lr, *(1 - beta ** (i + 1) for beta in BETAS)] for lr, i in zip(rates, steps, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _compiling(plain: Callable, on_cpu: bool) -> Callable:
    """`plain`, compiled at its first call, for families of any size; where that fails, one warning, and `plain` itself."""
    function = torch.compile(plain, fullgraph=True, options={"size_asserts": False, "cpp_wrapper": on_cpu})
    plan, seen = None, set()  # what it was last called with, and how large the tensors were

    def mark(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.shape[0] > 1 and not hasattr(tensor, "_dynamo_weak_dynamic_indices"):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def call(params: Params, *args) -> dict[str, Tensor] | Tensor:
        nonlocal function, plan, seen
        batch, current = (next(arg for arg in args if isinstance(arg, kind)) for kind in (Batch, Plan))
        if current is not plan:
            plan, seen = current, set()
        key = len(params["unembed.bias"]), batch.bank.shape, batch.ids.shape
        if key in seen:  # the guards held for these sizes and this plan: to check them again costs as much as some products
            try:
                with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                    return function(params, *args)
            except RuntimeError as error:  # raised before anything has run
                if "skip_guard_eval_unsafe" not in str(error):
                    raise
                seen = set()
        mark([*params.values(), batch.ids, batch.labels, batch.bank, *current.tensors])
        mark(m for moments in args if isinstance(moments, dict) for kind in moments.values() for m in kind.values())
        mark([] if batch.noise is None else [batch.noise])
        torch._dynamo.maybe_mark_dynamic(batch.bank, 1)
        try:
            result = function(params, *args)
        except torch._dynamo.exc.TorchDynamoException as error:  # raised before anything has run
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"training is not compiled, and takes two to four times as long: {reason}", stacklevel=2)
            function, seen = plain, set()
            return plain(params, *args)
        if function is not plain:
            seen.add(key)
        return result

    return call


PLAIN = Program(train_step, metrics.summed, compiled=False)


def program(compile: bool, device: str | torch.device) -> Program:
    """The program of a family; plain, with a warning, where it is to be compiled but there is no compiler."""
    if not compile:
        return PLAIN
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and not _has_compiler():
        warnings.warn("there is no C++ compiler, so training is not compiled, and takes two to four times as long; install g++ "
                      "or clang to change that", stacklevel=2)
        return PLAIN
    torch._dynamo.config.recompile_limit = max(128, torch._dynamo.config.recompile_limit)  # a program a kind of family
    return Program(_compiling(train_step, on_cpu), _compiling(metrics.summed, on_cpu), compiled=True)


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except InvalidCxxCompiler:
        return False
