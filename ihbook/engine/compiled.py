"""The program of a family: plain, compiled on a CPU, or with its step captured on a GPU; and where that pays."""

from __future__ import annotations

import operator
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from ihbook import metrics
from ihbook.clamps.compose import Plan
from ihbook.engine import step
from ihbook.engine.captured import capturing
from ihbook.engine.flat import form_of, names_of, tensors_of
from ihbook.engine.programs import compiled
from ihbook.engine.step import Program, train_step
from ihbook.files import Busy
from ihbook.task import Batch

BLOCK = {"cpu": 1, "cuda": 512}  # most runs per family: a CPU's caches hold only one run, and more would gain nothing
PLAIN_BLOCK = 8  # most runs per family on a CPU without compiling: they share the cost of calling each operation
COMPILE_FROM = {"cpu": 30_000, "cuda": 100}  # run-steps, `pays`: a CPU compiles a step and an evaluation, 25 s of a core each
CALLING = {"cpu": 1.5, "cuda": 0}  # run-steps: what a plain step costs beyond those of its runs, to call each operation


def program_for(compile: bool, device: str | torch.device) -> Program:
    """The program of a family. It is plain without `compile` and, with a warning, on a CPU without a C++ compiler."""
    if not compile:
        return step.PLAIN
    if torch.device(device).type == "cuda":
        return Program(capturing(train_step), metrics.summed)
    if not has_compiler():
        warnings.warn("there is no C++ compiler, so training is not compiled, and takes four to eight times as long; install "
                      "g++, or name another compiler in CXX, to change that", stacklevel=2)
        return step.PLAIN
    return _compiled_program()


@cache
def _compiled_program() -> Program:
    """The program of all compiled families of a process, so that nothing is compiled twice."""
    stepping = Compiling(train_step)
    return Program(stepping, Compiling(metrics.summed), stepping.prepare)


def pays(steps: Sequence[int], device: str) -> bool:
    """Whether it pays to compile (on a GPU, to capture) one program for runs of so many steps each. A long run gains more by it
    than short ones with as many run-steps in all, which share the cost of calling each operation where they are not compiled."""
    return sum(steps) + CALLING[device] * max(steps) >= COMPILE_FROM[device]


def has_compiler() -> bool:
    """Whether there is a C++ compiler where PyTorch looks for one."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


class Compiling:
    """`plain`, compiled at the first call with each new form and size of its arguments. If that fails, warn, and call `plain`.

    The compiled function takes a flat list of tensors: PyTorch's own lookup of a compiled function for nested arguments would
    take a seventh of a step.
    """

    def __init__(self, plain: Callable):
        self.plain = plain
        self._functions: dict[tuple, Callable | None] = {}
        self._last: tuple = (), [], None  # the last call's fixed arguments, layout and function, read by threads as one
        self._lock = threading.Lock()

    def __call__(self, *arguments) -> dict[str, Tensor] | Tensor:
        tensors = tensors_of(arguments)
        function = self._function(arguments, tensors)
        return self.plain(*arguments) if function is None else function(*tensors)

    def prepare(self, *arguments) -> None:
        """Compile for these arguments, unless another process is doing so now."""
        with suppress(Busy):
            self._function(arguments, tensors_of(arguments), wait=False)

    def _function(self, arguments: tuple, tensors: list[Tensor], wait: bool = True) -> Callable | None:
        fixed = [each for each in arguments if not isinstance(each, (Batch, Tensor))]
        changing = [t for each in arguments if isinstance(each, (Batch, Tensor))
                    for t in ([each.bank, each.ids] if isinstance(each, Batch) else [each])]
        layout = [(t.shape, t.stride()) for t in changing]
        last_fixed, last_layout, function = self._last
        if layout != last_layout or not all(map(operator.is_, fixed, last_fixed)):
            plan = next(each for each in fixed if isinstance(each, Plan))
            others = tuple(each for each in fixed if not isinstance(each, (Plan, dict)))
            key = others, form_of(plan), tuple(names_of(arguments)), tuple((t.shape, t.stride(), t.dtype) for t in tensors)
            with self._lock:
                if key not in self._functions:
                    self._functions[key] = compiled(self.plain, arguments, tensors, wait)
            function = self._functions[key]
            self._last = fixed, layout, function
        return function
