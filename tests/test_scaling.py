"""Longer contexts and deeper networks: their settings, and what is measured of a run."""

import math

import pandas as pd
import pytest

from ihbook import task
from ihbook.banks import load_bank
from ihbook.chapters import scaling
from ihbook.chapters.experiments import PROFILES, Settings
from ihbook.engine.results import Result
from ihbook.model import initial_weights

PAPER = Settings("paper")


def test_a_variant_changes_one_property_and_the_length_that_it_needs():
    two, four, deep = (scaling.variant(PAPER, scaling.ALONG[name]) for name in ("two pairs", "four pairs", "three layers"))
    assert (two.n_labels, two.n_seeds, two.run().lr) == (10, 3, PROFILES["quick"].lr)
    assert (two.n_sequences, four.n_sequences, deep.n_sequences) == (64_000, 192_000, 64_000)
    assert (four.n_pairs, four.n_layers, deep.n_pairs, deep.n_layers) == (4, 2, 2, 3)
    assert scaling.variant(Settings("paper", n_sequences=100_000), {}).n_sequences == 6_400
    usual, long = (scaling.run_of(scaling.variant(PAPER, scaling.ALONG[name]), 1) for name in ("two pairs", "eight pairs"))
    assert usual.eval_every == usual.heads_every == 640 and usual.init_seed == PAPER.seed + 1
    assert long.eval_every == long.heads_every and 0.99 * scaling.MOST < long.n_sequences / long.eval_every <= scaling.MOST
    for changed in scaling.ALONG.values():
        task.split(load_bank(PAPER.run().bank), scaling.variant(PAPER, changed).task)  # is possible
    assert len(scaling.CROSSED) == 19 and scaling.variant(PAPER, scaling.CROSSED["4 pairs, 2 layers, 20 labels"]).n_labels == 20
    assert scaling.CROSSED["8 pairs, 3 layers, MLPs"] == {"n_pairs": 8, "n_layers": 3, "mlp_ratio": 4.0}


def test_the_recorded_table_is_shown_by_pairs_and_depth():
    rows = [(f"{k} pairs, {d} layers", seed, math.nan if k == 8 else 100 * (2 * k + 1) ** 2 + seed, 1.1, 50.0)
            for k in (2, 4, 8) for d in (2, 3) for seed in (0, 1)]
    table = pd.DataFrame(rows, columns=["network", "seed", "time", "plateau", "matched"])
    shown = scaling.crossed(table)
    assert list(shown) == ["2 layers", "3 layers"] and list(shown.index) == ["2 pairs", "4 pairs", "8 pairs"]
    assert shown.loc["2 pairs", "2 layers"] == "2,500 / 50" and shown.loc["8 pairs", "3 layers"] == "never / 50"
    said = " ".join(scaling.said_of_crossed(table))
    assert "With 8 pairs, 0% of" in said and "power of 2.0 to 2.0" in said and "0.6% to 2.0% of the wait" in said


def a_result(losses, n_pairs=4):
    run = scaling.variant(PAPER, {"n_pairs": n_pairs}).run()
    table = pd.DataFrame({"sequences": list(losses), "eval_set": "train", "metric": "loss",
                          "value": [loss * math.log(n_pairs) for loss in losses.values()]})
    return Result(run=run, weights=None, metrics=table, heads=None, checkpoints={})


def test_the_form_of_a_drop():
    found = scaling.form(a_result({0: 2.0, 10: 1.1, 20: 1.1, 30: 1.1, 40: 1.0, 50: 0.6, 60: 0.2, 70: 0.1}))
    assert found == pytest.approx({"time": 55, "plateau": 1.1, "drop": (60 - 45) / 55})
    stairs = a_result({0: 2.0, 10: 1.0, 12: 0.79, 40: 0.79, 42: 0.5, 80: 0.5, 82: 0.1})
    assert scaling.on_stairs(stairs) > 0.9
    assert scaling.on_stairs(a_result({0: 1.0, 100: 0.0})) == pytest.approx(0.2 / 0.7, abs=0.01)  # a steady fall
    assert math.isnan(scaling.on_stairs(a_result({0: 1.0, 100: 0.0}, n_pairs=2)))  # no step lies between
    assert all(map(math.isnan, scaling.form(a_result({0: 2.0, 10: 1.0, 20: 1.0})).values()))


def test_the_exponent_of_a_power_law():
    def falls(at, n_pairs):
        return a_result({0: 1.0, 2 * at: 0.0 if at < 1e9 else 1.0}, n_pairs)  # the threshold is at 0.4, so at 1.2 times `at`

    assert scaling.power(3 * 5 ** 1.7, 3 * 9 ** 1.7, 2, 4) == pytest.approx(1.7)
    assert scaling.exponent(falls(100, 2), falls(100 * 1.8 ** 2, 4)) == pytest.approx(2)
    never = a_result({0: 1.0, 512_000: 1.0}, 8)
    assert math.isinf(scaling.exponent(falls(10_000, 2), never))  # even its whole length is more than a square
    assert math.isnan(scaling.exponent(falls(100_000, 2), never)) and math.isnan(scaling.exponent(never, falls(10, 4)))


def test_where_heads_are_is_found_in_any_depth():
    variant = scaling.variant(Settings("quick"), {"n_layers": 4})
    splits = task.split(load_bank(variant.run().bank), variant.task)
    weights = initial_weights(variant.model, splits.features.shape[1], variant.n_labels, 0)
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    qkv = tensors["layers.2.attn.qkv.weight"].unflatten(0, (3, 8, 8))
    qkv[0, 5], qkv[1, 5] = 100 * qkv[0, 5], 100 * qkv[1, 5]  # a head with a sharp pattern
    result = Result(run=variant.run(), weights=type(weights)(variant.model, tensors), metrics=None, heads=None, checkpoints={})
    found = scaling.where(result, task.evaluation_sets(splits, 0, 100)["train"])
    assert 1 <= found["induction"][0] <= 3 and 0 <= found["previous token"][0] <= 2
    every = scaling.metrics.measure(result.weights, task.evaluation_sets(splits, 0, 100)["train"])
    assert every["strength"][0, 1:].max() == every["strength"][0][found["induction"]]
    assert every["previous_token"][0, :3].max() == every["previous_token"][0][found["previous token"]]
