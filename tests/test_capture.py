"""Steps as CUDA graphs: that a step can be captured, and what its graph reads and writes. Only one test needs a GPU."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import cases
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ihbook import clamps
from ihbook.clamps import compose
from ihbook.config import ModelConfig, RunConfig, TaskConfig
from ihbook.engine import captured, step
from ihbook.engine import train as training
from ihbook.model import Weights, initial_weights, stack
from ihbook.task import Batch

MODEL = ModelConfig(d_model=16, n_heads=2)
RUN = RunConfig(task=TaskConfig(n_classes=10, n_test_classes=10), model=MODEL, n_sequences=16_000, lr=3e-3, eval_every=4000,
                eval_size=50, checkpoint_every=8000)
RUNS = [RUN, replace(RUN, init_seed=6, n_sequences=9600, data_seed=1), replace(RUN, clamps=(clamps.Copy((1, 0)),)),
        replace(RUN, clamps=(clamps.During(clamps.Induction((1, 0)), 640, 12_800),), data_seed=3)]
NOISY = [replace(RUN, task=replace(RUN.task, noise=0.1)), replace(RUN, task=replace(RUN.task, noise=0.2), optimiser="sgd", lr=0.1)]


class Device(TorchDispatchMode):
    """Refuses what a CUDA capture refuses: tensors of the host, and values read back from the device (here "meta")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in (*tensors, *made)), f"{func} is of the host"
        return out


def step_on_meta(config, chosen, noise=False):
    """Take a step of two runs, one of them with the clamps `chosen`, on tensors without numbers."""
    run = RunConfig(model=config)
    networks = [initial_weights(config, 12, 5, seed) for seed in range(2)]
    params = stack(networks, "meta")
    ids = torch.zeros(2, 32, 3, dtype=torch.long, device="meta")
    batch = Batch(torch.zeros(1, 20, 12, device="meta"), ids, ids, torch.zeros(2, 32, 3, 12, device="meta") if noise else None)
    plan = compose.make_plan([chosen, ()], config, 2, device="meta")
    moments, scalars = step.initial_moments(params, run), torch.zeros(3, device="meta")
    with Device():
        assert step.train_step(params, moments, batch, plan, config, scalars).shape == (2,)


DONOR = Weights(ModelConfig(), initial_weights(ModelConfig(), 12, 5, 9).tensors)


@pytest.mark.parametrize("case", cases.clamps(DONOR))
def test_a_step_with_clamps_stays_on_the_device(case):
    step_on_meta(ModelConfig(), cases.clamps(DONOR)[case])


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_a_step_of_each_architecture_stays_on_the_device(variant):
    step_on_meta(cases.VARIANTS[variant], (), noise=True)


@pytest.mark.parametrize("bad", [lambda x: x + torch.tensor([1.0]), lambda x: x[x > 0], lambda x: x.new_zeros(1).item()])
def test_the_test_above_can_fail(bad):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Device():
        bad(torch.zeros(3, device="meta"))


class Tape(TorchDispatchMode):
    """A stand-in on a CPU for a CUDA graph: it records operations and omits their changes in place; a replay runs them again on
    the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.operations.append((func, args, kwargs, None))
            return args[0]
        out = func(*args, **kwargs)
        is_view = any(argument.alias_info is not None for argument in func._schema.arguments)
        self.operations.append((None if is_view else func, args, kwargs, out))
        return out

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # as when the operations were recorded
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs) if func else None
                if again is not None and out is not None:
                    for old, new in zip(torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(again), strict=True):
                        old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Put tapes in place of CUDA graphs; the list of the tapes made."""
    made = []

    @contextmanager
    def graph(tape, capture_error_mode):
        made.append(tape)
        with tape:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nullcontext(),
                        "CUDAGraph": Tape, "graph": graph, "set_stream": lambda s: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def train(runs, bank, device="cpu", compile=False):
    return training.train(runs, bank=bank, progress=False, device=device, compile=compile)


@pytest.mark.parametrize("runs, captures", [(RUNS, 4), (NOISY[:1], 1), (NOISY[1:], 1)], ids=["clamped", "noisy", "sgd"])
def test_captured_steps_are_the_plain_ones(small_bank, tapes, monkeypatch, runs, captures):
    """Training crosses a chunk of sequences, a window opens and closes, and a run leaves; new plans or runs need a new graph."""
    plain = train(runs, small_bank)
    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=captured.capturing(step.train_step)))
    for a, b in zip(plain, train(runs, small_bank), strict=True):
        pd.testing.assert_frame_equal(a.metrics, b.metrics, check_exact=True)
        assert a.weights == b.weights and a.checkpoints == b.checkpoints
    assert len(tapes) == captures


def test_where_nothing_can_be_captured_training_is_plain_and_says_so(small_bank, monkeypatch):
    def broken():
        raise RuntimeError("no streams here")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    plain = train([RUN], small_bank)
    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=captured.capturing(step.train_step)))
    with pytest.warns(UserWarning, match="no streams here") as warned:
        [result] = train([RUN], small_bank)
    assert result.weights == plain[0].weights and len(warned) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_gives_what_a_cpu_does(small_bank, recwarn, compile):
    for here, there in zip(train(RUNS, small_bank), train(RUNS, small_bank, "cuda", compile), strict=True):
        pd.testing.assert_frame_equal(here.metrics, there.metrics, atol=2e-3, rtol=2e-3)
        assert sorted(here.checkpoints) == sorted(there.checkpoints)
    assert not [w for w in recwarn if "captured" in str(w.message)]


def test_a_family_is_as_it_was_where_the_first_calls_fail(small_bank, tapes, monkeypatch):
    calls = []

    def third_time_unlucky(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return step.train_step(*args)

    plain = train([RUN], small_bank)
    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=captured.capturing(third_time_unlucky)))
    with pytest.warns(UserWarning, match="out of memory"):
        [result] = train([RUN], small_bank)
    assert result.weights == plain[0].weights and not tapes
