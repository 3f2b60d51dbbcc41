"""Pictures of verdicts: claims against the parameters of a sweep, and over the columns of evidence."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns

from ihbook.chapters.pictures import INK, MUTED, PALETTE, Picture, in_style


@in_style
def sweep(table: pd.DataFrame, varied: Sequence[str], claims: Mapping[str, Any]) -> Picture:
    """Small multiples of a sweep, one per claim: numbers against the first of `varied`, colours for the second, medians and
    ranges over the rest. `seed` is among the rest unless it is alone. Shading marks where a claim (`claims.Claim`) holds."""
    order = sorted(varied, key=lambda name: name == "seed") or ["nth"]
    hue = next((name for name in order[1:] if name != "seed"), None)
    x = table[order[0]]
    table = table.assign(x=x if pd.api.types.is_numeric_dtype(x) else x.map(str), hue=table[hue].map(str) if hue else "")
    palette = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(table["hue"].unique())}
    keys = [key for key in dict.fromkeys(table["claim"]) if table.loc[table["claim"] == key, "value"].notna().any()]
    figure = Picture(figsize=(9.6, 2.8 * -(-len(keys) // 3)))
    grid, words = figure.subplots(-(-len(keys) // 3), 3, squeeze=False).flatten(), []
    for axes, key in zip(grid, keys, strict=False):
        rows = table[table["claim"] == key].dropna(subset="value")
        sns.lineplot(rows, x="x", y="value", hue="hue", palette=palette, ax=axes, estimator="median", errorbar=("pi", 100),
                     marker="o", legend=False)
        low, high = axes.get_ylim()
        sentence = key
        if key in claims:  # a reader's own chapter may have other claims
            sentence = claims[key].sentence
            axes.axhspan(max(low, claims[key].low), min(high, claims[key].high), color=PALETTE[2], alpha=0.12, lw=0)
        axes.set(ylim=(low, high), xlabel=order[0], ylabel="", title="\n".join(textwrap.wrap(sentence, 36)))
        axes.title.set_fontsize(9.5)
        if pd.api.types.is_integer_dtype(x):
            axes.set_xticks(sorted(x.unique()))
        words.append(f"{sentence}: median {rows['value'].median():.3g}")
    for axes in grid[len(keys):]:
        axes.axis("off")
    if hue:
        handles = [grid[0].plot([], [], "o-", color=colour, label=f"{hue}={name}")[0] for name, colour in palette.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.alt = f"Against {order[0]}, one panel per claim. " + "; ".join(words) + "."
    return figure


@in_style
def columns(of_claim: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Picture:
    """One panel per claim: for each column of evidence, one dot per seed, the median, and its interval as a bar (`claims.Verdict`,
    in the order of `names`). Shading marks where the claim holds, a dotted line the published number; ▸ counts seeds that never got
    there. Panels of one claim share their axis."""
    figure = Picture(figsize=(9.6, (0.55 + 0.33 * len(names)) * len(of_claim) + 0.4))
    words, limits = [], {}
    for verdicts in of_claim.values():
        limits[verdicts[0].claim.key] = _limits(verdicts, *limits.get(verdicts[0].claim.key, ()))
    for axes, (title, verdicts) in zip(figure.subplots(len(of_claim), 1, squeeze=False).flatten(), of_claim.items(), strict=True):
        claim = verdicts[0].claim
        low, high = limits[claim.key]
        axes.axvspan(max(low, claim.low), min(high, claim.high), color=PALETTE[2], alpha=0.12, lw=0)
        if claim.published_value is not None:
            axes.axvline(claim.published_value, color=INK, ls=":", lw=1.3)
        for y, verdict in enumerate(verdicts):
            known = [v for v in verdict.known if math.isfinite(v)]
            never = verdict.n - len(known)
            colour = {"holds": PALETTE[2], "differs": PALETTE[3], "direction only": PALETTE[3]}.get(verdict.word, MUTED)
            shifts = [0.16 * (i % 3 - 1) for i in range(len(known))]  # neighbours stand apart
            axes.scatter(known, [y + shift for shift in shifts], s=16, color=colour, alpha=0.55, lw=0, zorder=3)
            if verdict.interval and math.isfinite(verdict.interval[0]):
                axes.plot([verdict.interval[0], min(high, verdict.interval[1])], [y, y], color=colour, lw=4, alpha=0.45, zorder=2,
                          solid_capstyle="butt")
            if known and math.isfinite(verdict.median):
                axes.plot([verdict.median] * 2, [y - 0.3, y + 0.3], color=colour, lw=2.2, zorder=4)
            axes.annotate(f"▸{never} " * bool(never) + verdict.word, (1.01, y), xycoords=("axes fraction", "data"), va="center",
                          fontsize=9, color=colour)
        axes.set(xlim=(low, high), ylim=(len(verdicts) - 0.4, -0.6), yticks=range(len(names)), xlabel=claim.measure)
        axes.set_yticklabels(names)
        axes.tick_params(axis="y", length=0)
        axes.set_title("\n".join(textwrap.wrap(title, 84)))
        axes.xaxis.label.set_fontsize(9.5)
        words.append(f"{title}: " + ", ".join(f"{name} {v.measured}, {v.word}" for name, v in zip(names, verdicts, strict=True)))
    figure.alt = "; ".join(words) + "."
    return figure


def _limits(verdicts: Sequence[Any], *more: float) -> tuple[float, float]:
    """The ends of an axis that has all finite numbers of these verdicts, their claim's bounds, its published number, and `more`."""
    claim = verdicts[0].claim
    ends = [x for x in (*(v for verdict in verdicts for v in verdict.known), claim.low, claim.high, claim.published_value)
            if x is not None and math.isfinite(x)]
    margin = 0.08 * (max(ends) - min(ends)) or 0.1
    return min([min(ends) - margin, *more]), max([max(ends) + margin, *more])
