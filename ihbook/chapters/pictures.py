"""The book's style, and its pictures of characters and attention patterns: functions from tensors to a `Picture`.

No picture opens a window. A head keeps its colour across the book (`head_colour`).
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MUTED = "#222222", "#6b6b6b"
STYLE = {
    **sns.axes_style("ticks"), **sns.plotting_context("notebook", font_scale=0.95),
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.labelcolor": INK,
    "axes.titlelocation": "left", "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlepad": 9,
    "text.color": INK, "xtick.color": "#555555", "ytick.color": "#555555", "lines.linewidth": 1.9,
    "figure.constrained_layout.use": True, "figure.dpi": 110, "savefig.dpi": 160, "font.family": "DejaVu Sans",
    "figure.facecolor": "white",  # so that a figure can be read on a dark page
}
PALETTE = sns.color_palette("colorblind", 10).as_hex()
PALETTE[6] = "#56b4e9"  # in place of seaborn's pale pink, which can't be read as text
PALETTE[9] = "#444444"


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook, at most as wide as the page, with alternative text (`alt`)."""

    alt = ""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png")
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        source = base64.b64encode(self._repr_png_()).decode()
        return (f'<img alt="{html.escape(self.alt)}" src="data:image/png;base64,{source}" '
                f'style="--width: {self.get_figwidth():.1f}in; width: var(--width); max-width: 100%; height: auto">')


def in_style(function: Callable[..., Picture]) -> Callable[..., Picture]:
    """The same function; what it draws has the book's style, and the style of other figures stays."""
    @wraps(function)
    def styled(*args, **kwargs) -> Picture:
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return styled


def head_colour(head: int) -> str:
    """The colour of head number `head`, in every layer; colour-blind readers can tell up to 10 heads apart."""
    return PALETTE[head % len(PALETTE)]


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per name, in order, for up to ten names."""
    return dict(zip(names, PALETTE, strict=False))


def shades(names: Sequence[str]) -> dict[str, str]:
    """One shade per name, for names in order from the least to the most."""
    return dict(zip(names, sns.color_palette("flare", len(names)).as_hex(), strict=True))


def diverging(values: Mapping[str, float]) -> dict[str, str]:
    """One colour per value from −1 to 1, dark grey in the middle."""
    scale = sns.diverging_palette(220, 20, s=90, l=50, center="dark", as_cmap=True)
    return {name: matplotlib.colors.to_hex(scale((value + 1) / 2)) for name, value in values.items()}


def _image(axes: Axes, image: torch.Tensor, *, frame: str | None = None) -> None:
    """Draw a character, dark ink on white."""
    axes.imshow(255 - image.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame or "#dddddd", linewidth=2.0 if frame else 0.8)


@in_style
def contact_sheet(images: torch.Tensor, n_classes: int = 12) -> Picture:
    """Characters `[class, exemplar, 28, 28]`, one column per class, one row per exemplar (up to 5). Exemplar 0 trains."""
    n_classes, n_exemplars = min(len(images), n_classes), min(images.shape[1], 5)
    figure = Picture(figsize=(8, 8 * n_exemplars / n_classes * 1.04))
    grid = figure.subplots(n_exemplars, n_classes, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for e, row in enumerate(np.atleast_2d(grid)):
        for c, axes in enumerate(row):
            _image(axes, images[c, e], frame=PALETTE[0] if e == 0 else None)
        row[0].set_ylabel("trains" if e == 0 else "held out", fontsize=8.5, color=PALETTE[0] if e == 0 else MUTED)
    figure.alt = f"{n_classes} characters in columns, each drawn {n_exemplars} times in slightly different hands."
    return figure


@in_style
def sequence(images: Sequence[torch.Tensor], labels: Sequence[int], *, answer: bool = True) -> Picture:
    """One sequence: characters and label tokens in order, then the query and its answer (or "?" without `answer`).

    `images` are the characters of the pairs and of the query; `labels` are their labels, of which the last is the answer.
    """
    n = 2 * len(images) - 1
    figure = Picture(figsize=(min(8.0, 1.5 * n + 1.6), 2.15))
    axes = figure.subplots()
    axes.set(xlim=(-0.6, n + 0.75), ylim=(-1.0, 0.72), aspect="equal")
    axes.axis("off")
    for position in range(n):
        if position % 2 == 0:
            inset = axes.inset_axes((position - 0.4, -0.4, 0.8, 0.8), transform=axes.transData)
            _image(inset, images[position // 2], frame=PALETTE[3] if position == n - 1 else "#aaaaaa")
            name = "query" if position == n - 1 else f"exemplar {position // 2 + 1}"
        else:
            axes.add_patch(FancyBboxPatch((position - 0.26, -0.26), 0.52, 0.52, boxstyle="round,pad=0.06", fc="#eef3f8",
                                          ec=PALETTE[0]))
            axes.text(position, -0.01, str(labels[position // 2]), ha="center", va="center", fontsize=19, color=PALETTE[0])
            name = "its label"
        axes.text(position, 0.6, str(position), ha="center", fontsize=10, color=MUTED)
        axes.text(position, -0.7, name, ha="center", fontsize=11.5, color=INK)
    axes.add_patch(FancyArrowPatch((n - 0.5, 0), (n - 0.02, 0), arrowstyle="-|>", mutation_scale=13, color=INK))
    axes.text(n + 0.28, 0, str(labels[-1]) if answer else "?", ha="center", va="center", fontsize=23, color=PALETTE[3],
              weight="bold")
    axes.text(n + 0.28, -0.7, "the answer", ha="center", fontsize=11.5)
    pairs = ", ".join(f"a character with label {label}" for label in labels[:-1])
    asked = f"The answer is {labels[-1]}." if answer else "What is the answer?"
    figure.alt = f"A sequence: {pairs}, then the query, one of these characters again. {asked}"
    return figure


@in_style
def label_pairs(train: torch.Tensor, test: torch.Tensor, n_labels: int) -> Picture:
    """Half a table of the unordered label pairs, which shows those that train and those that are held out."""
    figure = Picture(figsize=(3.9, 3.3) if n_labels <= 6 else (5.4, 4.6))
    axes = figure.subplots()
    for pairs, colour in ((train, PALETTE[0]), (test, PALETTE[1])):
        for low, high in pairs.tolist():
            axes.add_patch(FancyBboxPatch((low - 0.4, high - 0.4), 0.8, 0.8, boxstyle="round,pad=0.02", fc=colour, ec="none"))
    axes.set(xlim=(-0.6, n_labels - 1.4), ylim=(n_labels - 0.4, 0.4), aspect="equal", xlabel="one label", ylabel="the other",
             xticks=range(n_labels - 1), yticks=range(1, n_labels))
    axes.tick_params(length=0)
    sns.despine(ax=axes, left=True, bottom=True)
    for i, (name, pairs, colour) in enumerate((("train", train, PALETTE[0]), ("held out", test, PALETTE[1]))):
        words = f"{len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'} {name}"
        axes.text(1.0, 0.97 - 0.1 * i, words, transform=axes.transAxes, ha="right", va="top", color=colour, fontsize=10.5)
    held = ", ".join(f"{a} with {b}" for a, b in test.tolist()[:10]) + (" and more" if len(test) > 10 else "")
    figure.alt = f"Half a table of {len(train) + len(test)} label pairs; held out are {held or 'none'}."
    return figure


def _heat(axes: Axes, values: torch.Tensor, limits: tuple[float, float]) -> None:
    """Draw a matrix as a heat map with its numbers in the cells."""
    axes.imshow(values.numpy(), cmap="Blues", vmin=limits[0], vmax=limits[1], aspect="auto")
    for (i, j), value in np.ndenumerate(values.numpy()):
        dark = value > limits[0] + 0.6 * (limits[1] - limits[0])
        if value >= 0.005:
            axes.text(j, i, f"{value:.2f}".lstrip("0") or "0", ha="center", va="center", fontsize=7.5,
                      color="white" if dark else INK)
    axes.tick_params(length=0, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


@in_style
def attention(patterns: Mapping[str, torch.Tensor], tokens: Sequence[str]) -> Picture:
    """Attention patterns `[q_pos, k_pos]` by title, four per row; each number is a share of its row's attention."""
    columns = min(4, len(patterns))
    rows = -(-len(patterns) // columns)
    figure = Picture(figsize=(1.95 * columns, 2.1 * rows))
    for axes, (title, pattern) in zip(figure.subplots(rows, columns, squeeze=False).flatten(), patterns.items(), strict=False):
        _heat(axes, pattern, (0.0, 1.0))
        axes.set(xticks=range(len(tokens)), yticks=range(len(tokens)), xticklabels=tokens, yticklabels=tokens)
        axes.set_title(title, fontsize=8.5)
    figure.alt = "Attention patterns; where the last token looks: " + "; ".join(
        f"{title}: " + ", ".join(f"{token} {p:.2f}" for token, p in zip(tokens, pattern[-1].tolist(), strict=True))
        for title, pattern in patterns.items()) + "."
    return figure


@in_style
def wiring(grids: Mapping[str, torch.Tensor], rows: Sequence[str], columns: Sequence[str], words: str,
           limits: tuple[float, float] | None) -> Picture:
    """Heat maps of Layer 2's heads (rows) by Layer 1's (columns), two per row, on one scale (Figure 11)."""
    low, high = limits or (0.0, max(float(grid.max()) for grid in grids.values()))
    figure = Picture(figsize=(7.6, 3.3 * -(-len(grids) // 2)))
    for axes, (title, grid) in zip(figure.subplots(-(-len(grids) // 2), 2).flatten(), grids.items(), strict=False):
        _heat(axes, grid, (low, high))
        axes.set(title=title.strip(), xticks=range(len(columns)), yticks=range(len(rows)), xticklabels=columns, yticklabels=rows,
                 xlabel="head of Layer 1", ylabel="head of Layer 2")
        axes.label_outer(remove_inner_ticks=False)
    figure.alt = f"Heat maps of {words}, Layer 2's heads by Layer 1's: " + "; ".join(
        f"{title.strip()}, from {grid.min():.2f} to {grid.max():.2f}, in the first row least at {columns[int(grid[0].argmin())]} "
        f"and most at {columns[int(grid[0].argmax())]}" for title, grid in grids.items()) + "."
    return figure


@in_style
def heat_map(table: pd.DataFrame, words: str, x: str, y: str) -> Picture:
    """A heat map of `words` with its numbers, NaN left empty; its index is along `y`, its columns along `x` (chapter 12)."""
    figure = Picture(figsize=(1.6 + 0.62 * table.shape[1], 0.9 + 0.34 * len(table)))
    sns.heatmap(table, ax=figure.subplots(), cmap="crest", annot=True, fmt=",.0f", annot_kws={"size": 9}, cbar=False, linewidths=1)
    figure.axes[0].set(xlabel=x, ylabel=y)
    figure.axes[0].set_title(words, fontsize=10)
    figure.axes[0].tick_params(length=0, rotation=0)
    figure.alt = f"Heat map of {words}: " + "; ".join(
        f"{y} {name}: {row.min():,.0f} to {row.max():,.0f}" for name, row in table.iterrows()) + "."
    return figure


@in_style
def ratio_maps(rows: Mapping[str, Mapping[str, pd.DataFrame]], x: str, y: str) -> Picture:
    """Heat maps of ratios, one row of maps per entry of `rows`, one map per name: blue below 1, orange above, each with its number
    (∞: never). Frames have what is along `y` as index and along `x` as columns; what a row lacks stays empty (chapter 11)."""
    names = list(dict.fromkeys(name for maps in rows.values() for name in maps))
    figure = Picture(figsize=(9.6, 0.5 + 2.0 * len(rows)))
    scale, words = sns.diverging_palette(240, 30, s=85, l=60, as_cmap=True), []
    for line, (row, maps) in zip(figure.subplots(len(rows), len(names), squeeze=False), rows.items(), strict=True):
        for axes, name in zip(line, names, strict=True):
            if name not in maps:
                axes.axis("off")
                continue
            found = maps[name].sort_index()
            shades = np.log2(found.clip(0.25, 4).to_numpy(float))
            axes.imshow(shades, cmap=scale, vmin=-1.5, vmax=1.5, aspect="auto", origin="lower")
            for (i, j), value in np.ndenumerate(found.to_numpy(float)):
                axes.text(j, i, "∞" if np.isinf(value) else f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=INK)
            axes.set(xticks=range(found.shape[1]), yticks=range(found.shape[0]), title=textwrap.fill(name, 13))
            axes.set_xticklabels([f"{at:g}" for at in found.columns])
            axes.set_yticklabels([f"{at:g}" for at in found.index])
            axes.tick_params(length=0, labelsize=8.5)
            axes.title.set_fontsize(9.5)
            for spine in axes.spines.values():
                spine.set_visible(False)
            words.append(f"{row}, {name}: " + ", ".join(
                f"{value:.2f} at start {start:g} and length {length:g}" for (length, start), value in found.stack().items()))
        next(axes for axes in line if axes.axison).set_ylabel(f"{row}\n{y}", fontsize=9.5)
    figure.supxlabel(x, fontsize=9.5, color=INK)
    figure.alt = "Heat maps of ratios. " + "; ".join(words) + "."
    return figure
