"""The step captured as a CUDA graph: on a GPU, calling each operation would take longer than computing it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ihbook.clamps.compose import Plan
from ihbook.config import ModelConfig
from ihbook.engine.flat import filled, tensors_of, tensors_of_batch
from ihbook.engine.step import Moments
from ihbook.model import Params
from ihbook.task import Batch


def capturing(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`plain`, a `train_step`, captured at the first call and whenever the family's state or clamps become other tensors. Where
    that fails: one warning, and `plain` itself."""
    fixed: tuple[Params, Moments, Plan] | None = None
    sizes, replay, failed = None, plain, False

    def call(params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig, scalars: Tensor) -> Tensor:
        nonlocal fixed, sizes, replay, failed
        same = fixed is not None and all(a is b for a, b in zip(fixed, (params, moments, plan), strict=True))
        if not failed and not (same and sizes == (batch.bank.shape, batch.ids.shape)):
            fixed, sizes = (params, moments, plan), (batch.bank.shape, batch.ids.shape)
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
    own = [t.clone() for t in (*tensors_of_batch(batch), scalars)]
    held: list[Tensor | None] = [None] * len(own)  # what was last copied there: a bank is the same for many steps

    def once() -> Tensor:
        return plain(params, moments, filled(batch, iter(own)), plan, config, own[-1])

    state = tensors_of((params, moments))
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
        for i, tensor in enumerate((*tensors_of_batch(batch), scalars)):
            if tensor is not held[i]:
                own[i].copy_(tensor)
                held[i] = tensor
        graph.replay()
        return losses

    return replay
