"""Who wins: crossed seeds, places, shares of variance, scores of initial weights, and heads that change networks."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from ihbook import model, task
from ihbook.banks import load_bank
from ihbook.chapters import winners
from ihbook.chapters.experiments import Settings
from ihbook.clamps import Ablate, During, run_with_clamps
from ihbook.config import ModelConfig

SETTINGS = Settings("quick", n_seeds=2)


def test_weights_and_orders_are_crossed():
    runs = winners.factorial(SETTINGS)
    assert {(run.init_seed, run.data_seed) for run in runs.values()} == set(runs) == {(5, 5), (5, 6), (6, 5), (6, 6)}
    assert len({run.digest for run in runs.values()}) == 4


def test_places_and_agreement():
    strengths = pd.Series([0.1, 0.9, 0.5, 0.5, 0.2])
    assert [winners.place(strengths, h) for h in range(5)] == [1.0, 0.0, 0.375, 0.375, 0.75]
    assert math.isnan(winners.place(pd.Series([1.0]), 0))
    assert winners.agreement([1, 1, 2]) == pytest.approx(1 / 3) and winners.agreement([3, 3]) == 1 and math.isnan(winners.agreement([3]))


def test_being_on_the_same_side_is_kendalls_correlation():
    times = pd.DataFrame({"a": [1, 2, 3, math.nan], "b": [10, 20, 40, 50], "c": [4, 3, 2, 1]})
    assert winners.same_side(times[["a", "b"]]) == [1.0] * 4 and winners.same_side(times[["a", "c"]]) == [0.0] * 4  # never is last
    assert winners.same_side(times) == pytest.approx([1 / 3] * 4)
    assert all(map(math.isnan, winners.same_side(times[["a"]]) + winners.same_side(times.head(1))))
    rng = np.random.default_rng(0)
    two = pd.DataFrame(rng.standard_normal((12, 2)))
    assert np.mean(winners.same_side(two)) == pytest.approx((1 + two.corr("kendall").iloc[0, 1]) / 2)
    drawn = [np.mean(winners.same_side(pd.DataFrame(rng.standard_normal((5, 4))))) for _ in range(300)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.03)


def test_shares_of_variance_are_those_that_were_put_in():
    rng = np.random.default_rng(0)
    found = [winners.variance_shares(pd.DataFrame(2 * rng.standard_normal((30, 1)) + rng.standard_normal((1, 30))
                                                  + rng.standard_normal((30, 30)))) for _ in range(40)]
    shares = pd.DataFrame(found).mean()
    assert shares.tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=0.03)
    only_rows = pd.DataFrame(np.arange(4.0)[:, None] + np.zeros((4, 3)))
    assert winners.variance_shares(only_rows) == {"weights": 1.0, "order": 0.0, "neither": 0.0}
    assert all(math.isnan(share) for share in winners.variance_shares(pd.DataFrame([[1.0, math.nan], [2.0, 3.0]])).values())
    low, high = winners.intervals(pd.DataFrame(rng.standard_normal((8, 8))), 200)["neither"]
    assert 0 <= low < high <= 1 and winners.intervals(pd.DataFrame(rng.standard_normal((5, 5)))) is None


@pytest.fixture(scope="module")
def splits():
    return task.split(load_bank(SETTINGS.run().bank), SETTINGS.run().task)


def two_networks(splits):
    runs = winners.factorial(SETTINGS)
    return [winners.initial(runs[s, s], splits.features.shape[1]) for s in (5, 6)]


def test_scores_see_what_they_are_named_for(splits):
    """A head that is built to match, and one that is built to copy, are first by these scores alone."""
    network, _ = two_networks(splits)
    batch = task.evaluation_sets(splits, 0, 100)["train"]
    tensors = {name: tensor.clone() for name, tensor in network.tensors.items()}
    qkv = tensors["layers.1.attn.qkv.weight"].unflatten(0, (3, 8, 8))
    first = tensors["layers.0.attn.qkv.weight"].unflatten(0, (3, 8, 8))[2, 0]  # what head 0.0 moves
    moved = tensors["layers.0.attn.proj.weight"].unflatten(1, (8, 8))[:, 0] @ first
    _, _, components = torch.linalg.svd(moved)
    qkv[0, 3], qkv[1, 3] = 5 * components[:8] @ moved.T @ moved, 5 * components[:8] @ moved.T
    output = tensors["layers.1.attn.proj.weight"].unflatten(1, (8, 8))
    unembed, labels = tensors["unembed.weight"], tensors["label_embed.weight"].T
    qkv[2, 6, :5], output[:, 6, :5] = labels * 100, unembed.T
    found = winners.scores(model.Weights(network.config, tensors), splits, batch, batch)
    assert found["match"].idxmax() == 3 and found["copy"].idxmax() == 6
    assert set(found) == {"strength", "composition", "match", "copy", "gradient"} and (found["gradient"] > 0).all()


def test_the_best_score_is_chosen_on_other_networks():
    places = pd.DataFrame({"a": [0.0, 0.5, 0.6], "b": [0.5, 0.2, 0.2]})
    assert winners.best_elsewhere(places) == [("b", 0.5), ("a", 0.5), ("a", 0.6)]  # each without itself
    last = pd.DataFrame({"a": [0.9, 1.0, 0.8], "b": [0.5, 0.4, 0.6]})  # a score that is always wrong tells as much as one that is right
    assert [name for name, _ in winners.best_elsewhere(last)] == ["−a"] * 3 and winners.best_elsewhere(last)[2][1] == pytest.approx(0.2)
    assert math.isnan(winners.best_elsewhere(places.head(1))[0][1])


def test_a_head_moves_with_all_that_is_its_own(splits):
    """In the other network, the head alone gives what it gave in its own, where both read the same stream."""
    mine, theirs = two_networks(splits)
    both = winners.with_head(mine, 2, theirs, 5)
    batch = task.evaluation_sets(splits, 0, 20)["train"]

    def output(weights, head):
        acts = run_with_clamps(weights, batch)
        return [acts[name, 1][..., head, :] for name in ("q", "v", "z")]

    layer0 = {name: tensor for name, tensor in mine.tensors.items() if not name.startswith("layers.1")}
    reading = model.Weights(theirs.config, {**theirs.tensors, **layer0})  # their head, on my stream
    for a, b in zip(output(both, 2), output(reading, 5), strict=True):
        torch.testing.assert_close(a, b)
    projection = both.tensors["layers.1.attn.proj.weight"].unflatten(1, (8, 8))
    torch.testing.assert_close(projection[:, 2], theirs.tensors["layers.1.attn.proj.weight"].unflatten(1, (8, 8))[:, 5])
    for a, b in zip(output(both, 3), output(mine, 3), strict=True):
        torch.testing.assert_close(a, b)
    assert winners.with_head(mine, 2, mine, 2) == mine and mine != both


def test_who_is_kept_away_may_begin_at_the_time_of_the_phase_change():
    run = SETTINGS.run(winners.LENGTH)
    away = winners.kept_away(run, 3, 10.4 * run.batch_size)
    assert away.clamps == (During(Ablate((1, 3)), 0, 10 * run.batch_size),) and away.n_sequences == round(run.n_sequences * 4 / 3)
    assert ModelConfig() == away.model
