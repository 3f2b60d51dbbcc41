"""The model: shapes, names, parameter count, initial weights, saving and loading."""

import math

import pytest
import torch

from ihbook import load_weights, save_weights
from ihbook import model as m
from ihbook.config import ModelConfig
from ihbook.task import Batch, from_exemplars


def count(config):
    return sum(math.prod(s) for s in m.shapes(config, 512, 5).values())


def test_the_published_network_has_66629_parameters():
    assert count(ModelConfig()) == 66_629


def test_initial_weights_are_lecun_normal_truncated_at_two_sigma():
    weights = m.initial_weights(ModelConfig(mlp_ratio=4, positions="learned", init_scale=0.5), 512, 5, seed=1).tensors
    for name, tensor in weights.items():
        if name in ("label_embed.weight", "pos_embed.weight"):
            assert tensor.abs().max() <= 0.04 and tensor.std() == pytest.approx(0.02 * 0.88, rel=0.1)
        elif tensor.ndim == 2:
            std = 0.5 * tensor.shape[1] ** -0.5
            assert tensor.std().item() == pytest.approx(std, rel=0.06 if tensor.numel() > 1000 else 0.2), name
            assert tensor.abs().max() <= 2 * std / 0.8796 + 1e-6
        else:
            assert (tensor == (1 if name.endswith("weight") else 0)).all(), name


def test_activations_have_their_names_and_shapes(networks, batch):
    acts = m.forward(m.stack([networks[0]] * 2), batch.expand(2), networks[0].config)
    stream, head, attention = (2, 64, 5, 64), (2, 64, 5, 8, 8), (2, 64, 8, 5, 5)
    expected = {"resid_pre": stream, "attn_out": stream, "resid_post": stream, "q": head, "k": head, "v": head, "z": head,
                "attn_scores": attention, "pattern": attention}
    for layer in (0, 1):
        assert {name: tuple(acts[name, layer].shape) for name in expected} == expected
    assert tuple(acts["token_embed", None].shape) == stream and tuple(acts.logits.shape) == (2, 64, 5)
    assert (acts["attn_scores", 0][..., 0, 1:] == -math.inf).all()
    torch.testing.assert_close(acts["pattern", 1].sum(-1), torch.ones(2, 64, 8, 5))
    z = torch.einsum("rbhqk,rbkhd->rbqhd", acts["pattern", 1], acts["v", 1])
    torch.testing.assert_close(acts["z", 1], z)
    torch.testing.assert_close(acts["resid_pre", 0] + acts["attn_out", 0], acts["resid_pre", 1])
    with pytest.raises(KeyError, match=r"no activation \('paterns', 1\)"):
        acts["paterns", 1]


def test_each_run_is_its_own_network(networks, batch):
    both = m.forward(m.stack(list(networks)), batch.expand(2), networks[0].config).logits
    for i, weights in enumerate(networks):
        torch.testing.assert_close(both[i], m.forward(m.stack([weights]), batch, weights.config).logits[0], atol=1e-6, rtol=1e-5)


def test_query_only_gives_the_same_logits_and_gradients():
    generator = torch.Generator().manual_seed(0)
    for config in (ModelConfig(), ModelConfig(n_layers=3, mlp_ratio=2, positions="learned"),
                   ModelConfig(n_layers=1, positions="sinusoidal"), ModelConfig(positions="none", layer_norm=False)):
        weights = m.initial_weights(config, 16, 5, 0)
        batch = from_exemplars(torch.randn(20, 4, 16, generator=generator), torch.randint(0, 5, (20, 4), generator=generator))
        results = []
        for query_only in (False, True):
            params = {name: p.requires_grad_() for name, p in m.stack([weights]).items()}
            logits = m.forward(params, batch, config, query_only=query_only).logits
            logits.square().sum().backward()
            results.append((logits, {name: p.grad for name, p in params.items()}))
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_without_positions_the_order_of_pairs_does_not_matter_to_one_layer():
    weights = m.initial_weights(ModelConfig(n_layers=1, positions="none"), 16, 5, 0)
    x, labels = torch.randn(4, 3, 16), torch.randint(0, 5, (4, 3))
    logits = [m.forward(m.stack([weights]), from_exemplars(x[:, o], labels[:, o]), weights.config).logits
              for o in ([0, 1, 2], [1, 0, 2])]
    torch.testing.assert_close(*logits)


def test_weights_go_through_safetensors(tmp_path):
    weights = m.initial_weights(ModelConfig(n_layers=3, mlp_ratio=2), 16, 7, 3)
    save_weights(weights, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded == weights and loaded.config == weights.config and hash(loaded) == hash(weights)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert m.initial_weights(ModelConfig(n_layers=3, mlp_ratio=2), 16, 7, 4) != weights


def test_damaged_or_missing_weights_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="w.safetensors"):
        load_weights(path)
    weights = m.initial_weights(ModelConfig(), 16, 5, 3)
    save_weights(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(path)
    with pytest.raises(ValueError, match=r"weight layers.1.norm1.weight is \(64,\), but .*n_layers=1.* has none"):
        m.Weights(ModelConfig(n_layers=1), weights.tensors)
    with pytest.raises(ValueError, match="exemplar_embed"):
        m.Weights(ModelConfig(), {})
    save_weights(weights, path)
    with pytest.raises(ValueError, match="holds a network of .*n_heads=8.*, not of .*n_heads=4"):
        load_weights(path, ModelConfig(n_heads=4))
    with pytest.raises(ValueError, match="one architecture"):
        m.stack([weights, m.initial_weights(ModelConfig(n_heads=4), 16, 5, 0)])


def test_too_long_a_sequence_for_learned_positions_is_named():
    weights = m.initial_weights(ModelConfig(positions="learned", max_positions=4), 16, 5, 0)
    batch = from_exemplars(torch.randn(2, 3, 16), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="5 positions, but max_positions=4"):
        m.forward(m.stack([weights]), batch, weights.config)


def test_as_many_positions_as_the_table_has():
    weights = m.initial_weights(ModelConfig(positions="learned", max_positions=5), 16, 5, 0)
    batch = from_exemplars(torch.randn(2, 3, 16), torch.zeros(2, 3))
    assert m.forward(m.stack([weights]), batch, weights.config).logits.shape == (1, 2, 5)


def test_noise_reaches_the_network_on_every_path():
    """The logits are right for a bank small enough to be embedded whole and for a larger one, with and without noise."""
    weights = m.initial_weights(ModelConfig(), 16, 5, 0)
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(1, 10, 16, generator=generator), torch.randint(0, 5, (1, 40, 3), generator=generator)
    ids = torch.randint(0, 10, labels.shape, generator=generator)
    large = torch.cat([bank, torch.zeros(1, 2000, 16)], 1)
    for noise in (None, torch.randn(1, 40, 3, 16, generator=generator)):
        expected = bank[0][ids] + (0 if noise is None else noise)
        plain = m.forward(m.stack([weights]), from_exemplars(expected[0], labels[0]), weights.config).logits
        for each in (bank, large):
            found = m.forward(m.stack([weights]), Batch(each, ids, labels, noise), weights.config).logits
            torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def test_architecture_is_part_of_what_weights_are(networks):
    other = m.Weights(ModelConfig(n_heads=4), networks[0].tensors)
    assert other != networks[0] and other.content_digest != networks[0].content_digest


@pytest.mark.parametrize("positions, angles", [("rotary", [1.0, 0.1]), ("sinusoidal", [1.0, 0.01])])
def test_positions_follow_their_formula(positions, angles):
    """Rotary: pair i of a head's features turns by pos · base^(-2i/d_head). Sinusoidal: sin and cos of pos · 10000^(-2i/d)."""
    config = ModelConfig(d_model=4, n_heads=1, positions=positions, rotary_base=100.0)
    weights = m.initial_weights(config, 4, 5, 0)
    batch = from_exemplars(torch.randn(3, 3, 4), torch.zeros(3, 3))
    plain = m.Weights(ModelConfig(d_model=4, n_heads=1, positions="none"), weights.tensors)
    found, without = (m.forward(m.stack([w]), batch, w.config) for w in (weights, plain))
    for pos in range(5):
        turn = pos * torch.tensor(angles)
        if positions == "sinusoidal":
            added = torch.stack([turn.sin(), turn.cos()], 1).flatten()
            torch.testing.assert_close(found["token_embed", None][0, 0, pos], without["token_embed", None][0, 0, pos] + added)
        else:
            x = torch.view_as_complex(without["q", 0][0, 0, pos, 0].unflatten(0, (2, 2)).contiguous())
            torch.testing.assert_close(found["q", 0][0, 0, pos, 0], torch.view_as_real(x * torch.exp(1j * turn)).flatten())


@pytest.mark.parametrize("bad", [{"n_heads": 7}, {"mlp_ratio": 0.001}, {"d_model": 8, "n_heads": 8}, {"positions": "alibi"}, {"n_layers": 0},
                                 {"mlp_ratio": -1}, {"mlp_ratio": 1e8}, {"rotary_base": 0}, {"d_model": 64.0},
                                 {"positions": "sinusoidal", "d_model": 63, "n_heads": 7}])
def test_bad_architectures_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values()))).replace(".", r"\.")):
        ModelConfig(**bad)
