"""Clamps of what heads and layers write: values, logits, the residual stream, whole layers (§3 of the paper); and steering."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ihbook.checks import one_of, whole
from ihbook.clamps.write import BLOCKED, Head, OnHeads, Shape, Write, as_heads, on_heads
from ihbook.model import KIND, Activations, Weights


@dataclass(frozen=True)
class Ablate(OnHeads):
    """The heads' value vectors are 0 at all positions and pass no gradient. Figures 4, 5b, 6, 8, 10–14, 16–18; Tables 1–3; §3."""

    heads: tuple[Head, ...]

    def writes(self, shape: Shape) -> list[Write]:
        return on_heads(self, self.heads, shape, "v", True, ((0.0, None),))


@dataclass(frozen=True)
class _FromUnclamped:
    """An activation of the same network's pass with no clamps at all."""

    name: str
    layer: int

    def __call__(self, acts: Activations) -> Tensor:
        return acts.unclamped[self.name, self.layer]


@dataclass(frozen=True)
class Preserve:
    """Patterns, values, queries or keys (`what`, one or several) of every layer are taken from a pass with no clamps at all.

    This is path patching. If patterns are preserved, only the values feel an ablation; if values are, only the patterns; if both
    are, only the direct connection to the output. Gradients flow through that pass too. What another clamp sets is not preserved:
    ablated values, a clamped pattern, the row of a pattern whose scores are clamped, the layers that `PerfectLayer1` feeds. A
    part that is grafted above is the donor's in that pass too. Raises ValueError for another `what`. Figures 11, 12; Table 1; §3.
    """

    what: tuple[str, ...]

    broadcasts: ClassVar[bool] = True
    extra_pass: ClassVar[bool] = True
    NAMES: ClassVar = {"patterns": "pattern", "values": "v", "queries": "q", "keys": "k"}

    def __post_init__(self):
        if not isinstance(self.what, (str, tuple, list)):
            raise ValueError(f"Preserve: what={self.what!r} must be one or several of {', '.join(map(repr, self.NAMES))}")
        object.__setattr__(self, "what", (self.what,) if isinstance(self.what, str) else tuple(self.what))
        for what in self.what:
            one_of("Preserve: what", what, tuple(self.NAMES))

    def writes(self, shape: Shape) -> list[Write]:
        names = [self.NAMES[what] for what in self.what]
        return [Write(name, layer, ~shape.zeros(name), ((1.0, _FromUnclamped(name, layer)),), "keep")
                for name in names for layer in range(shape.n_layers)]


@dataclass(frozen=True)
class _CopiedScores:
    """A head's scores from the query to the label tokens, as logits; −1e9 for labels that are not in context."""

    layer: int
    head: int

    def __call__(self, acts: Activations) -> Tensor:
        scores = acts["attn_scores", self.layer][:, :, self.head, -1, 1::2]
        labels = acts.batch.labels[:, :, :-1]
        n_labels = acts.params["unembed.bias"].shape[1]
        # The probabilities of a repeated label are added: a log-sum-exp of its scores.
        seen = labels[..., None] == torch.arange(n_labels, device=labels.device)
        logits = torch.where(seen, scores[..., None], BLOCKED).logsumexp(2)
        return torch.where(seen.any(2), logits, BLOCKED)


@dataclass(frozen=True)
class Copy:
    """The query's logits are `head`'s pre-softmax scores at the label tokens in context, and −1e9 for all other labels.

    The scores are those of the pass with the other clamps, scaled by d_head^-½. If a label stands in context more than once, its
    probabilities are added. With `PerfectLayer1`, this is the paper's "layer 1 + copy". No gradient reaches the unembedding;
    value vectors get gradients only through `head`'s scores. Raises ValueError for more than one head. Figures 5b, 6.
    """

    head: Head

    broadcasts: ClassVar[bool] = True

    def __post_init__(self):
        heads = as_heads(self.head)
        if len(heads) > 1:
            raise ValueError(f"Copy: head={self.head!r} is more than one; logits are copied from one head")
        object.__setattr__(self, "head", heads[0])

    def writes(self, shape: Shape) -> list[Write]:
        on_heads(self, (self.head,), shape, "attn_scores", True, ())  # raises ValueError if there is no such head
        return [Write("logits", None, ~shape.zeros("logits"), ((1.0, _CopiedScores(*self.head)),))]


def _embeddings(acts: Activations) -> Tensor:
    return acts["token_embed", None]


def _copied_embeddings(acts: Activations) -> Tensor:
    """Token embeddings; each except the first and the query is replaced by the previous token's."""
    x = acts["token_embed", None]
    return torch.cat([x[:, :, :1], x[:, :, :-2], x[:, :, -1:]], 2)


@dataclass(frozen=True)
class _WithCopiedEmbeddings:
    """The residual stream before a layer, with copied embeddings in place of the token embeddings that it started from."""

    layer: int

    def __call__(self, acts: Activations) -> Tensor:
        return acts["resid_pre", self.layer] - _embeddings(acts) + _copied_embeddings(acts)


@dataclass(frozen=True)
class PerfectLayer1:
    """The patterns of Layer 2 are computed as if Layer 1 had written a perfect previous-token copy (steps 1–2).

    Queries and keys read the token embeddings, with each token except the first and the query replaced by the one before. Values
    read the plain token embeddings, which form the residual stream: the learnt Layer 1 does not interfere and gets no gradient.
    Absolute positions are part of the embeddings. In a deeper network the copy stays in the stream for the queries and keys of
    every later layer, as if Layer 1 had written it: they read what the layers from the second on have written plus the copied
    embeddings, and values read the same plus the plain ones. Raises ValueError for a network of one layer. Figures 5b, 6.
    """

    broadcasts: ClassVar[bool] = True

    def writes(self, shape: Shape) -> list[Write]:
        if shape.n_layers < 2:
            raise ValueError(f"PerfectLayer1 needs a layer after the first; n_layers={shape.n_layers}")
        everywhere = ~shape.zeros("resid_pre")
        read = {layer: _copied_embeddings if layer == 1 else _WithCopiedEmbeddings(layer) for layer in range(1, shape.n_layers)}
        return [Write("resid_pre", 1, everywhere, ((1.0, _embeddings),)),
                *(Write("qk_input", layer, everywhere, ((1.0, source),)) for layer, source in read.items()),
                *(Write("v", layer, ~shape.zeros("v"), how="hold") for layer in read)]


@dataclass(frozen=True)
class _FromDonor:
    layer: int

    def __call__(self, acts: Activations) -> Tensor:
        return acts.of_donor["resid_post", self.layer]


@dataclass(frozen=True)
class Graft:
    """Part of the network is a frozen donor's: no gradient reaches the donor's weights. Figure 7.

    `part="below"`: the residual stream after `after_layer` is the donor's, with its embeddings and its layers up to that one.
    `part="above"`: everything after `after_layer` is the donor's; gradients flow through it to what is below. Raises ValueError
    where no layer follows `after_layer`, or where the donor is not `Weights`.
    """

    donor: Weights
    after_layer: int = 0
    part: str = "below"

    broadcasts: ClassVar[bool] = True
    extra_pass: ClassVar[bool] = True

    def __post_init__(self):
        one_of("Graft: part", self.part, ("below", "above"))
        whole("Graft: after_layer", self.after_layer, 0)
        if not isinstance(self.donor, Weights):
            raise ValueError(f"Graft: donor={self.donor!r} must be a network's Weights, such as a result's `weights`")

    def check_donor(self, network: Weights) -> None:
        """Raise ValueError unless the donor's architecture, exemplar dim and label count are the network's."""
        for name, own, donors in (("architecture", network.config.architecture, self.donor.config.architecture),
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
    """Token embeddings, absolute positions included, are 0."""

    broadcasts: ClassVar[bool] = True

    def writes(self, shape: Shape) -> list[Write]:
        return [Write("token_embed", None, ~shape.zeros("token_embed"), ((0.0, None),))]


@dataclass(frozen=True)
class Steer:
    """`vector` is added to a stream (`resid_pre`, `attn_out`, …; `d_model` numbers) or to `logits` (one number per label).

    `positions` lists the tokens of a stream, counted from zero or, if negative, from the end (-1 is the query); None means all.
    The vector is added last, also to what another clamp has set. Gradients pass unchanged. Raises ValueError for another kind of
    activation or a position that is not there. The paper has no such clamp.
    """

    name: str
    layer: int | None
    vector: tuple[float, ...]
    positions: tuple[int, ...] | None = None

    broadcasts: ClassVar[bool] = True

    def __post_init__(self):
        if self.layer is not None:
            whole("Steer: layer", self.layer, 0)
        one_of("Steer: name", self.name, tuple(name for name, kind in KIND.items() if kind in ("stream", "logits")))
        try:
            object.__setattr__(self, "vector", tuple(float(x) for x in self.vector))
            if self.positions is not None:
                object.__setattr__(self, "positions", tuple(operator.index(pos) for pos in self.positions))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Steer: vector must be a list of numbers, and positions of whole numbers or None: {error}") from error
        if not self.vector or not all(map(math.isfinite, self.vector)):
            raise ValueError("Steer: vector is empty, or has a number that is not finite")

    def writes(self, shape: Shape) -> list[Write]:
        everywhere = self.name == "logits" or self.positions is None
        if not everywhere and (beyond := [pos for pos in self.positions if not -shape.n_positions <= pos < shape.n_positions]):
            raise ValueError(f"Steer: there is no position {beyond[0]}; they are 0 to {shape.n_positions - 1}")
        where = shape.zeros(self.name)
        where[... if everywhere else list(self.positions)] = True
        vector = torch.tensor(self.vector)
        return [Write(self.name, self.layer, where, ((vector if self.name == "logits" else vector[None], None),), how="add")]
