"""How clamps compose into one forward pass: a plan of overrides, for a family of runs or for one network.

Two clamps of a run never write the same entry; the whole program is the same for all clamps that write the same sites.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ihbook.clamps import Clamp, During, Graft, Shape, Source, Write
from ihbook.config import ModelConfig, one_of
from ihbook.data import Batch
from ihbook.model import KIND, Activations, Override, Params, Site, Weights, forward, stack


def bare(clamp: Clamp) -> Clamp:
    """A clamp without its window."""
    return clamp.clamp if isinstance(clamp, During) else clamp


def active(clamps: Sequence[Clamp], sequences: float) -> tuple[Clamp, ...]:
    """The clamps that hold at that many sequences seen, without their windows."""
    return tuple(bare(c) for c in clamps if not isinstance(c, During) or c.active(sequences))


def edges(clamps: Sequence[Clamp]) -> list[int]:
    """The numbers of sequences seen at which a clamp goes on or off."""
    windows = [c for c in clamps if isinstance(c, During)]
    return sorted({e for c in windows for e in (c.start, c.until) if e})


def check(clamps: Sequence[Clamp], shape: Shape, network: Weights | None = None) -> None:
    """Raise ValueError where a clamp does not fit the network, or two write the same entry at some time in training."""
    if hasattr(clamps, "writes"):
        raise ValueError(f"{clamps!r} is one clamp; give a list of them, [...]")
    for clamp in clamps:
        if not hasattr(clamp, "writes"):
            raise ValueError(f"{clamp!r} is not a clamp; use one from ihbook.clamps, or give yours a method writes(shape)")
        if network is not None and isinstance(bare(clamp), Graft):
            bare(clamp).check_donor(network)
    for at in [0, *edges(clamps)]:
        _compose(active(clamps, at), shape)


def _compose(clamps: Sequence[Clamp], shape: Shape) -> dict[Site, dict[str, list[Write]]]:
    """One run's writes by site and manner; raises where two clamps write the same entry."""
    grafts = [c for c in clamps if isinstance(c, Graft)]
    if len(grafts) > 1:
        raise ValueError(f"{grafts[0]} and {grafts[1]}: a network takes one graft; choose one")
    sites: dict[Site, dict[str, list[Write]]] = defaultdict(lambda: defaultdict(list))
    writers: dict[tuple[Site, str], list[tuple[Clamp, Write]]] = defaultdict(list)
    for clamp in clamps:
        for write in clamp.writes(shape):
            site = write.name, write.layer
            _check_write(clamp, write, shape)
            for other, earlier in writers[site, write.how] if write.how != "hold" else []:
                both = write.where & earlier.where
                if both.any():
                    raise ValueError(f"{other} and {clamp} both {write.how} {_entry(site, both)}; drop one, or narrow its "
                                     "heads, positions or window")
            writers[site, write.how].append((clamp, write))
            sites[site][write.how].append(write)
    return sites


def _check_write(clamp: Clamp, write: Write, shape: Shape) -> None:
    """Raise ValueError where nothing would read the write: clamps of the reader's own pass here too."""
    name = type(clamp).__name__  # not its repr, which for a graft digests the donor, at every plan
    one_of(f"{name}: a Write's name", write.name, tuple(KIND))
    one_of(f"{name}: a Write's how", write.how, ("set", "scale", "keep", "hold"))
    layers = (None,) if write.name in ("token_embed", "logits") else tuple(range(shape.n_layers))
    one_of(f"{name}: the layer of a Write of {write.name}", write.layer, layers)
    expected = shape.zeros(write.name).shape
    if write.where.dtype != torch.bool or write.where.shape != expected:
        raise ValueError(f"{clamp}: a Write of {write.name} has where of {write.where.dtype} {list(write.where.shape)}; it must be "
                         f"bool {list(expected)}, as shape.zeros({write.name!r}) makes it")


def _entry(site: Site, where: Tensor) -> str:
    """A few words for the first entry of `where`."""
    name, layer = site
    first = where.nonzero()[0].tolist() if where.ndim else []
    head = f" of head {layer}.{first.pop(0)}" if KIND[name] in ("attention", "head") else (
        f" of layer {layer}" if layer is not None else "")
    return f"{name}{head}" + (f" at position {', key position '.join(map(str, first))}" if first else "")


def _set_anyway(site: Site, sites: dict[Site, dict[str, list[Write]]], like: Tensor) -> Tensor:
    """The entries of a site that clamps set there or by what it is computed from: what is preserved gives way there."""
    name, layer = site
    taken = torch.zeros_like(like)
    for write in sites[site]["set"] + sites[site]["hold"] if site in sites else []:
        taken |= write.where
    if name in ("q", "k", "attn_scores", "pattern") and ("qk_input", layer) in sites:
        taken |= True
    if name == "pattern" and ("attn_scores", layer) in sites:
        by_score = sites["attn_scores", layer]
        for write in by_score["set"] + by_score["scale"]:
            taken |= write.where.any(-1, keepdim=True)
    return taken


@dataclass(frozen=True, eq=False)
class Plan:
    """The clamps of a family of runs at one time in training, as overrides with a run axis."""

    overrides: dict[Site, Override] = field(default_factory=dict)
    donor: Params | None = None
    frozen: dict[str, Tensor] = field(default_factory=dict)  # weight name -> bool [run, 1, …]: the donor's

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All that it holds, each with a run axis."""
        parts = (t for o in self.overrides.values() for t in (o.where, *(c for c, _ in o.terms), o.scale))
        return [*(t for t in parts if t is not None), *(self.donor or {}).values(), *self.frozen.values()]

    @cached_property
    def form(self) -> tuple:
        """All but the tensors: plans of one form are one program."""
        sites = ((site, o.where is None, tuple(source for _, source in o.terms), o.scale is None)
                 for site, o in self.overrides.items())
        return (*sites, self.donor is None, *self.frozen)

    def filled(self, tensors: Iterator[Tensor]) -> Plan:
        """A plan of the same form that holds the next of `tensors`."""
        overrides = {site: Override(None if o.where is None else next(tensors),
                                    tuple((next(tensors), source) for _, source in o.terms),
                                    None if o.scale is None else next(tensors)) for site, o in self.overrides.items()}
        donor = {name: next(tensors) for name in self.donor} if self.donor else None
        return Plan(overrides, donor, {name: next(tensors) for name in self.frozen})

    def __call__(self, params: Params, batch: Batch, config: ModelConfig, *, query_only: bool = False) -> Activations:
        """A forward pass under these clamps."""
        if self.frozen:
            params = params | {name: torch.where(mask, self.donor[name], params[name]) for name, mask in self.frozen.items()}
        return forward(params, batch, config, self.overrides, query_only=query_only, donor=self.donor)


def signature(clamps: Sequence[Clamp], shape: Shape) -> frozenset:
    """What of a run's clamps a program is made for: the sites that they write, how, and of what. Entries and numbers are data."""
    return frozenset((w.name, w.layer, w.how, tuple(source for number, source in w.terms if torch.as_tensor(number).any()))
                     for clamp in clamps for w in clamp.writes(shape))


def plan(clamps: Sequence[Sequence[Clamp]], config: ModelConfig, n_pairs: int, *, also: Sequence[Sequence[Clamp]] = (),
         dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Plan:
    """Compile each run's clamps (no windows: see `active`) into one plan for the family.

    The plan has the form that it would have if there were runs with the clamps in `also` too, so that families of different
    clamps are one program. Raises ValueError where a clamp does not fit the network or two of a run's clamps write the same entry.
    """
    shape = Shape(config.n_layers, config.n_heads, n_pairs)
    families = [_compose(run, shape) for run in (*also, *clamps)]  # terms keep this order, which is part of the form
    overrides = {}
    for site in sorted({site for sites in families for site in sites}, key=str):
        overrides[site] = _override(site, families, len(also), shape, dtype, device)
    donors = [next((c for c in run if isinstance(c, Graft)), None) for run in (*also, *clamps)]
    donor, frozen = None, {}
    if any(donors):
        filler = next(graft for graft in donors if graft)
        donor = {name: p.to(dtype) for name, p in stack([(g or filler).donor for g in donors[len(also):]], device).items()}
        for name in donor:
            mask = torch.tensor([g is not None and g.part == "above" and _after(name, g.after_layer) for g in donors])
            if mask.any():
                frozen[name] = mask[len(also):].to(device).view(-1, *[1] * (donor[name].ndim - 1))
    return Plan(overrides, donor, frozen)


def _after(name: str, layer: int) -> bool:
    """Whether a weight belongs to what follows layer `layer`."""
    first, _, rest = name.partition(".")
    return int(rest.split(".")[0]) > layer if first == "layers" else first in ("final_norm", "unembed")


def _override(site: Site, families: list, first: int, shape: Shape, dtype: torch.dtype, device: str | torch.device) -> Override:
    """The writes of all runs at one site, stacked; of these, from `first` on. A run that writes nothing there has an empty mask."""
    name, _ = site
    nothing = shape.zeros(name)
    n_runs = len(families)
    where = nothing.expand(n_runs, *nothing.shape).clone()
    scale = torch.ones(n_runs, *nothing.shape, dtype=dtype)
    terms: dict[Source | None, Tensor] = {}
    for run, sites in enumerate(families):
        writes = sites.get(site, {})
        for write in writes.get("scale", []):
            scale[run][write.where] = write.terms[0][0]
        for write in writes.get("set", []) + writes.get("keep", []):
            mask = write.where & ~_set_anyway(site, sites, nothing) if write.how == "keep" else write.where
            where[run] |= mask
            for coefficient, source in write.terms:
                total = terms.setdefault(source, torch.zeros(n_runs, *nothing.shape, dtype=dtype))
                total[run] += torch.as_tensor(coefficient, dtype=dtype) * mask

    def inside(x: Tensor) -> Tensor:
        """Axes for the features and the batch: [run, head, q, k, 1], [run, head, 1, pos, 1], [run, 1, pos, 1], [run, 1, 1]."""
        x = {"attention": x, "head": x.unsqueeze(-2), "stream": x.unsqueeze(-2), "logits": x.unsqueeze(-1)}[KIND[name]]
        return x[first:].unsqueeze(-1).to(device)

    every = [(inside(coefficient), source) for source, coefficient in terms.items() if coefficient.any()]
    return Override(inside(where) if where.any() else None, tuple(every), inside(scale) if (scale != 1).any() else None)


def run(weights: Weights, batch: Batch, clamps: Sequence[Clamp] = (), *, query_only: bool = False) -> Activations:
    """One network's activations on a batch of one run, under `clamps`. Without windows; gradients are on as usual."""
    n_pairs = batch.labels.shape[2] - 1
    if not 0 <= batch.labels.min() <= batch.labels.max() < weights.n_labels:
        raise ValueError(f"labels are from {batch.labels.min()} to {batch.labels.max()}, but the network has n_labels="
                         f"{weights.n_labels}; they must be from 0 to {weights.n_labels - 1}")
    check(clamps, Shape(weights.config.n_layers, weights.config.n_heads, n_pairs), weights)
    family = plan([active(clamps, float("inf"))], weights.config, n_pairs, dtype=weights.tensors["unembed.bias"].dtype)
    return family(stack([weights]), batch, weights.config, query_only=query_only)
