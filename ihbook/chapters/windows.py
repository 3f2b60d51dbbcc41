"""Help for a while: the clamps of Figure 5b in windows of training, in a network and in the toy model, and what is left when they
end (chapter 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ihbook import metrics, toy
from ihbook.chapters import experiments
from ihbook.clamps import Ablate, BlockPreviousToken, Clamp, During
from ihbook.config import RunConfig
from ihbook.engine.results import Result

Window = tuple[int, int]  # from the first number of sequences seen on, and no longer at the second
TOY_LEVEL = 0.4  # of the loss of learning nothing: as the threshold of a phase change is of a guess between the labels
GIVEN = {"layer 1": ("a",), "match": ("a", "b")}  # vectors that stand for a clamp
ALIKE = {"copy": "layer 1", "layer 1 and copy": "match"}  # the toy's vectors are exchangeable: only their number matters
N_ORDERS = 3  # of the data, under which a network without help is trained: how far times spread by chance


def check(starts: Sequence[float], lengths: Sequence[float]) -> None:
    """Raise ValueError unless windows can have these starts and lengths."""
    for name, values, least in (("starts", starts, "from 0 to 1"), ("lengths", lengths, "above 0")):
        if not isinstance(values, (list, tuple)) or not values or not all(
                isinstance(x, (int, float)) and (0 <= x <= 1 if name == "starts" else x > 0) for x in values):
            raise ValueError(f"{name}={values!r} must be a list of numbers {least}")


def need(never: float, always: float) -> float:
    """The unit of a window's length: the time that learning takes under a clamp that always holds, or a quarter of the time
    without it (`never`) where that is less. NaN where nothing is learnt without it."""
    return math.nan if math.isnan(never) else np.fmin(always, never / 4)


def snap(run: RunConfig, start: float, length: float) -> Window:
    """The window of about this start and length, in sequences, that begins and ends with a step of the run. It is never empty."""
    step = run.batch_size
    first = round(start / step) * step
    return first, first + max(1, round(length / step)) * step


def helped(run: RunConfig, clamps: Sequence[Clamp], window: Window) -> RunConfig:
    """The run with these clamps too, in a window of its training."""
    return replace(run, clamps=(*run.clamps, *(During(clamp, *window) for clamp in clamps)))


def grid(run: RunConfig, ways: Mapping[str, Sequence[Clamp]], never: float, always: Mapping[str, float], starts: Sequence[float],
         lengths: Sequence[float]) -> dict[tuple[str, float, float], tuple[RunConfig, Window]]:
    """The run under each of `ways` in windows that start at a share of `never` and have a length in units of `need`, by (name,
    start, length), each with its window; nothing where `never` is NaN."""
    windows = {(name, start, length): snap(run, start * never, length * need(never, always[name]))
               for name in ways for start in starts for length in lengths if not math.isnan(never)}
    return {key: (helped(run, ways[key[0]], window), window) for key, window in windows.items()}


def time_without_help(result: Result, until: int) -> float:
    """Sequences seen when the training loss is first below the threshold of a phase change once the help has ended, `until`."""
    losses = experiments.curve(result).set_index("sequences")["value"]
    return metrics.crossing(losses[losses.index >= until], metrics.threshold(result.run.task.n_ways))


@dataclass(frozen=True, eq=False)
class Help:
    """What windows of help did for the single heads of some networks: the `windows` and their `results`, by (network, clamp,
    start, length), runs without an end to the help in `unended`, by (network, clamp), runs without help under other orders of the
    data in `others`, by (network, order), and a `table`, one row per window: clamp, start, length, run (the seed), never, from,
    until, time (of the phase change once the help has ended), ratio (time over never), net (the same without the help's own time),
    and loss_after (nats, at the first evaluation without help). A ratio is infinite where the run never gets there, and NaN where
    it ends too soon to tell: at less than 1.25 times never."""

    unended: dict[tuple[int, str], Result]
    others: dict[tuple[int, int], Result]
    windows: dict[tuple[int, str, float, float], Window]
    results: dict[tuple[int, str, float, float], Result]
    table: pd.DataFrame

    @property
    def times(self) -> pd.DataFrame:
        """Sequences seen at the phase change with help that never ends: networks × clamps, "nothing" first."""
        names = list(dict.fromkeys(name for _, name in self.unended))
        seeds = {i: r.run.init_seed for (i, _), r in self.unended.items()}
        return pd.DataFrame({name: [experiments.phase_change(self.unended[i, name]) for i in seeds] for name in names},
                            index=pd.Index(seeds.values(), name="seed"))


def of_networks(settings: experiments.Settings, best: Sequence[int], previous: Sequence[int], starts: Sequence[float],
                lengths: Sequence[float], device: str = "cpu") -> Help:
    """Train each network's head of Layer 2 in `best` alone, helped in six ways without an end and in windows; `previous` has a head
    of Layer 1 for each. Starts are shares of the time without help, lengths are in units of `need`."""
    networks = list(enumerate(zip(best, previous, strict=True)))
    alone = {i: experiments.single_head(settings.run(6e5, nth=i), head) for i, (head, _) in networks}
    others = experiments.fetch_each({(i, k): replace(run, data_seed=run.data_seed + 1000 * k) for i, run in alone.items()
                                     for k in range(1, N_ORDERS)}, device)
    unended = experiments.fetch_each({(i, name): run for i, (head, pt) in networks
                                      for name, run in experiments.six_runs(settings, head, pt, i).items()}, device)
    asked = {}
    for i, (head, pt) in networks:
        ways = {name: clamps for name, clamps in experiments.six_ways(head, pt).items() if clamps}
        never, *_ = times = [experiments.phase_change(unended[i, name]) for name in ("nothing", *ways)]
        found = grid(alone[i], ways, never, dict(zip(ways, times[1:], strict=True)), starts, lengths)
        asked |= {(i, *key): (run, window, never) for key, (run, window) in found.items()}
    results = experiments.fetch_each({key: run for key, (run, _, _) in asked.items()}, device)
    rows = []
    for (i, name, start, length), (run, (first, until), never) in asked.items():
        result = results[i, name, start, length]
        time = time_without_help(result, until)
        ratio = math.inf if math.isnan(time) and run.n_sequences >= 1.25 * never else time / never
        rows.append((name, start, length, run.init_seed, never, first, until, time, ratio, ratio - (until - first) / never,
                     experiments.loss_from(result, until)))
    table = pd.DataFrame(rows, columns=["clamp", "start", "length", "run", "never", "from", "until", "time", "ratio", "net",
                                        "loss_after"])
    return Help(unended, others, {key: window for key, (_, window, _) in asked.items()}, results, table)


def restarted(settings: experiments.Settings, best: Sequence[int], previous: Sequence[int], help: Help, length: float,
              device: str = "cpu") -> dict[tuple[int, str], float]:
    """A control: the ratios of help from the start, by (network, clamp), where the optimiser begins anew when the help ends, on
    sequences in another order. Otherwise Adam remembers the help: it has no second moment of what was clamped, and large ones of
    all else from the jump of the loss."""
    first, rest = {}, {}
    for i, (head, pt) in enumerate(zip(best, previous, strict=True)):
        run = experiments.single_head(settings.run(6e5, nth=i), head)
        for name, clamps in experiments.six_ways(head, pt).items():
            if (i, name, 0, length) in help.windows:
                until = help.windows[i, name, 0, length][1]
                first[i, name] = replace(run, clamps=(*run.clamps, *clamps), n_sequences=until)
                rest[i, name] = replace(run, data_seed=run.data_seed + 1000,
                                        n_sequences=max(run.batch_size, run.n_sequences - until))
    taught = experiments.fetch_each(first, device)
    alone = experiments.fetch_each({key: replace(run, initial=taught[key].weights) for key, run in rest.items()}, device)
    return {key: (first[key].n_sequences + experiments.phase_change(result)) / help.times["nothing"].iloc[key[0]]
            for key, result in alone.items()}


def lesions(settings: experiments.Settings, head: int, nth: int = 0) -> tuple[dict[str, RunConfig], Window]:
    """Runs of the full network in which something is taken away for a while after the phase change, and that window: Layer 2's
    head `head`, or all attention of Layer 1 to the token before."""
    run = settings.run(nth=nth, heads_every=5000)
    window = snap(run, settings.length(6e5), settings.length(1e5))
    layer1 = [(0, h) for h in range(settings.n_heads)]
    return {"strongest head off": helped(run, [Ablate((1, head))], window),
            "no previous token": helped(run, [BlockPreviousToken(layer1)], window)}, window


def of_toy(seeds: Sequence[int], starts: Sequence[float], lengths: Sequence[float], n_iterations: int = 1500) -> pd.DataFrame:
    """The same windows in the toy model, one row per draw, clamp and window: columns clamp, start, length, run (the draw), ratio
    (the time of the drop over that without help), loss_after (when the help ends, in units of the loss of learning nothing). Where
    clamps give as many vectors they have the same draws (`ALIKE`)."""
    seeds = list(seeds)

    def losses(given: Sequence[str], first: Sequence[float] | float, last: Sequence[float] | float, draws: list[int]) -> np.ndarray:
        table = toy.descend(draws, given, start=first, until=last, n_iterations=n_iterations)
        return table["relative_loss"].to_numpy().reshape(n_iterations + 1, len(draws))

    def times(found: np.ndarray, since: Sequence[int]) -> list[float]:
        return [metrics.crossing(pd.Series(column).iloc[start:], TOY_LEVEL) for column, start in zip(found.T, since, strict=True)]

    from_start, rows = [0] * len(seeds), []
    never = times(losses((), 0, 0, seeds), from_start)
    for clamp, given in GIVEN.items():
        always = times(losses(given, 0, math.inf, seeds), from_start)
        cases = [(start, length, i, round(start * never[i])) for start in starts for length in lengths for i in range(len(seeds))
                 if not math.isnan(never[i])]
        first = [at for *_, at in cases]
        last = [at + max(1, round(length * need(never[i], always[i]))) for _, length, i, at in cases]
        found = losses(given, first, last, [seeds[i] for *_, i, _ in cases])
        rows += [{"clamp": clamp, "start": start, "length": length, "run": seeds[i], "ratio": time / never[i],
                  "loss_after": found[until, column] if until <= n_iterations else math.nan}
                 for column, ((start, length, i, _), until, time) in enumerate(zip(cases, last, times(found, last), strict=True))]
    found = pd.DataFrame(rows, columns=["clamp", "start", "length", "run", "ratio", "loss_after"])
    return pd.concat([found, *(found[found["clamp"] == same].assign(clamp=clamp) for clamp, same in ALIKE.items())])


def medians(table: pd.DataFrame, column: str = "ratio") -> dict[str, pd.DataFrame]:
    """The median of a column over runs, by clamp: length × start. In a toy's table NaN is a draw that never gets there."""
    filled = table.assign(**{column: table[column].fillna(math.inf)}) if "net" not in table else table
    return {clamp: rows.pivot_table(index="length", columns="start", values=column, aggfunc="median")
            for clamp, rows in filled.groupby("clamp", sort=False)}
