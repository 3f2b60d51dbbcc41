"""The step captured as a CUDA graph: on a GPU, launching each operation takes longer than computing it."""

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
    """`plain` (a `train_step`), captured at the first call and again when its parameters, moments, plan or sizes are replaced. If
    that fails, warn once and call `plain` from then on."""
    fixed: tuple[Params, Moments, Plan] | None = None
    sizes, replay, failed = None, plain, False

    def call(params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig, scalars: Tensor) -> Tensor:
        nonlocal fixed, sizes, replay, failed
        same = fixed is not None and all(a is b for a, b in zip(fixed, (params, moments, plan), strict=True))
        if not failed and not (same and sizes == (batch.bank.shape, batch.ids.shape)):
            fixed, sizes = (params, moments, plan), (batch.bank.shape, batch.ids.shape)
            replay = plain  # frees the old graph's memory before the new capture
            try:
                replay = _captured(plain, params, moments, batch, plan, config, scalars)
            except RuntimeError as error:
                failed = True
                warnings.warn(f"steps are not captured as CUDA graphs, and take longer: {error}", stacklevel=2)
        return replay(params, moments, batch, plan, config, scalars)

    return call


def _captured(plain: Callable[..., Tensor], params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig,
              scalars: Tensor) -> Callable[..., Tensor]:
    """Capture one step. The graph updates the state in place; it reads the batch and the scalars from buffers of its own."""
    own = [t.clone() for t in (*tensors_of_batch(batch), scalars)]
    held: list[Tensor | None] = [None] * len(own)  # the tensor last copied to each buffer: a bank stays the same for many steps

    def once() -> Tensor:
        return plain(params, moments, filled(batch, iter(own)), plan, config, own[-1])

    state = tensors_of((params, moments))
    before = [t.clone() for t in state]
    aside, usual = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(usual)
    try:
        with torch.cuda.stream(aside):
            for _ in range(3):  # the first calls set things up, which the graph must not contain
                once()
    finally:
        usual.wait_stream(aside)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            losses = once()
    finally:
        torch.cuda.set_stream(usual)  # after a failed capture, PyTorch stays on the capture's stream

    def replay(params: Params, moments: Moments, batch: Batch, plan: Plan, config: ModelConfig, scalars: Tensor) -> Tensor:
        for i, tensor in enumerate((*tensors_of_batch(batch), scalars)):
            if tensor is not held[i]:
                own[i].copy_(tensor)
                held[i] = tensor
        graph.replay()
        return losses

    return replay
