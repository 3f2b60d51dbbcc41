"""Longer contexts, deeper networks, MLPs and other positions: their settings, and what is measured of a run (chapter 13)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from ihbook import metrics
from ihbook.chapters import experiments
from ihbook.chapters.experiments import Settings
from ihbook.config import RunConfig
from ihbook.engine.results import Result
from ihbook.task import Batch

N_LABELS = 10  # enough for eight pairs
GIVEN = 0.25  # the share of an unclamped run's length: a clamped run that learns at all learns early
SQUARE = (1.5, 2.5)  # exponents that count as a square
LONGER = {2: 1, 4: 3, 8: 8}  # times as many sequences as with two pairs
MOST = 300  # evaluations of a run: with more, those of long runs on long contexts cost a third of the training
ALONG = {"two pairs": {}, "four pairs": {"n_pairs": 4}, "eight pairs": {"n_pairs": 8}, "three layers": {"n_layers": 3},
         "four layers": {"n_layers": 4}, "MLPs": {"mlp_ratio": 4.0}, "sinusoidal positions": {"positions": "sinusoidal"},
         "learned positions": {"positions": "learned"}}  # one property at a time


CROSSED = {f"{k} pairs, {d} layers" + ", MLPs" * bool(m): {"n_pairs": k, "n_layers": d, "mlp_ratio": float(m)}
           for k in (2, 4, 8) for d in (2, 3, 4) for m in (0, 4)} | {
    "4 pairs, 2 layers, 20 labels": {"n_pairs": 4, "n_layers": 2, "mlp_ratio": 0.0, "n_labels": 20}}  # as many labels per pair


def variant(settings: Settings, changed: Mapping[str, object]) -> Settings:
    """The settings of a network with some properties changed: ten labels, at the scale of the profile quick, and longer runs for
    longer contexts."""
    n_pairs = changed.get("n_pairs", settings.n_pairs)
    quick = experiments.PROFILES["quick"].n_sequences
    share = settings.n_sequences / settings.scale.n_sequences  # of a profile's usual length
    length = round(quick * share * LONGER.get(n_pairs, n_pairs / 2))
    return replace(settings, **{"profile": "quick", "n_labels": N_LABELS, "n_sequences": length, **changed})


def run_of(settings: Settings, nth: int) -> RunConfig:
    """The run of the `nth` seed under a variant's settings, with its heads, evaluated at most `MOST` times after the start."""
    run = settings.run(heads_every=5000, nth=nth)
    every = max(run.eval_every, -(-run.n_sequences // MOST))
    return replace(run, eval_every=every, heads_every=every)


def crossed(table: pd.DataFrame) -> pd.DataFrame:
    """The recorded table of `CROSSED` (columns network, time, matched, …) as pairs × layers and MLPs: medians of the times of the
    phase change with nothing clamped, and with a perfect match."""
    medians = table.fillna({"time": math.inf, "matched": math.inf}).groupby("network")[["time", "matched"]].median()
    found: dict[str, dict[str, str]] = {}
    for name, changed in CROSSED.items():
        if name in medians.index:
            kind = name.split(" pairs, ")[1] if "n_labels" not in changed else "2 layers, labels in proportion"
            found.setdefault(kind, {})[f"{changed['n_pairs']} pairs"] = " / ".join(
                "never" if math.isinf(time) else f"{time:,.0f}" for time in medians.loc[name])
    return pd.DataFrame(found).fillna("–")


def said_of_crossed(table: pd.DataFrame) -> list[str]:
    """What the recorded table of `CROSSED` says, in sentences."""
    n_pairs = pd.Series([CROSSED[name]["n_pairs"] for name in table["network"]], table.index)
    said = [f"With {n} pairs, {share:.0%} of the networks have a phase change in the length of their runs."
            for n, share in table["time"].notna().groupby(n_pairs).mean().items()]
    learnt = table[table["time"].notna()]
    left, low, high = learnt["matched"] / learnt["time"], learnt["plateau"].min(), learnt["plateau"].max()
    said.append(f"Where there is one, its plateau lies at {low:.2f} to {high:.2f} times the loss of a guess, and a perfect match "
                f"leaves {left.min():.1%} to {left.max():.1%} of the wait.")
    kinds = learnt.groupby("network")["time"].median()
    powers = [power(time, kinds[longer], 2, 4) for name, time in kinds.items() if name.startswith("2 pairs")
              and (longer := name.replace("2 pairs", "4 pairs")) in kinds.index]
    if powers:
        said.append(f"From two pairs to four the time grows with the number of tokens to the power of {min(powers):.1f} to "
                    f"{max(powers):.1f}, by kind of network.")
    return said


def over_guess(result: Result) -> pd.DataFrame:
    """A run's training loss over that of a guess among the labels in context, as `experiments.curve`."""
    rows = experiments.curve(result)
    return rows.assign(value=rows["value"] / math.log(result.run.task.n_ways))


def form(result: Result) -> dict[str, float]:
    """How a run learns: `time` of its phase change, the height of its `plateau` over the loss of a guess, and how long its `drop`
    takes, from 0.8 to 0.2 times the loss of a guess, as a share of that time. NaN where there is no phase change."""
    losses = over_guess(result).set_index("sequences")["value"]
    time = experiments.phase_change(result)
    drop = metrics.crossing(losses, 0.2) - metrics.crossing(losses, 0.8)
    return {"time": time, "plateau": metrics.plateau(losses, time)[0], "drop": drop / time}


def on_stairs(result: Result, width: float = 0.05) -> float:
    """The share of the time from 0.9 to 0.2 times the loss of a guess that the loss spends within `width` of a guess among fewer
    labels, over that of a guess among all: where a network would wait that rules out one label after the other."""
    losses, n_ways = over_guess(result).set_index("sequences")["value"], result.run.task.n_ways
    start, end = metrics.crossing(losses, 0.9), metrics.crossing(losses, 0.2)
    seen = np.linspace(start, end, 2001)
    value = np.interp(seen, losses.index, losses)
    steps = [math.log(m) / math.log(n_ways) for m in range(2, n_ways)]
    return math.nan if math.isnan(end) or not steps else float(np.any([np.abs(value - step) < width for step in steps], 0).mean())


def exponent(short: Result, long: Result) -> float:
    """The exponent of the time of the phase change in the number of tokens, between two contexts. Where the longer is never learnt
    it is infinite if even the length of its run would make it more than a square, and NaN otherwise."""
    a, b = experiments.phase_change(short), experiments.phase_change(long)
    found = power(a, long.run.n_sequences if math.isnan(b) else b, short.run.task.n_pairs, long.run.task.n_pairs)
    return found if not math.isnan(b) else math.inf if found > SQUARE[1] else math.nan


def power(short: float, long: float, short_pairs: int, long_pairs: int) -> float:
    """The exponent between two times, in the number of tokens."""
    return math.log(long / short) / math.log((2 * long_pairs + 1) / (2 * short_pairs + 1))


def where(result: Result, sequences: Batch) -> dict[str, tuple[int, int]]:
    """The strongest induction head after the first layer, and the head before the last with the most attention from labels to the
    tokens before them, as (layer, head)."""
    found = metrics.measure(result.weights, sequences)
    strength, previous = found["strength"][0, 1:], found["previous_token"][0, :-1]
    n_heads = strength.shape[1]
    a, b = int(strength.argmax()), int(previous.argmax())
    return {"induction": (a // n_heads + 1, a % n_heads), "previous token": (b // n_heads, b % n_heads)}
