"""Metrics, checked by hand on small examples."""

import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cases import clamps as golden_clamps
from conftest import shared
from scipy import stats

from ihbook import clamps, metrics
from ihbook.chapters import claims, experiments
from ihbook.clamps import run_with_clamps
from ihbook.task import Batch


def batch_of(labels):
    labels = torch.tensor(labels)[None]
    return Batch(torch.zeros(1, 1, 1), torch.zeros_like(labels), labels)


def test_query_metrics_by_hand():
    batch = batch_of([[0, 2, 2], [1, 0, 1]])
    p = torch.tensor([[[0.1, 0.6, 0.2, 0.1], [0.3, 0.5, 0.1, 0.1]]])
    found = metrics.query_metrics(p.log(), batch)
    expected = {
        "loss": [-math.log(0.2), -math.log(0.5)], "accuracy": [0, 1], "probability": [0.2, 0.5],
        "in_context_loss": [-math.log(2 / 3), -math.log(5 / 8)], "in_context_accuracy": [1, 1],
        "in_context_probability": [2 / 3, 5 / 8], "context_probability": [0.3, 0.8],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor([values], dtype=torch.float32), msg=name)


def test_induction_strength_and_previous_token_attention_by_hand():
    pattern = torch.zeros(1, 1, 2, 5, 5)
    pattern[0, 0, 0, -1] = torch.tensor([0.1, 0.2, 0.1, 0.5, 0.1])
    pattern[0, 0, 1, 1, 0], pattern[0, 0, 1, 3, 2] = 0.4, 0.8
    assert metrics.induction_strength(pattern, batch_of([[0, 2, 2]]))[0, 0].tolist() == pytest.approx([0.3, 0])
    assert metrics.induction_strength(pattern, batch_of([[0, 2, 0]]))[0, 0].tolist() == pytest.approx([-0.3, 0])
    assert metrics.previous_token_attention(pattern)[0, 0].tolist() == pytest.approx([0, 0.6])


def test_phase_change_is_interpolated():
    def curve(losses):
        return pd.DataFrame({"sequences": range(0, 100 * len(losses), 100), "eval_set": "train", "metric": "loss", "value": losses})

    assert metrics.phase_change(curve([1.0, 0.6, 0.2, 0.3]), 0.4) == pytest.approx(150)
    assert metrics.phase_change(curve([0.1, 0.6]), 0.4) == 0
    assert math.isnan(metrics.phase_change(curve([1.0, 0.6]), 0.4))
    assert metrics.threshold(2) == pytest.approx(0.4 * math.log(2)) and metrics.threshold(4) == pytest.approx(2 * metrics.threshold(2))
    assert metrics.phase_change(curve([1.0, 0.3, 0.2])) == metrics.phase_change(curve([1.0, 0.3, 0.2]), metrics.threshold(2))


def test_chunks_do_not_change_a_mean(networks, batch):
    whole, parts = (metrics.measure(networks[0], batch, chunk=chunk) for chunk in (64, 7))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-6, rtol=1e-6, equal_nan=True)


def test_one_network_under_many_clamps_is_computed_once_where_they_agree(networks, batch):
    """Every case gives the same with a shared prefix, up to where the clamps differ, as with a network of its own."""
    lists = list(golden_clamps(networks[1]).values())
    for some in (lists, lists[:1] * 3):  # also where nothing differs at all
        shared, own = metrics.measure(networks[0], batch, some), metrics.measure([networks[0]] * len(some), batch, some)
        for name, value in own.items():
            assert shared[name].shape == value.shape and len(value) == len(some)
            torch.testing.assert_close(shared[name], value, atol=1e-6, rtol=1e-5, equal_nan=True)
        right = metrics.correct(networks[0], batch, some)
        assert right.shape == (len(some), len(batch))
        torch.testing.assert_close(right.double().mean(1), own["accuracy"], check_dtype=False)


@dataclass(frozen=True)
class Gathered:
    """A reader's clamp whose source expects run axes of the same length in activations and sequences."""

    def writes(self, shape):
        return [clamps.Write("logits", None, ~shape.zeros("logits"), ((1.0, self.source),))]

    @staticmethod
    def source(acts):
        scores = acts["attn_scores", 1][:, :, 3, -1, 1::2]
        return scores.gather(2, acts.batch.labels % 2).sum(2, keepdim=True) * torch.arange(5.0)


def test_a_clamp_of_ones_own_beside_others_of_one_network(networks, batch):
    lists = [(Gathered(), clamps.HeadTemperature((1, 3), temperature)) for temperature in (0.5, 1.0, 4.0)]
    together = metrics.measure(networks[0], batch, lists)["loss"]
    assert len(set(together.tolist())) == 3
    for each, loss in zip(lists, together, strict=True):
        torch.testing.assert_close(metrics.measure(networks[0], batch, [each])["loss"][0], loss, atol=1e-6, rtol=1e-5)


def test_measure_pairs_networks_with_clamps(networks, batch):
    lists = [(), (clamps.Ablate((1, 3)),)]
    one = metrics.measure(networks[0], batch, lists)["loss"]
    assert one[0] != one[1]
    two = metrics.measure(networks, batch, [lists[1]])["loss"]
    torch.testing.assert_close(two[0], one[1])
    with pytest.raises(ValueError, match="2 networks and 3 lists"):
        metrics.measure(networks, batch, [(), (), ()])
    with pytest.raises(ValueError, match="no head 3.0"):
        metrics.measure(networks[0], batch, [(clamps.Ablate((3, 0)),)])


def test_the_phase_change_is_of_one_curve_in_order():
    rows = [(200, "train", "loss", 0.1), (100, "train", "loss", 0.9), (50, "test_classes", "loss", 0.0),
            (60, "train", "accuracy", 0.1)]
    curve = pd.DataFrame(rows, columns=["sequences", "eval_set", "metric", "value"])
    assert metrics.phase_change(curve, 0.5) == pytest.approx(150)
    assert metrics.phase_change(curve, 0.5, eval_set="test_classes") == 50
    assert metrics.phase_change(curve, 0.5, metric="accuracy") == 60


def test_the_plateau_and_the_fall_after_it():
    losses = pd.Series([2.0, 0.9, 0.8, 0.7, 0.7, 0.4, 0.1, 0.0], index=[0, 25, 40, 50, 75, 100, 125, 200])
    assert metrics.plateau(losses, 100) == pytest.approx((0.8, 0.2, 0.6))
    assert all(math.isnan(value) for value in metrics.plateau(losses, math.nan))


def test_the_authors_curve_meets_the_claims_about_its_shape():
    """Otherwise a claim would ask for more than the paper shows."""
    curves = pd.read_csv(shared("reference/curves.csv"))
    curve = curves[(curves["run"] == "main") & (curves["eval_set"] == "train")]
    change = metrics.phase_change(curve.melt(["run", "sequences", "eval_set"], var_name="metric"))
    level, waits, falls = metrics.plateau(curve.set_index("sequences")["loss"], change)
    found = {"plateau": level, "drop": falls / 2 / waits, "final-loss": curve["loss"].iloc[-1]}
    assert {key: claims.judge(key, value).word for key, value in found.items()} == dict.fromkeys(found, "holds"), found


def test_others_are_all_heads_but_those():
    assert experiments.others(1, 3, 4) == ((1, 0), (1, 1), (1, 2))
    assert experiments.others(0, [0, 2], 4) == ((0, 1), (0, 3)) and experiments.others(1, np.int64(0), 2) == ((1, 1),)
    with pytest.raises(ValueError, match="keep=9"):
        experiments.others(1, 9, 8)


def test_a_finished_network_is_measured_at_the_end_of_its_windows(networks, batch):
    window = clamps.During(clamps.Ablate((1, 3)), 0, 100)
    found = metrics.measure(networks[0], batch, [(window,), (), (clamps.Ablate((1, 3)),)])["loss"]
    assert found[0] == found[1] != found[2]


def test_networks_that_are_measured_together_are_of_one_architecture(networks, batch):
    eight = networks[0]
    other = replace(eight, config=replace(eight.config, n_heads=eight.config.n_heads // 2))
    with pytest.raises(ValueError, match="measure each architecture by itself"):
        metrics.measure([eight] * 8 + [other], batch)
    wide = replace(eight, config=replace(eight.config, init_scale=2.0))  # drawn otherwise, and the same architecture
    one, two = metrics.measure([eight, wide], batch)["loss"].tolist()
    assert one == two and run_with_clamps(eight, batch, [clamps.Graft(wide)])["logits", None].isfinite().all()
    for grafted in ([clamps.Graft(other)], [clamps.During(clamps.Graft(other), 0)]):
        with pytest.raises(ValueError, match="the donor's architecture"):
            metrics.measure(eight, batch, [grafted])
        with pytest.raises(ValueError, match="the donor's architecture"):
            run_with_clamps(eight, batch, grafted)
    with pytest.raises(ValueError, match="nothing to measure"):
        metrics.measure([], batch, [])


def test_who_is_right_where_the_first_is_wrong(networks, batch):
    lists = [(clamps.Ablate((1, h)),) for h in range(3)]
    n, shares, by_label = experiments.right_instead(networks[0], batch, lists)
    first, *others = metrics.correct(networks[0], batch, lists)
    assert n == (~first).sum() > 0
    assert shares == pytest.approx([(each[~first]).double().mean().item() for each in others])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "correct", lambda weights, batch, clamps: torch.ones(len(clamps), 8, dtype=torch.bool))
        assert experiments.right_instead(networks[0], batch, lists) == (0, [], [])  # the first makes no mistake


def test_what_only_labels_would_give():
    """By hand: where the first is right, the other gets half of label 0 right, and all of label 1; the first misses 0, 0 and 1."""
    right = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "correct", lambda weights, batch, clamps: right)
        for targets, expected in (([0, 0, 0, 0, 1, 1], (0.5 + 0.5 + 1) / 3), ([0, 0, 0, 0, 0, 1], math.nan)):  # 1 is never known
            found = experiments.right_instead(None, SimpleNamespace(targets=torch.tensor([targets])), [])
            assert found[:2] == (3, [pytest.approx(2 / 3)]) and found[2] == pytest.approx([expected], nan_ok=True)


def test_half_way_up_is_interpolated():
    heads = pd.DataFrame([(at, layer, 3, at / 100 * (layer + 1)) for at in (0, 10, 20) for layer in (0, 1)],
                         columns=["sequences", "layer", "head", "strength"])
    assert experiments.half_way(heads, {3: 0.3}) == pytest.approx([7.5])  # 0.15, at 0.02 per sequence
    assert math.isnan(experiments.half_way(heads, {3: 2.0})[0])


def test_rank_correlations_are_spearmans_one_per_run():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"run": np.repeat([7, 5], 8), "strength": rng.random(16), "time": rng.random(16)})
    by_run = {run: each for run, each in table.groupby("run")}
    expected = [stats.spearmanr(by_run[run]["strength"], by_run[run]["time"]).statistic for run in (7, 5)]
    assert experiments.rank_correlations(table, "time") == pytest.approx(expected)
    table.loc[table["time"].idxmax(), "time"] = math.nan  # a head that never learns is the slowest
    assert experiments.rank_correlations(table, "time") == pytest.approx([
        stats.spearmanr(each["strength"], each["time"].fillna(9)).statistic for each in (table[:8], table[8:])])


def test_random_correlations_are_those_of_random_orders():
    assert set(experiments.random_correlations(3, (200,)).round(9)) == {1, 0.5, -0.5, -1}
    every = np.array([stats.spearmanr(range(5), order).statistic for order in itertools.permutations(range(5))])
    found = experiments.random_correlations(5, (10_000, 2))
    assert found.shape == (10_000, 2) and abs(np.corrcoef(found.T)[0, 1]) < 0.05
    for limit in (0.2, 0.5, 0.9):
        assert (abs(found) <= limit + 1e-9).mean() == pytest.approx((abs(every) <= limit + 1e-9).mean(), abs=0.02)


def test_gradient_norms_are_those_of_the_heads_own_weights(networks, batch):
    network, head = networks[0], 1
    found = metrics.gradients(network, batch)
    qkv = found["layers.1.attn.qkv.weight"]
    d = network.config.d_head
    norms = experiments.gradient_norms(network, batch, head)
    for i, name in enumerate(("its queries", "its keys", "its values")):
        rows = qkv[i * network.config.d_model + head * d:][:d]
        assert norms[name] == pytest.approx(rows.norm().item()) and norms[name] > 0
    assert norms["its output"] == pytest.approx(found["layers.1.attn.proj.weight"][:, head * d:(head + 1) * d].norm().item())
    assert norms["the layer before"] == pytest.approx(found["layers.0.attn.qkv.weight"].norm().item())


def test_the_yardstick_of_chapter_1():
    """The nearest exemplar by cosine answers, however long the features are; a query may repeat an exemplar of its context."""
    bank = torch.tensor([[[1.0, 0.0], [0.0, 9.0], [0.6, 0.5], [0.0, 1.0]]])
    ids = torch.tensor([[[0, 1, 2], [1, 0, 2], [0, 1, 1], [3, 0, 3]]])
    labels = torch.tensor([[[4, 2, 4], [4, 2, 4], [4, 2, 2], [4, 2, 2]]])
    batch = Batch(bank, ids, labels)
    assert experiments.nearest_is_right(batch).tolist() == [[True, False, True, False]]
    assert experiments.repeats(batch).tolist() == [[False, False, True, True]]
