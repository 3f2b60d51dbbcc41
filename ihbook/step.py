"""One optimiser step, and one evaluation, of a family of runs: pure functions, compiled on a CPU, captured as a graph on a GPU."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ihbook import metrics
from ihbook.compose import Plan
from ihbook.config import ModelConfig, RunConfig
from ihbook.data import Batch
from ihbook.model import Params

BETAS, EPSILON = (0.9, 0.999), 1e-8
BLOCK = {"cpu": 1, "cuda": 512}  # runs in one program: a CPU's caches hold no more than one, and others gain it nothing
PLAIN_BLOCK = 8  # runs in one on a CPU that is not compiled, where more of them share the cost of calling each operation
COMPILE_FROM = {"cpu": 31_000, "cuda": 100}  # run-steps: a CPU compiles for half a minute, to save a millisecond at each
Moments = dict[str, Params]  # the optimiser's state, by kind and weight


@dataclass(frozen=True)
class Program:
    """What a family runs at every step. `train` updates params and moments in place and returns the losses before, `[run]`, which
    hold until it is called again; `evaluate` is `metrics.summed`. `compiled` says how."""

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

    with torch.enable_grad():
        values = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = metrics.cross_entropy(plan(values, batch, config, query_only=True).logits, batch)
        # The runs share no weight, so that the sum's gradient is each run's own. Of what a clamp leaves unused it is 0.
        gradients = torch.autograd.grad(losses.sum(), list(values.values()), allow_unused=True, materialize_grads=True)
    lr, correction, correction_sq = scalars.unbind()
    for (name, p), g in zip(params.items(), gradients, strict=True):
        if not moments:
            p.sub_(lr * g)
            continue
        m, v = moments["exp_avg"][name], moments["exp_avg_sq"][name]
        m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        p.sub_(lr * (m / correction) / ((v / correction_sq).sqrt() + EPSILON))
    return losses.detach()


def scalars_of(rates: Sequence[float], steps: Sequence[int], device: str | torch.device) -> Tensor:
    """The scalars of optimiser steps, counted from 0, and their learning rates: `[step, 3]`."""
    rows = [[lr, *(1 - beta ** (i + 1) for beta in BETAS)] for lr, i in zip(rates, steps, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _compiling(plain: Callable) -> Callable:
    """`plain`, compiled for every new form and size of its arguments at the first call with them; where that fails, one warning,
    and `plain` itself.

    The arguments are traced as a flat list of tensors, and the program is called with such a list: a step is so short that
    PyTorch's own way of finding the program for nested arguments would take a seventh of it.
    """
    programs: dict[tuple, Callable | None] = {}
    last: tuple = None, None, None  # the plan and form that it was called with, and their program; threads take all or none
    compiling = threading.Lock()

    def call(*args) -> dict[str, Tensor] | Tensor:
        nonlocal last
        tensors = _tensors(args)
        batch, plan = (next(arg for arg in args if isinstance(arg, kind)) for kind in (Batch, Plan))
        form = [(t.shape, t.stride()) for t in (batch.bank, batch.ids)], _names(args)
        known, known_form, program = last
        if plan is not known or form != known_form:
            configs = tuple(arg for arg in args if isinstance(arg, ModelConfig))
            key = configs, plan.form, tuple(form[1]), tuple((t.shape, t.stride(), t.dtype) for t in tensors)
            with compiling:
                if key not in programs:
                    programs[key] = _compiled(plain, args, tensors)
            program = programs[key]
            last = plan, form, program
        return plain(*args) if program is None else program(*tensors)

    return call


def _compiled(plain: Callable, args: tuple, tensors: list[Tensor]) -> Callable | None:
    """A function of the tensors in `args` alone; None, with a warning, where it can't be compiled. Nothing is run."""
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*values: Tensor) -> dict[str, Tensor] | Tensor:
        tensors = iter(values)
        return plain(*(_filled(arg, tensors) for arg in args))

    try:
        graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        return torch._inductor.compile(graph, tensors, options={"size_asserts": False, "cpp_wrapper": True})
    except Exception as error:  # whatever it is, the plain step says it again, or does without
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"training is not compiled, and takes two to four times as long: {reason}", stacklevel=2)
        return None


def _tensors(args: tuple) -> list[Tensor]:
    """The tensors in a step's arguments, in one order."""
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, dict):
            for each in arg.values():
                found += each.values() if isinstance(each, dict) else [each]
        elif isinstance(arg, (Batch, Plan)):
            found += arg.tensors
    return found


def _names(args: tuple) -> list[tuple[str, ...]]:
    """What the tensors of `_tensors` are, as far as it is a matter of names: a flat list does not say which moment is which."""
    dicts = [arg for arg in args if isinstance(arg, dict)]
    return [tuple(each) for arg in dicts for each in (arg, *arg.values()) if isinstance(each, dict)]


def _filled(arg: object, tensors: Iterator[Tensor]) -> object:
    """An argument of a step with other tensors, in the order of `_tensors`."""
    if isinstance(arg, dict):
        return {key: _filled(each, tensors) for key, each in arg.items()}
    if isinstance(arg, Tensor):
        return next(tensors)
    return arg.filled(tensors) if isinstance(arg, (Batch, Plan)) else arg


def _capturing(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`plain`, a `train_step`, captured as a CUDA graph at the first call and when the family's state or clamps become other
    tensors; where that fails, one warning, and `plain` itself."""
    fixed: tuple[Params, Moments, Plan] | None = None
    form, replay, failed = None, plain, False

    def call(params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig, scalars: Tensor) -> Tensor:
        nonlocal fixed, form, replay, failed
        same = fixed is not None and all(a is b for a, b in zip(fixed, (params, moments, plan), strict=True))
        if not failed and not (same and form == (batch.bank.shape, batch.ids.shape)):
            fixed, form = (params, moments, plan), (batch.bank.shape, batch.ids.shape)
            replay = plain  # the graph before, and its memory, goes first
            try:
                replay = _captured(plain, params, moments, batch, plan, config, scalars)
            except RuntimeError as error:
                failed = True
                warnings.warn(f"steps are not captured as CUDA graphs, and take longer: {error}", stacklevel=2)
        return replay(params, moments, batch, plan, config, scalars)

    return call


def _captured(plain: Callable[..., Tensor], params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig,
              scalars: Tensor) -> Callable[..., Tensor]:
    """A CUDA graph of one step, which reads and writes the state where it lies, and batches and scalars in places of its own."""
    own = [t.clone() for t in (*batch.tensors, scalars)]
    held: list[Tensor | None] = [None] * len(own)  # what was last copied there: a bank is the same for many steps

    def once() -> Tensor:
        return plain(params, moments, batch.filled(iter(own)), plan, config, own[-1])

    state = _tensors((params, moments))
    before = [t.clone() for t in state]
    aside, usual = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(usual)
    try:
        with torch.cuda.stream(aside):
            for _ in range(3):  # what a first call sets up must not be part of the graph
                once()
    finally:
        usual.wait_stream(aside)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # what other threads do on the GPU is no error
            losses = once()
    finally:
        torch.cuda.set_stream(usual)  # where a capture fails, PyTorch stays on the stream of its own

    def replay(params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig, scalars: Tensor) -> Tensor:
        for i, tensor in enumerate((*batch.tensors, scalars)):
            if tensor is not held[i]:
                own[i].copy_(tensor)
                held[i] = tensor
        graph.replay()
        return losses

    return replay


PLAIN = Program(train_step, metrics.summed, compiled=False)


def program(compile: bool, device: str | torch.device) -> Program:
    """The program of a family; plain, with a warning, where it is to be compiled but there is no compiler."""
    if not compile:
        return PLAIN
    if torch.device(device).type == "cuda":
        return Program(_capturing(train_step), metrics.summed, compiled=True)
    if not _has_compiler():
        warnings.warn("there is no C++ compiler, so training is not compiled, and takes two to four times as long; install g++ "
                      "or clang to change that", stacklevel=2)
        return PLAIN
    return _compiled_program()


@cache
def _compiled_program() -> Program:
    """One for all families of a process, so that none compiles what another has."""
    return Program(_compiling(train_step), _compiling(metrics.summed), compiled=True)


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except InvalidCxxCompiler:
        return False
