"""How clamps compose into one forward pass: a plan of overrides, for a family of runs or for one network. Two clamps of one run
never set the same entry. Clamps that write the same sites, in the same manner and from the same sources, share one program."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ihbook.checks import one_of
from ihbook.clamps.content import Graft
from ihbook.clamps.write import HOWS, Clamp, During, Shape, Write
from ihbook.config import ModelConfig
from ihbook.model import KIND, Activations, Override, Params, Site, Source, Weights, forward, stack
from ihbook.task import Batch

Writes = dict[Site, dict[str, list[Write]]]  # one run's writes, by activation and by `how`


def run_with_clamps(weights: Weights, batch: Batch, clamps: Sequence[Clamp] = (), *, query_only: bool = False) -> Activations:
    """One network's activations on a batch of one run, under `clamps` (chapter 5). Gradients reach the batch's features alone.

    `query_only` computes only what the logits need (`model.forward`). Windows that end are over (`During`). Raises ValueError
    where a clamp does not fit the network, two clamps set the same entry, or a label is not one of the network's.
    """
    n_pairs = batch.labels.shape[2] - 1
    check_batch(weights, batch)
    check(clamps, Shape(weights.config.n_layers, weights.config.n_heads, n_pairs), weights)
    plan = make_plan([active(clamps, float("inf"))], weights.config, n_pairs, dtype=weights.tensors["unembed.bias"].dtype)
    return plan(stack([weights]), batch, weights.config, query_only=query_only)


def check_batch(network: Weights, batch: Batch) -> None:
    """Raise ValueError where a batch's labels or features are not those of the network."""
    if not 0 <= batch.labels.min() <= batch.labels.max() < network.n_labels:
        raise ValueError(f"labels are from {batch.labels.min()} to {batch.labels.max()}, but the network has n_labels="
                         f"{network.n_labels}; they must be from 0 to {network.n_labels - 1}")
    if batch.bank.shape[2] != network.d_exemplar:
        raise ValueError(f"the characters of these sequences have {batch.bank.shape[2]} features, but the network takes "
                         f"{network.d_exemplar}; draw sequences from the bank that it was trained on")


def bare(clamp: Clamp) -> Clamp:
    """A clamp without its window."""
    return clamp.clamp if isinstance(clamp, During) else clamp


def active(clamps: Sequence[Clamp], sequences: float) -> tuple[Clamp, ...]:
    """The clamps that hold at that many sequences seen, without their windows."""
    return tuple(bare(c) for c in clamps if not isinstance(c, During) or c.active(sequences))


def edges(clamps: Sequence[Clamp]) -> list[int]:
    """The numbers of sequences seen, above 0, at which a clamp goes on or off; sorted."""
    windows = [c for c in clamps if isinstance(c, During)]
    return sorted({e for c in windows for e in (c.start, c.until) if e})


def check(clamps: Sequence[Clamp], shape: Shape, network: Weights | None = None) -> None:
    """Raise ValueError where a clamp does not fit the network, or two set the same entry at the same time in training."""
    if hasattr(clamps, "writes"):
        raise ValueError(f"{clamps!r} is one clamp; give a list of them, [...]")
    for clamp in clamps:
        if isinstance(bare(clamp), type):
            raise ValueError(f"{bare(clamp).__name__} is a class; give a clamp made of it, {bare(clamp).__name__}(...)")
        if not hasattr(bare(clamp), "writes"):
            raise ValueError(f"{clamp!r} is not a clamp; use one from ihbook.clamps, or give yours a method writes(shape)")
        if network is not None and isinstance(bare(clamp), Graft):
            bare(clamp).check_donor(network)
    for at in [0, *edges(clamps)]:
        _writes_of(active(clamps, at), shape, network)


def _writes_of(clamps: Sequence[Clamp], shape: Shape, network: Weights | None = None) -> Writes:
    """One run's writes. Raises ValueError for two grafts, two clamps that write one entry, or a write that nothing would read."""
    grafts = [c for c in clamps if isinstance(c, Graft)]
    if len(grafts) > 1:
        raise ValueError(f"{grafts[0]} and {grafts[1]}: a network takes one graft; choose one")
    sites: Writes = defaultdict(lambda: defaultdict(list))
    writers: dict[tuple[Site, str], list[tuple[Clamp, Write]]] = defaultdict(list)
    for clamp in clamps:
        writes = clamp.writes(shape)
        if not isinstance(writes, (list, tuple)) or not all(isinstance(write, Write) for write in writes):
            raise ValueError(f"{type(clamp).__name__}.writes gave {reprlib.repr(writes)}; it must return a list of Writes")
        for write in writes:
            site = write.name, write.layer
            _check_write(clamp, write, shape, network)
            for other, earlier in writers[site, write.how] if write.how not in ("hold", "add") else []:
                both = write.where & earlier.where
                if both.any():
                    raise ValueError(f"{other} and {clamp} both {write.how} {_entry(site, both)}; drop one, or narrow its "
                                     "heads, positions or window")
            writers[site, write.how].append((clamp, write))
            sites[site][write.how].append(write)
    return sites


def _check_write(clamp: Clamp, write: Write, shape: Shape, network: Weights | None) -> None:
    """Raise ValueError where nothing would read the write; a reader's own clamps are checked here too."""
    name = type(clamp).__name__  # not the repr: a graft's would digest the donor at every plan
    one_of(f"{name}: a Write's name", write.name, tuple(KIND))
    one_of(f"{name}: a Write's how", write.how, HOWS)
    layers = (None,) if write.name in ("token_embed", "logits") else tuple(range(shape.n_layers))
    one_of(f"{name}: the layer of a Write of {write.name}", write.layer, layers)
    if network is not None and not network.config.mlp_ratio and write.name in ("resid_mid", "mlp_out"):
        raise ValueError(f"{name}: a network without an MLP (mlp_ratio=0) has no {write.name}")
    expected = shape.zeros(write.name).shape
    if not isinstance(write.where, Tensor) or write.where.dtype != torch.bool or write.where.shape != expected:
        found = f"{write.where.dtype} {list(write.where.shape)}" if hasattr(write.where, "shape") else write.where
        raise ValueError(f"{clamp}: a Write of {write.name} has where of {found}; it must be bool {list(expected)}, a tensor as "
                         f"shape.zeros({write.name!r}) makes it")
    if write.how == "scale" and (len(write.terms) != 1 or write.terms[0][1] is not None):
        raise ValueError(f"{clamp}: a Write of {write.name} that scales has the terms {write.terms}; it must have one, "
                         "((number, None),)")
    kind = KIND[write.name]
    width = {"head": network.config.d_head, "stream": network.config.d_model, "logits": network.n_labels} if network else {}
    for coefficient, _ in write.terms:
        found = list(torch.as_tensor(coefficient).shape)
        wide = len(found) > len(expected) and kind != "attention"
        fits = [*expected, width.get(kind, found[-1])] if wide else list(expected)
        if len(found) > len(fits) or any(n not in (1, m) for n, m in zip(found[::-1], fits[::-1], strict=False)):
            hint = f"; for a vector of features give {[1] * len(expected) + found}" if found == [width.get(kind)] else ""
            raise ValueError(f"{name}: a Write of {write.name} has a coefficient of {found}, which does not broadcast to {fits}: "
                             f"its entries{', and its features' * wide}{hint}")


def _entry(site: Site, where: Tensor) -> str:
    """The first entry of `where` in a few words, for an error message."""
    name, layer = site
    first = where.nonzero()[0].tolist() if where.ndim else []
    head = f" of head {layer}.{first.pop(0)}" if KIND[name] in ("attention", "head") else (
        f" of layer {layer}" if layer is not None else "")
    return f"{name}{head}" + (f" at position {', key position '.join(map(str, first))}" if first else "")


def _clamped_anyway(site: Site, sites: Writes, like: Tensor) -> Tensor:
    """Entries set at this site, or fed by clamped scores or `qk_input`; what `Preserve` keeps must not overwrite them."""
    name, layer = site
    taken = torch.zeros_like(like)
    for write in sites[site]["set"] + sites[site]["hold"] if site in sites else []:
        taken |= write.where
    if name in ("q", "k", "attn_scores", "pattern") and ("qk_input", layer) in sites:
        taken |= True
    if name == "pattern" and ("attn_scores", layer) in sites:
        by_score = sites["attn_scores", layer]
        for write in by_score["set"] + by_score["scale"] + by_score["add"]:
            taken |= write.where.any(-1, keepdim=True)
    return taken


@dataclass(frozen=True, eq=False)
class Plan:
    """The clamps of a family of runs at one time in training, as overrides with a run axis."""

    overrides: dict[Site, Override] = field(default_factory=dict)
    donor: Params | None = None
    frozen: dict[str, Tensor] = field(default_factory=dict)  # weight name -> bool [run, 1, …]: where the donor's is used

    def __call__(self, params: Params, batch: Batch, config: ModelConfig, *, query_only: bool = False,
                 table: Tensor | None = None) -> Activations:
        """A forward pass under these clamps."""
        if self.frozen:
            params = params | {name: torch.where(mask, self.donor[name], params[name]) for name, mask in self.frozen.items()}
        return forward(params, batch, config, self.overrides, query_only=query_only, donor=self.donor, table=table)


def make_plan(clamps: Sequence[Sequence[Clamp]], config: ModelConfig, n_pairs: int, *, compile_with: Sequence[Sequence[Clamp]] = (),
              dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Plan:
    """The plan of a family: for each of its runs, the clamps that hold (without windows: see `active`). It has the same form as
    if runs with the clamps in `compile_with` were there too, so that families with different clamps share one program.
    Raises ValueError where a clamp does not fit the network or two set the same entry."""
    shape, first = Shape(config.n_layers, config.n_heads, n_pairs), len(compile_with)
    every = [*compile_with, *clamps]
    writes = [_writes_of(each, shape) for each in every]  # terms keep this order, which is part of the program's key
    overrides = {site: _override(site, writes, first, shape, dtype, device) for site in
                 sorted({site for sites in writes for site in sites}, key=str)}
    grafts = [next((c for c in each if isinstance(c, Graft)), None) for each in every]
    donor, frozen = None, {}
    if any(grafts):
        filler = next(graft for graft in grafts if graft)
        donor = {name: p.to(dtype) for name, p in stack([(g or filler).donor for g in grafts[first:]], device).items()}
        for name in donor:
            mask = torch.tensor([g is not None and g.part == "above" and _after(name, g.after_layer) for g in grafts])
            if mask.any():
                frozen[name] = mask[first:].to(device).view(-1, *[1] * (donor[name].ndim - 1))
    return Plan(overrides, donor, frozen)


def _after(name: str, layer: int) -> bool:
    """Whether the weight `name` belongs to what comes after layer `layer`."""
    first, _, rest = name.partition(".")
    return int(rest.split(".")[0]) > layer if first == "layers" else first in ("final_norm", "unembed")


def _override(site: Site, writes: list[Writes], first: int, shape: Shape, dtype: torch.dtype,
              device: str | torch.device) -> Override:
    """All runs' writes at one site, stacked, then cut to the runs from `first` on. A run without a write has an empty mask."""
    kind, nothing, n_runs = KIND[site[0]], shape.zeros(site[0]), len(writes)
    where = nothing.expand(n_runs, *nothing.shape).clone()
    scale = torch.ones(n_runs, *nothing.shape, dtype=dtype)
    terms: dict[Source | None, Tensor] = {}
    added: dict[Source | None, Tensor] = {}

    def collect(totals: dict[Source | None, Tensor], i: int, write: Write, mask: Tensor) -> None:
        """Add a write's coefficients to the totals, `[run, *entries, features or 1]`."""
        for number, source in write.terms:
            coefficient = torch.as_tensor(number, dtype=dtype)
            coefficient = coefficient if coefficient.ndim > mask.ndim else coefficient.unsqueeze(-1)
            total = totals.get(source, torch.zeros(n_runs, *mask.shape, 1, dtype=dtype))
            totals[source] = total.expand(*total.shape[:-1], max(total.shape[-1], coefficient.shape[-1])).clone()
            totals[source][i] += coefficient * mask.unsqueeze(-1)

    for i, sites in enumerate(writes):
        by_how = sites.get(site, {})
        for write in by_how.get("scale", []):
            scale[i][write.where] = write.terms[0][0]
        for write in by_how.get("set", []) + by_how.get("keep", []):
            mask = write.where & ~_clamped_anyway(site, sites, nothing) if write.how == "keep" else write.where
            where[i] |= mask
            collect(terms, i, write, mask)
        for write in by_how.get("add", []):
            collect(added, i, write, write.where)

    def inside(x: Tensor) -> Tensor:
        """From `[run, *entries, features or 1]` to the order inside: features before positions, the batch last."""
        x = x if kind == "attention" else (x if kind == "logits" else x.transpose(-1, -2)).unsqueeze(-1)
        return x[first:].contiguous().to(device)

    def found(totals: dict[Source | None, Tensor]) -> tuple:
        return tuple((inside(coefficient), source) for source, coefficient in totals.items() if coefficient.any())

    return Override(inside(where.unsqueeze(-1)) if where.any() else None, found(terms),
                    inside(scale.unsqueeze(-1)) if (scale != 1).any() else None, found(added))
