"""What the live panels of a page share: a run's task, sequences to look at, networks, and the worker's script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ihbook import task
from ihbook.banks import load_bank
from ihbook.chapters import experiments
from ihbook.chapters.live import data, operate, what_if
from ihbook.chapters.panels import STYLE, Shown, patterns
from ihbook.clamps import Clamp
from ihbook.config import RunConfig
from ihbook.engine.results import Result
from ihbook.model import Weights, shapes

WORKER = ("unpack", "random", "products", "network", "step", "encoder", "worker")
TOKENS = ["x", "ℓ", "x", "ℓ", "?"]


@dataclass(frozen=True, eq=False, repr=False)
class Page:
    """A page's live panels. It shows itself as what they share, which must stand before the first of them. `networks` hold weights
    by words, the finished ones last. There are no live panels for a network or task that the scripts don't know."""

    run: RunConfig
    shown: Sequence[Shown]
    networks: Mapping[str, Weights]

    def _repr_html_(self) -> str:
        if not data.offered(self.run):
            return ""
        bank = load_bank(self.run.bank)
        features, sequences = data.gathered([each.batch for each in self.shown], task.split(bank, self.run.task).train_bank[0])
        kinds = data.label_counts(self.run)
        found = {
            "shapes": {n: shapes(self.run.model, bank.dim, n) for n in kinds},
            "sets": {n: task.label_sets(replace(self.run.task, n_labels=n))[0].tolist() for n in kinds},
            "answers": {n: data.answers(n) for n in kinds},
            "patterns": [patterns(layer, data.N_HEADS, TOKENS) for layer in range(2)],
            "bank": data.packed(features), "shown": sequences, "nClasses": self.run.task.n_classes,
            "nLabels": self.run.task.n_labels,
            "networks": {name: data.halves(weights) for name, weights in self.networks.items()}}
        style = data.FOLDER.joinpath("live.css").read_text(encoding="utf-8")
        return f'{STYLE}<style>{style}</style>{data.script(found, "ih-shared")}{data.script(data.source(*WORKER), "ih-worker")}'

    def operate(self, kinds: Mapping[str, Clamp], instead: str) -> str:
        """The panel that operates on a network, under heads switched off and the clamps `kinds`, as HTML."""
        return operate.html_of(self.run, list(self.networks), kinds, instead) if operate.drawable(self.run) else instead

    def what_if(self, runs: Mapping[str, RunConfig], ways: what_if.Ways) -> str | None:
        """The panel that trains, as HTML: `runs` hold one run per learning rate, by words; `ways` clamps by heads and name."""
        return what_if.html_of(runs, ways, self.shown, list(self.networks)) if data.offered(self.run) else None


def networks(result: Result) -> dict[str, Weights]:
    """Networks of a run for a page: half-way to its phase change, at it, and finished."""
    seen, change = sorted(result.checkpoints), experiments.phase_change(result)
    found = {}
    for words, share in (("the plateau", 0.5), ("the phase change", 1.0)) if seen and change == change else ():
        near = min(seen, key=lambda at: abs(at - share * change))
        found[f"{words} ({near:,} sequences)"] = result.checkpoints[near]
    return found | {f"the end ({result.run.n_sequences:,} sequences)": result.weights}
