"""How fast the engine trains, in run-steps per second, and what part of that is the matrix products.

    python benchmarks/engine.py            the tables of the README (about twenty minutes)
    python benchmarks/engine.py 8 Copy     only the rows whose names contain one of these words
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rows import ROWS, RUN
from torch import Tensor

from ihbook import engine, load_bank, metrics
from ihbook.engine import blocks, compiled, family, flat, products, programs, step
from ihbook.engine.prepared import prepare
from ihbook.engine.state import FamilyState
from ihbook.model import stack


def seconds(call: Callable[[], object], least: float = 0.5) -> float:
    """The time of a call in a hot loop: the median of seven loops of `least` seconds in all."""
    call()
    found, n = [], 1
    while len(found) < 7:
        start = time.perf_counter()
        for _ in range(n):
            call()
        taken = time.perf_counter() - start
        if taken * 7 < least:
            n = max(n + 1, int(n * min(10, least / 7 / taken)))
        else:
            found.append(taken / n)
    return sorted(found)[3]


class Step:
    """A compiled step of one unclamped run, and its parts, as functions to time."""

    def __init__(self):
        self.prepared = prepare([RUN])
        params = stack([self.prepared[0].weights])
        self.state = FamilyState(0, [0], params, step.initial_moments(params, RUN))
        self.program = compiled.program_for(True, "cpu")
        self.schedule = family.Schedule(self.prepared, "cpu", self.program)
        graphs, loaded = [], programs._loaded
        programs._loaded = lambda graph, tensors, wait: graphs.append(graph) or loaded(graph, tensors, wait)
        self.whole()
        programs._loaded = loaded
        nodes = [node for node in graphs[0].graph.nodes if node.target is products.OPERATION]
        likes = [[each.meta["val"] for each in node.args] for node in nodes]
        self.operands = [torch.empty_strided(x.shape, x.stride()).normal_() for pair in likes for x in pair]
        self._products = programs.compiled(multiply, tuple(self.operands), self.operands)
        gradients = {name: torch.randn_like(p) for name, p in params.items()}
        self._arguments = params, self.state.moments, gradients, self.schedule.batch(self.state)[1]
        self._update = programs.compiled(update, self._arguments, flat.tensors_of(self._arguments))

    def whole(self) -> None:
        batch, scalars = self.schedule.batch(self.state)
        self.program.step(self.state.params, self.state.moments, batch, self.schedule.plan(self.state), RUN.model, scalars)

    def products(self) -> None:
        self._products(*self.operands)

    def mkl_products(self) -> None:
        multiply(*self.operands)

    def optimiser(self) -> None:
        self._update(*flat.tensors_of(self._arguments))

    def evaluation(self) -> None:
        for name in self.prepared[0].eval_sets:
            metrics.evaluate(self.state.params, self.schedule.eval_set(name, [0]), RUN.model, self.schedule.plan(self.state),
                             chunk=family.EVAL_CHUNK, summed=self.program.evaluate)


def multiply(*operands: Tensor) -> dict[str, Tensor]:
    return {str(i): operands[i] @ operands[i + 1] for i in range(0, len(operands), 2)}


def update(*arguments) -> dict[str, Tensor]:
    step.update(*arguments)
    return {"scalars": arguments[-1].clone()}


def large() -> float:
    """FLOP per second of large matrix products on one core, by PyTorch or by the programs' kernel, whichever is faster."""
    a, b = torch.randn(1024, 1024), torch.randn(256, 256)
    own = programs.compiled(multiply, (b, b), [b, b])
    return max(2 * 1024**3 / seconds(lambda: a @ a), 2 * 256**3 / seconds(lambda: own(b, b)))


FIRST = """
import os, time
import torch
from ihbook import train
from rows import RUN
from dataclasses import replace
imported, first = time.time(), []
train([replace(RUN, n_sequences=32)], compile=True, progress=False)
print(imported - float(os.environ["STARTED"]), time.time() - imported)
"""


def first_step() -> tuple[float, float]:
    """Seconds from the start of a process to the end of its imports, and from there to the end of its first compiled step."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-c", FIRST]
    found = [subprocess.check_output(command, cwd=here, text=True, env={**os.environ, "STARTED": str(time.time())}) for _ in "123"]
    return tuple(sorted(map(float, column))[1] for column in zip(*map(str.split, found), strict=True))


def parts() -> tuple[float, float]:
    """Print the parts of a step, and return the time of its products at their real shapes, and their FLOP."""
    one = Step()
    timed = one.whole, one.products, one.mkl_products, one.optimiser, one.evaluation
    whole, multiplied, mkl, adam, evaluation = map(seconds, timed)
    evaluation /= RUN.eval_every / RUN.batch_size
    print("| one run on one core | µs per step |\n|---|---|")
    for name, value in (("step", whole), ("its products, by the program's kernel", multiplied), ("Adam", adam),
                        ("the rest of the step", whole - multiplied - adam), ("evaluation", evaluation),
                        ("the same products, by PyTorch's library", mkl)):
        print(f"| {name} | {value * 1e6:.0f} |")
    print("\nA new process imports for {:.1f} s, and takes its first compiled step {:.1f} s later.\n".format(*first_step()))
    return multiplied, sum(2 * a.numel() * b.shape[-1] for a, b in zip(one.operands[::2], one.operands[1::2], strict=True))


def main() -> None:
    wanted = sys.argv[1:]
    load_bank(RUN.bank)
    print(f"PyTorch {torch.__version__}, {blocks.n_cores()} cores, evaluation every {RUN.eval_every} sequences on {RUN.eval_size} "
          f"of each set, version {engine.VERSION}\n")
    torch.set_num_threads(1)
    multiplied, flop = parts()
    print("| | run-steps/s | share of large products' rate | share of its own products' | of 8 runs |\n|---|---|---|---|---|")
    reference = None
    for name, row in ROWS.items():
        if wanted and not any(word in name for word in wanted):
            continue
        n = min(row.n_runs, blocks.n_cores())
        before, found, after = large(), row.rate(), large()
        reference = found if name == "8 runs" else reference
        same = not any(word in name for word in ("width", "positions", "classes"))
        shares = f"{found * flop / n / (before + after) * 2:.0%} | {found * multiplied / n:.0%}" if same else " | "
        print(f"| {name} | {found:,.0f} | {shares} | {f'{found / reference:.2f}' if reference else ''} |", flush=True)


if __name__ == "__main__":
    main()
