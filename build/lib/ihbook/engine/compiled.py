"""The step and the evaluation, compiled on a CPU or captured on a GPU, and what that costs."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ihbook import metrics
from ihbook.clamps.compose import Plan
from ihbook.engine import step
from ihbook.engine.captured import capturing
from ihbook.engine.flat import filled, form_of, names_of, tensors_of
from ihbook.engine.step import Program, train_step
from ihbook.task import Batch

BLOCK = {"cpu": 1, "cuda": 512}  # runs in one program: a CPU's caches hold no more than one, and others gain it nothing
PLAIN_BLOCK = 8  # runs in one on a CPU that is not compiled, where more of them share the cost of calling each operation
COMPILE_FROM = {"cpu": 31_000, "cuda": 100}  # run-steps: a CPU compiles for half a minute, to save a millisecond at each


def program_for(compile: bool, device: str | torch.device) -> Program:
    """The program of a family; plain, with a warning, where it is to be compiled but there is no compiler."""
    if not compile:
        return step.PLAIN
    if torch.device(device).type == "cuda":
        return Program(capturing(train_step), metrics.summed)
    if not has_compiler():
        warnings.warn("there is no C++ compiler, so training is not compiled, and takes two to four times as long; install g++ "
                      "or clang to change that", stacklevel=2)
        return step.PLAIN
    return _compiled_program()


@cache
def _compiled_program() -> Program:
    """One for all families of a process, so that none compiles what another has."""
    return Program(compiling(train_step), compiling(metrics.summed))


def has_compiler() -> bool:
    """Whether PyTorch finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except InvalidCxxCompiler:
        return False


def compiling(plain: Callable) -> Callable:
    """`plain`, compiled for every new form and size of its arguments at the first call with them. Where that fails: one warning,
    and `plain` itself.

    The arguments are traced as a flat list of tensors, and the program is called with such a list: PyTorch's own way of finding the
    program for nested arguments would take a seventh of a step.
    """
    programs: dict[tuple, Callable | None] = {}
    last: tuple = None, None, None  # the plan and sizes of the last call, and its program; threads take all three or none
    lock = threading.Lock()

    def call(*arguments) -> dict[str, Tensor] | Tensor:
        nonlocal last
        tensors = tensors_of(arguments)
        batch, plan = (next(each for each in arguments if isinstance(each, kind)) for kind in (Batch, Plan))
        others = tuple(each for each in arguments if not isinstance(each, (Batch, Plan, Tensor, dict)))
        sizes = [(t.shape, t.stride()) for t in (batch.bank, batch.ids)], names_of(arguments), others
        last_plan, last_sizes, program = last
        if last_plan is not plan or sizes != last_sizes:
            compile_key = others, form_of(plan), tuple(sizes[1]), tuple((t.shape, t.stride(), t.dtype) for t in tensors)
            with lock:
                if compile_key not in programs:
                    programs[compile_key] = compiled(plain, arguments, tensors)
            program = programs[compile_key]
            last = plan, sizes, program
        return plain(*arguments) if program is None else program(*tensors)

    return call


def compiled(plain: Callable, arguments: tuple, tensors: list[Tensor]) -> Callable | None:
    """A function of the tensors in `arguments` alone; None, with a warning, where it can't be compiled. Nothing is run."""
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*values: Tensor) -> dict[str, Tensor] | Tensor:
        rest = iter(values)
        return plain(*(filled(each, rest) for each in arguments))

    try:
        graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        return torch._inductor.compile(graph, tensors, options={"size_asserts": False, "cpp_wrapper": True})
    except Exception as error:  # whatever it is, the plain step says it again, or does without
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"training is not compiled, and takes two to four times as long: {reason}", stacklevel=2)
        return None
