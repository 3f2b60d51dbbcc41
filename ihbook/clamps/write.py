"""What a clamp is: a value that says, entry by entry, what it writes into a forward pass."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ihbook.checks import one_of, whole
from ihbook.model import KIND, Source

Head = tuple[int, int]
HOWS = ("set", "scale", "add", "keep", "hold")
BLOCKED = -1e9


@dataclass(frozen=True)
class Shape:
    """The sizes of network and sequence that a clamp needs. Positions: exemplars 0, 2, …, labels 1, 3, …, query last."""

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
        """A mask, all False, of the entries of activation `name` that a clamp can tell apart: attention `[head, q_pos, k_pos]`,
        heads `[head, pos]`, streams `[pos]`, logits `[]`."""
        h, n = self.n_heads, self.n_positions
        one_of("the activation", name, tuple(KIND))
        size = {"attention": (h, n, n), "head": (h, n), "stream": (n,), "logits": ()}[KIND[name]]
        return torch.zeros(size, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Write:
    """What a clamp does to one activation, at the entries in `where` (see `Shape.zeros`). `how` is one of

    - "set": the entries become Σ coefficient · source over `terms`. A source maps the activations so far to an activation in the
      caller's order of axes, and may read the value that it replaces; None stands for the constant 1;
    - "add": that sum is added last, also to what another clamp has set there (steering);
    - "scale": the entries are multiplied by the coefficient of the one term, before anything is set;
    - "keep": as "set", except where another clamp sets the entry, or changes the scores or the `qk_input` that feed it;
    - "hold": the entries stay as computed, also where another clamp would keep them.

    A coefficient is a number, or a tensor that broadcasts to `where`; with one more axis, the last is the features (`d_model`,
    `d_head`, labels; attention has none). Equal sources are computed once for all the runs of a family. Gradients: an entry that
    is set passes none to what was computed there; sources and scales pass theirs.
    """

    name: str
    layer: int | None
    where: Tensor
    terms: tuple[tuple[float | Tensor, Source | None], ...] = ()
    how: str = "set"

    def __post_init__(self):
        for term in self.terms if isinstance(self.terms, (tuple, list)) else [self.terms]:
            if not (isinstance(term, (tuple, list)) and len(term) == 2 and isinstance(term[0], (int, float, Tensor))
                    and (term[1] is None or callable(term[1]))):
                raise ValueError(f"a Write of {self.name} has the term {term!r}; terms are pairs (coefficient, source), such as "
                                 "((1.0, None),), where None stands for the constant 1")


class Clamp(Protocol):
    """Any frozen dataclass with a method `writes`, which raises ValueError where a network of that shape can't have the clamp.

    It may declare what it needs, as class attributes that are False if absent. `extra_pass = True` says that a source reads
    `acts.unclamped` or `acts.of_donor`; runs without the clamp then need not pay for that pass. `broadcasts = True` says that the
    sources also work with a run axis of length 1; a network under many clamps is then computed once up to where they differ.
    """

    def writes(self, shape: Shape) -> list[Write]: ...


def as_heads(heads) -> tuple[Head, ...]:
    """One (layer, head) or several, as a tuple of pairs. Raises ValueError for anything else, and for a pair given twice."""
    try:
        pairs = [tuple(heads)] if len(heads) == 2 and not hasattr(heads[0], "__len__") else [tuple(pair) for pair in heads]
        result = tuple((_index(layer), _index(head)) for layer, head in pairs)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"heads={heads!r} is neither a (layer, head) pair of whole numbers nor a list of them") from error
    if not result or len(set(result)) != len(result):
        raise ValueError(f"heads={heads!r} must be one or more different (layer, head) pairs, counted from zero")
    return result


def _index(number) -> int:
    """A whole number, also NumPy's or a tensor's, as an int. Raises TypeError for anything else."""
    if isinstance(number, bool):
        raise TypeError(f"{number} is not a whole number")
    return operator.index(number)


def on_heads(clamp: Clamp, heads: tuple[Head, ...], shape: Shape, name: str, entries: Tensor | bool, terms, *,
             how: str = "set") -> list[Write]:
    """One write per layer: the same `entries` for each of `heads`. Raises ValueError for a head that is not in `shape`."""
    where = defaultdict(lambda: shape.zeros(name))
    for layer, head in heads:
        if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
            raise ValueError(f"{clamp}: there is no head {layer}.{head}; layers are 0 to {shape.n_layers - 1}, heads 0 to "
                             f"{shape.n_heads - 1}")
        where[layer][head] = entries
    return [Write(name, layer, mask, terms, how) for layer, mask in where.items()]


class OnHeads:
    """Base of clamps with a field `heads`: one (layer, head) or several, made a tuple of pairs by `as_heads`."""

    broadcasts: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "heads", as_heads(self.heads))


@dataclass(frozen=True)
class During:
    """A clamp in a window of training: it holds from `start` until `until` sequences seen (None: to the end), and not outside it.

    A step is in the window if the number of sequences seen before it is: `start` is included, `until` is not. Analyses of
    finished networks (`run_with_clamps`, `metrics.measure`) come after every window that ends. Raises ValueError for an empty or
    nested window.
    """

    clamp: Clamp
    start: int = 0
    until: int | None = None

    def __post_init__(self):
        whole("During: start", self.start, 0)
        if self.until is not None:
            whole("During: until", self.until, 0)
            if self.until <= self.start:
                raise ValueError(f"During: start={self.start}, until={self.until} is no window; it needs start < until")
        if isinstance(self.clamp, During):
            raise ValueError("During: a window in a window; give the clamp itself, with the window that both share")

    def writes(self, shape: Shape) -> list[Write]:
        return self.clamp.writes(shape)

    def active(self, sequences: float) -> bool:
        return self.start <= sequences and (self.until is None or sequences < self.until)
