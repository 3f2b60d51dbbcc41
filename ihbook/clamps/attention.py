"""Clamps of attention: they set where heads attend (§3 of the paper; chapter 5 draws them)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ihbook.checks import at_least, between, flag, positive
from ihbook.clamps.write import BLOCKED, Clamp, Head, OnHeads, Shape, Write, on_heads
from ihbook.model import Activations


def _previous_token_rows(shape: Shape, labels_only: bool) -> list[int]:
    return shape.label_positions if labels_only else list(range(1, shape.n_positions))


@dataclass(frozen=True)
class PreviousToken(OnHeads):
    """The heads' pattern puts `strength` on the previous token and 1 − `strength` on the token itself; position 0 attends to
    itself. `labels_only` sets the rows of label positions alone. Raises ValueError unless `strength` is 0 to 1. Figures 5b, 8,
    10."""

    heads: tuple[Head, ...]
    strength: float = 1.0
    labels_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        between("PreviousToken: strength", self.strength, 0, 1)
        flag("PreviousToken: labels_only", self.labels_only)

    def writes(self, shape: Shape) -> list[Write]:
        rows = _previous_token_rows(shape, self.labels_only)
        pattern = torch.zeros(shape.n_positions, shape.n_positions)
        for row in rows:
            pattern[row, row - 1], pattern[row, row] = self.strength, 1 - self.strength
        if not self.labels_only:
            rows, pattern[0, 0] = [0, *rows], 1.0
        entries = torch.zeros(pattern.shape, dtype=torch.bool)
        entries[rows] = True
        every = pattern.expand(shape.n_heads, -1, -1)
        return on_heads(self, self.heads, shape, "pattern", entries, ((every, None),))


@dataclass(frozen=True)
class BlockPreviousToken(OnHeads):
    """The heads' pre-softmax score for the previous token is −1e9, at all positions or (`labels_only`) at label positions."""

    heads: tuple[Head, ...]
    labels_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        flag("BlockPreviousToken: labels_only", self.labels_only)

    def writes(self, shape: Shape) -> list[Write]:
        rows = torch.tensor(_previous_token_rows(shape, self.labels_only))
        entries = torch.zeros(shape.n_positions, shape.n_positions, dtype=torch.bool)
        entries[rows, rows - 1] = True
        return on_heads(self, self.heads, shape, "attn_scores", entries, ((BLOCKED, None),))


def _on_labels(weights: Tensor) -> Tensor:
    """Weights over pairs `[run, batch, pair]` as a query row `[run, batch, 1, 1, k_pos]`, placed on the pairs' label tokens."""
    row = torch.stack([torch.zeros_like(weights), weights], -1).flatten(2)
    return F.pad(row, (0, 1))[:, :, None, None]


@dataclass(frozen=True)
class _LabelRow:
    """The query's attention, shared equally among the label tokens that are right (or wrong). If no label token is wrong, the
    right ones get the share of the wrong ones too, so that the row sums to 1."""

    right: bool

    def __call__(self, acts: Activations) -> Tensor:
        right = acts.batch.in_context
        wanted = right if self.right else ~right
        wanted = torch.where(wanted.any(2, keepdim=True), wanted, ~wanted).to(acts.params["unembed.bias"].dtype)
        return _on_labels(wanted / wanted.sum(2, keepdim=True))


def _query_rows(clamp: Clamp, heads: tuple[Head, ...], shape: Shape, terms) -> list[Write]:
    entries = torch.zeros(shape.n_positions, shape.n_positions, dtype=torch.bool)
    entries[-1] = True
    return on_heads(clamp, heads, shape, "pattern", entries, terms)


@dataclass(frozen=True)
class Induction(OnHeads):
    """The query's pattern row puts `strength` on the right label token, 1 − `strength` on the wrong one, and 0 elsewhere.

    With more pairs, the right label tokens share `strength` equally and the wrong ones share 1 − `strength`; if none is wrong,
    the right ones have it all. Strength 1 clamps the match (step 4). Raises ValueError unless `strength` is 0 to 1. Figures 5b,
    6, 10, 15, 16.
    """

    heads: tuple[Head, ...]
    strength: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        between("Induction: strength", self.strength, 0, 1)

    def writes(self, shape: Shape) -> list[Write]:
        terms = ((self.strength, _LabelRow(True)), (1 - self.strength, _LabelRow(False)))
        return _query_rows(self, self.heads, shape, terms)


@dataclass(frozen=True)
class _SimilarityRow:
    """Softmax over context exemplars of cosine(query features, exemplar features) / temperature, on their label tokens."""

    temperature: float

    def __call__(self, acts: Activations) -> Tensor:
        features = F.normalize(acts.batch.exemplars.to(acts.params["unembed.bias"].dtype), dim=-1)
        cosine = (features[:, :, :-1] * features[:, :, -1:]).sum(-1)
        if self.temperature == 0:
            first = cosine.argmax(2, keepdim=True)  # F.one_hot reads the data, which a compiled program can't do
            return _on_labels((first == torch.arange(cosine.shape[2], device=first.device)).to(cosine.dtype))
        return _on_labels((cosine / self.temperature).softmax(2))


@dataclass(frozen=True)
class SimilarityMatch(OnHeads):
    """The query's pattern row matches by the raw features: a softmax over context exemplars of their cosine with the query,
    divided by `temperature`, placed on their label tokens. Temperature 0 is the arg-max (the first of equals). Raises ValueError
    unless `temperature` is 0 or at least 1e-6."""

    heads: tuple[Head, ...]
    temperature: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        at_least("SimilarityMatch: temperature", self.temperature, 0)
        if 0 < self.temperature < 1e-6:
            raise ValueError(f"SimilarityMatch: temperature={self.temperature!r} is out of range; it must be 0 (the arg-max) or "
                             "from 1e-6 up")

    def writes(self, shape: Shape) -> list[Write]:
        return _query_rows(self, self.heads, shape, ((1.0, _SimilarityRow(self.temperature)),))


@dataclass(frozen=True)
class HeadTemperature(OnHeads):
    """The heads' pre-softmax scores are divided by `temperature`, at all positions; gradients scale with them. Scores that
    another clamp sets are set afterwards, so they are not divided. Raises ValueError unless `temperature` is positive and
    finite."""

    heads: tuple[Head, ...]
    temperature: float

    def __post_init__(self):
        super().__post_init__()
        positive("HeadTemperature: temperature", self.temperature)

    def writes(self, shape: Shape) -> list[Write]:
        return on_heads(self, self.heads, shape, "attn_scores", True, ((1 / self.temperature, None),), how="scale")


@dataclass(frozen=True)
class LabelAttentionOnly(OnHeads):
    """The heads' scores from the query to exemplars, itself included, are −1e9. Raises ValueError outside the last layer."""

    heads: tuple[Head, ...]

    def writes(self, shape: Shape) -> list[Write]:
        for layer, _ in self.heads:
            if layer != shape.n_layers - 1:
                raise ValueError(f"{self}: layer {layer} is not the last; this clamp is defined for heads of layer "
                                 f"{shape.n_layers - 1} alone")
        entries = torch.zeros(shape.n_positions, shape.n_positions, dtype=torch.bool)
        entries[-1, ::2] = True
        return on_heads(self, self.heads, shape, "attn_scores", entries, ((BLOCKED, None),))
