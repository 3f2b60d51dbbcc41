"""Claims: verdicts, how they are saved, and the settings that they belong to."""

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest

from ihbook.chapters import claims, experiments
from ihbook.chapters.experiments import Settings

QUICK = Settings("quick")


@pytest.mark.parametrize("key, values, word", [
    ("redundant", [0.01, 0.02, 0.9], "undecided"), ("redundant", [0.01, 0.02, 0.03], "holds"), ("redundant", [0.04], "differs"), ("redundant", 0.03, "holds"),
    ("plateau", [0.7], "holds"), ("plateau", [0.6], "differs"), ("plateau", [0.9], "differs"),
    ("each-learns", [1.0], "holds"), ("each-learns", [7 / 8], "differs"), ("plateau", [math.nan], "not tested"),
    ("plateau", [math.nan, 0.7], "holds"), ("plateau", [], "not tested"),
    ("all-pt", [math.inf, 1.3, math.inf], "holds"), ("pt-faster", [0.5, math.inf, math.inf], "undecided"), ("pt-faster", [1.5, math.inf, math.inf], "differs"),
])
def test_verdicts(key, values, word):
    assert claims.judge(key, values).word == word


def test_what_was_measured_in_words():
    assert claims.judge("plateau", [0.7, 0.8, 0.75]).measured == "0.75 (0.7 to 0.8)"
    assert claims.judge("plateau", [math.nan, 0.7]).measured == "0.7" and claims.judge("plateau", []).measured == "–"


def test_a_run_that_never_gets_there_is_the_slowest():
    assert claims.ratios([2.0, math.nan], [4.0, 4.0]) == [0.5, math.inf]
    assert math.isnan(claims.ratios([2.0], [math.nan])[0]) and claims.judge("all-pt", [math.inf]).measured == "∞"


def test_claims_are_whole():
    for claim in claims.CLAIMS.values():
        assert claim.low <= claim.high and (math.isfinite(claim.low) or math.isfinite(claim.high))
        assert claim.sentence and bool(claim.published) != claim.new and claim.measure and claim.holds_if


def test_an_interval_misses_the_true_median_as_often_as_is_said():
    chance = np.random.default_rng(8)
    intervals = [claims.Verdict(claims.CLAIMS["plateau"], tuple(chance.standard_normal(8))).interval for _ in range(200)]
    missed = sum(least > 0 or most < 0 for least, most in intervals) / len(intervals)
    assert missed == pytest.approx(claims.misses(8), abs=0.05) and 0.05 < claims.misses(8) < 0.12
    assert 0.05 < claims.misses(16) < claims.misses(8)


def test_two_claims_with_one_key_are_refused():
    text = '[a]\nfigure = "1"\nsentence = "s"\npublished = "p"\nmeasure = "m"\nlow = 1\n'
    assert claims.load(text)["a"].low == 1
    with pytest.raises(ValueError, match="twice"):
        claims.load(text + text)
    with pytest.raises(TypeError, match="hihg"):
        claims.load(text + "hihg = 2\n")


def test_a_claim_of_ones_own_is_judged_and_tabled(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    mine = claims.Claim("mine", "–", "Mine holds", "not published", "a number", low=0.5)
    table = claims.record([claims.judge(mine, [0.7, 0.9]), claims.judge(mine, 0.1)], QUICK)
    assert table["verdict"].tolist() == ["holds", "differs"] and "at least 0.5" in table.iloc[0, -1]


def test_an_unknown_claim_is_an_error():
    with pytest.raises(KeyError, match="no claim 'x'"):
        claims.judge("x", [1.0])


def test_a_number_for_each_network_has_its_seed(tmp_path, monkeypatch):
    """Also in a chapter with more networks than were asked for; a number for all of them has none."""
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    claims.record([claims.judge("seeds-time", [0.2, 0.3]), claims.judge("seeds-change", [1.0])], QUICK, range(5, 7))
    found = {v.key: v.seeds for v in claims.gathered(QUICK)}
    assert found["seeds-time"] == (5, 6) and found["seeds-change"] == ()


def test_what_is_recorded_is_gathered_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path))
    assert {v.word for v in claims.gathered(QUICK)} == {"not tested"}
    table = claims.record([claims.judge("redundant", [0.2]), claims.judge("plateau", [0.7, math.nan])], QUICK)
    assert table["verdict"].tolist() == ["differs", "holds"]
    with monkeypatch.context() as patched:  # the device is in no name
        patched.setattr(experiments, "check_device", lambda device: None)
        found = {v.key: v for v in claims.gathered(replace(QUICK, device="cuda"))}
    assert (found["redundant"].word, found["plateau"].word) == ("differs", "holds")
    assert [k for k, v in found.items() if v.word != "not tested"] == ["plateau", "redundant"]
    for other in ({"seed": 6}, {"n_seeds": 2}):
        assert {v.word for v in claims.gathered(replace(QUICK, **other))} == {"not tested"}
    monkeypatch.setitem(claims.CLAIMS, "redundant", replace(claims.CLAIMS["redundant"], high=0.3))
    assert {v.key: v.word for v in claims.gathered(QUICK)}["redundant"] == "holds"  # by the bound of today
    monkeypatch.setitem(claims.CLAIMS, "redundant", replace(claims.CLAIMS["redundant"], measure="something else"))
    assert {v.key: v.word for v in claims.gathered(QUICK)}["redundant"] == "not tested"


def test_settings_are_named_by_what_the_bank_holds(tmp_path):
    """Two files under one name of a bank are two settings; one file under two paths is one, as text or as a path."""
    paths = [tmp_path / f"{name}.h5" for name in "abc"]
    for path, value in zip(paths, (0, 0, 1), strict=True):
        with h5py.File(path, "w") as file:
            file["resnet18/224/feat"] = np.random.default_rng(value).random((160, 5, 8), dtype=np.float32)
    settings = replace(QUICK, bank="authors", bank_path=paths[0], dim=8)
    a, b, c = (replace(settings, bank_path=path).digest for path in paths)
    assert a == b != c and replace(settings, bank_path=str(paths[0])).digest == a


@pytest.mark.parametrize("bad, words", [
    ({"profile": "fast"}, "profile='fast'"), ({"seed": -1}, "seed=-1"), ({"n_seeds": 0}, "n_seeds=0"),
    ({"n_sequences": 0}, "n_sequences=0"), ({"bank": "klingon"}, "klingon"), ({"n_labels": 1}, "n_labels=1"),
    ({"n_classes": 1600}, "n_classes=1600"), ({"device": "tpu"}, "device='tpu'"), ({"n_seeds": "3"}, "n_seeds='3'"),
])
def test_bad_settings_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        Settings(**bad)


def test_profiles(monkeypatch):
    monkeypatch.delenv("IHBOOK_PROFILE", raising=False)
    paper = Settings()
    assert (paper.profile, paper.n_sequences, paper.as_published) == ("paper", 1_000_000, True)
    assert paper.length(4e5) == 400_000 and paper.run(eval_every=1000).eval_every == 1000
    half = Settings(n_sequences=500_000)
    assert half.length(4e5) == 200_000 and half.run().eval_every == 5000 and not half.as_published
    monkeypatch.setenv("IHBOOK_PROFILE", "quick")
    assert Settings().profile == "quick" and not Settings().as_published and Settings("paper").profile == "paper"
    runs = experiments.main_runs(Settings(n_seeds=3))
    assert [(r.init_seed, r.data_seed) for r in runs] == [(5, 5), (6, 6), (7, 7)]


def test_a_single_head_is_left():
    run = experiments.single_head(QUICK.run(), 3)
    assert set(run.clamps[0].heads) == {(1, h) for h in range(8) if h != 3}
    assert set(experiments.single_head(QUICK.run(), (3, 5)).clamps[0].heads) == {(1, h) for h in (0, 1, 2, 4, 6, 7)}
