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
from ihbook.clamps import Ablate, BlockPreviousToken, Clamp, During, LabelAttentionOnly, run_with_clamps
from ihbook.config import RunConfig
from ihbook.engine.results import Result
from ihbook.model import Weights
from ihbook.task import Batch

Found = Mapping[tuple[str, str, str, int], tuple[Result, float]]  # what `controls` gives
Window = tuple[int, int]  # from the first number of sequences seen on, and no longer at the second
TOY_LEVEL = 0.4  # of the loss of learning nothing: as the threshold of a phase change is of a guess between the labels
GIVEN = {"layer 1": ("a",), "match": ("a", "b")}  # vectors that stand for a clamp
ALIKE = {"copy": "layer 1", "layer 1 and copy": "match"}  # the toy's vectors are exchangeable: only their number matters
SLOWEST = "layer 1 and copy"  # help after which some networks need more than the usual length
PERFECT_LAYER_1 = ("layer 1", SLOWEST)  # help that can make a network much later
ENOUGH = 1.25  # times without help: a run that has not learnt by then counts as one that never does
CONTROLS = ("as it is", "the optimiser begins anew then, on another order", "the head looks at labels alone from then on")
HEADS = ("helped", "off for as long", "never helped")  # what the head is until that moment
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


def long_enough(run: RunConfig, never: float, until: int, clamp: str | None = None) -> RunConfig:
    """The run, but no longer than it takes to tell whether it learns: `ENOUGH` times the time without help (`never`), and at least
    a quarter of that time after the help has ended, `until`. Help by one of `PERFECT_LAYER_1` leaves the length as it is."""
    if math.isnan(never) or clamp in PERFECT_LAYER_1:
        return run
    return replace(run, n_sequences=min(run.n_sequences, math.ceil(max(ENOUGH * never, until + never / 4))))


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
    it ends too soon to tell: before `ENOUGH` times never. Runs that are helped from the start have a checkpoint when the help
    ends or, with a match, before."""

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
    unended = experiments.fetch_each({(i, name): run for i, (head, pt) in networks
                                      for name, run in experiments.six_runs(settings, head, pt, i).items()}, device)
    asked = {}
    for i, (head, pt) in networks:
        ways = {name: clamps for name, clamps in experiments.six_ways(head, pt).items() if clamps}
        never, *_ = times = [experiments.phase_change(unended[i, name]) for name in ("nothing", *ways)]
        found = grid(alone[i], ways, never, dict(zip(ways, times[1:], strict=True)), starts, lengths)
        asked |= {(i, *key): (_as_asked(run, key, window[1], never, settings), window, never)
                  for key, (run, window) in found.items()}
    orders = {(i, k): replace(run, data_seed=run.data_seed + 1000 * k) for i, run in alone.items() for k in range(1, N_ORDERS)}
    results = experiments.fetch_each({**orders, **{key: run for key, (run, _, _) in asked.items()}}, device)
    rows = []
    for (i, name, start, length), (run, (first, until), never) in asked.items():
        result = results[i, name, start, length]
        time = time_without_help(result, until)
        ratio = _over(time, never, run.n_sequences)
        rows.append((name, start, length, run.init_seed, never, first, until, time, ratio, ratio - (until - first) / never,
                     experiments.loss_from(result, until)))
    table = pd.DataFrame(rows, columns=["clamp", "start", "length", "run", "never", "from", "until", "time", "ratio", "net",
                                        "loss_after"])
    return Help(unended, {key: results[key] for key in orders}, {key: window for key, (_, window, _) in asked.items()},
                {key: results[key] for key in asked}, table)


def _as_asked(run: RunConfig, key: tuple[str, float, float], until: int, never: float,
              settings: experiments.Settings) -> RunConfig:
    """A window's run with the checkpoints that `Help` names, `long_enough`, and longer after the `SLOWEST` help."""
    name, start, _ = key
    run = long_enough(run, never, until, name)
    if start:
        return run
    return replace(run, checkpoint_every=settings.every(10_000) if name == "match" else until,
                   n_sequences=round(run.n_sequences * (1.5 if name == SLOWEST else 1)))


def last_checkpoint(result: Result, until: int) -> int:
    """The last checkpoint of a run at or before `until`, in sequences seen."""
    return max(seen for seen in result.checkpoints if seen <= until)


def released(result: Result, until: int) -> Weights:
    """The weights of that checkpoint."""
    return result.checkpoints[last_checkpoint(result, until)]


def looks(weights: Weights, head: int, sequences: Batch) -> dict[str, float]:
    """Where head `head` of Layer 2, alone in its layer, looks from the query: the shares of its attention on the labels, the right
    exemplars, the other exemplars, and the query itself, mean over `sequences` (of one run)."""
    pattern = run_with_clamps(weights, sequences, [experiments.only(head, weights.config.n_heads)])["pattern", 1][0, :, head, -1]
    right = (sequences.labels[0, :, :-1] == sequences.labels[0, :, -1:]).to(pattern)
    exemplars = pattern[:, :-1:2]
    found = {"labels": pattern[:, 1::2].sum(1), "right exemplar": (exemplars * right).sum(1),
             "other exemplars": (exemplars * (1 - right)).sum(1), "itself": pattern[:, -1]}
    return {name: share.mean().item() for name, share in found.items()}


def controls(settings: experiments.Settings, best: Sequence[int], help: Help, length: float,
             device: str = "cpu") -> Found:
    """Controls of help with a perfect Layer 1 of this length from the start, which can do harm. By (clamp, one of `HEADS`, one of
    `CONTROLS`, network): the result, and the time of its phase change over that without help. Under `SLOWEST` every combination is
    there that can be, but for a new optimiser of a head that was off. Under layer 1 there are the helped head as it is, and the
    helped and the never helped head that look at labels alone."""
    as_it_is, anew, looking = CONTROLS
    asked: dict[tuple[str, str, str, int], tuple[RunConfig, int]] = {}  # with the sequences that were seen before the run
    for (i, name, start, this), (_, until) in help.windows.items():
        if start or this != length or name not in PERFECT_LAYER_1:
            continue
        at, with_help, without = (1, best[i]), help.results[i, name, start, this], help.unended[i, "nothing"]
        run, never = replace(with_help.run, checkpoint_every=0), help.times["nothing"].iloc[i]
        alone = experiments.single_head(run, best[i])
        off = helped(alone, [Ablate(at)], (0, until))
        asked[name, HEADS[0], as_it_is, i] = with_help.run, 0
        if name == SLOWEST:
            asked[name, HEADS[1], as_it_is, i] = replace(off, checkpoint_every=until), 0
        for head, each, result in ((HEADS[0], run, with_help), (HEADS[1], off, None), (HEADS[2], alone, without)):
            if result or name == SLOWEST:
                free = During(LabelAttentionOnly(at), until)
                asked[name, head, looking, i] = long_enough(replace(each, clamps=(*each.clamps, free)), never, until), 0
            if result and name == SLOWEST:
                seen = last_checkpoint(result, until)
                whole = run if head == HEADS[0] else long_enough(run, never, until)
                asked[name, head, anew, i] = replace(
                    alone, initial=result.checkpoints[seen], data_seed=run.data_seed + 1000,
                    n_sequences=max(run.batch_size, whole.n_sequences - seen)), seen
    results = experiments.fetch_each({key: run for key, (run, _) in asked.items()}, device)
    return {key: (results[key], _over(seen + time_without_help(results[key], _end_of_help(run)),
                                      help.times["nothing"].iloc[key[-1]], seen + run.n_sequences))
            for key, (run, seen) in asked.items()}


def of_control(found: Found, clamp: str, head: str, control: str) -> list[float]:
    """The ratios of one of the `controls`, one number per network."""
    return [ratio for key, (_, ratio) in found.items() if key[:3] == (clamp, head, control)]


def looks_at_release(best: Sequence[int], help: Help, found: Found, length: float, sequences: Batch) -> pd.DataFrame:
    """Where heads look (`looks`) when help of this length from the start ends, the clamp taken off: a row per network and clamp,
    and for a head that was off (from the `controls` found), or never helped, at the moment when the `SLOWEST` help ends. Column
    clamp, and those of `looks`."""
    rows = []
    for (i, name, start, this), (_, until) in help.windows.items():
        if start == 0 and this == length:
            each = {name: help.results[i, name, start, this]}
            if name == SLOWEST:
                each |= {HEADS[1]: found[name, HEADS[1], CONTROLS[0], i][0], HEADS[2]: help.unended[i, "nothing"]}
            rows += [{"clamp": clamp, **looks(released(result, until), best[i], sequences)} for clamp, result in each.items()]
    return pd.DataFrame(rows, columns=["clamp", "labels", "right exemplar", "other exemplars", "itself"])


def harm_in_words(looked: pd.DataFrame, found: Found) -> list[str]:
    """What `looks_at_release` and `controls` say of the `SLOWEST` help, in sentences; none where they are empty."""
    if looked.empty or not found:
        return []
    labels = looked.groupby("clamp")["labels"].median()
    as_it_is, anew, looking = (np.median(of_control(found, SLOWEST, HEADS[0], control)) for control in CONTROLS)
    off, off_looking = (np.median(of_control(found, SLOWEST, HEADS[1], control)) for control in (CONTROLS[0], CONTROLS[2]))
    base = np.median(of_control(found, SLOWEST, HEADS[2], CONTROLS[2]))
    said = [f"When help with {SLOWEST} ends, the head puts {labels[SLOWEST]:.0%} of its attention on labels, one that was off for "
            f"as long {labels[HEADS[1]]:.0%}, and one that was never helped {labels[HEADS[2]]:.0%}."]
    if as_it_is > 1.05 and math.isfinite(as_it_is + looking + base):
        said += [
            f"If from then on it may look at labels alone, the phase change comes at {looking:.2f} of the time without help in "
            f"place of {as_it_is:.2f}; without help, the same clamp from the same moment on gives {base:.2f}.",
            "So most of the harm is in where the head looks." if looking - base < 0.5 * (as_it_is - 1) else
            "So where the head looks explains less than half of the harm.",
            "A new optimiser does not undo it." if anew > 1.05 else "With a new optimiser there is no harm."]
    if off > 1.05 and math.isfinite(off + off_looking + as_it_is):
        more = "more than" if off > as_it_is + 0.1 else "about as much as"
        said.append(f"A head that is off for as long instead comes at {off:.2f}, and at {off_looking:.2f} if it may look at labels "
                    "alone from then on"
                    + (f": to take no part at the start costs more than that time itself, and {more} such help."
                       if off > max(as_it_is - 0.1, 1.3) else "."))
    return said


def _end_of_help(run: RunConfig) -> int:
    """When the last window of a run ends, in sequences seen; 0 where none does."""
    return max((clamp.until or 0 for clamp in run.clamps if isinstance(clamp, During)), default=0)


def _over(time: float, never: float, length: float) -> float:
    """A time over that without help: infinite where the run never gets there, NaN where it ends too soon to tell."""
    return math.inf if math.isnan(time) and length >= ENOUGH * never else time / never


def lesions(settings: experiments.Settings, head: int, nth: int = 0) -> tuple[dict[str, RunConfig], Window]:
    """Runs of the full network in which something is taken away for a while after the phase change, and that window: Layer 2's
    head `head`, or all attention of Layer 1 to the token before."""
    run = settings.run(8e5, nth=nth, heads_every=5000)
    window = snap(run, settings.length(6e5), settings.length(1e5))
    layer1 = [(0, h) for h in range(settings.n_heads)]
    return {"strongest head off": helped(run, [Ablate((1, head))], window),
            "no previous token": helped(run, [BlockPreviousToken(layer1)], window)}, window


def of_toy(seeds: Sequence[int], starts: Sequence[float], lengths: Sequence[float], n_iterations: int = 1500) -> pd.DataFrame:
    """The same windows in the toy model, one row per draw, clamp and window: columns clamp, start, length, run (the draw), ratio
    (the time of the drop over that without help, infinite where there is none), loss_after (when the help ends, in units of the
    loss of learning nothing). Where clamps give as many vectors they have the same draws (`ALIKE`)."""
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
        rows += [{"clamp": clamp, "start": start, "length": length, "run": seeds[i],
                  "ratio": math.inf if math.isnan(time) else time / never[i],
                  "loss_after": found[until, column] if until <= n_iterations else math.nan}
                 for column, ((start, length, i, _), until, time) in enumerate(zip(cases, last, times(found, last), strict=True))]
    found = pd.DataFrame(rows, columns=["clamp", "start", "length", "run", "ratio", "loss_after"])
    return pd.concat([found, *(found[found["clamp"] == same].assign(clamp=clamp) for clamp, same in ALIKE.items())])


def medians(table: pd.DataFrame, column: str = "ratio") -> dict[str, pd.DataFrame]:
    """The median of a column over runs, by clamp: length × start."""
    return {clamp: rows.pivot_table(index="length", columns="start", values=column, aggfunc="median")
            for clamp, rows in table.groupby("clamp", sort=False)}
