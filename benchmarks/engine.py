"""How fast the engine trains, in run-steps per second and as a share of what this machine's matrix products allow.

    python benchmarks/engine.py            the table of the README (about twenty minutes)
    python benchmarks/engine.py 8 Copy     only the rows whose names contain one of these words
"""

import sys
import tempfile
import time
from dataclasses import replace

import torch

from ihbook import BankConfig, ModelConfig, RunConfig, TaskConfig, engine, load_bank, seeds, train
from ihbook import clamps as c
from ihbook.engine import blocks, compiled
from ihbook.model import initial_weights

FLOP = 32e6  # per run-step at the published size: forward and backward of 32 sequences, without attention's products
RUN = RunConfig(bank=BankConfig(n_classes=300))
ONLY_3 = c.Ablate(tuple((1, h) for h in range(8) if h != 3))
CLAMPS = {
    "Ablate": (ONLY_3,), "Preserve": (c.Ablate((0, 1)), c.Preserve("patterns")), "PreviousToken": (c.PreviousToken((0, 2)),),
    "BlockPreviousToken": (c.BlockPreviousToken((0, 2)),), "Induction": (c.Induction((1, 3)),),
    "SimilarityMatch": (c.SimilarityMatch((1, 3), 0.5),), "HeadTemperature": (c.HeadTemperature((1, 3), 2.0),),
    "LabelAttentionOnly": (c.LabelAttentionOnly((1, 3)),), "Copy": (c.Copy((1, 3)),), "PerfectLayer1": (c.PerfectLayer1(),),
    "PerfectLayer1 + Copy": (c.PerfectLayer1(), c.Copy((1, 3))), "Graft": (c.Graft(initial_weights(ModelConfig(), 512, 5, 9)),),
    "AblateEmbedding": (c.AblateEmbedding(),),
}


def gemm(seconds: float = 2.0) -> float:
    """FLOP per second of large matrix products on all cores, sustained for `seconds` as in training: the bound for all rows."""
    a, n, start = torch.randn(1024, 1024), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        n += 1
    return n * 2 * 1024**3 / (time.perf_counter() - start)


def rate(run: RunConfig, n_runs: int, steps: int = 1000) -> float:
    """Sustained run-steps per second: the time of a long call minus that of a short one, without starting and compiling."""
    def seconds(n_steps: int) -> float:
        runs = seeds(replace(run, n_sequences=32 * n_steps), n_runs)
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            train(runs, directory=directory, compile=True, progress=False)
            return time.perf_counter() - start

    blocks.SHARE_FROM = 1  # so that even short calls get one process per core
    seconds(8)  # fills the compiler's cache on disk
    short = min(seconds(8) for _ in range(2))
    return n_runs * (steps - 8) / (seconds(steps) - short)


def rows():
    """Yield the name, run, number of runs and steps of each row."""
    for n in (1, 2, 8, 32):
        yield f"{n} run{'s' * (n > 1)}", RUN, n, 15_000 if n < 8 else 7_500
    yield "8 runs, no evaluation", replace(RUN, eval_every=0), 8, 7500
    for name, chosen in CLAMPS.items():
        yield f"8 runs, {name}", replace(RUN, clamps=chosen), 8, 5000
    for width in (32, 128):
        yield f"8 runs, width {width}", replace(RUN, model=ModelConfig(d_model=width)), 8, 2000
    for pairs in (4, 8):
        task = TaskConfig(n_pairs=pairs, burstiness=pairs // 2)
        yield f"8 runs, {2 * pairs + 1} positions", replace(RUN, task=task), 8, 2000


def main() -> None:
    wanted = sys.argv[1:]
    load_bank(RUN.bank)
    print(f"PyTorch {torch.__version__}, {blocks.n_cores()} cores, blocks of {compiled.BLOCK['cpu']}, evaluation every "
          f"{RUN.eval_every} on {RUN.eval_size} sequences a set, version {engine.VERSION}\n")
    print("| | run-steps/s | share of the bound | of 8 runs |\n|---|---|---|---|")
    reference = None
    for name, run, n_runs, steps in rows():
        if wanted and not any(word in name for word in wanted):
            continue
        before, found, after = gemm(), rate(run, n_runs, steps), gemm()
        bound = (before + after) / 2 / FLOP
        reference = found if name == "8 runs" else reference
        share = f"{found / bound:.0%} of {bound:,.0f}" if "width" not in name and "positions" not in name else ""
        print(f"| {name} | {found:,.0f} | {share} | {found / reference:.2f} |" if reference
              else f"| {name} | {found:,.0f} | {share} | |", flush=True)


if __name__ == "__main__":
    main()
