"""The panel that operates on a network in a built page: any head, any clamp, any characters, also those that the reader draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ihbook.banks import encoder, load_bank
from ihbook.chapters.live import data
from ihbook.chapters.live.data import N_HEADS, button, select
from ihbook.chapters.panels import FELT
from ihbook.clamps import Clamp
from ihbook.config import RunConfig
from ihbook.digest import encode

HANDS = 2  # exemplars of each class in the page


def drawable(run: RunConfig) -> bool:
    """Whether a page can embed characters as the run's bank does: if that is by a learnt encoder."""
    return data.offered(run) and run.bank.name in encoder.KINDS and run.bank.embedding == "auto"


def html_of(run: RunConfig, networks: Sequence[str], kinds: Mapping[str, Clamp], instead: str) -> str:
    """The panel as HTML, for a page that has what `Page` shows. The last of `networks` is first operated on; `instead` is shown
    where the browser can't compute."""
    bank = load_bank(run.bank)
    n_test = run.task.n_test_classes
    images = torch.cat([bank.images[:run.task.n_classes, :HANDS], bank.images[-n_test:, :HANDS]])
    numbers, record = encoder.load(run.bank.name)
    parts = [numbers[f"{i}.{name}"].numpy().view(np.uint8).ravel() for i in range(len(encoder.WIDTHS))
             for name in ("weight", "exponent", "bias")]
    felt = [encode(list(clamps), defaults=True) for clamps in FELT.values()]
    found = {"images": data.packed(images.numpy()), "encoder": data.packed(np.concatenate(parts)), "scale": float(record["scale"]),
             "felt": felt, "kinds": [encode(clamp, defaults=True) for clamp in kinds.values()],
             "bars": data.bars_of("over 2,000 training sequences", ["accuracy", "loss (nats)"], ["#0173b2", "#a44a00"], (0, 1.7))}
    names = [f"{kind} {i + 1}" for kind, n in (("trained", run.task.n_classes), ("held out", n_test)) for i in range(n)]
    labels = [str(i) for i in range(run.task.n_labels)]
    indices = [str(i) for i in range(len(names))]

    def switches(name: str, options: Sequence[str], on: bool) -> str:
        boxes = "".join(f'<label><input type="checkbox" name="{name}" autocomplete="off"{" checked" * on}>{option}</label>'
                        for option in options)
        return f"<fieldset><legend>{name}</legend>{boxes}</fieldset>"

    def slot(i: int, what: str, options: Sequence[str], values: Sequence[str], more: str = "") -> str:
        chosen = select(f"shown{i}", "", options, values, values[i % 2], f' aria-label="what {what} shows" data-slot="{i}"')
        clear = button("clear", "Clear", f' data-slot="{i}" disabled')
        return (f'<figure><figcaption>{what}</figcaption><canvas width="28" height="28" data-slot="{i}" role="img" '
                f'aria-label="{what}: draw here"></canvas>{chosen}{more}{clear}</figure>')

    query = {"hand 0": "exemplar 1, another hand", "hand 1": "exemplar 2, another hand", "same 0": "exemplar 1 itself",
             "same 1": "exemplar 2 itself", "yours 0": "exemplar 1, drawn by you", "yours 1": "exemplar 2, drawn by you"}
    slots = "".join(slot(i, f"exemplar {i + 1}", [*names, "drawn by you"], [*indices, "yours"],
                         select(f"label{i}", "label", labels, chosen=labels[(i + 1) % len(labels)])) for i in range(2))
    slots += slot(2, "query", [*query.values()], [*query])
    controls = (select("network", "network", networks, chosen=networks[-1])
                + switches("Layer 1", [f"0.{h}" for h in range(N_HEADS)], True)
                + switches("Layer 2", [f"1.{h}" for h in range(N_HEADS)], True)
                + select("felt", "what is switched off in Layer 1 is felt by", list(FELT), indices[:len(FELT)])
                + switches("clamped", list(kinds), False))
    return (
        '<section class="ih-panel ih-operate" aria-label="Operate on the network, with characters of your own">'
        f'<div class="ih-instead">{instead}</div><form class="ih-works" hidden><div class="ih-controls">{controls}</div>'
        f'<div class="ih-slots ih-buttons">{slots}</div><p class="ih-big ih-said" role="status"></p></form>'
        '<div class="ih-row ih-view ih-bars"></div>' + 2 * '<div class="ih-view ih-patterns"></div>'
        + f'{data.script(found, "ih-data")}{data.block("unpack", "draw", "operate")}</section>')
