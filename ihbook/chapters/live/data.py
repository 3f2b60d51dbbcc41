"""What the live panels' scripts read, packed for a page: the paper's network, sequences, clamps and checkpoints, from PyTorch."""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files

import numpy as np
import torch

from ihbook.banks import load_bank
from ihbook.chapters import pictures
from ihbook.chapters.panels import bars
from ihbook.config import ModelConfig, RunConfig, TaskConfig
from ihbook.model import Weights
from ihbook.task import Batch

FOLDER = files(__package__)
N_HEADS = ModelConfig().n_heads
N_LABELS = (5, 10, 15)  # the paper's (Figure 6)
FEW, SHOWN = 68, 18  # exemplars in the page's bank at most (`network.js`), and of these in sequences to look at


def offered(run: RunConfig) -> bool:
    """Whether the scripts know this run's network and task: the paper's, with any labels, and with classes that fit the bank."""
    own = replace(TaskConfig(), **{name: getattr(run.task, name) for name in ("n_classes", "n_test_classes", "n_labels")})
    fits = run.task.n_classes <= FEW - SHOWN and load_bank(run.bank).dim % 8 == 0  # products take eight columns at a time
    return run.model == ModelConfig() and run.task == own and fits


def packed(array: np.ndarray) -> str:
    """The bytes of an array, deflated, as text for a page (`unpack.js`)."""
    return base64.b85encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode().replace("<", ",")


def halves(weights: Weights) -> str:
    """A network's weights in half precision, as a page holds a checkpoint: all low bytes, then all high ones, to deflate well."""
    flat = torch.cat([tensor.flatten() for tensor in weights.tensors.values()]).half().numpy()
    return packed(flat.astype("<f2").view(np.uint8).reshape(-1, 2).T)


def rounded(weights: Weights) -> Weights:
    """The network that a page has for this one: each weight is off by at most 1 in 2,000."""
    return Weights(weights.config, {name: tensor.half().float() for name, tensor in weights.tensors.items()})


def gathered(batches: Sequence[Batch], bank: torch.Tensor) -> tuple[np.ndarray, dict[str, list[int]]]:
    """A bank `[n, dim]` of the training exemplars and, after them, those of `batches` (one sequence each); and the sequences.
    Raises ValueError where these are more than `FEW`."""
    rows, ids, labels = list(bank), [], []
    for batch in batches:
        for exemplar in batch.exemplars[0, 0]:
            same = [i for i, row in enumerate(rows) if torch.equal(row, exemplar)]
            ids.append(same[0] if same else len(rows))
            rows += [] if same else [exemplar]
        labels += batch.labels[0, 0].tolist()
    if len(rows) > FEW:
        raise ValueError(f"the page's bank would have {len(rows)} exemplars, more than {FEW}; show fewer sequences")
    return torch.stack(rows).numpy(), {"ids": ids, "labels": labels}


def label_counts(run: RunConfig) -> list[int]:
    """The numbers of labels that a reader can choose."""
    return sorted({*N_LABELS, run.task.n_labels})


# The drawings' templates, and the HTML around them.

def bars_of(title: str, names: Sequence[str], colours: Sequence[str], limits: tuple[float, float]) -> dict:
    """`panels.bars` for `draw.js`."""
    return {"template": bars(title, names, colours, limits), "limits": limits, "longest": max(map(len, names))}


def head_bars(title: str, layer: int, limits: tuple[float, float]) -> dict:
    """A bar for each head of a layer."""
    heads = range(N_HEADS)
    return bars_of(title, [f"{layer}.{h}" for h in heads], [pictures.head_colour(h) for h in heads], limits)


def answers(n_labels: int) -> dict:
    """A bar for each label: the probability that the network gives to it."""
    return bars_of("answer: probability of", [f"label {i}" for i in range(n_labels)], ["#555"] * n_labels, (0, 1))


def source(*names: str) -> str:
    """The scripts of these names, one after the other."""
    return "\n".join(FOLDER.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in names)


def block(*names: str) -> str:
    """A script in a page, whose names stay its own."""
    return f"<script>{{\n{source(*names)}}}</script>"


def script(data: object, kind: str) -> str:
    """Data for a panel's script, in a page."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    return f'<script type="application/json" class="{kind}">{text}</script>'


def select(name: str, words: str, options: Sequence[str], values: Sequence[str] | None = None, chosen: str | None = None,
           more: str = "") -> str:
    """A choice, with `words` in front of it."""
    listed = "".join(f'<option value="{html.escape(value)}"{" selected" * (value == chosen)}>{html.escape(option)}</option>'
                     for option, value in zip(options, values or options, strict=True))
    return f'<label>{words} <select name="{name}"{more} autocomplete="off">{listed}</select></label>'


def button(do: str, words: str, more: str = "") -> str:
    """A button; `do` says to the panel's script what to do."""
    return f'<button type="button" data-do="{do}"{more}>{words}</button>'
