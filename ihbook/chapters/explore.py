"""Panels on a trained network, live or as a page (`panels`): scrub through training, operate on it, see its wiring, retrain."""

from __future__ import annotations

import html
import itertools
import math
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import ipywidgets
import pandas as pd
import torch
from torch import Tensor

from ihbook import metrics, task, toy
from ihbook.banks import load_bank
from ihbook.chapters import experiments, pictures
from ihbook.chapters.experiments import Settings
from ihbook.chapters.live import Page
from ihbook.chapters.panels import (
    FELT,
    STYLE,
    Axes,
    Control,
    Panel,
    Part,
    Shown,
    bar_values,
    bars,
    chart,
    loss_axes,
    page,
    pattern_values,
    patterns,
    short,
    threshold_line,
)
from ihbook.clamps import Ablate, Clamp, Copy, Induction, PerfectLayer1, Preserve, PreviousToken, run_with_clamps
from ihbook.config import RunConfig
from ihbook.engine.family import train_family
from ihbook.engine.prepared import prepare
from ihbook.engine.results import Result
from ihbook.task import Batch

MOST_HEADS = 8  # the page without a kernel holds every set of heads


def sequences(settings: Settings, n_training: int = 3) -> list[Shown]:
    """The first `n_training` sequences of the evaluation set `train`, and the first of each other evaluation set."""
    run = settings.run()
    bank = load_bank(run.bank)
    splits = task.split(bank, run.task)
    batches = task.evaluation_sets(splits, run.eval_seed, 16)
    found = []
    for kind in (kind for kind in task.EVAL_SETS if kind.name in batches):
        for i, one in enumerate(batches[kind.name].split(1)[:n_training if kind.name == "train" else 1]):
            images = None
            if bank.images is not None:
                images = tuple(bank.images.flatten(0, 1)[getattr(splits, kind.ids).flatten()[one.ids[0, 0]]])
            found.append(Shown(f"{kind.words} ({i + 1})" if kind.name == "train" else kind.words, one, images))
    return found


def _header(shown: Sequence[Shown]) -> Part:
    return Part("{}", ("sequence",), lambda i: [shown[int(i)].drawing()])


def _tokens(shown: Sequence[Shown]) -> list[str]:
    """A one-letter name for each position: an attention pattern has room for no more."""
    return ["x", "ℓ"] * (shown[0].batch.labels.shape[2] - 1) + ["?"]


def _colours(n_heads: int) -> list[str]:
    return [pictures.head_colour(h) for h in range(n_heads)]


def scrub(result: Result, shown: Sequence[Shown]) -> Panel:
    """Scrub through checkpoints: loss, head strengths, answer, attention (Figure 3). Raises ValueError if none was evaluated."""
    table = result.heads[result.heads["layer"] == 1].pivot(index="sequences", columns="head", values="strength")
    seen = sorted(set(result.checkpoints) & set(table.index))
    if not seen:
        raise ValueError("the run has no checkpoints to scrub through at which it was evaluated; give it checkpoint_every and "
                         "heads_every, such as 20,000 sequences both")
    model, n_labels = result.run.model, result.run.task.n_labels
    losses = experiments.curve(result)
    axes = loss_axes(seen[-1])
    line = axes.path(losses[["sequences", "value"]].to_numpy())
    inside = (f'<path d="{line}" fill="none" stroke="#222" stroke-width="1.8"/>{threshold_line(axes, result.run)}'
              '<circle cx="{}" cy="{}" r="6" fill="#d55e00"/><text class="ih-value" x="{}" y="{}" fill="#a44a00">{}</text>')
    heads = [f"1.{h}" for h in range(model.n_heads)]
    labels = [f"label {i}" for i in range(n_labels)]
    weights = cache(lambda at: result.checkpoints[at])

    @cache
    def acts(at: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            found = run_with_clamps(weights(at), shown[i].batch, result.run.clamps)
        return found["pattern", 0][0, 0], found["pattern", 1][0, 0], found.logits[0, 0].softmax(0)

    def charts(at: str, i: str) -> list[str]:
        now = seen[int(at)]
        loss = experiments.loss_at(result, now)
        x, y = axes.at(now, loss)
        right = x > axes.WIDTH - 90
        return [short(x, 1), short(y, 1), short(x + (-50 if right else 10), 1), short(max(y - 10, 36), 1), f"{loss:.3f}",
                *bar_values(table.loc[now].tolist(), heads, (-1, 1)),
                *bar_values(acts(now, int(i))[2].tolist(), labels, (0, 1))]

    def attention(at: str, i: str) -> list[str]:
        first, second, _ = acts(seen[int(at)], int(i))
        return [*pattern_values(first), *pattern_values(second)]

    change = experiments.phase_change(result)
    start = min(range(len(seen)), key=lambda i: abs(seen[i] - change)) if change == change else len(seen) - 1
    row = "".join([chart(axes, "Training loss, and where this checkpoint stands", inside),
                   bars("induction strength", heads, _colours(model.n_heads), (-1, 1)),
                   bars("answer: probability of", labels, ["#555"] * n_labels, (0, 1))])
    every = ("sequences seen", "sequence")
    return Panel(
        [Control("sequences seen", tuple(f"{s:,}" for s in seen), "slider", str(start)),
         Control("sequence", tuple(one.name for one in shown))],
        [_header(shown), Part(f'<div class="ih-row">{row}</div>', every, charts),
         Part(patterns(0, model.n_heads, _tokens(shown)) + patterns(1, model.n_heads, _tokens(shown)), every, attention)],
        label="Scrub through training")


def _ablated(layer: int, bits: str) -> list[Clamp]:
    """The clamp that ablates the heads of a layer whose bit is 0, or no clamp."""
    off = tuple((layer, h) for h, bit in enumerate(bits) if bit == "0")
    return [Ablate(off)] if off else []


def clamps_to_add(result: Result, sample: Batch) -> dict[str, Clamp]:
    """Clamps on the finished network, by name: of its strongest previous-token head, and of its strongest induction head."""
    best, pt = next(iter(experiments.by_strength(result, sample))), experiments.previous_token_heads(result)[-1]
    second = tuple((1, h) for h in range(result.run.model.n_heads))
    return {f"previous token (0.{pt})": PreviousToken((0, pt)), "match (all of Layer 2)": Induction(second),
            f"copy (1.{best})": Copy((1, best)), "layer 1": PerfectLayer1()}


def operate(result: Result, shown: Sequence[Shown], sample: Batch, live: Page | None = None) -> Panel:
    """Switch heads off and clamp the rest, on the finished network: accuracy, loss over `sample`, attention (chapter 3). Live,
    every head has a switch. The page without a kernel holds every set of heads of Layer 2 with some of the clamps, over the first
    500 sequences; a network with more than `MOST_HEADS` heads per layer raises ValueError. If the page is `live`, it computes."""
    weights, model = result.weights, result.run.model
    if model.n_heads > MOST_HEADS:
        raise ValueError(f"n_heads={model.n_heads}: the page holds every set of heads; choose at most {MOST_HEADS}")
    found, kinds = experiments.previous_token_heads(result), clamps_to_add(result, sample)
    previous = tuple((0, h) for h in found)
    names = ["accuracy", "loss (nats)"]
    limits = (0, 1.7)
    few = sample.split(500)[0]  # since the page holds thousands of states
    words = "over {:,} training sequences"

    def numbers(lists: Sequence[Sequence[Clamp]], sample: Batch = sample) -> list[list[str]]:
        values = metrics.measure(weights, sample, lists)
        pairs = torch.stack([values["accuracy"], values["loss"]], 1).tolist()
        return [bar_values(pair, names, limits, 4) for pair in pairs]

    def attention(i: str, clamps: Sequence[Clamp], first: str = "", last: str = "") -> list[str]:
        with torch.no_grad():
            acts = run_with_clamps(weights, shown[int(i)].batch, clamps)
        on = [None if not bits else [bit == "1" for bit in bits] for bits in (first, last)]
        return [*pattern_values(acts["pattern", 0][0, 0], on[0]), *pattern_values(acts["pattern", 1][0, 0], on[1])]

    def chosen(first: str, last: str, felt: str, clamped: str) -> list[Clamp]:
        extra = [clamp for clamp, bit in zip(kinds.values(), clamped, strict=True) if bit == "1"]
        return [*_ablated(0, first), *_ablated(1, last), *(list(FELT.values())[int(felt)]), *extra]

    heads = [tuple(f"{layer}.{h}" for h in range(model.n_heads)) for layer in (0, 1)]
    result_bars, result_bars_of_few = (bars(words.format(len(batch)), names, ["#0173b2", "#a44a00"], limits) for batch in
                                       (sample, few))
    grids = patterns(0, model.n_heads, _tokens(shown)) + patterns(1, model.n_heads, _tokens(shown))
    names_of = tuple(one.name for one in shown)
    follows = ("Layer 1", "Layer 2", "what is switched off in Layer 1 is felt by", "clamped")
    still = {"nothing": (), f"no previous-token heads ({', '.join(f'0.{h}' for h in found)})": (Ablate(previous),),
             "… felt by the patterns alone": (Ablate(previous), Preserve("values")),
             "… felt by the values alone": (Ablate(previous), Preserve("patterns")),
             **{name: (clamp,) for name, clamp in kinds.items()}}
    every = list(still.values())

    @cache
    def stored(i: int) -> dict[str, list[str]]:
        """The numbers of every set of heads of Layer 2, under clamps number `i`."""
        states = Control("", heads[1], "switches").states
        found = []
        for at in range(0, len(states), 64):
            found += numbers([[*_ablated(1, bits), *every[i]] for bits in states[at:at + 64]], few)
        return dict(zip(states, found, strict=True))

    without_kernel = page(
        [Control("Layer 2", heads[1], "switches"), Control("clamped", tuple(still)), Control("sequence", names_of)],
        [Part(result_bars_of_few, ("clamped", "Layer 2"), lambda i, bits: stored(int(i))[bits]), _header(shown),
         Part(grids, ("sequence", "clamped"), lambda i, clamped: attention(i, every[int(clamped)]))],
        label="Operate on the finished network")
    return Panel(
        [Control("Layer 1", heads[0], "switches"), Control("Layer 2", heads[1], "switches"),
         Control("what is switched off in Layer 1 is felt by", tuple(FELT)), Control("clamped", tuple(kinds), "switches", "0000"),
         Control("sequence", names_of)],
        [Part(result_bars, follows, lambda *states: numbers([chosen(*states)])[0]), _header(shown),
         Part(grids, (*follows, "sequence"),
              lambda first, last, felt, clamped, i: attention(i, chosen(first, last, felt, clamped), first, last))],
        label="Operate on the finished network", page=live.operate(kinds, without_kernel) if live else without_kernel)


def wiring(result: Result, sample: Batch) -> Panel:
    """How much each head of Layer 1 feeds a head of Layer 2 through keys and values: the composition scores, and the accuracy
    that the Layer 2 head alone loses when only its patterns or only its values feel the ablation (Figure 11)."""
    weights, n = result.weights, result.run.model.n_heads
    order = list(experiments.by_strength(result, sample))
    names = [f"0.{i}" for i in range(n)]
    scores = [metrics.composition_scores(weights, part)[order] for part in ("keys", "values")]
    lost = []
    for preserved in ("values", "patterns"):
        rows = []
        for j in order:
            lists = [[experiments.only(j, n)], *([experiments.only(j, n), Ablate((0, i)), Preserve(preserved)] for i in range(n))]
            accuracy = metrics.measure(weights, sample, lists)["accuracy"]
            rows.append(accuracy[0] - accuracy[1:])
        lost.append(torch.stack(rows))
    grids = [(scores[0], "keys: composition score", (0, 0.5)), (lost[0], "keys: accuracy lost without it", (-0.1, 0.8)),
             (scores[1], "values: composition score", (0, 0.5)), (lost[1], "values: accuracy lost without it", (-0.1, 0.8))]
    template = "".join(bars(title, names, _colours(n), limits) for _, title, limits in grids)
    return Panel(
        [Control("head of Layer 2, the strongest first", tuple(f"1.{j}" for j in order), "buttons")],
        [Part(f'<div class="ih-row">{template}</div>', ("head of Layer 2, the strongest first",),
              lambda j: [value for grid, _, limits in grids for value in bar_values(grid[int(j)].tolist(), names, limits)])],
        label="Wiring of Layer 1 into Layer 2")


def toy_model(seed: int = 1, n_iterations: int = 400) -> Panel:
    """The toy model under sliders: the share of each vector that is given, and the loss (Figures 5a, 9)."""
    strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
    given = list(itertools.product(strengths, repeat=len(toy.NAMES)))
    shares = dict(zip(toy.NAMES, zip(*given, strict=True), strict=True))
    found = toy.descend((seed,) * len(given), shares, n_iterations=n_iterations)
    losses = dict(zip(given, found["relative_loss"].to_numpy().reshape(-1, len(given)).T, strict=True))
    top = max(loss.max() for loss in losses.values())
    axes = Axes((0, n_iterations), (0, top), "iterations", "loss, as a share of the loss of learning nothing",
                [(x, f"{x:,}") for x in range(0, n_iterations + 1, n_iterations // 4)],
                [(y / 2, short(y / 2)) for y in range(int(2 * top) + 1)])

    def drawn(*states: str) -> list[str]:
        loss = losses[tuple(strengths[int(state)] for state in states)]
        half = metrics.crossing(pd.Series(loss), 0.5)
        return [axes.path(list(enumerate(loss))[::4]), "never half" if math.isnan(half) else f"half at iteration {half:,.0f}"]

    x, y = axes.at(n_iterations, 1)
    inside = (f'<path d="{{}}" fill="none" stroke="#0173b2" stroke-width="2"/><text x="{x:.0f}" y="{y + 16:.0f}" text-anchor="end" '
              'class="ih-title">{}</text>')
    return Panel([Control(f"share of {name} given", tuple(f"{s:.0%}" for s in strengths), "slider") for name in toy.NAMES],
                 [Part(chart(axes, "The toy model's loss", inside), tuple(f"share of {name} given" for name in toy.NAMES), drawn)],
                 label="The toy model")


class WhatIf(ipywidgets.VBox):
    """Choose rows of `choices` (clamps by name), train `settings.run(length)` under each, and watch the losses fall; the notebook
    stays free meanwhile. Stop saves the state, and Continue resumes. `results` are those of `runs`, or None until they finish.
    Without a kernel, as in a built page, it shows `page` instead (see `ihbook.chapters.live`)."""

    EVERY = 40  # steps whose losses are averaged into one point of a curve

    def __init__(self, settings: Settings, choices: Mapping[str, Sequence[Clamp]], length: float = experiments.PUBLISHED,
                 page: str | None = None):
        self._page, self.settings, self.choices, self.length = page, settings, dict(choices), length
        self.runs: list[RunConfig] = []
        self.results: list[Result] | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._stopping, self._thread = threading.Event(), None
        names = tuple(self.choices)
        self.chosen = ipywidgets.SelectMultiple(options=names, value=names[:1], rows=len(names), description="clamps",
                                                layout={"width": "min(100%, 420px)"})
        self.train, self.stop, self.go_on = (ipywidgets.Button(description=word, disabled=off) for word, off in
                                             (("Train", False), ("Stop", True), ("Continue", True)))
        self.train.on_click(lambda _: self._begin())
        self.stop.on_click(lambda _: self._stopping.set())
        self.go_on.on_click(lambda _: self._start())
        self.view, self.said = ipywidgets.HTML(), ipywidgets.HTML()
        super().__init__([self.chosen, ipywidgets.HBox([self.train, self.stop, self.go_on]), self.said, self.view])
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._draw()

    def _repr_mimebundle_(self, **options: object) -> dict:
        page = self._page or f'{STYLE}<div class="ih-live">{self.said.value}{self.view.value}</div>'
        return {**super()._repr_mimebundle_(**options), "text/html": page}

    def _begin(self) -> None:
        """Train the runs that are chosen, from the start."""
        if not self.chosen.value:
            self._say("choose one or more rows first")
            return
        self.runs = [self.settings.run(self.length, clamps=self.choices[name]) for name in self.chosen.value]
        try:
            self._family = prepare(self.runs, device=self.settings.device)
        except ValueError as error:
            self._say(str(error))
            return
        self._folder = tempfile.TemporaryDirectory()
        self._curves = {name: [] for name in self.chosen.value}
        self.results = None
        self._start()

    def _start(self) -> None:
        self._stopping.clear()
        self._buttons(training=True)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        waiting: list[Tensor] = []
        size, names = self.runs[0].batch_size, list(self._curves)
        done = 0

        def report(run_steps: int, losses: Tensor | None) -> None:
            nonlocal done
            done += run_steps
            if losses is None:
                return
            waiting.append(losses.detach().cpu())
            if len(waiting) == self.EVERY:
                for name, loss in zip(names, torch.stack(waiting).mean(0).tolist(), strict=True):
                    self._curves[name].append((done // len(names) * size, loss))
                waiting.clear()
                self._draw()

        try:
            results = train_family(self._family, Path(self._folder.name), self.settings.device, report=report,
                                          stopped=self._stopping.is_set)
        except Exception as error:  # otherwise an error in a thread goes unseen
            self._say(f"{type(error).__name__}: {error}")
            self._buttons(training=False)
            return
        if results is not None:
            self.results = results
            times = [experiments.phase_change(result) for result in results]
            self._say("; ".join(f"{name}: phase change at {time:,.0f}" if time == time else f"{name}: no phase change"
                                for name, time in zip(names, times, strict=True)))
        else:
            self._say("stopped; Continue goes on from here")
        self._buttons(training=False, finished=results is not None)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until training is finished or stopped, or for that many seconds."""
        if self._thread:
            self._thread.join(seconds)

    def _buttons(self, *, training: bool, finished: bool = True) -> None:
        self.train.disabled, self.stop.disabled, self.go_on.disabled = training, not training, training or finished

    def _say(self, words: str) -> None:
        self.said.value = f'<p role="status">{html.escape(words)}</p>'

    def _draw(self) -> None:
        axes = loss_axes(self.settings.length(self.length))
        colours = pictures.colours(list(self.choices))
        lines = "".join(f'<path d="{axes.path(points)}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>'
                        f'<text x="{axes.LEFT + 8}" y="{axes.HEIGHT - axes.BOTTOM - 8 - 15 * i}" fill="{colours[name]}" '
                        f'class="ih-title">{html.escape(name)}</text>' for i, (name, points) in enumerate(self._curves.items()))
        self.view.value = STYLE + chart(axes, "Training losses", threshold_line(axes, self.settings.run()) + lines)
