"""Drawings that follow controls: live widgets where there is a kernel, and otherwise a page that needs none.

A drawing is a template of HTML and SVG with a `{}` for each number, so that a change of state is a short list of numbers. That
is fast enough to follow a slider, and small enough for a page to hold every state of its controls.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

import ipywidgets
import torch
from PIL import Image
from torch import Tensor

from ihbook import metrics
from ihbook.chapters import pictures
from ihbook.clamps import Preserve
from ihbook.config import RunConfig
from ihbook.task import Batch

Values = list[str]


@dataclass(frozen=True)
class Control:
    """A control. As a "slider", "choice" or "buttons" it sets one of `options`; as "switches" it sets any subset of them."""

    name: str
    options: tuple[str, ...]
    kind: str = "choice"
    start: str = ""  # the first state; if empty, the first option, or all switches on

    @property
    def states(self) -> list[str]:
        """Every state, as a part's `values` take it: the index of an option, or one 0 or 1 per switch."""
        if self.kind == "switches":
            return ["".join(bits) for bits in itertools.product("10", repeat=len(self.options))]
        return [str(i) for i in range(len(self.options))]

    @property
    def first(self) -> str:
        return self.start or ("1" * len(self.options) if self.kind == "switches" else "0")


@dataclass(frozen=True)
class Part:
    """A drawing's template, the names of the controls that it follows, and a function from their states to its numbers."""

    template: str
    follows: tuple[str, ...]
    values: Callable[..., Values]


class Panel(ipywidgets.VBox):
    """Controls above the parts that follow them. Without a kernel, as in a built page, it shows `page` instead.

    If a part's `values` raise ValueError (two clamps that do not compose, say), the part shows the message instead.
    """

    def __init__(self, controls: Sequence[Control], parts: Sequence[Part], *, label: str, page: str | None = None):
        self._page = page
        self._controls, self._parts, self._label = tuple(controls), tuple(parts), label
        fronts = {control.name: _front(control) for control in controls}
        self._views = [ipywidgets.HTML() for _ in parts]
        self._states = {control.name: control.first for control in controls}
        for control in controls:
            self._listen(control, fronts[control.name])
        super().__init__([*fronts.values(), *self._views])
        self.add_class("ih-panel")
        self.draw(set(self._states))

    def _listen(self, control: Control, front: ipywidgets.Widget) -> None:
        switches = front.children[1:] if control.kind == "switches" else (front,)

        def changed(_: object) -> None:
            values = [switch.value for switch in switches]
            self._states[control.name] = ("".join("1" if on else "0" for on in values) if control.kind == "switches"
                                          else str(values[0]))
            self.draw({control.name})

        for switch in switches:
            switch.observe(changed, "value")

    def draw(self, changed: set[str]) -> None:
        """Draw the parts that follow a control in `changed`."""
        for part, view in zip(self._parts, self._views, strict=True):
            if changed & set(part.follows) or not view.value:
                view.value = STYLE + _drawn(part, [self._states[name] for name in part.follows])

    @cached_property
    def page(self) -> str:
        return self._page or page(self._controls, self._parts, label=self._label)

    def _repr_mimebundle_(self, **options: object) -> dict:
        return {**super()._repr_mimebundle_(**options), "text/html": self.page}


def _front(control: Control) -> ipywidgets.Widget:
    """The widget of a control; for switches, a box whose first child is the control's name."""
    wide = {"description_width": "initial"}
    options = [(name, i) for i, name in enumerate(control.options)]
    if control.kind == "switches":
        switches = [ipywidgets.ToggleButton(bit == "1", description=name, tooltip=f"{control.name}: {name} on or off",
                                            layout={"width": "auto"})
                    for name, bit in zip(control.options, control.first, strict=True)]
        return ipywidgets.Box([ipywidgets.Label(control.name), *switches], layout={"flex_flow": "row wrap"})
    kind = {"slider": ipywidgets.SelectionSlider, "choice": ipywidgets.Dropdown, "buttons": ipywidgets.ToggleButtons}[control.kind]
    layout = {"width": "min(100%, 640px)"} if control.kind == "slider" else {"width": "auto"}
    front = kind(options=options, value=int(control.first), description=control.name, style=wide, layout=layout)
    if control.kind == "buttons":
        front.style.button_width = "auto"
    return front


def page(controls: Sequence[Control], parts: Sequence[Part], *, label: str) -> str:
    """The panel as HTML that needs no kernel and no network: the numbers of every state, and a short script (panel.js)."""
    by_name = {control.name: control for control in controls}
    data = {"controls": [{"name": c.name, "first": c.first} for c in controls], "parts": []}
    for part in parts:
        frames = {"|".join(states): _frame(part, states)
                  for states in itertools.product(*(by_name[name].states for name in part.follows))}
        data["parts"].append({"template": part.template, "follows": part.follows, "frames": frames})
    fields = "".join(_field(control) for control in controls)
    views = "".join(f'<div class="ih-view">{_drawn(part, [by_name[name].first for name in part.follows])}</div>' for part in parts)
    packed = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    return (f'{STYLE}<section class="ih-panel" aria-label="{html.escape(label)}"><form class="ih-controls">{fields}</form>{views}'
            f'<script type="application/json">{packed}</script><script>{SCRIPT}</script></section>')


def _frame(part: Part, states: Sequence[str]) -> Values | dict[str, str]:
    """The values of a part in these states, or what it shows in their place."""
    try:
        return part.values(*states)
    except ValueError as error:
        return {"instead": f'<p class="ih-error" role="alert">{html.escape(str(error))}</p>'}


def _drawn(part: Part, states: Sequence[str]) -> str:
    """A part in these states, or what it shows in its place."""
    frame = _frame(part, states)
    return frame["instead"] if isinstance(frame, dict) else part.template.format(*frame)


def _field(control: Control) -> str:
    name = html.escape(control.name)
    if control.kind == "slider":
        words = html.escape(json.dumps(control.options, ensure_ascii=False))
        return (f'<label class="ih-slider">{name} <input type="range" name="{name}" min="0" max="{len(control.options) - 1}" '
                f'value="{control.first}" data-options="{words}"><output>{html.escape(control.options[int(control.first)])}'
                '</output></label>')
    if control.kind == "choice":
        options = "".join(f'<option value="{i}"{" selected" * (str(i) == control.first)}>{html.escape(option)}</option>'
                          for i, option in enumerate(control.options))
        return f'<label>{name} <select name="{name}" autocomplete="off">{options}</select></label>'
    kind = "radio" if control.kind == "buttons" else "checkbox"
    boxes = "".join(f'<label><input type="{kind}" name="{name}" value="{i}" autocomplete="off"'
                    f'{" checked" * (control.first[i] == "1" if kind == "checkbox" else str(i) == control.first)}>'
                    f'{html.escape(option)}</label>'
                    for i, option in enumerate(control.options))
    return f'<fieldset><legend>{name}</legend>{boxes}</fieldset>'


@dataclass(frozen=True, eq=False)
class Shown:
    """One sequence to show: its evaluation set in words, a batch that holds it alone, and its characters if there are any."""

    name: str
    batch: Batch
    images: tuple[Tensor, ...] | None

    def drawing(self) -> str:
        """Its tokens and its right answer, as HTML."""
        labels = self.batch.labels[0, 0].tolist()
        ids = self.batch.ids[0, 0].tolist()
        cells = []
        for i, label in enumerate(labels):
            last = i == len(labels) - 1
            what = "query" if last else f"exemplar {i + 1}"
            drawn = (f'<img alt="{what}" src="{picture(self.images[i])}">' if self.images
                     else f'<div class="ih-label">x{ids[i]}</div>')
            cells.append(f"<figure>{drawn}<figcaption>{what}</figcaption></figure>")
            role = "right answer" if last else "label"
            cells.append(f'<figure><div class="ih-label">{label}</div><figcaption>{role}</figcaption></figure>')
        return f'<div class="ih-tokens">{"".join(cells)}</div>'


FELT = {"everything": (), "the patterns alone": (Preserve("values"),), "the values alone": (Preserve("patterns"),)}


# The drawings: functions that return templates, and functions (`…_values`) that fill them.

def patterns(layer: int, n_heads: int, tokens: Sequence[str]) -> str:
    """Every head's attention pattern, without the entries that the causal mask hides; rows attend to columns."""
    n = len(tokens)
    figures = []
    for head in range(n_heads):
        cells = "".join(f'<rect x="{k}" y="{q}" width=".94" height=".94" opacity="{{}}"/>' for q in range(n) for k in range(q + 1))
        under = "".join(f'<rect x="{k}" y="{q}" width=".94" height=".94"/>' for q in range(n) for k in range(q + 1))
        rows = "".join(f'<text x="-.25" y="{i + .68}" text-anchor="end">{token}</text>'
                       f'<text x="{i + .47}" y="{n + .72}" text-anchor="middle">{token}</text>' for i, token in enumerate(tokens))
        figures.append(
            f'<figure style="opacity:{{}}"><figcaption style="color:{pictures.head_colour(head)}">{layer}.{head}</figcaption>'
            f'<svg viewBox="-1.1 -.1 {n + 1.2} {n + 1.1}" role="img" aria-label="Attention of head {layer}.{head}, rows to '
            f'columns"><g fill="#eef0f2">{under}</g><g fill="{pictures.head_colour(head)}">{cells}</g>{rows}</svg></figure>')
    return f'<div class="ih-heads"><h4>Layer {layer + 1}</h4>{"".join(figures)}</div>'


def pattern_values(pattern: Tensor, on: Sequence[bool] | None = None) -> Values:
    """The numbers of `patterns`, from a pattern `[head, q_pos, k_pos]`; heads that are not `on` are shown pale."""
    below = torch.ones(pattern.shape[1:], dtype=torch.bool).tril()
    return [value for head, one in enumerate(pattern)
            for value in ("1" if on is None or on[head] else ".25", *map(short, one[below].tolist()))]


def short(x: float, digits: int = 2) -> str:
    """A number in few characters, such as .5, 0 or 1."""
    text = f"{x:.{digits}f}".rstrip("0").rstrip(".") or "0"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else {"-0": "0"}.get(text, text)


def bars(title: str, names: Sequence[str], colours: Sequence[str], limits: tuple[float, float]) -> str:
    """A horizontal bar from 0 for each of `names`, with its number."""
    low, high = limits
    left, width, row = 12 + 7.2 * max(map(len, names)), 190, 19
    zero = left + width * (0 - low) / (high - low)
    height = row * len(names) + 26
    lines = [f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="20" y2="{height - 4}" stroke="#888"/>']
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        y = 22 + row * i
        lines.append(f'<text x="{left - 6:.0f}" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>'
                     f'<rect x="{{}}" y="{y}" width="{{}}" height="{row - 5}" fill="{colour}"/>'
                     f'<text class="ih-value" x="{{}}" y="{y + 12}">{{}}</text>')
    total = left + width + 52
    return (f'<svg class="ih-chart" style="max-width:{total:.0f}px" viewBox="0 0 {total:.0f} {height}" role="img" '
            f'aria-label="{html.escape(title)}"><text x="2" y="12" class="ih-title">{html.escape(title)}</text>'
            f'{"".join(lines)}</svg>')


def bar_values(values: Sequence[float], names: Sequence[str], limits: tuple[float, float], digits: int = 2) -> Values:
    """The numbers of `bars` with the same names and limits; a bar stops at the limits, its number does not."""
    low, high = limits
    left, width = 12 + 7.2 * max(map(len, names)), 190
    zero = left + width * (0 - low) / (high - low)
    result = []
    for value in values:
        x = left + width * (min(max(value, low), high) - low) / (high - low)
        words = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0
        result += [short(min(x, zero), 1), short(abs(x - zero), 1), short(max(x, zero) + 4, 1), words]
    return result


@dataclass(frozen=True)
class Axes:
    """A chart's axes: the range of each, its title, and its marks as (number, text)."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_words: str
    y_words: str
    x_marks: Sequence[tuple[float, str]]
    y_marks: Sequence[tuple[float, str]]

    WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 230, 44, 12, 26, 40

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point's place in the drawing's units; a value outside the range is moved to the nearer end."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (min(max(x, x0), x1) - x0) / (x1 - x0)
        up = (min(max(y, y0), y1) - y0) / (y1 - y0)
        return (self.LEFT + across * (self.WIDTH - self.LEFT - self.RIGHT),
                self.HEIGHT - self.BOTTOM - up * (self.HEIGHT - self.TOP - self.BOTTOM))

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """A line through points, as an SVG path."""
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (self.at(*point) for point in points)) if len(points) else ""


def chart(axes: Axes, title: str, inside: str) -> str:
    """A chart around the drawing `inside`, whose places come from `axes.at` and whose `{}` stay open."""
    left, bottom = axes.at(axes.x[0], axes.y[0])
    right, top = axes.at(axes.x[1], axes.y[1])
    marks = "".join(f'<text x="{axes.at(x, 0)[0]:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>'
                    for x, text in axes.x_marks)
    marks += "".join(f'<text x="{left - 5}" y="{axes.at(axes.x[0], y)[1] + 4:.1f}" text-anchor="end">{text}</text>'
                     f'<line x1="{left}" x2="{right}" y1="{axes.at(axes.x[0], y)[1]:.1f}" y2="{axes.at(axes.x[0], y)[1]:.1f}" '
                     'stroke="#e4e6e8"/>' for y, text in axes.y_marks)
    return (f'<svg class="ih-chart" style="max-width:{axes.WIDTH}px" viewBox="0 0 {axes.WIDTH} {axes.HEIGHT}" role="img" '
            f'aria-label="{html.escape(title)}"><text x="2" y="13" class="ih-title">{html.escape(axes.y_words)}</text>{marks}'
            f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888"/>'
            f'<text x="{(left + right) / 2}" y="{axes.HEIGHT - 6}" text-anchor="middle">{html.escape(axes.x_words)}</text>'
            f'{inside}</svg>')


def _millions(last: float) -> list[tuple[float, str]]:
    """Marks along an axis of sequences seen."""
    step = 10 ** math.floor(math.log10(last))
    step = step / 5 if last / step < 2 else step / 2 if last / step < 5 else step
    unit, letter = (1e6, "M") if last >= 5e5 else (1e3, "k")
    return [(i * step, f"{i * step / unit:g} {letter}" if i else "0") for i in range(int(last / step) + 1)]


def loss_axes(last: float, top: float = 1.8) -> Axes:
    """The axes of training losses up to `last` sequences."""
    return Axes((0, last), (0, top), "sequences seen", "training loss (nats)", _millions(last),
                [(y, short(y)) for y in (0, 0.5, 1.0, 1.5)])


def threshold_line(axes: Axes, run: RunConfig) -> str:
    """The line below which the paper says that the phase change is over."""
    n_ways = run.task.n_ways
    y, right = axes.at(0, metrics.threshold(n_ways))[1], axes.at(axes.x[1], 0)[0]
    return (f'<line x1="{axes.LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888" stroke-dasharray="4 3"/>'
            f'<text x="{right:.1f}" y="{y - 4:.1f}" text-anchor="end">0.4 ln {n_ways}: phase change</text>')


def picture(image: Tensor) -> str:
    """A character (uint8 `[28, 28]`, ink high) as the source of an `<img>`."""
    buffer = io.BytesIO()
    Image.fromarray((255 - image).numpy()).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


STYLE = f"<style>{files('ihbook.chapters').joinpath('panel.css').read_text(encoding='utf-8')}</style>"
SCRIPT = files("ihbook.chapters").joinpath("panel.js").read_text(encoding="utf-8")
