"""The catalogue of clamps (chapter 5 draws them). How they compose: `compose.py`.

A clamp is a value. It says, entry by entry, what it replaces in a forward pass; the rest of the network computes from
that and learns around it. A replaced entry passes no gradient to what it replaced; everything else does, and nothing
is detached, but a donor network, which is frozen. Clamps compose by being listed together.

Writing one's own takes a frozen dataclass with a method `writes(shape)` that returns `Write`s.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ihbook.config import one_of
from ihbook.model import KIND, Activations, Weights

Head = tuple[int, int]
BLOCKED = -1e9


@dataclass(frozen=True)
class Shape:
    """What a clamp must know of the network and the sequence. Positions: exemplars 0, 2, …, labels 1, 3, …, query last."""

    n_layers: int
    n_heads: int
    n_pairs: int

    @property
    def n_positions(self) -> int:
        return 2 * self.n_pairs + 1

    @property
    def label_positions(self) -> list[int]:
        return list(range(1, self.n_positions, 2))

    def zeros(self, name: str) -> Tensor:
        """All False, of the entries of activation `name` that a clamp can tell apart: attention `[head, q_pos, k_pos]`,
        heads `[head, pos]`, streams `[pos]`, logits `[]`."""
        h, n = self.n_heads, self.n_positions
        size = {"attention": (h, n, n), "head": (h, n), "stream": (n,), "logits": ()}[KIND[name]]
        return torch.zeros(size, dtype=torch.bool)


# A function of the activations so far that gives an activation in the caller's order of axes; None is the constant 1.
Source = Callable[[Activations], Tensor]


@dataclass(frozen=True, eq=False)
class Write:
    """What a clamp does to one activation: the entries in `where` (see `Shape.zeros`) become Σ coefficient · source.

    `how` is "set"; "scale" (times the coefficient, before anything is set); "keep" (a default, which gives way to what
    other clamps set); or "hold" (nothing is set, but a "keep" gives way here too). Sources that are equal are computed
    once for all the runs of a family.
    """

    name: str
    layer: int | None
    where: Tensor
    terms: tuple[tuple[float | Tensor, Source | None], ...] = ()
    how: str = "set"


class Clamp(Protocol):
    """Any frozen dataclass that can say what it writes; it raises ValueError where `shape` can't have it."""

    def writes(self, shape: Shape) -> list[Write]: ...


def _heads(heads) -> tuple[Head, ...]:
    try:
        pairs = [tuple(heads)] if len(heads) == 2 and not hasattr(heads[0], "__len__") else [tuple(pair) for pair in heads]
        result = tuple((_index(layer), _index(head)) for layer, head in pairs)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"heads={heads!r} is neither a (layer, head) pair of whole numbers nor a list of them") from error
    if not result or len(set(result)) != len(result):
        raise ValueError(f"heads={heads!r} must be one or more different (layer, head) pairs, counted from zero")
    return result


def _index(number) -> int:
    """A whole number, also NumPy's or a tensor's; TypeError for what is none."""
    if isinstance(number, bool):
        raise TypeError(f"{number} is not a whole number")
    return operator.index(number)


def _on_heads(clamp: Clamp, heads: tuple[Head, ...], shape: Shape, name: str, entries: Tensor | bool, terms, *,
              how: str = "set") -> list[Write]:
    """One write a layer: the same `entries` of one head's activation, for each of `heads`, after checking that they exist."""
    where = defaultdict(lambda: shape.zeros(name))
    for layer, head in heads:
        if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
            raise ValueError(f"{clamp}: there is no head {layer}.{head}; layers are 0 to {shape.n_layers - 1}, heads 0 to "
                             f"{shape.n_heads - 1}")
        where[layer][head] = entries
    return [Write(name, layer, mask, terms, how) for layer, mask in where.items()]


def _fraction(clamp: Clamp, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{type(clamp).__name__}: {name}={value!r} must be a Python number from 0 to 1")


class _OnHeads:
    """Normalises the field `heads`: one (layer, head) or several."""

    def __post_init__(self):
        object.__setattr__(self, "heads", _heads(self.heads))


@dataclass(frozen=True)
class Ablate(_OnHeads):
    """The heads' value vectors are 0 at all positions. No gradient reaches their value weights."""

    heads: tuple[Head, ...]

    def writes(self, shape: Shape) -> list[Write]:
        return _on_heads(self, self.heads, shape, "v", True, ((0.0, None),))


@dataclass(frozen=True)
class _FromUnclamped:
    """An activation of the same network's pass with no clamps at all."""

    name: str
    layer: int

    def __call__(self, acts: Activations) -> Tensor:
        return acts.unclamped[self.name, self.layer]


@dataclass(frozen=True)
class Preserve:
    """`what` ("patterns", "values", "queries" or "keys") of every layer is taken from a pass with no clamps at all.

    Gradients flow through that pass too. Whatever another clamp sets wins: the ablated values, a clamped pattern, the
    row of a pattern whose scores are clamped, Layer 2 under `PerfectLayer1`. A part that is grafted above is the donor's
    in that pass too. Preserving patterns lets only the values
    path feel an ablation; values, only the patterns; both, only the direct connection to the output.
    """

    what: tuple[str, ...]

    NAMES = {"patterns": "pattern", "values": "v", "queries": "q", "keys": "k"}

    def __post_init__(self):
        object.__setattr__(self, "what", (self.what,) if isinstance(self.what, str) else tuple(self.what))
        for what in self.what:
            one_of("Preserve: what", what, tuple(self.NAMES))

    def writes(self, shape: Shape) -> list[Write]:
        names = [self.NAMES[what] for what in self.what]
        return [Write(name, layer, ~shape.zeros(name), ((1.0, _FromUnclamped(name, layer)),), "keep")
                for name in names for layer in range(shape.n_layers)]


def _previous_token_rows(shape: Shape, labels_only: bool) -> list[int]:
    return shape.label_positions if labels_only else list(range(1, shape.n_positions))


@dataclass(frozen=True)
class PreviousToken(_OnHeads):
    """The heads' pattern: `strength` on the previous token, 1 − `strength` on itself; position 0 attends to itself.

    `labels_only` sets the rows of label positions alone. Figures 5b, 8, 10.
    """

    heads: tuple[Head, ...]
    strength: float = 1.0
    labels_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        _fraction(self, "strength", self.strength)

    def writes(self, shape: Shape) -> list[Write]:
        rows = _previous_token_rows(shape, self.labels_only)
        pattern = torch.zeros(shape.n_positions, shape.n_positions)
        for row in rows:
            pattern[row, row - 1], pattern[row, row] = self.strength, 1 - self.strength
        if not self.labels_only:
            rows, pattern[0, 0] = [0, *rows], 1.0
        entries = torch.zeros(pattern.shape, dtype=torch.bool)
        entries[rows] = True
        return _on_heads(self, self.heads, shape, "pattern", entries, ((pattern.expand(shape.n_heads, -1, -1), None),))


@dataclass(frozen=True)
class BlockPreviousToken(_OnHeads):
    """The heads' pre-softmax score for the previous token is −1e9, at all positions or at label positions only."""

    heads: tuple[Head, ...]
    labels_only: bool = False

    def writes(self, shape: Shape) -> list[Write]:
        rows = torch.tensor(_previous_token_rows(shape, self.labels_only))
        entries = torch.zeros(shape.n_positions, shape.n_positions, dtype=torch.bool)
        entries[rows, rows - 1] = True
        return _on_heads(self, self.heads, shape, "attn_scores", entries, ((BLOCKED, None),))


def _on_labels(weights: Tensor) -> Tensor:
    """Weights over pairs `[run, batch, pair]` as a query row: on their label tokens, `[run, batch, 1, 1, k_pos]`."""
    row = torch.stack([torch.zeros_like(weights), weights], -1).flatten(2)
    return F.pad(row, (0, 1))[:, :, None, None]


@dataclass(frozen=True)
class _LabelRow:
    """The query's attention shared equally among the label tokens that are right (or wrong).

    Where no label token is wrong, the wrong ones' share goes to the right ones too, so that a row sums to 1.
    """

    right: bool

    def __call__(self, acts: Activations) -> Tensor:
        right = acts.batch.in_context
        wanted = right if self.right else ~right
        wanted = torch.where(wanted.any(2, keepdim=True), wanted, ~wanted).to(acts.params["unembed.bias"].dtype)
        return _on_labels(wanted / wanted.sum(2, keepdim=True))


def _query_rows(clamp: Clamp, heads: tuple[Head, ...], shape: Shape, terms) -> list[Write]:
    entries = torch.zeros(shape.n_positions, shape.n_positions, dtype=torch.bool)
    entries[-1] = True
    return _on_heads(clamp, heads, shape, "pattern", entries, terms)


@dataclass(frozen=True)
class Induction(_OnHeads):
    """The query's pattern row: `strength` on the right label token, 1 − `strength` on the wrong one, 0 elsewhere.

    With more pairs, the right label tokens share `strength` equally, and the wrong ones 1 − `strength`; where none is
    wrong, the right ones have it all. Strength 1 clamps the match (step 4). Figures 5b, 6, 10, 15, 16.
    """

    heads: tuple[Head, ...]
    strength: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _fraction(self, "strength", self.strength)

    def writes(self, shape: Shape) -> list[Write]:
        terms = ((self.strength, _LabelRow(True)), (1 - self.strength, _LabelRow(False)))
        return _query_rows(self, self.heads, shape, terms)


@dataclass(frozen=True)
class _SimilarityRow:
    """Softmax over context exemplars of cosine(query features, exemplar features) / temperature, on label tokens."""

    temperature: float

    def __call__(self, acts: Activations) -> Tensor:
        features = F.normalize(acts.batch.exemplars.to(acts.params["unembed.bias"].dtype), dim=-1)
        cosine = (features[:, :, :-1] * features[:, :, -1:]).sum(-1)
        if self.temperature == 0:
            first = cosine.argmax(2, keepdim=True)  # F.one_hot would look into the data, which a compiled program can't
            return _on_labels((first == torch.arange(cosine.shape[2], device=first.device)).to(cosine.dtype))
        return _on_labels((cosine / self.temperature).softmax(2))


@dataclass(frozen=True)
class SimilarityMatch(_OnHeads):
    """The query's pattern row matches by the raw features: a softmax over context exemplars of their cosine with the
    query, over `temperature`, placed on their label tokens. Temperature 0 is the arg-max (the first of equals)."""

    heads: tuple[Head, ...]
    temperature: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            raise ValueError(f"SimilarityMatch: temperature={self.temperature!r} is out of range; it must be 0 (the arg-max) or "
                             "from 1e-6 up")

    def writes(self, shape: Shape) -> list[Write]:
        return _query_rows(self, self.heads, shape, ((1.0, _SimilarityRow(self.temperature)),))


@dataclass(frozen=True)
class HeadTemperature(_OnHeads):
    """The heads' pre-softmax scores are divided by `temperature`, at all positions; gradients scale with them.

    Scores that another clamp sets are set after, and not divided.
    """

    heads: tuple[Head, ...]
    temperature: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"HeadTemperature: temperature={self.temperature!r} must be positive and finite")

    def writes(self, shape: Shape) -> list[Write]:
        return _on_heads(self, self.heads, shape, "attn_scores", True, ((1 / self.temperature, None),), how="scale")


@dataclass(frozen=True)
class LabelAttentionOnly(_OnHeads):
    """Last layer: for these heads the query's scores at exemplar tokens, its own included, are −1e9."""

    heads: tuple[Head, ...]

    def writes(self, shape: Shape) -> list[Write]:
        for layer, _ in self.heads:
            if layer != shape.n_layers - 1:
                raise ValueError(f"{self}: layer {layer} is not the last; this clamp is defined for heads of layer "
                                 f"{shape.n_layers - 1} alone")
        entries = torch.zeros(shape.n_positions, shape.n_positions, dtype=torch.bool)
        entries[-1, ::2] = True
        return _on_heads(self, self.heads, shape, "attn_scores", entries, ((BLOCKED, None),))


@dataclass(frozen=True)
class _CopiedScores:
    """A head's scores from the query to the label tokens, as logits; −1e9 for labels that are not in context."""

    layer: int
    head: int

    def __call__(self, acts: Activations) -> Tensor:
        scores = acts["attn_scores", self.layer][:, :, self.head, -1, 1::2]
        labels = acts.batch.labels[:, :, :-1]
        n_labels = acts.params["unembed.bias"].shape[1]
        # Adding the probabilities of repeated labels is a log-sum-exp of their scores.
        seen = labels[..., None] == torch.arange(n_labels, device=labels.device)
        logits = torch.where(seen, scores[..., None], BLOCKED).logsumexp(2)
        return torch.where(seen.any(2), logits, BLOCKED)


@dataclass(frozen=True)
class Copy:
    """The query's logits are `head`'s pre-softmax scores at the label tokens in context; −1e9 for all other labels.

    The scores are those of the pass with the other clamps, scaled by d_head^-½. Of labels that stand in context more than
    once the probabilities are added. With `PerfectLayer1`, this is the paper's "layer 1 + copy". No gradient reaches
    the unembedding, or any value vector but through `head`'s scores. Figures 5b, 6.
    """

    head: Head

    def __post_init__(self):
        heads = _heads(self.head)
        if len(heads) > 1:
            raise ValueError(f"Copy: head={self.head!r} is more than one; logits are copied from one head")
        object.__setattr__(self, "head", heads[0])

    def writes(self, shape: Shape) -> list[Write]:
        _on_heads(self, (self.head,), shape, "attn_scores", True, ())  # checks that there is such a head
        return [Write("logits", None, ~shape.zeros("logits"), ((1.0, _CopiedScores(*self.head)),))]


def _embeddings(acts: Activations) -> Tensor:
    return acts["token_embed", None]


def _copied_embeddings(acts: Activations) -> Tensor:
    """Token embeddings, each but the first and the query replaced by the previous token's."""
    x = acts["token_embed", None]
    return torch.cat([x[:, :, :1], x[:, :, :-2], x[:, :, -1:]], 2)


@dataclass(frozen=True)
class PerfectLayer1:
    """Layer 2's patterns are computed as if Layer 1 had written a perfect previous-token copy (steps 1–2).

    Queries and keys see the token embeddings with each token but the first and the query replaced by the one before.
    Values see the plain token embeddings, which form the residual stream: nothing of the learnt Layer 1 interferes, and
    no gradient reaches it. Absolute positions are part of the embeddings. Two layers only. Figures 5b, 6.
    """

    def writes(self, shape: Shape) -> list[Write]:
        if shape.n_layers != 2:
            raise ValueError(f"PerfectLayer1 is defined for networks of two layers, not n_layers={shape.n_layers}")
        everywhere = ~shape.zeros("resid_pre")
        return [Write("resid_pre", 1, everywhere, ((1.0, _embeddings),)),
                Write("qk_input", 1, everywhere, ((1.0, _copied_embeddings),)),
                Write("v", 1, ~shape.zeros("v"), how="hold")]


@dataclass(frozen=True)
class _FromDonor:
    layer: int

    def __call__(self, acts: Activations) -> Tensor:
        return acts.of_donor["resid_post", self.layer]


@dataclass(frozen=True)
class Graft:
    """Part of the network is a frozen donor's: no gradient reaches the donor's weights. Figure 7.

    `part="below"`: the stream after `after_layer` is the donor's, with its embeddings and its layers up to that one.
    `part="above"`: everything after `after_layer` is the donor's; gradients flow through it to what is below.
    """

    donor: Weights
    after_layer: int = 0
    part: str = "below"

    def __post_init__(self):
        one_of("Graft: part", self.part, ("below", "above"))
        if not isinstance(self.donor, Weights):
            raise ValueError(f"Graft: donor={self.donor!r} must be a network's Weights, such as a result's `weights`")

    def check_donor(self, network: Weights) -> None:
        """Raise ValueError unless the donor's architecture, exemplar dim and label count are the network's."""
        for name, own, donors in (("architecture", replace(network.config, init_scale=1.0),
                                   replace(self.donor.config, init_scale=1.0)),
                                  ("exemplar dim", network.d_exemplar, self.donor.d_exemplar),
                                  ("n_labels", network.n_labels, self.donor.n_labels)):
            if own != donors:
                raise ValueError(f"{self}: the donor's {name} is {donors}, the network's {own}; graft like on like")

    def writes(self, shape: Shape) -> list[Write]:
        if not 0 <= self.after_layer < shape.n_layers - 1:
            raise ValueError(f"{self}: after_layer={self.after_layer} is out of range; it must be from 0 to "
                             f"{shape.n_layers - 2}, so that a layer follows")
        if self.part == "above":
            return []
        name, layer = "resid_pre", self.after_layer + 1
        return [Write(name, layer, ~shape.zeros(name), ((1.0, _FromDonor(self.after_layer)),))]


@dataclass(frozen=True)
class AblateEmbedding:
    """Token embeddings are 0."""

    def writes(self, shape: Shape) -> list[Write]:
        return [Write("token_embed", None, ~shape.zeros("token_embed"), ((0.0, None),))]


@dataclass(frozen=True)
class During:
    """A clamp in a window of training: on from `start` until `until` sequences seen (None: to the end), else off.

    A step is in the window where the number of sequences seen before it is: `start` is included, `until` is not. Analyses
    of finished networks (`run`, `metrics.measure`) are after every window that ends.
    """

    clamp: Clamp
    start: int = 0
    until: int | None = None

    def __post_init__(self):
        if not self.start >= 0 or (self.until is not None and not self.until > self.start):
            raise ValueError(f"During: start={self.start}, until={self.until} is no window; it needs 0 ≤ start < until")
        if isinstance(self.clamp, During):
            raise ValueError("During: a window in a window; give the clamp itself, with the window that both share")

    def writes(self, shape: Shape) -> list[Write]:
        return self.clamp.writes(shape)

    def active(self, sequences: float) -> bool:
        return self.start <= sequences and (self.until is None or sequences < self.until)


CATALOGUE = {Ablate, Preserve, PreviousToken, BlockPreviousToken, Induction, SimilarityMatch, HeadTemperature, LabelAttentionOnly,
             Copy, PerfectLayer1, Graft, AblateEmbedding, During}
