"""The attention-only transformer: weights, tokens and overrides in, named activations out.

Weights carry a leading run axis, so that one call computes many networks. Inside, the batch is the last axis: projections are
then large matrix products, and attention's small products are vectorised over the batch. A caller sees the field's order:
`token_embed, resid_pre, qk_input, attn_out, resid_mid, mlp_out, resid_post` `[run, batch, pos, d_model]`; `q, k, v, z`
`[run, batch, pos, head, d_head]`, with `q` and `k` after rotation; `attn_scores, pattern` `[run, batch, head, q_pos, k_pos]`;
`logits` `[run, batch, label]`, at the query. `attn_scores` are pre-softmax, scaled, with the causal mask; `pattern` is
post-softmax. `qk_input` exists only where a clamp sets it; `resid_mid` and `mlp_out` exist only with an MLP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ihbook.config import ModelConfig
from ihbook.digest import content_digest, encode
from ihbook.task import Batch, seeded

FEW = 256  # a bank of at most this many exemplars is embedded once, not at every token
Params = dict[str, Tensor]  # name -> [run, ...]; matrices as [run, out, in]
Site = tuple[str, int | None]  # an activation's name and its layer (None where it has no layer)

# For each kind of activation: the permutation from the order of axes inside (in the comments) to the caller's order.
KINDS = {
    "stream": (0, 3, 2, 1),  # [run, d_model, pos, batch]
    "head": (0, 4, 3, 1, 2),  # [run, head, d_head, pos, batch]
    "attention": (0, 4, 1, 2, 3),  # [run, head, q_pos, k_pos, batch]
    "logits": (0, 2, 1),  # [run, label, batch]
}
KIND = {"q": "head", "k": "head", "v": "head", "z": "head", "attn_scores": "attention", "pattern": "attention",
        "logits": "logits", **dict.fromkeys(("token_embed", "resid_pre", "qk_input", "attn_out", "resid_mid", "mlp_out",
                                             "resid_post"), "stream")}


def to_caller(name: str, x: Tensor) -> Tensor:
    """A view of activation `name` in the caller's order of axes."""
    return x.permute(KINDS[KIND[name]])


def to_inside(name: str, x: Tensor) -> Tensor:
    """The inverse of `to_caller`. Raises ValueError unless `x`, such as what a source gave, has the axes of that activation."""
    order = KINDS[KIND[name]]
    if not isinstance(x, Tensor) or x.ndim != len(order):
        found = list(x.shape) if isinstance(x, Tensor) else x
        raise ValueError(f"{name} is to be {found}; it must be a tensor of {len(order)} axes, [run, batch, ...]")
    return x.permute(sorted(range(len(order)), key=order.__getitem__))


# A source maps the activations so far to an activation in the caller's order of axes. In terms, None stands for the constant 1.
Source = Callable[["Activations"], Tensor]
Terms = tuple[tuple[Tensor, Source | None], ...]  # (coefficient, source) pairs that stand for Σ coefficient · source


@dataclass(frozen=True)
class Override:
    """What a forward pass reads in place of what it computed, for one activation x.

    First, x is multiplied by `scale`. Then the entries in `where` become Σ coefficient · source over `terms`. Last, the same sum
    over `added` is added to x. A source may read x itself, as it was computed. Tensors broadcast to the activation in the order
    inside. Gradients: a replaced entry passes none to x unless a source reads x; scale, sources and coefficients pass theirs.
    """

    where: Tensor | None = None
    terms: Terms = ()
    scale: Tensor | None = None
    added: Terms = ()

    def apply(self, name: str, x: Tensor, acts: Activations) -> Tensor:
        axis = {"head": 3, "stream": 2, "attention": 2}.get(KIND[name])  # the position axis, which `query_only` shortens
        length = x.shape[axis] if axis else 0

        def fit(y: Tensor) -> Tensor:
            return y.narrow(axis, y.shape[axis] - length, length) if axis and length < y.shape[axis] else y

        def total(terms: Terms, start: Tensor) -> Tensor:
            for coefficient, source in terms:
                term = fit(coefficient)
                start = start + (term if source is None else term * fit(to_inside(name, source(acts))))
            return start

        if self.scale is not None:
            x = x * fit(self.scale)
        if self.where is not None:
            x = torch.where(fit(self.where), total(self.terms, x.new_zeros(())), x)
        return total(self.added, x)


Overrides = Mapping[Site, Override]


@dataclass
class Activations:
    """The named activations of one pass, `acts["pattern", 1]`, in the caller's order. Raises KeyError for one that is absent."""

    params: Params
    batch: Batch
    config: ModelConfig
    query_only: bool = False
    donor: Params | None = None
    table: Tensor | None = None
    inside: dict[Site, Tensor] = field(default_factory=dict)
    other_passes: dict[str, Activations] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Activations of {', '.join(f'{name}[{layer}]' for name, layer in self.inside)}"

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self.inside:
            known = ", ".join(sorted({name for name, _ in self.inside}))
            raise KeyError(f"no activation {site!r}; give [name, layer]: names are {known}; layers 0 to {self.config.n_layers - 1} "
                           "(None for token_embed and logits)")
        return to_caller(site[0], self.inside[site])

    @property
    def logits(self) -> Tensor:
        """The logits at the query, `[run, batch, label]`."""
        return self["logits", None]

    @property
    def unclamped(self) -> Activations:
        """A pass of the same network with no overrides at all; gradients flow through it."""
        if "unclamped" not in self.other_passes:
            self.other_passes["unclamped"] = forward(self.params, self.batch, self.config, query_only=self.query_only,
                                                     table=self.table)
        return self.other_passes["unclamped"]

    @property
    def of_donor(self) -> Activations:
        """The frozen donor's own pass over the same sequences, without gradients."""
        if "of_donor" not in self.other_passes:
            with torch.no_grad():
                self.other_passes["of_donor"] = forward(self.donor, self.batch, self.config)
        return self.other_passes["of_donor"]


def forward(params: Params, batch: Batch, config: ModelConfig, overrides: Overrides | None = None, *,
            query_only: bool = False, donor: Params | None = None, table: Tensor | None = None) -> Activations:
    """Compute every run's network on its own sequences (chapter 2).

    `overrides` maps (name, layer) to what replaces that activation; the rest of the network computes from it. `query_only`
    computes only what the logits need: in the last layer, all activations but `resid_pre`, `qk_input`, `k` and `v` have one
    position, the query's. `donor` holds the frozen weights that an override may read. `table` is `exemplar_table(params, batch)`,
    where the caller has it. Raises ValueError for a sequence longer than a learned position table.
    """
    acts = Activations(params, batch, config, query_only, donor, table)
    overrides = overrides or {}

    def put(name: str, layer: int | None, x: Tensor) -> Tensor:
        acts.inside[name, layer] = x  # a source may read what it replaces
        if (name, layer) in overrides:
            acts.inside[name, layer] = x = overrides[name, layer].apply(name, x, acts)
        return x

    x = put("token_embed", None, embed(params, batch, config, table))
    n_positions = x.shape[2]
    causal = torch.ones(n_positions, n_positions, dtype=torch.bool, device=x.device).tril()[..., None]
    for i in range(config.n_layers):
        queries = slice(n_positions - 1 if query_only and i == config.n_layers - 1 else 0, None)
        x = put("resid_pre", i, x)
        h = layer_norm(x, params, f"layers.{i}.norm1", config)
        qk = h
        if ("qk_input", i) in overrides:
            qk = layer_norm(put("qk_input", i, x), params, f"layers.{i}.norm1", config)
        qkv = project_qkv(params[f"layers.{i}.attn.qkv.weight"], qk, h, queries)
        q, k, v = (split_heads(y, config) for y in qkv)
        if config.positions == "rotary":
            q, k = rotate(q, config, n_positions), rotate(k, config, n_positions)
        q, k, v = put("q", i, q), put("k", i, k), put("v", i, v)
        scores = (q.unsqueeze(4) * k.unsqueeze(3)).sum(2) * config.d_head ** -0.5
        scores = put("attn_scores", i, scores.masked_fill(~causal[queries], -math.inf))
        pattern = put("pattern", i, scores.softmax(3))
        z = put("z", i, (pattern.unsqueeze(2) * v.unsqueeze(3)).sum(4))
        attn_out = put("attn_out", i, linear(z.flatten(1, 2), params[f"layers.{i}.attn.proj.weight"]))
        x = x[:, :, queries] + attn_out
        if config.mlp_ratio:
            x = put("resid_mid", i, x)
            h = layer_norm(x, params, f"layers.{i}.norm2", config)
            h = linear(h, params[f"layers.{i}.mlp.fc1.weight"], params[f"layers.{i}.mlp.fc1.bias"])
            h = F.gelu(h, approximate="tanh")
            x = x + put("mlp_out", i, linear(h, params[f"layers.{i}.mlp.fc2.weight"], params[f"layers.{i}.mlp.fc2.bias"]))
        x = put("resid_post", i, x)
    x = layer_norm(x[:, :, -1:], params, "final_norm", config)
    put("logits", None, linear(x, params["unembed.weight"], params["unembed.bias"])[:, :, 0])
    return acts


def exemplar_table(params: Params, batch: Batch) -> Tensor:
    """Every exemplar of the batch's bank, embedded, `[run, d_model, n]`, noise left out."""
    bank = batch.bank[0] if len(batch.bank) == 1 else batch.bank  # a bank that the runs share is one matrix, so one product
    return params["exemplar_embed.weight"] @ bank.mT + params["exemplar_embed.bias"].unsqueeze(-1)


def embed(params: Params, batch: Batch, config: ModelConfig, table: Tensor | None = None) -> Tensor:
    """Token embeddings `[run, d_model, pos, batch]`: exemplars and labels interleaved, plus absolute positions where chosen."""
    n_runs, n_batch, n_exemplars = batch.ids.shape
    if table is None and batch.noise is None and batch.bank.shape[1] <= min(FEW, n_batch * n_exemplars - 1):
        table = exemplar_table(params, batch)
    if table is not None:
        exemplars = select(table, batch.ids)
    else:
        features = batch.exemplars.transpose(1, 2).flatten(1, 2)
        exemplars = params["exemplar_embed.weight"] @ features.mT + params["exemplar_embed.bias"].unsqueeze(-1)
        exemplars = exemplars.unflatten(2, (n_exemplars, n_batch))
    labels = select(params["label_embed.weight"], batch.labels[:, :, :-1])
    pairs = torch.stack([exemplars[:, :, :-1], labels], 3).flatten(2, 3)
    x = torch.cat([pairs, exemplars[:, :, -1:]], 2)
    n_positions = x.shape[2]
    if config.positions == "learned":
        if n_positions > config.max_positions:
            raise ValueError(f"a sequence has {n_positions} positions, but max_positions={config.max_positions}; raise it")
        x = x + params["pos_embed.weight"][:, :, :n_positions, None]
    elif config.positions == "sinusoidal":
        cos, sin = turns(n_positions, config.d_model, 10000.0, x)
        x = x + torch.stack([sin, cos], 1).flatten(0, 1)[..., None]
    return x


def select(table: Tensor, index: Tensor) -> Tensor:
    """Columns of `table` `[run, d, n]` at `index` `[run, batch, pos]`, as `[run, d, pos, batch]`."""
    n_runs, n_batch, n_positions = index.shape
    flat = index.transpose(1, 2).reshape(n_runs, 1, -1)
    if not torch.is_grad_enabled():
        return table.gather(2, flat.expand(-1, table.shape[1], -1)).unflatten(2, (n_positions, n_batch))
    # Multiply by a one-hot matrix: its gradient is a product too, while the gradient of a gather is a slow scatter.
    one_hot = (flat == torch.arange(table.shape[2], device=table.device)[:, None]).to(table.dtype)
    return (table @ one_hot).unflatten(2, (n_positions, n_batch))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`weight` `[run, out, in]` applied to features `[run, in, pos, batch]`, plus `bias`: `[run, out, pos, batch]`."""
    y = weight @ x.flatten(2)
    y = y if bias is None else y + bias.unsqueeze(-1)
    return y.unflatten(2, x.shape[2:])


def project_qkv(weight: Tensor, qk: Tensor, h: Tensor, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (at the positions `queries`), keys and values, in as few matrix products as their inputs allow."""
    if qk is h and queries.start == 0:
        return linear(h, weight).chunk(3, 1)
    w_q, w_k, w_v = weight.chunk(3, 1)
    if qk is h:
        k, v = linear(h, weight[:, w_q.shape[1]:]).chunk(2, 1)
    else:
        k, v = linear(qk, w_k), linear(h, w_v)
    return linear(qk[:, :, queries], w_q), k, v


def split_heads(x: Tensor, config: ModelConfig) -> Tensor:
    """`[run, d_model, pos, batch]` -> `[run, head, d_head, pos, batch]`."""
    return x.unflatten(1, (config.n_heads, config.d_head))


def layer_norm(x: Tensor, params: Params, name: str, config: ModelConfig) -> Tensor:
    """LayerNorm over the features, axis 1 (ε 1e-5); the identity if the architecture has no LayerNorm."""
    if not config.layer_norm:
        return x
    x = x - x.mean(1, keepdim=True)  # var_mean takes ten times as long along any axis but the last
    variance = x.square().mean(1, keepdim=True)
    weight, bias = (params[f"{name}.{part}"][:, :, None, None] for part in ("weight", "bias"))
    return x * (variance + 1e-5).rsqrt() * weight + bias


def turns(n_positions: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of pos · base^(-2i / width), each `[width / 2, pos]`. On a CPU they come from Python floats, so that the
    compiler embeds the table as a constant; on a GPU they are computed there, as a captured step may not copy from the host."""
    if like.device.type == "cpu":
        angles = [[pos * base ** (-i / width) for pos in range(n_positions)] for i in range(0, width, 2)]
        return tuple(like.new_tensor([[f(angle) for angle in row] for row in angles]) for f in (math.cos, math.sin))
    powers, positions = (torch.arange(0, end, by, dtype=torch.float64, device=like.device)
                         for end, by in ((width, 2), (n_positions, 1)))
    angles = base ** (-powers / width)[:, None] * positions
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, config: ModelConfig, n_positions: int) -> Tensor:
    """Rotary positions: turn adjacent feature pairs of `[run, head, d_head, pos, batch]` by the angle of their position."""
    first = n_positions - x.shape[3]
    cos, sin = (table[:, first:, None] for table in turns(n_positions, config.d_head, config.rotary_base, x))
    even, odd = x[:, :, 0::2], x[:, :, 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], 3).flatten(2, 3)


def shapes(config: ModelConfig, d_exemplar: int, n_labels: int) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight, without the run axis."""
    d, norm = config.d_model, config.layer_norm
    out: dict[str, tuple[int, ...]] = {"exemplar_embed.weight": (d, d_exemplar), "exemplar_embed.bias": (d,),
                                       "label_embed.weight": (d, n_labels)}
    if config.positions == "learned":
        out["pos_embed.weight"] = (d, config.max_positions)
    for i in range(config.n_layers):
        layer = f"layers.{i}."
        if norm:
            out |= {layer + "norm1.weight": (d,), layer + "norm1.bias": (d,)}
        out |= {layer + "attn.qkv.weight": (3 * d, d), layer + "attn.proj.weight": (d, d)}
        if config.mlp_ratio:
            if norm:
                out |= {layer + "norm2.weight": (d,), layer + "norm2.bias": (d,)}
            out |= {layer + "mlp.fc1.weight": (config.d_mlp, d), layer + "mlp.fc1.bias": (config.d_mlp,),
                    layer + "mlp.fc2.weight": (d, config.d_mlp), layer + "mlp.fc2.bias": (d,)}
    if norm:
        out |= {"final_norm.weight": (d,), "final_norm.bias": (d,)}
    return out | {"unembed.weight": (n_labels, d), "unembed.bias": (n_labels,)}


def by_head(tensors: Mapping[str, Tensor], layer: int, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's matrices (or their gradients) by head, as views: queries, keys and values `[head, d_head, d_model]`, and output
    `[head, d_model, d_head]`."""
    q, k, v = tensors[f"layers.{layer}.attn.qkv.weight"].unflatten(0, (3, config.n_heads, config.d_head))
    return q, k, v, tensors[f"layers.{layer}.attn.proj.weight"].unflatten(1, (config.n_heads, config.d_head)).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Weights:
    """One network as a value: its architecture and tensors, without a run axis. Two are equal when their contents are.
    Raises ValueError, naming the tensor, where the tensors are not those of `config`."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]

    def __post_init__(self):
        for name in ("exemplar_embed.weight", "unembed.weight"):
            if name not in self.tensors or self.tensors[name].ndim != 2:
                raise ValueError(f"the weights lack the matrix {name}; names as in `ihbook.model.shapes`")
        expected = shapes(self.config, self.d_exemplar, self.n_labels)
        for name in {**expected, **self.tensors}:
            found = tuple(self.tensors[name].shape) if name in self.tensors else "missing"
            if found != expected.get(name, "absent"):
                raise ValueError(f"weight {name} is {found}, but {self.config} has {expected.get(name, 'none')}; "
                                 "load them with the architecture that they were trained with")
        tensors = {name: self.tensors[name].detach().cpu().contiguous() for name in expected}
        object.__setattr__(self, "tensors", tensors)

    @property
    def d_exemplar(self) -> int:
        return self.tensors["exemplar_embed.weight"].shape[1]

    @property
    def n_labels(self) -> int:
        return self.tensors["unembed.weight"].shape[0]

    @cached_property
    def content_digest(self) -> str:
        """The sha256 of the architecture and of the tensors' names, shapes, dtypes and bytes, in hex."""
        return content_digest(self.tensors, json.dumps(encode(self.config), sort_keys=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and self.content_digest == other.content_digest

    def __hash__(self) -> int:
        return hash(self.content_digest)

    def __repr__(self) -> str:
        return f"Weights({self.content_digest[:12]})"


def initial_weights(config: ModelConfig, d_exemplar: int, n_labels: int, seed: int) -> Weights:
    """Draw weights (chapter 2): LeCun normal truncated at ±2σ for matrices, times `init_scale`; 0.02 · truncated normal for label
    and position tables; biases 0; LayerNorm weights 1. Each tensor has its own random stream, so that networks that differ in
    n_labels, for example, share all other weights."""
    tensors = {}
    for name, shape in shapes(config, d_exemplar, n_labels).items():
        tensor = torch.zeros(shape)
        if len(shape) == 2:
            table = name in ("label_embed.weight", "pos_embed.weight")
            # 0.8796… is the standard deviation of a standard normal truncated at ±2.
            std = 0.02 if table else config.init_scale * shape[1] ** -0.5 / 0.87962566103423978
            torch.nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0, generator=seeded("weights", name, seed)).mul_(std)
        elif name.endswith("weight"):
            tensor.fill_(1.0)
        tensors[name] = tensor
    return Weights(config, tensors)


def stack(networks: list[Weights], device: str | torch.device = "cpu") -> Params:
    """Networks as parameters with a leading run axis. Raises ValueError unless all have one architecture, dim and label count."""
    if len({(w.config.architecture, w.d_exemplar, w.n_labels) for w in networks}) != 1:
        raise ValueError("only networks of one architecture, exemplar dim and label count stack into one program")
    return {name: torch.stack([w.tensors[name] for w in networks]).to(device) for name in networks[0].tensors}
