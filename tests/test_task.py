"""Sequences: what they may contain, what is held out, and how many there are."""

import math

import numpy as np
import pytest
import torch

from ihbook import task
from ihbook.chapters import experiments
from ihbook.config import RunConfig, TaskConfig
from ihbook.task import Bank

TASK = TaskConfig(n_classes=20, n_test_classes=10)


@pytest.fixture(scope="module")
def splits(small_bank):
    return task.split(small_bank, TASK)


def draw(bank, n=4000, **changes):
    chosen = TaskConfig(**{"n_classes": 20, "n_test_classes": 10, **changes})
    return task.sample(task.split(bank, chosen), n, task.seeded("test"))


def test_a_sequence_asks_for_a_class_that_it_shows(splits):
    batch = task.sample(splits, 4000, task.seeded("a"))
    ids, labels = batch.ids[0], batch.labels[0]
    assert (ids[:, 0] != ids[:, 1]).all() and (labels[:, 0] != labels[:, 1]).all()
    which = (ids[:, :2] == ids[:, 2:]).long().argmax(1, keepdim=True)
    assert (ids.gather(1, which)[:, 0] == ids[:, 2]).all() and (labels.gather(1, which)[:, 0] == labels[:, 2]).all()
    assert abs(which.float().mean() - 0.5) < 0.03  # either position, equally likely
    assert torch.bincount(ids[:, 0], minlength=20).min() > 130  # of 200 expected: every class, equally likely
    sets = {tuple(s) for s in splits.train_sets.tolist()}
    pairs = labels[:, :2].sort(1).values
    assert {tuple(p) for p in pairs.tolist()} == sets
    flipped = (labels[:, 0] > labels[:, 1]).float().mean()
    assert abs(flipped - 0.5) < 0.03  # the order of the two labels is random


@pytest.mark.parametrize("n_labels, train, held", [(5, 8, 2), (10, 36, 9), (15, 84, 21)])
def test_published_label_splits(n_labels, train, held):
    for seed in range(20):
        sets = task.label_sets(TaskConfig(n_labels=n_labels, label_seed=seed))
        assert [len(s) for s in sets] == [train, held]
        assert sets[0].unique().tolist() == list(range(n_labels))
        assert not {tuple(s) for s in sets[0].tolist()} & {tuple(s) for s in sets[1].tolist()}


def test_every_label_trains_however_few_sets_do():
    for seed in range(40):  # 3 of 6 pairs often leave a label out at the first draw
        train, test = task.label_sets(TaskConfig(n_labels=4, held_out=0.5, label_seed=seed))
        assert len(train) == len(test) == 3 and train.unique().tolist() == [0, 1, 2, 3]
    assert len(task.label_sets(TaskConfig(n_labels=8))[1]) == 6  # a fifth of 28, rounded


def test_label_sets_can_be_given():
    train, test = task.label_sets(TaskConfig(n_labels=3, label_sets=((1, 0), (1, 2))))
    assert train.tolist() == [[0, 1], [1, 2]] and test.tolist() == [[0, 2]]
    with pytest.raises(ValueError, match=r"label_sets has no set with the labels \[2\] of n_labels=3"):
        task.label_sets(TaskConfig(n_labels=3, label_sets=((0, 1),)))
    with pytest.raises(ValueError, match="whole numbers"):
        TaskConfig(n_labels=3, label_sets=((0, 1.7), (1, 2)))


def test_splits_keep_classes_and_exemplars_apart(splits, small_bank):
    sets = task.evaluation_sets(splits, 0)
    assert list(sets) == [each.name for each in task.EVAL_SETS] and all(len(s) == 1000 for s in sets.values())
    bank = small_bank.features

    def members(name):
        return {tuple(x.tolist()) for x in sets[name].bank[0]}

    def rows(classes, exemplars):
        return {tuple(x.tolist()) for x in bank[classes][:, exemplars].flatten(0, 1)}

    assert members("train") == members("test_relabel") == rows(slice(0, 20), slice(0, 1))
    assert members("test_exemplars") == rows(slice(0, 20), slice(1, 3))
    assert members("test_classes") == rows(slice(30, 40), slice(0, 1))
    held = {tuple(s) for s in splits.test_sets.tolist()}
    assert {tuple(p) for p in sets["test_relabel"].labels[0, :, :2].sort(1).values.tolist()} == held
    # Each class has two held-out exemplars, so the class is half of the id.
    ids = sets["test_exemplars"].ids[0] // 2
    assert ((ids[:, :2] == ids[:, 2:]).sum(1) == 1).all()


def test_evaluation_sets_and_training_chunks_are_pure_functions_of_their_seeds(splits):
    for make in (lambda s: task.training_batch(splits, s, 3, 64), lambda s: task.evaluation_sets(splits, s)["train"]):
        a, b, other = make(1), make(1), make(2)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) and not torch.equal(a.ids, other.ids)
    assert not torch.equal(task.training_batch(splits, 1, 0, 64).ids, task.training_batch(splits, 1, 1, 64).ids)


def test_every_training_sequence_once():
    bank = Bank(torch.randn(150, 5, 8), None, {})
    splits = task.split(bank, TaskConfig())
    batch = task.every_training_sequence(splits)
    assert len(batch) == 78_400 == 50 * 49 * 16 * 2
    rows = torch.cat([batch.ids[0], batch.labels[0]], 1)
    assert len(rows.unique(dim=0)) == 78_400
    sampled = task.sample(splits, 2000, task.seeded("b"))
    known = {tuple(r) for r in rows.tolist()}
    assert {tuple(r) for r in torch.cat([sampled.ids[0], sampled.labels[0]], 1).tolist()} <= known
    with pytest.raises(ValueError, match="n_pairs=4"):
        task.every_training_sequence(task.split(bank, TaskConfig(n_pairs=4)))
    with pytest.raises(ValueError, match="noise=0.1"):
        task.every_training_sequence(task.split(bank, TaskConfig(noise=0.1)))


def test_more_pairs_and_bursts(small_bank):
    batch = draw(small_bank, n_pairs=4, burstiness=2)
    counts = [sorted(torch.bincount(row).tolist())[-2:] for row in batch.ids[0, :200, :4]]
    assert all(c == [2, 2] for c in counts)
    assert (batch.in_context.sum(2) == 2).all()
    four = draw(small_bank, n_pairs=4)
    assert all(len(set(row)) == 4 for row in four.ids[0, :200, :4].tolist())
    assert (four.in_context.sum(2) == 1).all()


def test_zipf_makes_the_first_classes_common(small_bank):
    for zipf in (0.5, 1.0, 2.0):
        ids = draw(small_bank, zipf=zipf).ids[0]
        p = torch.arange(1, 21) ** -zipf
        p = p / p.sum()
        second = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0).sum(0)  # one after another, without replacement
        for place in (0, 1):  # pairs come in random order
            counts = torch.bincount(ids[:, place], minlength=20).float()
            torch.testing.assert_close(counts / counts.sum(), (p + second) / 2, atol=0.03, rtol=0)
        assert (ids[:, 0] != ids[:, 1]).all()


def test_noise_is_added_to_each_token_afresh(small_bank):
    noisy, plain = draw(small_bank, noise=0.5), draw(small_bank)
    difference = noisy.exemplars - noisy.bank[0][noisy.ids]
    assert difference.std().item() == pytest.approx(0.5, rel=0.02) and plain.noise is None
    assert not torch.equal(difference[0, 0, 0], difference[0, 0, 2])


@pytest.mark.parametrize("changes, words", [
    ({"n_classes": 31}, "n_classes=31 and n_test_classes=10 need 41 classes"),
    ({"n_labels": 1}, "n_labels=1"),
    ({"n_labels": True}, "n_labels=True"),
    ({"n_labels": 5.0}, "n_labels=5.0"),
    ({"n_labels": 3, "held_out": 0.9}, "too few to show all of n_labels=3"),
    ({"n_labels": 2, "held_out": 0.5, "label_sets": ((0, 2),)}, "label_sets has (0, 2)"), ({"label_sets": ()}, "label_sets=()"),
    ({"n_labels": np.int64(5)}, "write 5"),
    ({"held_out": 1.0}, "held_out=1.0"),
    ({"held_out": math.nan}, "held_out=nan"),
    ({"n_pairs": 3, "burstiness": 2}, "burstiness=2"),
    ({"n_pairs": 8}, "n_labels=5 is fewer than the 8"),
    ({"n_labels": 40, "n_pairs": 20, "n_classes": 20, "n_test_classes": 20}, "label sets, more than"),
    ({"n_classes": 1}, "n_classes=1 is fewer"),
    ({"zipf": -1}, "zipf=-1"),
])
def test_bad_tasks_are_named(small_bank, changes, words):
    with pytest.raises(ValueError) as error:
        draw(small_bank, **changes)
    assert words in str(error.value)


def test_from_exemplars_checks_shapes():
    with pytest.raises(ValueError, match="must be"):
        task.from_exemplars(torch.zeros(4, 3, 2), torch.zeros(4, 2))


def test_concatenated_runs_keep_their_own_banks(small_bank):
    a = task.split(small_bank, TASK)
    b = task.split(small_bank, TaskConfig(n_classes=10, n_test_classes=10))
    batches = [task.training_batch(s, 0, 0, 50) for s in (a, b)]
    both = task.concatenate(batches)
    for i, batch in enumerate(batches):
        assert torch.equal(both.exemplars[i], batch.exemplars[0])


def test_bursts_and_queries_fall_anywhere(small_bank):
    bursty = draw(small_bank, n_pairs=4, burstiness=2).ids[0]
    first_twice = (bursty[:, 0] == bursty[:, 1]).float().mean()
    assert abs(first_twice - 1 / 3) < 0.04  # one of the three that may follow the first is its copy
    four = draw(small_bank, n_pairs=4).ids[0]
    place = (four[:, :4] == four[:, 4:]).float().mean(0)
    assert (place - 0.25).abs().max() < 0.04


def test_noise_stays_with_its_sequences(small_bank):
    chosen = TaskConfig(n_classes=20, n_test_classes=10, noise=0.5)
    splits = task.split(small_bank, chosen)
    batch = task.training_batch(splits, 0, 0, 10)
    assert batch.noise is not None and task.evaluation_sets(splits, 0)["train"].noise is not None
    assert torch.equal(torch.cat([b.exemplars for b in batch.split(3)], 1), batch.exemplars)
    assert torch.equal(batch.to("cpu").exemplars, batch.exemplars)
    assert torch.equal(batch.expand(2).exemplars[1], batch.exemplars[0])
    other = task.training_batch(splits, 1, 0, 10)
    assert torch.equal(task.concatenate([batch, other]).exemplars, torch.cat([batch.exemplars, other.exemplars]))


def test_evaluation_sets_are_streams_of_their_own(splits):
    sets = task.evaluation_sets(splits, 0)
    for name in ("test_relabel", "test_classes"):
        assert not torch.equal(sets[name].ids, sets["train"].ids)
    assert not torch.equal(task.training_batch(splits, 0, 0, 1000).ids, sets["train"].ids)
    trained = {tuple(s) for s in splits.train_sets.tolist()}
    for name in ("test_exemplars", "test_classes", "train"):
        assert {tuple(p) for p in sets[name].labels[0, :, :2].sort(1).values.tolist()} == trained
    ids = sets["test_exemplars"].ids[0]
    assert 0.3 < (ids[:, :2] == ids[:, 2:]).any(1).float().mean() < 0.7  # the query is drawn afresh, from two


def test_sets_that_would_be_empty_are_left_out(small_bank):
    single = Bank(small_bank.features[:, :1], None, {})
    sets = task.evaluation_sets(task.split(single, TaskConfig(n_classes=20, n_test_classes=10, n_labels=2)), 0)
    assert list(sets) == ["train", "test_classes"]


@pytest.mark.parametrize("n_common, n_ways, expected", [(5, 2, (4 / 15, 1 / 15)), (5, 3, (6 / 14, 12 / 10 / 14)), (2, 2, (1 / 3, 1 / 3))])
def test_common_labels_are_seen_more_often_than_rare_ones(small_bank, n_common, n_ways, expected):
    groups = experiments.common_and_rare(n_common, n_ways)
    run = RunConfig(task=TaskConfig(n_classes=20, n_test_classes=10, n_labels=3 * n_common, n_pairs=n_ways))
    splits = task.split(small_bank, experiments.with_groups(run, groups).task)
    labels = task.sample(splits, 20_000, task.seeded("a")).labels[0, :, :-1]
    seen = [(labels == label).any(1).double().mean().item() for label in range(3 * n_common)]
    shares = [group.share(len(splits.train_sets)) for group in groups]
    assert shares == pytest.approx(expected)
    assert np.mean(seen[:n_common]) == pytest.approx(shares[0], abs=0.01)
    assert np.mean(seen[n_common:]) == pytest.approx(shares[1], abs=0.01) and min(seen) > 0
    sets = task.evaluation_sets(splits, 0, 500, groups)
    assert sets["common"].labels.max() < n_common <= sets["rare"].labels.min()
