"""Help for a while: where windows lie, what is measured when they end, and the toy model under the same windows."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ihbook import model, task, toy
from ihbook.banks import load_bank
from ihbook.chapters import experiments, pictures, windows
from ihbook.chapters.experiments import Settings, single_head, six_ways
from ihbook.clamps import Ablate, BlockPreviousToken, During, Induction, LabelAttentionOnly
from ihbook.engine.results import Result

SETTINGS = Settings("quick")
RUN = SETTINGS.run(6e5)
WEIGHTS = model.initial_weights(RUN.model, 512, RUN.task.n_labels, 0)


def test_a_window_begins_and_ends_with_a_step():
    step = RUN.batch_size
    assert windows.snap(RUN, 0, 2.4 * step) == (0, 2 * step) and windows.snap(RUN, 5.6 * step, 1) == (6 * step, 7 * step)
    assert windows.need(1000, 100) == 100 and windows.need(1000, 600) == 250 and windows.need(1000, math.nan) == 250
    assert math.isnan(windows.need(math.nan, 100))


def test_a_grid_has_a_run_per_clamp_and_window():
    ways = {name: clamps for name, clamps in six_ways(2, 3).items() if clamps}
    never, always = 12_800.0, dict.fromkeys(ways, 1_280.0)
    found = windows.grid(single_head(RUN, 2), ways, never, always, (0, 0.5), (0.2, 2))
    assert len(found) == 5 * 4 and len({run.digest for run, _ in found.values()}) == 20
    run, window = found["match", 0.5, 2]
    assert window == (6_400, 6_400 + 2_560) and run.clamps[1:] == (During(Induction((1, 2)), *window),)
    assert len(found["layer 1 and copy", 0, 0.2][0].clamps) == 3  # both end together
    assert windows.grid(RUN, ways, math.nan, always, (0,), (1,)) == {}


@pytest.mark.parametrize("starts, lengths, words", [((2,), (1,), "starts"), ((0,), (0,), "lengths"), ((), (1,), "starts"), (0, (1,), "starts"),
                                                    ((0,), ("1",), "lengths")])
def test_bad_windows_are_named(starts, lengths, words):
    with pytest.raises(ValueError, match=words):
        windows.check(starts, lengths)


def a_result(losses, heads=None):
    table = pd.DataFrame({"sequences": list(losses), "eval_set": "train", "metric": "loss", "value": list(losses.values())})
    return Result(run=RUN, weights=None, metrics=table, heads=heads, checkpoints={})


def test_a_low_loss_counts_only_without_help():
    """A loss that was low under the clamp is no phase change; one that stays low when it ends is one at once."""
    helped = a_result({0: 1.6, 640: 0.1, 1280: 0.8, 1920: 0.7, 2560: 0.1})
    assert 1920 < windows.time_without_help(helped, 1280) < 2560
    assert windows.time_without_help(a_result({0: 1.6, 640: 0.1, 1280: 0.2}), 1280) == 1280
    assert math.isnan(windows.time_without_help(helped, 3200))


def test_a_run_ends_when_it_is_clear_whether_it_learns():
    usual = replace(RUN, n_sequences=64_000)
    assert windows.long_enough(usual, 20_001.5, 0).n_sequences == 25_002  # 1.25 times, and no less
    assert windows.long_enough(usual, 20_000, 30_016).n_sequences == 35_016  # help that lasts longer than the wait
    assert windows.long_enough(usual, 60_000, 0) == windows.long_enough(usual, math.nan, 0) == usual
    assert windows.long_enough(usual, 20_000, 0, "layer 1") == usual != windows.long_enough(usual, 20_000, 0, "copy")


def test_how_sharp_a_drop_is():
    """The loss falls by 0.1 in the second quarter of the time to the change, and by 0.8 from 3/4 to 5/4 of it: 4 times as fast."""
    drop = a_result({0: 1.6, 250: 1.3, 500: 1.2, 750: 0.9, 1000: 0.4 * math.log(2), 1250: 0.1})
    assert experiments.sharpness(drop) == pytest.approx(4)
    assert math.isnan(experiments.sharpness(a_result({0: 1.6, 1000: 1.0})))


def test_the_loss_when_help_ends_is_the_first_without_it():
    helped = a_result({0: 1.6, 640: 0.1, 1280: 0.8})
    assert experiments.loss_from(helped, 650) == 0.8 and experiments.loss_from(helped, 640) == 0.1
    assert math.isnan(experiments.loss_from(helped, 1281)) and experiments.loss_at(helped, 960) == pytest.approx(0.45)


def test_strengths_are_those_before_the_lesion():
    heads = pd.DataFrame([(n, layer, h, n * (h + 1)) for n in (0, 640, 1280) for layer in (0, 1) for h in (0, 1)],
                         columns=["sequences", "layer", "head", "strength"])
    assert experiments.strengths(a_result({0: 1.0}, heads), 1280).to_dict() == {0: 640, 1: 1280}
    assert experiments.strengths(a_result({0: 1.0}, heads), math.inf).to_dict() == {0: 1280, 1: 2560}


def test_a_lesion_is_a_window_after_the_phase_change():
    found, (begin, end) = windows.lesions(SETTINGS, 4, 1)
    assert begin < end < SETTINGS.n_sequences and begin % RUN.batch_size == end % RUN.batch_size == 0
    assert found["no previous token"].clamps == (During(BlockPreviousToken([(0, h) for h in range(8)]), begin, end),)
    assert {run.init_seed for run in found.values()} == {SETTINGS.seed + 1}


def test_the_toy_model_has_the_same_windows():
    """One draw and window are followed by hand."""
    found = windows.of_toy([1, 4], (0, 0.5), (0.2, 2), n_iterations=600)
    assert set(found["clamp"]) == {*windows.GIVEN, *windows.ALIKE} and len(found) == 2 * 2 * 2 * 4
    one, other = (found[found["clamp"] == name]["ratio"].tolist() for name in ("layer 1", "copy"))
    np.testing.assert_array_equal(one, other)
    losses = {name: toy.descend([1], name, n_iterations=600)["relative_loss"] for name in ((), ("a", "b"))}
    never, always = (windows.metrics.crossing(each, windows.TOY_LEVEL) for each in losses.values())
    until = max(1, round(2 * always))
    by_hand = toy.descend([1], ("a", "b"), until=until, n_iterations=600)["relative_loss"]
    time = windows.metrics.crossing(by_hand[until:], windows.TOY_LEVEL)
    row = found[(found["clamp"] == "match") & (found["start"] == 0) & (found["length"] == 2) & (found["run"] == 1)]
    np.testing.assert_allclose(row[["ratio", "loss_after"]].iloc[0].tolist(), [time / never, by_hand[until]], rtol=1e-9)


def test_a_run_that_never_gets_there_is_the_slowest():
    table = pd.DataFrame({"clamp": "match", "start": 0, "length": [1, 1, 1, 2], "ratio": [0.5, math.inf, math.inf, 0.7]})
    found = windows.medians(table)["match"]
    assert math.isinf(found.loc[1, 0]) and found.loc[2, 0] == 0.7
    too_soon = table.assign(ratio=table["ratio"].replace(math.inf, math.nan))  # a run that ended too soon to tell
    assert windows.medians(too_soon)["match"].loc[1, 0] == 0.5
    picture = pictures.ratio_maps({"network": {"match": found}, "toy model": {"match": found, "copy": found}}, "start", "length")
    assert "network, match: inf at start 0 and length 1, 0.70 at start 0 and length 2" in picture.alt and "toy model, copy" in picture.alt


def test_help_that_never_ends_is_no_window():
    with pytest.raises(ValueError, match="no window"):
        windows.helped(replace(RUN, clamps=()), [Induction((1, 0))], (640, 640))


def test_where_a_head_looks_adds_up():
    """A head whose scores are all alike looks at every token alike; the right exemplar is one of two."""
    splits = task.split(load_bank(RUN.bank), RUN.task)
    batch = task.sample(splits, 60, task.seeded("looks", 0))
    weights = model.initial_weights(RUN.model, splits.features.shape[1], RUN.task.n_labels, 3)
    found = windows.looks(weights, 2, batch)
    assert sum(found.values()) == pytest.approx(1) and min(found.values()) > 0.05
    blind = {name: tensor * (0 if name == "layers.1.attn.qkv.weight" else 1) for name, tensor in weights.tensors.items()}
    found = windows.looks(replace(weights, tensors=blind), 2, batch)
    assert found == pytest.approx({"labels": 0.4, "right exemplar": 0.2, "other exemplars": 0.2, "itself": 0.2})


def test_the_controls_differ_from_the_help_in_one_thing():
    """Help that ends at 1,280 of 9,600 sequences; its results are made up, and the runs that are asked for are looked at."""
    asked = {}

    def fetched(runs, device):
        asked.update(runs)
        return {key: falling(run, 12_800) for key, run in runs.items()}

    def falling(run, at):
        losses = {n: 1.0 if n < at else 0.1 for n in range(0, run.n_sequences + 1, 640)}
        return replace(a_result(losses), run=run, checkpoints={640: WEIGHTS, 1280: WEIGHTS})

    alone = single_head(RUN, 2)
    ways = six_ways(2, 3)
    window, names = (0, 1_280), ("layer 1", windows.SLOWEST, "copy")
    help = windows.Help({(0, "nothing"): falling(alone, 9_600)}, {}, {(0, name, 0, 2): window for name in names},
                        {(0, name, 0, 2): falling(windows.helped(alone, ways[name], window), 12_800) for name in names}, pd.DataFrame())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "fetch_each", fetched)
        found = windows.controls(SETTINGS, [2], help, 2)
    assert len(asked) == 3 + 7 and {key[0] for key in found} == {"layer 1", windows.SLOWEST}  # and no copy
    as_it_is, anew, looking = windows.CONTROLS
    was_helped, was_off, never = windows.HEADS
    free = {head: asked[windows.SLOWEST, head, looking, 0] for head in windows.HEADS}
    assert {run.clamps[-1] for run in free.values()} == {During(LabelAttentionOnly((1, 2)), 1_280)}
    assert free[was_helped].clamps[1:-1] == tuple(During(clamp, *window) for clamp in ways[windows.SLOWEST])
    assert free[was_off].clamps[1:-1] == (During(Ablate((1, 2)), *window),) and len(free[never].clamps) == 2
    restarted = asked[windows.SLOWEST, was_helped, anew, 0]
    assert {run.n_sequences for run in free.values()} == {math.ceil(1.25 * help.times["nothing"].iloc[0])}  # and no longer
    assert restarted.clamps == alone.clamps and restarted.data_seed != alone.data_seed and restarted.initial is WEIGHTS
    [late], [usual] = (windows.of_control(found, windows.SLOWEST, was_helped, control) for control in (anew, as_it_is))
    assert late - usual == pytest.approx(1_280 / help.times["nothing"].iloc[0])  # the help's own time is counted

    splits = task.split(load_bank(RUN.bank), RUN.task)
    looked = windows.looks_at_release([2], help, found, 2, task.sample(splits, 20, task.seeded("looks", 0)))
    assert looked["clamp"].tolist() == ["layer 1", windows.SLOWEST, was_off, never, "copy"]


def test_what_the_controls_say_is_put_into_words():
    looked = pd.DataFrame([("never helped", 0.6), ("off for as long", 0.4), (windows.SLOWEST, 0.1)], columns=["clamp", "labels"])
    as_it_is, anew, looking = windows.CONTROLS
    was_helped, was_off, never = windows.HEADS

    def said(late=1.6, free=0.75, off=1.2):
        ratios = {(was_helped, as_it_is): late, (was_helped, anew): 1.5, (was_helped, looking): free, (was_off, as_it_is): off,
                  (was_off, looking): 0.9, (never, looking): 0.7}
        return windows.harm_in_words(looked, {(windows.SLOWEST, *key, 0): (None, ratio) for key, ratio in ratios.items()})

    words = " ".join(said())
    assert "10% of its attention on labels" in words and "long 40%" in words and "So most of the harm" in words and "does not undo" in words
    assert "0.75 of the time without help in place of 1.60" in words and "gives 0.70" in words and "at 1.20, and at 0.90" in words
    assert "less than half" in " ".join(said(free=1.5)) and "costs more" not in words and "more than such help" in " ".join(said(off=1.9))
    assert "about as much as such help" in " ".join(said(off=1.65))
    assert len(said(late=0.9, off=1.0)) == 1  # no harm, nothing to explain
    assert len(said(free=math.inf, off=math.inf)) == len(said(late=math.inf)) == 1  # a time that is not known is not compared
    assert windows.harm_in_words(looked, {}) == windows.harm_in_words(looked[:0], {(): (None, 1.0)}) == []
