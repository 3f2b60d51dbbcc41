"""The panel `What if?` of a built page: the reader trains the paper's network under clamps, in the page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from ihbook import metrics
from ihbook.chapters import experiments, pictures
from ihbook.chapters.live import data
from ihbook.chapters.live.data import N_HEADS, button, select
from ihbook.chapters.panels import Shown, chart, loss_axes, threshold_line
from ihbook.clamps import Clamp, Induction
from ihbook.config import RunConfig
from ihbook.digest import encode

HELD = "hold to clamp"  # the network whose clamp a reader holds and lets go
INSTEAD = '<p>Here the page trains networks. <a href="07_subcircuits.html">Chapter 7</a> has the same curves.</p>'
Ways = dict[str, dict[str, list[Clamp]]]  # clamps by heads of Layer 2, then by name


def ways(head: int, previous: int, n_heads: int = N_HEADS) -> Ways:
    """The clamps of Figure 5b, with head 1.`head` alone in Layer 2 or with all of them; `previous` is a head of Layer 1."""
    six, every = experiments.six_ways(head, previous), tuple((1, h) for h in range(n_heads))
    return {f"1.{head} alone": {name: [experiments.only(head, n_heads), *clamps] for name, clamps in six.items()},
            f"all {n_heads}": {name: list(clamps) for name, clamps in six.items()} | {"match": [Induction(every)]}}


def html_of(runs: Mapping[str, RunConfig], ways: Ways, shown: Sequence[Shown], networks: Sequence[str]) -> str:
    """The panel as HTML, for a page that has what `Page` shows. Training may start from one of `networks`."""
    run = next(iter(runs.values()))
    names = [*next(iter(ways.values())), HELD]
    colours = pictures.colours(names)
    found = {"held": HELD, "colours": colours, "threshold": metrics.threshold(run.task.n_ways),
             "ways": {heads: {name: encode(clamps, defaults=True) for name, clamps in each.items()}
                      for heads, each in ways.items()},
             "paces": [_pace(each) for each in runs.values()], "drawings": [each.drawing() for each in shown],
             "bars": [data.head_bars("attention to the token before", 0, (0, 1)),
                      data.head_bars("induction strength", 1, (-1, 1))]}
    boxes = "".join(
        f'<label style="--own: {colours[name]}"><input type="checkbox" name="clamp" value="{html.escape(name)}" autocomplete="off"'
        f'{" checked" * (name != HELD)}><span>{html.escape(name)}</span></label>' for name in names)
    numbers = [str(i) for i in range(max(len(runs), len(shown)))]
    controls = (
        f'<fieldset class="ih-clamps"><legend>clamped</legend>{boxes}</fieldset>'
        + select("heads", "heads of Layer 2", list(ways))
        + f'<label>seed <input type="number" name="seed" min="0" max="9999" value="{run.init_seed}" autocomplete="off"></label>'
        + select("labels", "labels", list(map(str, data.label_counts(run))), chosen=str(run.task.n_labels))
        + select("start", "start from", ["initial weights", *networks], ["", *networks])
        + select("pace", "learning rate", list(runs), numbers[:len(runs)]))
    buttons = button("train", "Train") + "".join(button(word.lower(), word, " disabled") for word in
                                                 ("Pause", "Step", "Continue", "Reset"))
    hold = button("hold", "Hold to clamp", ' aria-pressed="false"') + select("window", "what", names[1:-1], chosen="match")
    operate = button("operate", "Operate on it", f' disabled title="for networks with {run.task.n_labels} labels"')
    inside = (select("inside", "look inside", names) + select("sequence", "on", [each.name for each in shown], numbers[:len(shown)])
              + f'<span class="ih-buttons">{operate}</span>')
    return (
        f'<section class="ih-panel ih-what-if" aria-label="What if?"><div class="ih-instead">{INSTEAD}</div>'
        f'<div class="ih-works" hidden><form class="ih-controls">{controls}</form><div class="ih-buttons">{buttons}</div>'
        f'<div class="ih-buttons ih-hold" hidden>{hold}</div><p class="ih-said" role="status"></p>'
        '<div class="ih-row"><div class="ih-chart-view"></div><div class="ih-curves"></div></div>'
        f'<form class="ih-controls ih-inside">{inside}</form><div class="ih-view ih-sequence"></div>'
        '<div class="ih-row ih-view ih-bars"></div>' + 2 * '<div class="ih-view ih-patterns"></div>' + '</div>'
        f'{data.script(found, "ih-data")}{data.block("unpack", "draw", "what_if")}</section>')


def _pace(run: RunConfig) -> dict:
    """A pace of training: its learning rate, its length in sequences, and the axes of its chart."""
    axes = loss_axes(run.n_sequences)
    return {"lr": run.lr, "last": run.n_sequences, "chart": chart(axes, "Training losses", threshold_line(axes, run) + "{}"),
            "corners": [axes.at(axes.x[0], axes.y[0]), axes.at(axes.x[1], axes.y[1])], "top": axes.y[1]}
