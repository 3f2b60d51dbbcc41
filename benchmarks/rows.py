"""What is timed: rows of runs, and the rate of one of them. It uses only what every version of the package has."""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace

from ihbook import clamps as c
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.model import initial_weights

try:
    from ihbook import seeds, train
except ImportError:  # an older commit, where they stand in a module
    from ihbook.train import seeds, train

RUN = RunConfig(bank=BankConfig(n_classes=300))


@dataclass(frozen=True)
class Row:
    """`n_runs` seeds of a run, timed over `steps` steps each, less the time of a call of `fewest` steps."""

    run: RunConfig
    n_runs: int = 8
    steps: int = 4000
    fewest: int = 1000

    def rate(self) -> float:
        """Sustained run-steps per second, without starting and compiling."""
        short = min(self._seconds(self.fewest) for _ in range(2))  # the first fills the caches
        return self.n_runs * (self.steps - self.fewest) / (self._seconds(self.steps) - short)

    def _seconds(self, n_steps: int) -> float:
        with tempfile.TemporaryDirectory() as directory:
            runs = seeds(replace(self.run, n_sequences=32 * n_steps), self.n_runs)
            start = time.perf_counter()
            train(runs, directory=directory, compile=True, progress=False)
            return time.perf_counter() - start


def _clamped() -> dict[str, tuple]:
    donor = initial_weights(ModelConfig(), 512, 5, 9)
    return {
        "Ablate": (c.Ablate(tuple((1, h) for h in range(8) if h != 3)),), "Preserve": (c.Ablate((0, 1)), c.Preserve("patterns")),
        "PreviousToken": (c.PreviousToken((0, 2)),), "BlockPreviousToken": (c.BlockPreviousToken((0, 2)),),
        "Induction": (c.Induction((1, 3)),), "SimilarityMatch": (c.SimilarityMatch((1, 3), 0.5),),
        "HeadTemperature": (c.HeadTemperature((1, 3), 2.0),), "LabelAttentionOnly": (c.LabelAttentionOnly((1, 3)),),
        "Copy": (c.Copy((1, 3)),), "PerfectLayer1": (c.PerfectLayer1(),),
        "PerfectLayer1 + Copy": (c.PerfectLayer1(), c.Copy((1, 3))), "Graft": (c.Graft(donor),),
        "AblateEmbedding": (c.AblateEmbedding(),),
    }


ROWS = {
    "1 run": Row(RUN, 1, 15_000), "2 runs": Row(RUN, 2, 15_000, 4000),
    "8 runs": Row(RUN), "32 runs": Row(RUN, 32, 2000, 500),
    "8 runs, no evaluation": Row(replace(RUN, eval_every=0)),
    "8 runs, heads every 1,000": Row(replace(RUN, heads_every=1000), steps=5000),
    **{f"8 runs, {n} classes": Row(replace(RUN, task=TaskConfig(n_classes=n))) for n in (100, 200)},
    **{f"8 runs, {name}": Row(replace(RUN, clamps=chosen)) for name, chosen in _clamped().items()},
    **{f"8 runs, width {n}": Row(replace(RUN, model=ModelConfig(d_model=n))) for n in (32, 128)},
    **{f"8 runs, {2 * n + 1} positions": Row(replace(RUN, task=TaskConfig(n_pairs=n, burstiness=n // 2))) for n in (4, 8)},
}


if __name__ == "__main__":  # a process of compare.py, with the package of one commit
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=ROWS)
    print(ROWS[parser.parse_args().row].rate())
