"""Clamps: what they set, their gradient rule, how they compose, and what they refuse."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import catalogue
from cases import clamps as golden_clamps

from ihbook import clamps as c
from ihbook.clamps import compose, run_with_clamps
from ihbook.config import ModelConfig, RunConfig
from ihbook.engine import flat
from ihbook.engine.prepared import clamp_signature
from ihbook.metrics import cross_entropy
from ihbook.model import Override, forward, initial_weights, stack
from ihbook.task import from_exemplars

SHAPE = c.Shape(n_layers=2, n_heads=8, n_pairs=2)
TINY = ModelConfig(d_model=8, n_heads=2)


def small_batch(n_pairs=2, n=6, dim=4, labels=None, dtype=torch.float32, n_labels=5):
    generator = torch.Generator().manual_seed(1)
    exemplars = torch.randn(n, n_pairs + 1, dim, generator=generator, dtype=dtype)
    if labels is None:
        pairs = torch.stack([torch.randperm(n_labels, generator=generator)[:n_pairs] for _ in range(n)])
        which = torch.randint(0, n_pairs, (n, 1), generator=generator)
        labels = torch.cat([pairs, pairs.gather(1, which)], 1)
    return from_exemplars(exemplars, labels)


def every_clamp(donor):
    """One clamp of each kind, for a network of two layers."""
    return [c.Ablate((1, 0)), c.Preserve("patterns"), c.Preserve("values"), c.Preserve("queries"), c.Preserve("keys"),
            c.PreviousToken((0, 1), 0.7), c.BlockPreviousToken((0, 0)), c.Induction((1, 1), 0.8),
            c.SimilarityMatch((1, 1), 0.5), c.HeadTemperature((1, 0), 2.0), c.LabelAttentionOnly((1, 1)), c.Copy((1, 1)),
            c.PerfectLayer1(), c.Graft(donor), c.Graft(donor, part="above"), c.AblateEmbedding(),
            c.Steer("resid_pre", 1, range(8), [-1])]


def test_every_kind_of_clamp_is_in_the_list_above():
    donor = initial_weights(TINY, 4, 5, 0)
    assert {type(clamp) for clamp in every_clamp(donor)} == catalogue() - {c.During}


def test_no_clamps_is_the_identity_bit_for_bit(networks, batch):
    params = stack([networks[0]])
    plain = forward(params, batch, networks[0].config)
    clamped = compose.make_plan([()], networks[0].config, 2)(params, batch, networks[0].config)
    assert plain.inside.keys() == clamped.inside.keys()
    assert all(torch.equal(plain.inside[site], clamped.inside[site]) for site in plain.inside)


@pytest.mark.parametrize("name", [name for name in golden_clamps(initial_weights(ModelConfig(), 32, 5, 0)) if name != "none"])
def test_a_replaced_entry_gets_exactly_no_gradient(name, networks, batch):
    weights = networks[0]
    plan = compose.make_plan([golden_clamps(networks[1])[name]], weights.config, 2)
    acts = plan(stack([weights]), batch, weights.config)
    for (site, _), override in plan.overrides.items():
        x = torch.randn_like(acts.inside[site, _]).requires_grad_()
        y = override.apply(site, x, acts)
        (gradient,) = torch.autograd.grad((y * torch.arange(1.0, y.numel() + 1).view_as(y)).sum(), x)
        replaced = torch.zeros_like(x, dtype=torch.bool) if override.where is None else override.where.expand_as(x)
        assert (gradient[replaced] == 0).all()
        assert (gradient[~replaced] != 0).all()
        if override.scale is None:
            assert torch.equal(y[~replaced], x[~replaced])


def gradients(weights, batch, chosen):
    params = {name: p.requires_grad_() for name, p in stack([weights]).items()}
    acts = compose.make_plan([chosen], weights.config, 2)(params, batch, weights.config)
    cross_entropy(acts.logits, batch).sum().backward()
    return {name: p.grad[0] for name, p in params.items()}


def head_rows(which, head):
    start = 64 * "qkv".index(which) + 8 * head
    return slice(start, start + 8)


def test_weights_behind_a_clamp_get_exactly_no_gradient(networks, batch):
    ablated = gradients(networks[0], batch, (c.Ablate((1, 3)),))["layers.1.attn.qkv.weight"]
    for which in "qkv":  # without values, the pattern has no effect either
        assert (ablated[head_rows(which, 3)] == 0).all() and (ablated[head_rows(which, 4)] != 0).any()
    previous = gradients(networks[0], batch, (c.PreviousToken((0, 2)),))["layers.0.attn.qkv.weight"]
    assert (previous[head_rows("q", 2)] == 0).all() and (previous[head_rows("k", 2)] == 0).all()
    assert (previous[head_rows("v", 2)] != 0).any()
    matched = gradients(networks[0], batch, (c.Induction((1, 3)),))["layers.1.attn.qkv.weight"]
    assert (matched[head_rows("q", 3)] == 0).all() and (matched[head_rows("v", 3)] != 0).any()
    copied = gradients(networks[0], batch, (c.Copy((1, 3)),))
    assert (copied["unembed.weight"] == 0).all() and (copied["layers.1.attn.qkv.weight"][head_rows("v", 3)] == 0).all()
    perfect = gradients(networks[0], batch, (c.PerfectLayer1(),))
    assert all((g == 0).all() for name, g in perfect.items() if name.startswith("layers.0."))
    assert (perfect["layers.1.attn.qkv.weight"] != 0).any()


def _float64_case(chosen, config=TINY):
    batch = small_batch(dtype=torch.float64)
    weights = initial_weights(config, 4, 5, seed=3)
    params = {name: (20 if "embed.weight" in name else 3 if p.ndim > 2 else 1) * p.double()
              for name, p in stack([weights]).items()}
    plan = compose.make_plan([chosen], config, 2, dtype=torch.float64)
    names = list(params)

    def loss(*values):
        return cross_entropy(plan(dict(zip(names, values, strict=True)), batch, config, query_only=True).logits, batch)

    return loss, [params[name].requires_grad_() for name in names]


ALL_LAYER_1 = tuple((0, h) for h in range(2))


@pytest.mark.parametrize("chosen", [
    (c.Ablate((0, 1)), c.Preserve("patterns")), (c.Ablate((0, 1)), c.Preserve("values")),
    (c.Ablate((0, 1)), c.Preserve("queries")), (c.Ablate((0, 1)), c.Preserve("keys")),
    (c.Ablate(ALL_LAYER_1), c.Preserve(("patterns", "values"))), (c.PerfectLayer1(),), (c.Copy((1, 1)),),
    (c.PerfectLayer1(), c.Copy((1, 1))), (c.Induction((1, 0), 0.7), c.BlockPreviousToken((0, 0)), c.HeadTemperature((0, 1), 2.0)),
    (c.Graft(initial_weights(TINY, 4, 5, 9)),), (c.Graft(initial_weights(TINY, 4, 5, 9), part="above"),),
], ids=lambda chosen: "+".join(type(x).__name__ for x in chosen))
def test_gradients_agree_with_finite_differences(chosen):
    """Nothing is detached, not in the unclamped pass, and not under `PerfectLayer1` and `Copy`."""
    loss, values = _float64_case(chosen)
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-7, rtol=1e-5)
    assert sum(g.abs().sum() for g in torch.autograd.grad(loss(*values).sum(), values)) > 1e-2


def test_a_family_of_different_clamps_equals_each_alone(networks, batch):
    cases = golden_clamps(networks[1])
    family = compose.make_plan(list(cases.values()), networks[0].config, 2)
    together = family(stack([networks[0]] * len(cases)), batch.expand(len(cases)), networks[0].config)
    for i, chosen in enumerate(cases.values()):
        alone = run_with_clamps(networks[0], batch, chosen)
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(together["pattern", 1][i], alone["pattern", 1][0], atol=2e-6, rtol=1e-5)


def test_a_program_made_for_all_clamps_gives_each_what_its_own_gives(networks, batch):
    """Activations and gradients agree: a run has an empty mask where it clamps nothing. All runs have one program."""
    cases = list(golden_clamps(networks[1]).values())
    params, config = stack([networks[0]]), networks[0].config

    def both(plan):
        def total(p):
            acts = plan(p, batch, config, query_only=True)
            return cross_entropy(acts.logits, batch).sum(), acts.logits

        return torch.func.grad(total, has_aux=True)(params)

    plans = [compose.make_plan([chosen], config, 2, compile_with=cases) for chosen in cases]
    assert len({flat.form_of(plan) for plan in plans}) == 1
    assert len({flat.form_of(compose.make_plan([chosen], config, 2)) for chosen in cases}) > 10
    for chosen, plan in zip(cases, plans, strict=True):
        (gradients, logits), (own_gradients, own_logits) = both(plan), both(compose.make_plan([chosen], config, 2))
        torch.testing.assert_close(logits, own_logits, atol=2e-6, rtol=1e-5)
        for name, g in own_gradients.items():
            torch.testing.assert_close(gradients[name], g, atol=2e-6, rtol=1e-4, msg=f"{chosen}: {name}")


# What each clamp sets, read off the activations.

def test_patterns_that_clamps_set(networks, batch):
    acts = run_with_clamps(networks[0], batch, (c.PreviousToken((0, 2), 0.75), c.Induction((1, 3), 0.9)))
    expected = torch.tensor([[1, 0, 0, 0, 0], [.75, .25, 0, 0, 0], [0, .75, .25, 0, 0], [0, 0, .75, .25, 0], [0, 0, 0, .75, .25]])
    assert torch.equal(acts["pattern", 0][0, :, 2], expected.expand(64, 5, 5))
    right = batch.in_context[0]
    row = acts["pattern", 1][0, :, 3, -1]
    torch.testing.assert_close(row[:, 1::2], torch.where(right, 0.9, 0.1))
    assert (row[:, ::2] == 0).all()


def test_more_pairs_share_the_strength_and_add_probabilities():
    labels = torch.tensor([[2, 4, 2, 0, 2], [1, 1, 1, 1, 1]])
    batch = small_batch(4, 2, labels=labels)
    weights = initial_weights(TINY, 4, 5, 0)
    row = run_with_clamps(weights, batch, (c.Induction((1, 0), 0.8),))["pattern", 1][0, :, 0, -1, 1::2]
    torch.testing.assert_close(row, torch.tensor([[.4, .1, .4, .1], [.25, .25, .25, .25]]))

    acts = run_with_clamps(weights, batch, (c.Copy((1, 1)),))
    scores = acts["attn_scores", 1][0, 0, 1, -1, 1::2]
    p = acts.logits[0, 0].softmax(0)
    torch.testing.assert_close(p[[2, 4, 0]], torch.stack([scores[[0, 2]].exp().sum(), scores[1].exp(), scores[3].exp()])
                               / scores.exp().sum())
    assert (acts.logits[0, 0, [1, 3]] == -1e9).all()


def test_similarity_match_takes_the_nearest_exemplar():
    batch = small_batch()
    row = run_with_clamps(initial_weights(TINY, 4, 5, 0), batch, (c.SimilarityMatch((1, 1)),))["pattern", 1][0, :, 1, -1]
    x = batch.exemplars[0]
    nearest = torch.nn.functional.cosine_similarity(x[:, :2], x[:, 2:], dim=-1).argmax(1)
    assert torch.equal(row[:, 1::2].argmax(1), nearest) and torch.equal(row.sum(1), torch.ones(6))


def test_ablated_embedding_leaves_only_biases(networks, batch):
    logits = run_with_clamps(networks[0], batch, (c.AblateEmbedding(),)).logits[0]
    assert torch.equal(logits, logits[:1].expand_as(logits))


def test_perfect_layer_1_with_absolute_positions_moves_the_embedding_with_its_position():
    config = ModelConfig(d_model=8, n_heads=2, positions="sinusoidal")
    acts = run_with_clamps(initial_weights(config, 4, 5, 0), small_batch(), (c.PerfectLayer1(),))
    x, seen = acts["token_embed", None], acts["qk_input", 1]
    assert torch.equal(seen, torch.stack([x[:, :, i] for i in (0, 0, 1, 2, 4)], 2))
    assert torch.equal(acts["resid_pre", 1], x)


@pytest.mark.parametrize("other", [c.PreviousToken((0, 1)), c.Induction((1, 1)), c.BlockPreviousToken((0, 1)),
                                   c.HeadTemperature((1, 1), 3.0), c.PerfectLayer1()], ids=lambda x: type(x).__name__)
def test_what_another_clamp_sets_wins_over_what_is_preserved(other, networks, batch):
    """`Preserve` does not change the pattern that the other clamp sets."""
    layer = 0 if isinstance(other, (c.PreviousToken, c.BlockPreviousToken)) else 1
    with_it = run_with_clamps(networks[0], batch, (other, c.Preserve("patterns")))["pattern", layer][0, :, 1, -1]
    alone = run_with_clamps(networks[0], batch, (other,))["pattern", layer][0, :, 1, -1]
    clean = run_with_clamps(networks[0], batch)["pattern", layer][0, :, 1, -1]
    torch.testing.assert_close(with_it, alone)
    assert not torch.allclose(with_it, clean, atol=1e-3)


DEEP = ModelConfig(d_model=16, n_heads=2, n_layers=3)


def deep_network(seed):
    """Three layers, with weights large enough that every part matters."""
    weights = initial_weights(DEEP, 4, 5, seed)
    return type(weights)(DEEP, {name: 3 * p if p.ndim == 2 else p for name, p in weights.tensors.items()})


@pytest.mark.parametrize("what, name", list(c.Preserve.NAMES.items()))
def test_every_layer_is_preserved(what, name):
    weights, batch = deep_network(0), small_batch()
    clean = run_with_clamps(weights, batch)
    acts = run_with_clamps(weights, batch, (c.Ablate(((0, 0), (1, 1))), c.Preserve(what)))
    lost = run_with_clamps(weights, batch, (c.Ablate(((0, 0), (1, 1))),))
    for layer in range(3):
        kept, plain, without = (a[name, layer].clone() for a in (acts, clean, lost))
        if name == "v":  # `Ablate` wins over `Preserve`
            for a in (kept, plain, without):
                a[:, :, :, 0 if layer == 0 else 1] = 0 if layer < 2 else a[:, :, :, 1]
        assert torch.equal(kept, plain)
        assert layer == 0 or not torch.allclose(without, plain, atol=1e-3)


@pytest.mark.parametrize("what, name", list(c.Preserve.NAMES.items()))
def test_layer_2_under_the_layer_1_clamp_is_not_preserved(what, name, networks, batch):
    both = run_with_clamps(networks[0], batch, (c.PerfectLayer1(), c.Preserve(what)))
    alone, clean = run_with_clamps(networks[0], batch, (c.PerfectLayer1(),)), run_with_clamps(networks[0], batch)
    assert torch.equal(both[name, 1], alone[name, 1]) and not torch.allclose(both[name, 1], clean[name, 1], atol=1e-3)
    assert torch.equal(both.logits, alone.logits)


def test_scores_that_are_set_are_not_divided(networks, batch):
    chosen = c.BlockPreviousToken((0, 1)), c.HeadTemperature((0, 1), 4.0)
    both = run_with_clamps(networks[0], batch, chosen)["attn_scores", 0][0, :, 1]
    clean = run_with_clamps(networks[0], batch)["attn_scores", 0][0, :, 1]
    assert (both.diagonal(-1, 1, 2) == -1e9).all()
    torch.testing.assert_close(both.diagonal(0, 1, 2), clean.diagonal(0, 1, 2) / 4)


def test_two_clamps_of_one_kind_in_one_layer(networks, batch):
    pattern = run_with_clamps(networks[0], batch, (c.PreviousToken((0, 1)), c.PreviousToken((0, 2), 0.25)))["pattern", 0][0, :, :, 3]
    assert torch.equal(pattern[:, 1, 1:4], torch.tensor([0., 1, 0]).expand(64, 3))
    assert torch.equal(pattern[:, 2, 1:4], torch.tensor([0, 0.25, 0.75]).expand(64, 3))


def test_copy_from_a_head_of_layer_1(networks, batch):
    acts = run_with_clamps(networks[0], batch, (c.Copy((0, 5)),))
    expected = acts["attn_scores", 0][0, :, 5, -1, 1::2]
    torch.testing.assert_close(acts.logits[0].gather(1, batch.labels[0, :, :2]), expected)


@pytest.mark.parametrize("after", [0, 1])
def test_grafts_in_a_deeper_network(after):
    own, donor, batch = deep_network(0), deep_network(1), small_batch()
    below = run_with_clamps(own, batch, (c.Graft(donor, after),))
    assert torch.equal(below["resid_pre", after + 1], run_with_clamps(donor, batch)["resid_post", after])
    spliced = {name: (donor if compose._after(name, after) else own).tensors[name] for name in own.tensors}
    assert {name for name in own.tensors if compose._after(name, after)} == {
        name for name in own.tensors if name.startswith(("final_norm", "unembed"))
        or (name.startswith("layers") and int(name.split(".")[1]) > after)}
    above = run_with_clamps(own, batch, (c.Graft(donor, after, "above"),))
    assert torch.equal(above.logits, run_with_clamps(type(own)(DEEP, spliced), batch).logits)


def test_each_run_of_a_family_has_its_own_donor():
    own, batch, donors = deep_network(0), small_batch(), [deep_network(1), deep_network(2)]
    lists = [(c.Graft(donors[0]),), (), (c.Graft(donors[1]),), (c.Graft(donors[0], part="above"),)]
    family = compose.make_plan(lists, DEEP, 2)(stack([own] * 4), batch.expand(4), DEEP)
    for i, chosen in enumerate(lists):
        torch.testing.assert_close(family.logits[i], run_with_clamps(own, batch, chosen).logits[0], atol=1e-5, rtol=1e-4)


def test_a_finished_network_is_at_the_end_of_every_window(networks, batch):
    windows = (c.During(c.Ablate((1, 3)), 0, 100), c.During(c.Ablate((1, 5)), 100))
    assert torch.equal(run_with_clamps(networks[0], batch, windows).logits, run_with_clamps(networks[0], batch, (c.Ablate((1, 5)),)).logits)


# Composition and refusals.

@pytest.mark.parametrize("first, second, entry", [
    (c.PreviousToken((1, 3)), c.Induction((1, 3)), "pattern of head 1.3 at position 4"),
    (c.Ablate((1, 3)), c.Ablate(((1, 2), (1, 3))), "v of head 1.3"),
    (c.Induction((1, 3)), c.SimilarityMatch((1, 3)), "pattern of head 1.3"),
    (c.HeadTemperature((1, 3), 2), c.HeadTemperature((1, 3), 3), "attn_scores of head 1.3"),
    (c.Copy((1, 3)), c.Copy((1, 2)), "logits"),
    (c.Preserve("patterns"), c.Preserve(("values", "patterns")), "pattern"),
])
def test_two_clamps_on_one_entry_are_an_error_that_names_both(first, second, entry):
    with pytest.raises(ValueError) as error:
        compose.check((first, second), SHAPE)
    assert str(first) in str(error.value) and str(second) in str(error.value) and entry in str(error.value)


def test_clamps_of_different_entries_of_one_pattern_compose():
    compose.check((c.PreviousToken((1, 3), labels_only=True), c.Induction((1, 3))), SHAPE)
    compose.check((c.BlockPreviousToken((1, 3)), c.HeadTemperature((1, 3), 2.0)), SHAPE)


def test_two_grafts_are_an_error(networks):
    with pytest.raises(ValueError, match="one graft"):
        compose.check((c.Graft(networks[0]), c.Graft(networks[1], part="above")), SHAPE)


@pytest.mark.parametrize("clamp, words", [
    (c.Ablate((2, 0)), "no head 2.0; layers are 0 to 1, heads 0 to 7"),
    (c.Induction((1, 8)), "no head 1.8; layers are 0 to 1, heads 0 to 7"),
    (c.Copy((0, -1)), "no head 0.-1"),
    (c.LabelAttentionOnly((0, 1)), "not the last"),
    (c.Graft(initial_weights(ModelConfig(), 32, 5, 0), after_layer=1), "from 0 to 0"),
])
def test_out_of_range_is_an_error_that_names_the_range(clamp, words):
    with pytest.raises(ValueError) as error:
        compose.check((clamp,), SHAPE)
    assert words in str(error.value)


def test_the_layer_1_clamp_needs_a_second_layer():
    with pytest.raises(ValueError, match="n_layers=1"):
        c.PerfectLayer1().writes(c.Shape(1, 2, 2))


@pytest.mark.parametrize("make", [
    lambda: c.Induction((1, 3), 1.5), lambda: c.PreviousToken((0, 1), -0.1), lambda: c.HeadTemperature((1, 1), 0),
    lambda: c.SimilarityMatch((1, 1), -1), lambda: c.SimilarityMatch((1, 1), 1e-7), lambda: c.HeadTemperature((1, 1), math.inf),
    lambda: c.Preserve("pattern"), lambda: c.Graft(None, part="left"),
    lambda: c.Graft(None), lambda: c.Ablate("10"), lambda: c.Ablate((1.0, 3.0)), lambda: c.Ablate((True, 1)),
    lambda: c.Copy(((1, 0), (1, 1))), lambda: c.Induction((1, 3), "1"), lambda: c.During(c.Copy((1, 1)), math.nan),
    lambda: RunConfig(clamps=c.Copy((1, 1))), lambda: c.Ablate(()), lambda: c.Ablate(((1, 1), (1, 1))),
    lambda: c.During(c.Copy((1, 1)), 5, 5),
    lambda: c.During(c.During(c.Copy((1, 1))), 5), lambda: c.Induction((1, 3), float("nan")),
])
def test_bad_values_are_refused_when_made(make):
    with pytest.raises(ValueError):
        make()


def test_heads_may_come_from_measurements():
    assert c.Ablate((1, torch.tensor([1, 5, 2]).argmax())).heads == ((1, 1),)
    assert c.Ablate(np.array([[1, 0], [1, 2]])).heads == ((1, 0), (1, 2)) and c.Copy((np.int64(1), 3)).head == (1, 3)


def test_labels_out_of_range_are_named(networks, batch):
    with pytest.raises(ValueError, match="n_labels=5"):
        run_with_clamps(networks[0], dataclasses.replace(batch, labels=batch.labels + 3))


def test_something_else_is_not_a_clamp():
    with pytest.raises(ValueError, match="not a clamp"):
        compose.check(("ablate",), SHAPE)


@pytest.mark.parametrize("write, words", [
    (c.Write("patterns", 1, torch.ones(8, 5, 5, dtype=torch.bool)), "Write's name='patterns'"),
    (c.Write("pattern", 2, torch.ones(8, 5, 5, dtype=torch.bool)), "layer of a Write of pattern=2"),
    (c.Write("logits", 0, torch.ones((), dtype=torch.bool)), "layer of a Write of logits=0"),
    (c.Write("pattern", 1, torch.ones(8, 5, 5, dtype=torch.bool), how="multiply"), "Write's how='multiply'"),
    (c.Write("pattern", 1, torch.ones(8, 5, 5)), "where of torch.float32"),
    (c.Write("pattern", 1, torch.ones(5, 5, dtype=torch.bool)), "must be bool [8, 5, 5]"),
])
def test_a_write_that_nothing_would_read_is_refused(write, words, networks, batch):
    own = type("Own", (), {"writes": lambda self, shape: [write]})()
    with pytest.raises(ValueError) as error:
        run_with_clamps(networks[0], batch, [own])
    assert words in str(error.value)


def test_a_clamp_that_is_not_in_a_list_says_so(networks, batch):
    with pytest.raises(ValueError, match="is one clamp; give a list"):
        run_with_clamps(networks[0], batch, c.Copy((1, 1)))


def test_layer_1_is_preserved_too(networks, batch):
    """A change before Layer 1 does not reach the patterns that are preserved."""
    plain, kept, lost = (run_with_clamps(deep_network(0), small_batch(), chosen) for chosen in
                         ((), (c.AblateEmbedding(), c.Preserve("patterns")), (c.AblateEmbedding(),)))
    for layer in range(3):
        assert torch.equal(kept["pattern", layer], plain["pattern", layer])
        assert not torch.allclose(lost["pattern", layer], plain["pattern", layer], atol=1e-3)


def test_a_donor_of_another_architecture_is_refused(networks, batch):
    donor = initial_weights(ModelConfig(n_heads=4), 32, 5, 0)
    with pytest.raises(ValueError, match="graft like on like"):
        run_with_clamps(networks[0], batch, (c.Graft(donor),))


def test_windows_switch_a_clamp_on_and_off():
    clamp = c.During(c.Induction((1, 3)), 100, 200)
    assert [compose.active((clamp,), s) for s in (0, 99, 100, 199, 200)] == [(), (), (clamp.clamp,), (clamp.clamp,), ()]
    assert compose.edges((clamp, c.During(c.Copy((1, 1)), until=50))) == [50, 100, 200]
    compose.check((clamp, c.During(c.SimilarityMatch((1, 3)), 200)), SHAPE)  # one after the other is no conflict
    with pytest.raises(ValueError, match="both set"):
        compose.check((clamp, c.During(c.SimilarityMatch((1, 3)), 199)), SHAPE)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A reader's own clamp: a head attends equally to every token that it can see."""

    layer: int
    head: int

    def writes(self, shape):
        where = shape.zeros("pattern")
        where[self.head] = True
        pattern = torch.ones(shape.n_positions, shape.n_positions).tril()
        return [c.Write("pattern", self.layer, where, ((pattern / pattern.sum(1, keepdim=True), None),))]


def test_a_clamp_of_ones_own(networks, batch):
    acts = run_with_clamps(networks[0], batch, (Uniform(1, 2), c.Ablate((1, 5))))
    torch.testing.assert_close(acts["pattern", 1][0, 0, 2, -1], torch.full((5,), 0.2))
    assert (acts["v", 1][:, :, :, 5] == 0).all()


def test_perfect_layer_1_in_a_deeper_network():
    """In every layer, queries and keys read the copied embeddings, values and the stream the plain ones."""
    weights, batch = deep_network(0), small_batch()
    acts = run_with_clamps(weights, batch, [c.PerfectLayer1()])
    params, config = stack([weights]), weights.config
    plain = acts["token_embed", None]
    copied = torch.stack([plain[:, :, i] for i in (0, 0, 1, 2, 4)], 2)
    written = torch.zeros_like(plain)  # by the layers from the second on
    for layer in (1, 2):
        queries_and_keys = run_layer(params, batch, config, layer, copied + written)
        values = run_layer(params, batch, config, layer, plain + written)
        torch.testing.assert_close(acts["pattern", layer], queries_and_keys["pattern", layer])
        torch.testing.assert_close(acts["v", layer], values["v", layer])
        torch.testing.assert_close(acts["resid_pre", layer], plain + written)
        assert not torch.allclose(acts["pattern", layer], values["pattern", layer], atol=1e-3)
        written = written + acts["attn_out", layer]
    gradient = gradients_of(weights, batch, [c.PerfectLayer1()])
    assert all((g == 0).all() for name, g in gradient.items() if name.startswith("layers.0."))
    assert all((gradient[f"layers.{i}.attn.qkv.weight"] != 0).any() for i in (1, 2))


def run_layer(params, batch, config, layer, stream):
    """Activations of a network whose stream before `layer` is replaced by `stream`."""
    where = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    override = Override(where, ((torch.ones(1, 1, 1, 1), lambda acts: stream),))
    return forward(params, batch, config, {("resid_pre", layer): override})


def gradients_of(weights, batch, chosen):
    params = {name: p.requires_grad_() for name, p in stack([weights]).items()}
    cross_entropy(compose.make_plan([chosen], weights.config, 2)(params, batch, weights.config).logits, batch).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}


# Adding to an activation, and sources that read what they replace.

def test_a_vector_is_added_where_it_is_to_be(networks, batch):
    vector = torch.linspace(-1, 1, 64)
    plain = run_with_clamps(networks[0], batch)
    steered = run_with_clamps(networks[0], batch, [c.Steer("resid_pre", 1, vector, [-1, 1])])
    added = steered["resid_pre", 1] - plain["resid_pre", 1]
    torch.testing.assert_close(added[0, :, [1, 4]], vector.expand(64, 2, 64), atol=1e-6, rtol=1e-5)
    assert (added[0, :, [0, 2, 3]] == 0).all() and not torch.equal(steered.logits, plain.logits)
    logits = run_with_clamps(networks[0], batch, [c.Steer("logits", None, [0, 1, 0, 0, 2.5])]).logits
    torch.testing.assert_close(logits - plain.logits, torch.tensor([0, 1, 0, 0, 2.5]).expand(1, 64, 5), atol=1e-6, rtol=1e-5)


def test_additions_compose_with_each_other_and_with_what_is_set(networks, batch):
    """Two additions are summed; an addition comes last, also where another clamp has set, kept or scaled the entry."""
    one, two = c.Steer("resid_pre", 1, [0.5] * 64), c.Steer("resid_pre", 1, [0.25] * 64, [0])
    both = run_with_clamps(networks[0], batch, [one, two])["resid_pre", 1]
    plain = run_with_clamps(networks[0], batch)["resid_pre", 1]
    torch.testing.assert_close(both[:, :, 0] - plain[:, :, 0], torch.full((1, 64, 64), 0.75), atol=1e-6, rtol=1e-5)
    under = run_with_clamps(networks[0], batch, [c.PerfectLayer1(), one])
    torch.testing.assert_close(under["resid_pre", 1], under["token_embed", None] + 0.5)
    values = run_with_clamps(networks[0], batch, [c.Ablate((1, 3)), Adds("v", (1, 3), 0.5)])["v", 1]
    assert (values[:, :, :, 3] == 0.5).all()
    kept = run_with_clamps(networks[0], batch, [c.Ablate((0, 1)), c.Preserve("values"), Adds("v", (1, 3), 0.5)])["v", 1]
    torch.testing.assert_close(kept[:, :, :, 3], run_with_clamps(networks[0], batch)["v", 1][:, :, :, 3] + 0.5)
    scores = run_with_clamps(networks[0], batch, [c.HeadTemperature((1, 3), 2.0), Adds("attn_scores", (1, 3), 1.0)])["attn_scores", 1]
    halved = run_with_clamps(networks[0], batch)["attn_scores", 1][0, :, 3, -1] / 2
    torch.testing.assert_close(scores[0, :, 3, -1], halved + 1.0)


@dataclasses.dataclass(frozen=True)
class Adds:
    """A clamp that adds a number to all entries of a head's activation."""

    name: str
    head: tuple[int, int]
    number: float

    def writes(self, shape):
        where = shape.zeros(self.name)
        where[self.head[1]] = True
        return [c.Write(self.name, self.head[0], where, ((self.number, None),), how="add")]


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A clamp that doubles a head's values: its source reads what it replaces."""

    head: tuple[int, int] = (1, 3)

    def writes(self, shape):
        where = shape.zeros("v")
        where[self.head[1]] = True
        return [c.Write("v", self.head[0], where, ((2.0, self.source),))]

    def source(self, acts):
        return acts["v", self.head[0]]


def test_a_source_reads_the_value_that_it_replaces(networks, batch):
    plain, doubled = run_with_clamps(networks[0], batch)["v", 1], run_with_clamps(networks[0], batch, [Doubled()])["v", 1]
    torch.testing.assert_close(doubled[:, :, :, 3], 2 * plain[:, :, :, 3])
    assert torch.equal(doubled[:, :, :, 4], plain[:, :, :, 4])


@pytest.mark.parametrize("chosen", [
    (c.Steer("resid_pre", 1, [0.3] * 8, [-1]), c.Induction((1, 0), 0.7)), (c.Steer("logits", None, [0.1] * 5), c.Copy((1, 1))),
    (Doubled((1, 1)), c.PreviousToken((0, 0), 0.7)), (Adds("attn_scores", (1, 0), 0.5), c.HeadTemperature((1, 0), 2.0)),
], ids=lambda chosen: "+".join(type(x).__name__ for x in chosen))
def test_gradients_through_additions_and_self_reading_sources(chosen):
    loss, values = _float64_case(chosen)
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_a_vector_added_is_felt_as_a_constant(networks, batch):
    """A vector added to the logits gives the same gradients as a network with that vector in its bias."""
    vector = torch.tensor([0.5, -1.0, 0.25, 2.0, 0.0])
    steered = gradients_of(networks[0], batch, [c.Steer("logits", None, vector)])
    tensors = dict(networks[0].tensors) | {"unembed.bias": networks[0].tensors["unembed.bias"] + vector}
    biased = gradients_of(dataclasses.replace(networks[0], tensors=tensors), batch, [])
    for name, g in steered.items():
        torch.testing.assert_close(g, biased[name], atol=1e-6, rtol=1e-4)


def test_families_with_vectors_of_their_own_are_one_program(networks, batch):
    config, shape = networks[0].config, SHAPE
    some = [(c.Steer("resid_pre", 1, [i + 1.0] * 64, [i]),) for i in range(3)]
    assert len({clamp_signature(each, shape) for each in some}) == 1
    plans = [compose.make_plan([each], config, 2, compile_with=[*some, ()]) for each in (*some, ())]
    assert len({flat.form_of(plan) for plan in plans}) == 1
    assert len({tuple(t.shape for t in flat.tensors_of((plan,))) for plan in plans}) == 1
    together = compose.make_plan([*some, ()], config, 2)(stack([networks[0]] * 4), batch.expand(4), config).logits
    for each, logits in zip((*some, ()), together, strict=True):
        torch.testing.assert_close(logits, run_with_clamps(networks[0], batch, each).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make, words", [
    (lambda: c.Steer("pattern", 1, [1.0]), "Steer: name='pattern'"), (lambda: c.Steer("resid_pre", 1, "abc"), "a list of numbers"),
    (lambda: c.Steer("resid_pre", 1, []), "is empty"), (lambda: c.Steer("resid_pre", 1, [math.nan]), "not finite"),
    (lambda: c.Steer("resid_pre", 1, [1.0], [0.5]), "whole numbers or None"),
])
def test_a_vector_that_cannot_be_added_is_refused_when_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("clamp, words", [
    (c.Steer("resid_pre", 1, [1.0] * 63), r"coefficient of \[1, 63\], which does not broadcast to \[5, 64\]"),
    (c.Steer("resid_pre", 1, [1.0] * 64, [5]), "no position 5"), (c.Steer("logits", None, [1.0] * 6), r"does not broadcast to \[5\]"),
    (c.Steer("resid_pre", 2, [1.0] * 64), "layer of a Write of resid_pre=2"),
])
def test_a_vector_that_does_not_fit_is_refused_by_name(clamp, words, networks, batch):
    with pytest.raises(ValueError, match=words):
        run_with_clamps(networks[0], batch, [clamp])
