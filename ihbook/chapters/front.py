"""The landing page's figure: the circuit, and what happens to the wait when its parts are given."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from IPython.display import HTML
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ihbook.chapters.pictures import INK, MUTED, Picture, in_style
from ihbook.metrics import threshold

A, B, C = "#0072B2", "#D55E00", "#009E73"  # the subcircuits' colours, as in circuit.svg
TOKENS = (("$a$", "exemplar"), ("3", "label"), ("$b$", "exemplar"), ("0", "label"), ("$a$", "query"))


def argument(curves: pd.DataFrame, colour: Mapping[str, str], n_ways: int = 2) -> HTML:
    """The circuit, and the losses of Figure 5b: `curves` has the columns group (what is clamped), run, sequences and value (nats);
    `colour` maps groups to colours. A line is the median over runs. On a narrow page the second picture stands below the first."""
    return HTML(f'<div class="beside">{_circuit()._repr_html_()}{_waits(curves, colour, n_ways)._repr_html_()}</div>')


@in_style
def _circuit() -> Picture:
    """Five tokens, and the three subcircuits as arrows between their streams."""
    figure = Picture(figsize=(4.4, 3.5))
    axes = figure.subplots()
    for x, (token, kind) in enumerate(TOKENS):
        label = kind == "label"
        axes.add_patch(FancyBboxPatch((x - 0.26, -0.26), 0.52, 0.52, boxstyle="round,pad=0.05", fc="#eef3f8" if label else "white",
                                      ec="#9aa5b1", lw=1))
        axes.text(x, 0, token, ha="center", va="center", fontsize=13, color=INK)
        axes.text(x, -0.55, kind, ha="center", va="center", fontsize=9, color=MUTED)
        axes.plot([x, x], [0.34, 3.1 if kind == "query" else 2.15], color="#c3cad3", lw=1.2, zorder=0)

    def arrow(start, end, colour, bend):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, lw=2,
                                       connectionstyle=f"arc3,rad={bend}", shrinkA=1, shrinkB=1))

    for x, alpha in ((0, 1), (2, 0.4)):
        axes.add_patch(FancyArrowPatch((x, 0.6), (x + 1, 1.05), arrowstyle="-|>", mutation_scale=13, color=A, lw=2, alpha=alpha,
                                       connectionstyle="arc3,rad=-0.25"))
    axes.text(-0.35, 1.16, "A  copy the exemplar\n    onto its label", color=A, fontsize=9.5, va="bottom", linespacing=1.1)
    arrow((4, 1.45), (1.06, 1.95), B, 0.22)
    axes.text(2.6, 2.27, "B  match the query", color=B, fontsize=9.5, ha="center", va="bottom")
    arrow((1.06, 2.12), (3.94, 2.95), C, -0.28)
    axes.text(2.0, 3.1, "C  copy the label", color=C, fontsize=9.5, ha="center", va="bottom")
    axes.text(4, 3.2, "3", color=C, fontsize=14, ha="center", va="bottom", weight="bold")
    for y, name in ((0.85, "Layer 1"), (2.2, "Layer 2")):
        axes.text(4.35, y, name, color=MUTED, fontsize=9, va="center")
    axes.set(xlim=(-0.6, 5.1), ylim=(-0.75, 3.75))
    axes.axis("off")
    axes.set_title("A circuit of three parts …")
    figure.alt = ("The circuit: Layer 1 copies each exemplar onto its label token (A); Layer 2 matches the query with that copy "
                  "(B), and copies the label to the answer (C).")
    return figure


@in_style
def _waits(curves: pd.DataFrame, colour: Mapping[str, str], n_ways: int) -> Picture:
    """Figure 5b's losses, each as the median over runs."""
    figure = Picture(figsize=(5.2, 3.5))
    axes, last, words = figure.subplots(), curves["sequences"].max(), []
    for name, hue in colour.items():
        median = curves[curves["group"] == name].groupby("sequences")["value"].median()
        axes.plot(median.index, median, color=hue, label=name, lw=2.4 if name == "nothing" else 1.7)
        below = median.index[median < threshold(n_ways)]
        when = f"below {threshold(n_ways):.2f} at {below[0]:,.0f}" if len(below) else "never that low"
        words.append(f"{name} clamped: {when}")
    axes.set(xlim=(0, last), ylim=(0, min(1.7, curves["value"].max())), ylabel="training loss (nats)", xlabel="sequences seen")
    axes.xaxis.set_major_formatter(lambda x, _: "0" if x == 0 else f"{x / 1e3:g} k")
    axes.set_title("… waits until some of it is given")
    axes.legend(title="clamped throughout training", frameon=False, fontsize=9, title_fontsize=9, labelcolor="linecolor",
                loc="upper right", labelspacing=0.25)
    figure.alt = "Training loss against sequences seen: " + "; ".join(words) + "."
    return figure
