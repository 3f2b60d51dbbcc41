"""The book's plots and tables of numbers: functions from tidy tables to a `Picture`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.ticker
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes

from ihbook.chapters.pictures import INK, MUTED, PALETTE, Picture, head_colour, in_style
from ihbook.metrics import threshold as threshold_of
from ihbook.task import EVAL_SETS

APART, ASIDE = "color: var(--ih-differs, #a44a00)", "color: var(--pst-color-text-muted, #6b6b6b)"  # a page may be dark
VERDICTS = {"differs": f"font-weight: 700; {APART}", "direction only": APART, "undecided": ASIDE, "check": ASIDE,
            "not tested": ASIDE}  # how a verdict is set in a table; "holds" is plain

_COLOURS = dict(zip((each.name for each in EVAL_SETS), (PALETTE[0], PALETTE[1], PALETTE[4], PALETTE[2]), strict=True))
_WORDS = {each.name: each.words for each in EVAL_SETS}


def _millions(axes: Axes, last: float) -> None:
    """Label the x axis with sequences seen, in thousands or millions."""
    axes.set_xlim(0, last)
    axes.set_xlabel("sequences seen")
    axes.xaxis.set_major_formatter(lambda x, _: "0" if x == 0 else f"{x / 1e6:g} M" if last >= 5e5 else f"{x / 1e3:g} k")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], x: float, gap: float) -> None:
    """Write names (y, text, colour) beside the right ends of lines, at least about `gap` apart, in units of y."""
    ends = sorted(ends)
    placed = [y for y, _, _ in ends]
    for _ in range(200):  # neighbours that are too close move apart, each by half
        for i in range(1, len(placed)):
            push = (gap - (placed[i] - placed[i - 1])) / 2
            if push > 1e-9:
                placed[i - 1], placed[i] = placed[i - 1] - push, placed[i] + push
    for (y, text, colour), at in zip(ends, placed, strict=True):
        axes.annotate(text, (x, y), xytext=(x * 1.035, at), color=colour, va="center", fontsize=9.5, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 4})


def table(rows: pd.DataFrame, digits: int = 3, *, index: bool = True) -> pd.io.formats.style.Styler:
    """A table in the book's style: one row of headings, numbers on the right with `digits` decimals, words on the left, and the
    cells that begin with a verdict other than "holds" set apart."""
    heads = [rows.index.name] if index and rows.index.name else []
    if heads:  # in the row of the other headings, not in one of its own
        rows, index = rows.reset_index(), False
    rows = rows.rename_axis(columns=None) if rows.columns.nlevels == 1 else rows
    kind = "dataframe claims" if "verdict" in rows else "dataframe"
    styler = rows.style.format(precision=digits, thousands=",", na_rep="–").set_table_attributes(f'class="{kind}"')
    words = [name for name in rows if any(isinstance(cell, str) and re.search("[a-z]{2}", cell) for cell in rows[name])]
    left = list(dict.fromkeys(words + heads))
    styler = styler.set_properties(**{"text-align": "right"}).set_properties(subset=left, **{"text-align": "left"})
    styler = styler.set_properties(subset=heads, **{"font-weight": "600"})
    sentences = [name for name in ("claim", "prediction") if name in rows]  # which need room on a narrow page (book.css)
    styler = styler.set_td_classes(pd.DataFrame("sentence", rows.index, sentences))
    styler = styler.map(lambda cell: VERDICTS.get(str(cell).split(" · ")[0], ""), subset=words)
    return styler if index else styler.hide()


@in_style
def similarities(groups: Mapping[str, torch.Tensor]) -> Picture:
    """Distributions of cosine similarity, one per named group of pairs of exemplars."""
    figure = Picture(figsize=(7, 2.7))
    axes = figure.subplots()
    for (name, values), colour in zip(groups.items(), (PALETTE[2], PALETTE[3]), strict=False):
        array = values.flatten().numpy()
        if array.std() < 1e-6:  # one-hot classes: there is no density to draw
            axes.axvline(array[0], color=colour)
            peak = (array[0], axes.get_ylim()[1])
        else:
            sns.kdeplot(x=array, ax=axes, color=colour, fill=True, alpha=0.25, linewidth=1.8, clip=(-1, 1))
            peak = max(axes.collections[-1].get_paths()[0].vertices.tolist(), key=lambda point: point[1])
        axes.annotate(f"{name} (mean {abs(array.mean()):.2f})", peak, xytext=(0, 4), textcoords="offset points",
                      color=colour, ha="center", fontsize=9.5, weight="bold", annotation_clip=False)
    axes.set(xlabel="cosine similarity of two exemplars' features", ylabel="density", yticks=[])
    means = "; ".join(f"{name}, mean {values.mean():.2f}" for name, values in groups.items())
    figure.alt = f"Densities of cosine similarity: {means}."
    return figure


def _curve(axes: Axes, table: pd.DataFrame, colour: str) -> pd.Series:
    """Draw the median over runs against sequences seen, and the band from lowest to highest; return the median."""
    wide = table.pivot_table(index="sequences", columns="run", values="value")
    median = wide.median(axis=1)
    axes.plot(median.index, median, color=colour)
    if wide.shape[1] > 1:
        axes.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.18, lw=0)
    return median


@in_style
def loss_curves(table: pd.DataFrame, *, n_ways: int = 2,
                published: Mapping[str, Sequence[tuple[float, float]]] | None = None) -> Picture:
    """Loss (nats) against sequences seen, one line per evaluation set (Figure 3a): median over the column `run`, band its range.

    `n_ways` is the number of labels in context. `published` maps an evaluation set to points (sequences, loss) of the paper,
    which are drawn as open circles.
    """
    figure = Picture(figsize=(7.6, 3.9))
    axes = figure.subplots()
    losses = table[table["metric"] == "loss"]
    there = set(losses["eval_set"])
    last, ends, guess = losses["sequences"].max(), [], math.log(n_ways)
    own = dict(zip(sorted(there - set(_COLOURS)), PALETTE[3:4] + PALETTE[5:], strict=False))
    for name, colour in {name: colour for name, colour in {**_COLOURS, **own}.items() if name in there}.items():
        words = _WORDS.get(name, name)
        median = _curve(axes, losses[losses["eval_set"] == name], colour)
        ends.append((median.iloc[-1], words, colour))
        for x, y in (published or {}).get(name, ()):
            axes.plot(x, y, "o", mfc="white", mec=colour, ms=6.5, mew=1.6, clip_on=False, zorder=5)
    axes.axhline(guess, color=MUTED, ls=(0, (4, 3)), lw=1)
    axes.text(0.72 * last, guess, f"ln {n_ways}", color=MUTED, ha="center", va="bottom", fontsize=9.5)
    top = max(1.0, min(2.4, losses["value"].max() * 1.04))
    axes.set(ylim=(-0.02 * top, top), ylabel="loss at the query (nats)")
    _millions(axes, last)
    _label_ends(axes, ends, last, 0.066 * top)
    if published:
        axes.plot([], [], "o", mfc="white", mec=MUTED, ms=6.5, mew=1.6, label="published (authors' features)")
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 1.02), fontsize=9, labelcolor=MUTED)
    figure.alt = (f"Loss against sequences seen, to {last:,}, with a dashed line at ln {n_ways}. At the end: "
                  + ", ".join(f"{words} {value:.3f}" for value, words, _ in ends) + ".")
    return figure


@in_style
def head_strengths(heads: pd.DataFrame, final: Sequence[float], *, layer: int = 1) -> Picture:
    """Induction strength of each head of a layer against sequences seen (Figure 3b), for one run.

    `heads` has the columns sequences, layer, head, strength (on a sample of sequences). `final` holds each head's strength at the
    end over all training sequences, drawn as a dot.
    """
    figure = Picture(figsize=(7.6, 3.9))
    axes = figure.subplots()
    table = heads[heads["layer"] == layer].pivot_table(index="sequences", columns="head", values="strength")
    last = table.index.max()
    for head in table.columns:
        axes.plot(table.index, table[head], color=head_colour(head), lw=1.6)
        axes.plot(last, final[head], "o", color=head_colour(head), ms=5.5, clip_on=False, zorder=5)
    axes.axhline(0, color=MUTED, lw=0.8)
    low, high = min(-0.05, table.min().min()), max(0.5, table.max().max())
    axes.set(ylim=(low - 0.03, high + 0.06), ylabel="induction strength\n(attention to right − wrong label)")
    _millions(axes, last)
    _label_ends(axes, [(value, f"head {layer}.{head}", head_colour(head)) for head, value in enumerate(final)], last,
                0.058 * (high - low))
    figure.alt = (f"Induction strength of each head of Layer {layer + 1} against sequences seen, to {last:,}. At the end: "
                  + ", ".join(f"head {layer}.{head} {value:.2f}" for head, value in enumerate(final)) + ".")
    return figure


@in_style
def panel_curves(table: pd.DataFrame, panels: Mapping[str, str], colour: Mapping[str, str], *, n_ways: int = 2,
                 across: Mapping[str, str] | None = None, spans: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
                 y: str = "loss (nats)") -> Picture:
    """Small multiples of loss (nats), two per row, from the columns panel, group, run, sequences, value (Figures 6, 15).

    `panels` maps panels to titles, `colour` groups to colours, in order. Lines are medians over runs, bands their range. `across`
    maps a panel whose column "sequences" counts something else to words for it. `spans` maps panels and groups to the window in
    which a group was helped, a bar at the top.
    """
    figure = Picture(figsize=(7.6, 2.75 * -(-len(panels) // 2)))
    grid = figure.subplots(-(-len(panels) // 2), 2, sharey=True).flatten()
    spare = grid[-1] if len(panels) % 2 else None
    high, words, low = min(3.0, table["value"].max() * 1.04), [], threshold_of(n_ways)
    for axes, (panel, title) in zip(grid, panels.items(), strict=False):
        rows = table[table["panel"] == panel]
        for name, hue in colour.items():
            median = _curve(axes, rows[rows["group"] == name], hue)
            below = median.index[median < low]
            words.append(f"{title}, {name}: " + (f"below {low:.2f} at {below[0]:,.0f}" if len(below) else "never low"))
        axes.axhline(low, color=MUTED, ls=(0, (1, 2)), lw=1)
        axes.set(title=title, ylim=(-0.02 * high, high), ylabel=y if axes in grid[::2] else "")
        _millions(axes, rows["sequences"].max())
        axes.set_xlabel((across or {}).get(panel, axes.get_xlabel()))
        for i, (name, window) in enumerate((spans or {}).get(panel, {}).items()):
            axes.plot(window, [(0.97 - 0.045 * i) * high] * 2, color=colour[name], lw=4, solid_capstyle="butt")
            words[-1] += f", {name} from {window[0]:,.0f} to {window[1]:,.0f}"
    legend = grid[0] if spare is None else spare
    for name, hue in colour.items():
        legend.plot([], [], color=hue, label=name)
    legend.legend(frameon=False, fontsize=9.5, labelcolor="linecolor", loc="upper right" if spare is None else "center",
                  ncols=1 if spare is None else 2)
    if spare is not None:
        spare.axis("off")
    figure.alt = "Loss against sequences seen. " + "; ".join(words) + "."
    return figure


@in_style
def run_curves(table: pd.DataFrame, colour: Mapping[str, str], *,
               published: Mapping[str, Sequence[tuple[float, float]]] | None = None,
               threshold: bool = False, log: bool = False, dashed: Sequence[str] = (), y: str = "training loss (nats)",
               x: str | None = None, n_ways: int = 2, guess: bool = True, top: float | None = None, bottom: float | None = None,
               lines_at: Sequence[float] = ()) -> Picture:
    """Curves of groups of runs, from the columns group, run, sequences, value: each group's median over runs, and its range.

    `colour` maps groups to colours, in order. `guess` marks ln `n_ways`, the loss of guessing among the labels in context;
    `threshold` marks 0.4 times that, and where each median is first below it. `published` maps groups to points (sequences,
    value) of the paper, which are open circles. `x` replaces "sequences seen"; `lines_at` are the x of vertical lines,
    and `top` and `bottom` the ends of the y axis.
    """
    figure = Picture(figsize=(7.6, 4.1))
    axes = figure.subplots()
    last, height, words, low = table["sequences"].max(), {}, [], threshold_of(n_ways)
    for name, hue in colour.items():
        rows = table[table["group"] == name]
        if rows.empty:
            continue
        median = _curve(axes, rows, hue)
        height[name] = axes.lines[-1], median.mean()
        if name in dashed:
            axes.lines[-1].set_linestyle((0, (4, 2)))
        for point in (published or {}).get(name, ()):
            axes.plot(*point, "o", mfc="white", mec=hue, ms=6.5, mew=1.6, clip_on=False, zorder=5)
        below = median.index[median < low]
        if threshold and len(below):
            axes.plot(below[0], low, "o", color=hue, ms=4.5, zorder=5)
        at_end = float(median.iloc[-1])
        crossing = f", first below {low:.2f} at {below[0]:,.0f}" if threshold and len(below) else ""
        words.append(f"{name} {at_end:.3g}{crossing}")
    ground = {"color": MUTED, "ha": "right", "va": "bottom", "fontsize": 9, "zorder": 4,
              "bbox": {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}}
    if guess:
        axes.axhline(math.log(n_ways), color=MUTED, ls=(0, (4, 3)), lw=1)
        axes.text(0.995 * last, math.log(n_ways), f"ln {n_ways}", **ground)
    if threshold:
        axes.axhline(low, color=MUTED, ls=(0, (1, 2)), lw=1)
        axes.text(0.995 * last, low, f"0.4 ln {n_ways}", **ground)
    for at in lines_at:
        axes.axvline(at, color=MUTED, lw=1)
    if log:
        axes.set_yscale("log")
    else:
        high = top or min(2.0, table["value"].max() * 1.04)
        axes.set_ylim(-0.02 * high if bottom is None else bottom, high)
    axes.set_ylabel(y)
    _millions(axes, last)
    if x:
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    names = sorted(height, key=lambda name: -height[name][1])  # from the highest curve to the lowest
    lines = [height[name][0] for name in names]
    if published:
        lines += axes.plot([], [], "o", mfc="white", mec=MUTED, ms=6.5, mew=1.6)
        names = [*names, "published (authors' features)"]
    legend = axes.legend(lines, names, frameon=False, loc="upper right", bbox_to_anchor=(1.0, 1.03), fontsize=9.5,
                         labelspacing=0.25, handlelength=1.5)
    for text, drawn in zip(legend.get_texts(), lines, strict=True):
        text.set_color(drawn.get_color() if drawn.get_marker() == "None" else MUTED)
    figure.alt = f"{y} against {x or 'sequences seen'}, to {last:,.0f}. At the end: {'; '.join(words)}."
    return figure


@in_style
def head_dots(table: pd.DataFrame) -> Picture:
    """Induction strengths of heads, from the columns panel, run, head, value: one plot per panel, with heads in the order of their
    means, and a dot per run (chapter 12)."""
    names = list(table["panel"].unique())
    figure, words = Picture(figsize=(9.6, 2.7 * -(-len(names) // 4))), []
    grid = figure.subplots(-(-len(names) // 4), min(4, len(names)), sharey=True, squeeze=False)
    for axes, name in zip(grid.flatten(), names, strict=False):
        wide = table[table["panel"] == name].pivot(index="run", columns="head", values="value")
        order = list(wide.mean().sort_values(ascending=False).index)
        for x, head in enumerate(order):
            axes.plot([x] * len(wide), wide[head], "o", color=head_colour(head), ms=6, alpha=0.8)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set(title=name, xticks=range(len(order)), xlabel="head of Layer 2",
                 ylabel="induction strength" if axes in grid[:, 0] else "")
        axes.set_xticklabels(order)
        words.append(f"{name}: " + ", ".join(f"head {head} {wide[head].min():.2f} to {wide[head].max():.2f}" for head in order))
    for axes in grid.flatten()[len(names):]:
        axes.axis("off")
    figure.alt = "Induction strengths at the end, lowest to highest over runs. " + "; ".join(words) + "."
    return figure


@in_style
def against_strength(table: pd.DataFrame, panels: Mapping[str, str], *,
                     published: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None) -> Picture:
    """What heads do against their induction strength, one plot per column in `panels`, which gives its axis' title. Other columns
    are run, head, strength. The first run's heads are coloured and numbered, other runs' grey, published values open circles."""
    figure = Picture(figsize=(7.6, 3.5))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    first = table["run"].iloc[0]
    for axes, (column, words) in zip(grid, panels.items(), strict=True):
        if column in (published or {}):
            axes.plot(*published[column], "o", mfc="white", mec=MUTED, ms=6.5, mew=1.3, label="published")
            axes.legend(frameon=False, fontsize=9, labelcolor=MUTED, loc="best", handletextpad=0.2)
        rest = table[table["run"] != first]
        axes.plot(rest["strength"], rest[column], "o", color="#c9c9c9", ms=4.5)
        for row in table[table["run"] == first].sort_values("strength").to_dict("records"):
            axes.plot(row["strength"], row[column], "o", color=head_colour(row["head"]), ms=11, mec="white", mew=0.8)
            axes.text(row["strength"], row[column], str(row["head"]), color="white", fontsize=7.5, fontweight="bold", ha="center",
                      va="center_baseline")
        axes.set(xlabel="induction strength", ylabel=words)
        axes.margins(0.09, 0.13)
        _whole_numbers(axes, table[column])
    best = table[table["run"] == first].sort_values("strength", ascending=False)
    figure.alt = "Against induction strength: " + "; ".join(
        f"{words}: " + ", ".join(f"{s:.2f} {v:.3f}" for s, v in zip(best["strength"], best[column], strict=True))
        for column, words in panels.items()) + "."
    return figure


def _whole_numbers(axes: Axes, values: pd.Series) -> None:
    """Put the ticks of counts at whole numbers; write large numbers with commas."""
    if values.max() > 1000:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    elif (values % 1 == 0).all():
        if values.nunique() == 1:  # otherwise the axis would show only one whole number
            axes.set_ylim(values.min() - 1, values.max() + 1)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


@in_style
def distributions(of_runs: Mapping[str, Sequence[float]], by_rank: pd.Series) -> Picture:
    """Distributions over runs, one plot per quantity in `of_runs`; the last plot shows the strengths of their heads by rank, the
    index of `by_rank` (Figure 18). Each dot is one run (or one of its heads), each line a median."""
    figure = Picture(figsize=(7.6, 3.2))
    grid = figure.subplots(1, len(of_runs) + 1, width_ratios=[1] * len(of_runs) + [2.4])
    panels = [*((words, pd.Series(values, [""] * len(values))) for words, values in of_runs.items()),
              ("induction strength, by rank", by_rank)]
    for axes, (words, values) in zip(grid, panels, strict=True):
        sns.stripplot(x=values.index, y=values.to_numpy(), ax=axes, color=PALETTE[0], size=5, alpha=0.75, jitter=0.12,
                      formatter=str)
        for at, (_, each) in enumerate(values.groupby(level=0, sort=False)):
            axes.plot([at - 0.3, at + 0.3], [each.median()] * 2, color=INK, lw=1.6, zorder=4)
        axes.set(ylabel=words, xlabel="")
        _whole_numbers(axes, values)
        if len(set(values.index)) == 1:
            axes.set_xticks([])
    grid[-1].axhline(0, color=MUTED, lw=0.8)
    grid[-1].set_xlabel("head, the strongest first")
    figure.alt = "; ".join(f"{words}: median {pd.Series(values).median():,.4g}, from {min(values):,.4g} to {max(values):,.4g}"
                           for words, values in of_runs.items()) + "; induction strengths by rank, medians: " + ", ".join(
        f"{each.median():.2f}" for _, each in by_rank.groupby(level=0)) + "."
    return figure
