"""The settings of a chapter, and the paper's runs under them: at published scale, or quick."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ihbook import clamps, metrics, model, task
from ihbook.banks import load_bank
from ihbook.checks import one_of, whole
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.digest import digest, encode
from ihbook.engine.prepared import check_device
from ihbook.engine.results import Result
from ihbook.engine.store import fetch
from ihbook.model import Weights
from ihbook.task import Batch, Splits

PUBLISHED = 1_000_000  # sequences of the paper's main run
PUBLISHED_STRENGTHS = (.418, .736, .708, .845, .289, .553, .104, .570)  # of the paper's heads 0 to 7 (Figure 3b)
STRONG = 0.3  # an induction strength above it is a strong head's: it parts the paper's weak heads from the others
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class Scale:
    """A profile: the main run's length in sequences and learning rate, the shortest distance between evaluations in sequences,
    the sequences per evaluation set, the seeds per figure, and the most sequences that an analysis averages over."""

    n_sequences: int
    lr: float
    finest: int
    eval_size: int
    n_seeds: int
    analysed: int


PROFILES = {"paper": Scale(PUBLISHED, 1e-5, 32, 1000, 3, 100_000), "quick": Scale(64_000, 7e-4, 640, 250, 1, 10_000)}


@dataclass(frozen=True)
class Settings:
    """The parameters of a chapter. Raises ValueError that names a bad one, before anything trains, and what `load_bank` raises.

    `profile` is "paper" or "quick" (None: the environment variable IHBOOK_PROFILE, or else "paper"). The networks have `n_seeds`
    consecutive seeds from `seed` on. `n_sequences` is the length of the main run; other runs are longer or shorter in proportion,
    as in the paper. None for either takes the profile's. Fields of the task and network are as in `TaskConfig` and `ModelConfig`.
    """

    profile: str | None = None
    seed: int = 5
    n_seeds: int | None = None
    bank: str = "glyphs"
    bank_path: str | None = None
    embedding: str = "auto"
    dim: int = 512
    n_classes: int = 50
    n_test_classes: int = 100
    n_labels: int = 5
    n_pairs: int = 2
    burstiness: int = 1
    noise: float = 0.0
    zipf: float = 0.0
    n_layers: int = 2
    n_heads: int = 8
    d_model: int = 64
    mlp_ratio: float = 0.0
    positions: str = "rotary"
    n_sequences: int | None = None
    device: str = "cpu"

    def __post_init__(self):
        object.__setattr__(self, "bank_path", self.bank_path and os.fspath(self.bank_path))
        object.__setattr__(self, "profile", self.profile or os.environ.get("IHBOOK_PROFILE") or "paper")
        one_of("profile", self.profile, tuple(PROFILES))
        whole("seed", self.seed, 0)
        if self.n_seeds is None:
            object.__setattr__(self, "n_seeds", self.scale.n_seeds)
        whole("n_seeds", self.n_seeds, 1)
        if self.n_sequences is None:
            object.__setattr__(self, "n_sequences", self.scale.n_sequences)
        whole("n_sequences", self.n_sequences, 1)
        check_device(self.device)
        task.split(load_bank(self.run().bank), self.task)  # raises for a bad bank, n_classes or n_labels

    @property
    def scale(self) -> Scale:
        return PROFILES[self.profile]

    @property
    def task(self) -> TaskConfig:
        return TaskConfig(n_classes=self.n_classes, n_test_classes=self.n_test_classes, n_labels=self.n_labels,
                          n_pairs=self.n_pairs, burstiness=self.burstiness, noise=self.noise, zipf=self.zipf)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model, mlp_ratio=self.mlp_ratio,
                           positions=self.positions)

    @property
    def tokens(self) -> list[str]:
        """A name for each position of a sequence: exemplars x₁, x₂, …, their labels l₁, l₂, …, and the query x."""
        return [name + str(i + 1).translate(SUBSCRIPTS) for i in range(self.n_pairs) for name in "xl"] + ["x"]

    @property
    def as_published(self) -> bool:
        """Whether task, network, length and learning rate are the paper's, so that its numbers can be compared with ours."""
        return (self.task, self.model, self.n_sequences, self.scale.lr) == (TaskConfig(), ModelConfig(), PUBLISHED, 1e-5)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that name these settings: the bank by its contents and not by its path, and without the device."""
        named = [[name, value] for name, value in encode(self).items() if name not in ("device", "bank_path")]
        return digest([*named, load_bank(self.run().bank).digest])[:16]

    @property
    def seeds(self) -> range:
        """The seeds of the networks."""
        return range(self.seed, self.seed + self.n_seeds)

    def length(self, published: float) -> int:
        """The number of sequences, at least 32, that corresponds to `published` of the paper's 1,000,000."""
        return max(32, round(published * self.n_sequences / PUBLISHED))

    def every(self, published: float) -> int:
        """The same for a distance between evaluations, by the profile's length, and at least `Scale.finest`; 0 means never."""
        return published and max(self.scale.finest, round(published * self.scale.n_sequences / PUBLISHED))

    def run(self, length: float = PUBLISHED, *, clamps: Sequence[Any] = (), n_classes: int | None = None,
            n_labels: int | None = None, eval_every: float = 5000, heads_every: float = 0,
            checkpoint_every: float = 0, nth: int = 0) -> RunConfig:
        """A run of the `nth` seed, counted from 0; lengths and distances are the paper's. The seed gives the weights and the order
        of the data, so that it names one network, however many others are asked for."""
        return RunConfig(
            bank=BankConfig(name=self.bank, path=self.bank_path, dim=self.dim, embedding=self.embedding),
            clamps=tuple(clamps), init_seed=self.seed + nth, data_seed=self.seed + nth, lr=self.scale.lr, model=self.model,
            task=replace(self.task, n_classes=n_classes or self.n_classes, n_labels=n_labels or self.n_labels),
            n_sequences=self.length(length), eval_size=self.scale.eval_size, eval_every=self.every(eval_every),
            heads_every=self.every(heads_every), checkpoint_every=self.every(checkpoint_every))


def two_layers(settings: Settings, n_heads: int = 2) -> None:
    """Raise ValueError unless the network has two layers, and at least `n_heads` heads per layer."""
    if settings.n_layers != 2:
        raise ValueError(f"n_layers={settings.n_layers}: this chapter takes Layer 1 and Layer 2 apart, and is defined for "
                         "n_layers=2; chapter 2 takes networks of any depth")
    if settings.n_heads < n_heads:
        raise ValueError(f"n_heads={settings.n_heads}: this chapter compares heads; choose at least {n_heads}")


def main_runs(settings: Settings) -> list[RunConfig]:
    """The runs of the full network, one per seed; most chapters start from them (Figure 3)."""
    return [settings.run(heads_every=1000, checkpoint_every=20_000, nth=i) for i in range(settings.n_seeds)]


def training_sequences(settings: Settings) -> Batch:
    """All distinct training sequences, or a sample where there are more than the profile allows or they can't be listed."""
    run = settings.run()
    splits = task.split(load_bank(run.bank), run.task)
    n = run.task.n_classes * (run.task.n_classes - 1) * len(splits.train_sets) * 4
    if run.task.n_pairs == 2 and not run.task.noise and not run.task.zipf and n <= settings.scale.analysed:
        return task.every_training_sequence(splits)
    return task.sample(splits, settings.scale.analysed, task.seeded("analysis", run.eval_seed))


def fetch_each(runs: Mapping[Any, RunConfig], device: str = "cpu") -> dict[Any, Result]:
    """The results of runs by their keys, trained where the store lacks them; nothing where there are no runs."""
    return dict(zip(runs, fetch(list(runs.values()), device=device), strict=True)) if runs else {}


def phase_change(result: Result, metric: str = "loss") -> float:
    """Sequences seen when a run's training loss first falls below the paper's threshold; NaN if it never does (Figure 4b). As
    `metric`, "in_context_loss" leaves out the labels that are not in context."""
    return metrics.phase_change(result.metrics, metrics.threshold(result.run.task.n_ways), metric=metric)


def by_strength(result: Result, sequences: Batch, layer: int = 1) -> dict[int, float]:
    """The induction strength of each head of a layer of a finished network, the strongest head first (Figure 3b)."""
    strength = metrics.measure(result.weights, sequences)["strength"][0, layer].tolist()
    return dict(sorted(enumerate(strength), key=lambda item: -item[1]))


def strengths(result: Result, before: float = math.inf, layer: int = 1) -> pd.Series:
    """The induction strengths of a layer's heads, by head, at a run's last evaluation before that many sequences seen."""
    heads = result.heads[(result.heads["layer"] == layer) & (result.heads["sequences"] < before)]
    return heads[heads["sequences"] == heads["sequences"].max()].set_index("head")["strength"]


def induction_layer(result: Result, sequences: Batch) -> int:
    """The layer, counted from 0, with the strongest induction head among the layers after the first; 0 if there is only one."""
    strength = metrics.measure(result.weights, sequences)["strength"][0].amax(1)
    return int(strength[1:].argmax()) + 1 if len(strength) > 1 else 0


def previous_token_heads(result: Result, n: int = 3) -> list[int]:
    """The `n` heads of Layer 1 whose label tokens attend most to the token before them at the end of training, the weakest first.

    Three because the paper's network has three (Table 1). At least one head is left out, unless there is only one.
    """
    end = result.heads[(result.heads["sequences"] == result.heads["sequences"].max()) & (result.heads["layer"] == 0)]
    attention = end.set_index("head")["previous_token"].sort_values()
    return [int(head) for head in attention.index[-min(n, max(1, len(attention) - 1)):]]


def others(layer: int, keep: int | Sequence[int], n_heads: int) -> tuple[tuple[int, int], ...]:
    """All heads of a layer except those in `keep`, as (layer, head). Raises ValueError for a head that is not there."""
    kept = {int(head) for head in np.atleast_1d(keep)}
    if not kept <= set(range(n_heads)):
        raise ValueError(f"keep={keep!r} has a head that is not there; heads are 0 to {n_heads - 1}")
    return tuple((layer, head) for head in range(n_heads) if head not in kept)


def only(head: int | Sequence[int], n_heads: int) -> clamps.Ablate:
    """The clamp that ablates all heads of Layer 2 except these."""
    return clamps.Ablate(others(1, head, n_heads))


def without(head: int) -> clamps.Ablate:
    """The clamp that ablates this head of Layer 2."""
    return clamps.Ablate((1, head))


def single_head(run: RunConfig, head: int | Sequence[int], *more: Any) -> RunConfig:
    """The run with only this head (or these) left in Layer 2 and the clamps `more`, not its own (Figures 4b, 5b, 6, 8, 17)."""
    return replace(run, clamps=(only(head, run.model.n_heads), *more))


def six_ways(head: int, previous: int) -> dict[str, tuple[Any, ...]]:
    """What is clamped while Layer 2's head `head` learns alone, in six ways (Figure 5b); `previous` is a head of Layer 1."""
    return {"nothing": (), "previous token": (clamps.PreviousToken((0, previous)),), "layer 1": (clamps.PerfectLayer1(),),
            "match": (clamps.Induction((1, head)),), "copy": (clamps.Copy((1, head)),),
            "layer 1 and copy": (clamps.PerfectLayer1(), clamps.Copy((1, head)))}


def six_runs(settings: Settings, head: int, previous: int, nth: int = 0) -> dict[str, RunConfig]:
    """The runs of Figure 5b for the `nth` seed, by what is clamped. The first keeps checkpoints (Figure 10)."""
    return {name: single_head(settings.run(6e5 if chosen and name != "previous token" else 8e5, nth=nth, heads_every=1000,
                                           checkpoint_every=0 if chosen else 10_000), head, *chosen)
            for name, chosen in six_ways(head, previous).items()}


def previous_token_runs(settings: Settings, head: int, previous: Sequence[int], nth: int = 0) -> dict[str, RunConfig]:
    """The runs of Figure 8 for the `nth` seed, by which heads of Layer 1 are clamped to the token before: none and the last
    (strongest) of `previous`, as in Figure 5b; the first head that is not in `previous`; all of `previous`; and every head."""
    six, n_heads = six_runs(settings, head, previous[-1], nth), settings.n_heads
    chosen = {"another head": [next(h for h in range(n_heads) if h not in previous)], "three heads": previous,
              "all heads": range(n_heads)}
    return {name: six[name] for name in ("nothing", "previous token")} | {
        name: single_head(settings.run(8e5, nth=nth), head,
                          clamps.PreviousToken((0, some[0]) if len(some) == 1 else [(0, h) for h in some]))
        for name, some in chosen.items()}


@dataclass(frozen=True)
class LabelGroup:
    """Some of the labels: the `label_sets` `[set][way]` that they form, and an evaluation set of training characters with these
    labels alone (chapter 8)."""

    name: str
    label_sets: tuple[tuple[int, ...], ...]

    def draw(self, splits: Splits, n: int, generator: torch.Generator) -> Batch:
        return task.sample(splits, n, generator, label_sets=torch.tensor(self.label_sets))

    def share(self, n_sets: int) -> float:
        """The share of sequences whose context has a given one of these labels, on average, where `n_sets` label sets train."""
        labels = [label for group in self.label_sets for label in group]
        return len(labels) / len(set(labels)) / n_sets


def common_and_rare(n_common: int, n_ways: int) -> tuple[LabelGroup, LabelGroup]:
    """Two groups of labels, from 3 × `n_common` in all. The first `n_common` are common: every set of `n_ways` of them is a label
    set. The others are rare: they form only as many label sets as it takes to use each of them (chapter 8)."""
    rest = list(range(n_common, 3 * n_common))
    few = [tuple(sorted(rest[(start + way) % len(rest)] for way in range(n_ways))) for start in range(0, len(rest), n_ways)]
    return (LabelGroup("common", tuple(itertools.combinations(range(n_common), n_ways))), LabelGroup("rare", tuple(few)))


def with_groups(run: RunConfig, groups: Sequence[LabelGroup]) -> RunConfig:
    """The run with the label sets of these groups, each of them equally likely, and each group as an evaluation set."""
    return replace(run, eval_sets=tuple(groups), task=replace(run.task, label_sets=sum((each.label_sets for each in groups), ())))


def curve(result: Result, eval_set: str = "train", metric: str = "loss", **columns: Any) -> pd.DataFrame:
    """A run's losses (nats), or another metric, on an evaluation set: columns sequences, value, run (its init seed), and the
    constant `columns`."""
    rows = result.metrics[(result.metrics["eval_set"] == eval_set) & (result.metrics["metric"] == metric)]
    return rows[["sequences", "value"]].assign(run=result.run.init_seed, **columns)


def at_end(result: Result, metric: str = "accuracy") -> pd.Series:
    """A metric at a run's end, by the name of the evaluation set."""
    table = result.metrics
    rows = table[(table["sequences"] == table["sequences"].max()) & (table["metric"] == metric)]
    return rows.set_index("eval_set")["value"]


def sharpness(result: Result) -> float:
    """How many times faster the training loss falls in the half around the phase change than in the second quarter of the time to
    it (`metrics.plateau`; Figures 3a, 5b, 7); NaN where there is no change."""
    _, waits, falls = metrics.plateau(curve(result).set_index("sequences")["value"], phase_change(result))
    return falls / 2 / waits


def progress(result: Result, batch: Batch, clamps: Sequence[Any], **columns: Any) -> pd.DataFrame:
    """The losses (nats) of a run's checkpoints on a batch under `clamps`, as `curve`: a progress measure (Figure 10)."""
    seen = sorted(result.checkpoints)
    losses = metrics.measure([result.checkpoints[n] for n in seen], batch, [clamps])["loss"]
    return pd.DataFrame({"sequences": seen, "value": losses.tolist()}).assign(run=result.run.init_seed, **columns)


def loss_at(result: Result, sequences: float) -> float:
    """The loss (nats) on the set `train` at that many sequences seen, interpolated linearly; NaN after the run's end."""
    rows = curve(result)
    return float(np.interp(sequences, rows["sequences"], rows["value"], right=math.nan))


def loss_from(result: Result, sequences: float) -> float:
    """The loss (nats) on the set `train` at the first evaluation from that many sequences on, such as when a window ends; NaN after
    the run's end."""
    rows = curve(result)
    return float(rows[rows["sequences"] >= sequences]["value"].iloc[0]) if sequences <= rows["sequences"].max() else math.nan


def repeats(batch: Batch) -> Tensor:
    """Whether each query is the very exemplar of one of its context, bool `[run, batch]` (chapter 1)."""
    return (batch.ids[:, :, :-1] == batch.ids[:, :, -1:]).any(2)


def nearest_is_right(batch: Batch) -> Tensor:
    """Whether the context exemplar whose features have the largest cosine with the query's has the right label, bool
    `[run, batch]`: a yardstick for a network's match, and no ceiling, as a network learns an embedding (chapter 1)."""
    features = F.normalize(batch.exemplars, dim=-1)
    nearest = (features[:, :, :-1] * features[:, :, -1:]).sum(-1).argmax(2, keepdim=True)
    return batch.labels.gather(2, nearest).squeeze(2) == batch.targets


def right_instead(weights: Weights, batch: Batch, clamps: Sequence[Sequence]) -> tuple[int, list[float], list[float]]:
    """The number of sequences that a network gets wrong under the first of `clamps`; the share of these that it gets right under
    each of the others; and what this share would be if it were, for each right label, as large as where the first is right (NaN
    where the first is never right on a label). No shares if it gets none wrong (Tables 2 and 3)."""
    right = metrics.correct(weights, batch, clamps)
    missed = ~right[0]
    if not missed.any():
        return 0, [], []
    right, labels = right[1:].double(), batch.targets[0]
    of_label = {label: right[:, (labels == label) & ~missed].mean(1) for label in labels[missed].unique().tolist()}
    by_label = torch.stack([of_label[label] for label in labels[missed].tolist()]).mean(0)
    return int(missed.sum()), right[:, missed].mean(1).tolist(), by_label.tolist()


def gradient_norms(weights: Weights, batch: Batch, head: int, clamps: Sequence = (), layer: int = 1) -> dict[str, float]:
    """The norms of `metrics.gradients`: of a head's queries, keys, values and output, the layer before's QKV, the unembedding."""
    config, found = weights.config, metrics.gradients(weights, batch, clamps)
    q, k, v, o = (each[head] for each in model.by_head(found, layer, config))
    tensors = {"its queries": q, "its keys": k, "its values": v, "its output": o,
               "the layer before": found[f"layers.{layer - 1}.attn.qkv.weight"], "unembedding": found["unembed.weight"]}
    return {name: tensor.norm().item() for name, tensor in tensors.items()}


def half_way(heads: pd.DataFrame, strengths: Mapping[int, float], layer: int = 1) -> list[float]:
    """Sequences seen when each head first exceeds half of its number in `strengths`, by a run's heads table (Figure 3b)."""
    by_head = heads[heads["layer"] == layer].pivot(index="sequences", columns="head", values="strength")
    return [metrics.crossing(-by_head[head], -strength / 2) for head, strength in strengths.items()]


def rank_correlations(heads: pd.DataFrame, column: str) -> list[float]:
    """Spearman's correlation of `strength` with another column, one number per run of the table, in its order. A missing number
    (a head that never learns) ranks last; NaN where all ranks are equal (Figure 18)."""
    return [each["strength"].rank().corr(each[column].fillna(math.inf).rank()) for _, each in heads.groupby("run", sort=False)]


def random_correlations(n_heads: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Spearman's correlations of `n_heads` heads with heads in random order, in an array of this shape: the null distribution."""
    ranks = np.arange(n_heads) - (n_heads - 1) / 2
    return np.random.default_rng(seed).permuted(np.broadcast_to(ranks, (*shape, n_heads)), axis=-1) @ ranks / (ranks @ ranks)
