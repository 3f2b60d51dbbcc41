"""Extending: a reader's own clamps, metrics, evaluation sets and banks are trained, stored and grouped like the book's."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_train import RUN, same

from ihbook import ModelConfig, Store, TaskConfig, from_array, measure, run_with_clamps, task, train
from ihbook.chapters import claims, experiments
from ihbook.chapters.experiments import Settings
from ihbook.clamps import Ablate, Copy, During, PerfectLayer1, Preserve, PreviousToken, Shape, Steer, Write, compose
from ihbook.config import BankConfig, RunConfig
from ihbook.engine import blocks, compiled
from ihbook.engine import train as training
from ihbook.engine.prepared import Prepared, prepare
from ihbook.task import EvalSet

SHORT = replace(RUN, n_sequences=640, eval_every=320, checkpoint_every=320)


@dataclass(frozen=True)
class Margin:
    """A reader's metric: the right label's logit minus the largest of the others."""

    name: str = "margin"

    def __call__(self, acts, batch):
        right = batch.targets.unsqueeze(2)
        return acts.logits.gather(2, right).squeeze(2) - acts.logits.scatter(2, right, float("-inf")).amax(2)


@dataclass(frozen=True)
class LookAtSelf:
    """A metric of the first layer. A network under many clamps computes that layer once, so the run axis may have length 1."""

    name: str = "looks at itself"

    def __call__(self, acts, batch):
        return acts["pattern", 0][:, :, :, -1, -1].mean(2)


@dataclass(frozen=True)
class SecondMatches:
    """A reader's evaluation set: the second pair is the one that matches."""

    name: str = "second"

    def draw(self, splits, n, generator):
        batch = task.sample(splits, 4 * n, generator)
        chosen = batch.in_context[0, :, 1].nonzero()[:n, 0]
        return replace(batch, ids=batch.ids[:, chosen], labels=batch.labels[:, chosen])


def test_a_metric_of_ones_own_is_recorded_kept_and_measured(small_bank, tmp_path):
    run = replace(SHORT, metrics=[Margin()])
    [result] = Store(tmp_path).fetch([run], bank=small_bank, progress=False)
    rows = result.metrics[result.metrics["metric"] == "margin"]
    assert sorted(set(rows["eval_set"])) == sorted(each.name for each in task.EVAL_SETS) and rows["value"].notna().all()
    batch = Prepared.of(run, small_bank).eval_sets["test_classes"]
    found = measure(result.weights, batch, metrics=[Margin()])["margin"]
    recorded = rows[(rows["eval_set"] == "test_classes") & (rows["sequences"] == 640)]["value"].item()
    assert found.item() == pytest.approx(recorded, abs=1e-5)
    logits = run_with_clamps(result.weights, batch).logits[0]
    by_hand = [row[right] - max(row[i] for i in range(5) if i != right)
               for row, right in zip(logits.tolist(), batch.targets[0].tolist(), strict=True)]
    assert np.mean(by_hand) == pytest.approx(recorded, abs=1e-5)
    [plain] = train([SHORT], bank=small_bank, progress=False)  # nothing else changes
    assert plain.weights == result.weights
    pd.testing.assert_frame_equal(result.metrics[result.metrics["metric"] != "margin"].reset_index(drop=True), plain.metrics)
    [again] = Store(tmp_path).fetch([run], bank=small_bank, progress=False)
    same(again, result)


def test_a_metric_is_broadcast_over_clamps(networks, batch):
    lists = [(), (Ablate((1, 3)),), (Copy((1, 2)),)]
    found = measure(networks[0], batch, lists, metrics=[LookAtSelf()])["looks at itself"]
    expected = run_with_clamps(networks[0], batch)["pattern", 0][0, :, :, -1, -1].mean().item()
    assert found.tolist() == pytest.approx([expected] * 3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler on this machine")
def test_the_default_way_of_training(small_bank, monkeypatch, tmp_path):
    """Long runs train compiled, in processes, several clamps in one program, with a reader's metric; the plain way agrees."""
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(compiled.COMPILE_FROM, "cpu", 1)
    monkeypatch.setattr(blocks, "SHARE_FROM", 1)
    monkeypatch.setattr(blocks, "n_cores", lambda: 2)
    kinds = [(), (Copy((1, 0)),), (Steer("resid_pre", 1, [0.1] * 16),), (During(PreviousToken((0, 1)), 320, 960),)]
    runs = [replace(SHORT, metrics=[Margin()], n_sequences=(1280, 3200)[i % 2], clamps=kind, data_seed=i)
            for i, kind in enumerate(kinds)]
    planned = blocks.plan_blocks(prepare(runs, small_bank), tmp_path)
    assert len(planned) == 4 and all(block.compile and len(block.compile_with) == 5 for block in planned)
    assert blocks.n_processes(planned, "cpu") == 2 and len(blocks.shares(planned, 2)) == 2
    fast = train(runs, bank=small_bank, progress=False)
    assert len(list((tmp_path / "cache/programs").glob("*.so"))) >= 2  # a step and an evaluation: a process's warnings are not seen here
    for a, b in zip(train(runs, bank=small_bank, progress=False, compile=False), fast, strict=True):
        pd.testing.assert_frame_equal(a.metrics, b.metrics, atol=5e-3, rtol=1e-3)
        for name, tensor in a.weights.tensors.items():
            torch.testing.assert_close(b.weights.tensors[name], tensor, atol=2e-4, rtol=1e-3)


def test_a_program_made_for_one_metric_does_not_serve_another(monkeypatch):
    monkeypatch.setattr(compiled, "compiled", lambda plain, arguments, tensors, wait: lambda *given: arguments[-1])
    call, ids = compiled.Compiling(lambda *arguments: None), torch.zeros(1, 4, 3, dtype=torch.long)
    batch, plan = task.Batch(torch.zeros(1, 5, 4), ids, ids), compose.Plan()
    assert [call({}, batch, ModelConfig(), plan, (metric(),)) for metric in (Margin, LookAtSelf, Margin)] == [
        (Margin(),), (LookAtSelf(),), (Margin(),)]


@pytest.mark.parametrize("metric, words", [
    (replace(Margin(), name="loss"), "another metric is named .loss."), (Margin, "the class Margin; give one made of it"), ("margin", "each needs a `name`"),
])
def test_a_metric_that_cannot_be_recorded_is_refused(metric, words, small_bank):
    with pytest.raises(ValueError, match=words):
        prepare([replace(SHORT, metrics=[metric])], small_bank)


def test_a_metric_of_the_wrong_shape_is_named(networks, batch):
    wrong = make_dataclass("Wrong", [("name", str, "wrong")], namespace={"__call__": lambda self, acts, batch: acts.logits})
    with pytest.raises(ValueError, match=r"'wrong' has values \[1, 64, 5\]"):
        measure(networks[0], batch, metrics=[wrong()])


def test_evaluation_sets_of_ones_own_are_recorded_and_kept(small_bank, tmp_path):
    both = EvalSet("both_new", "new classes and new label pairs", "class_ids", "test_sets")
    run = replace(SHORT, eval_sets=[both, SecondMatches()])
    [result] = Store(tmp_path).fetch([run], bank=small_bank, progress=False)
    prepared = Prepared.of(run, small_bank)
    assert set(result.metrics["eval_set"]) == {*(each.name for each in task.EVAL_SETS), "both_new", "second"}
    assert prepared.eval_sets["second"].in_context[0, :, 1].all() and len(prepared.eval_sets["second"]) == run.eval_size
    pairs = {tuple(sorted(pair)) for pair in prepared.eval_sets["both_new"].labels[0, :, :2].tolist()}
    assert pairs <= {tuple(pair) for pair in prepared.splits.test_sets.tolist()}
    end = result.metrics[(result.metrics["sequences"] == 640) & (result.metrics["metric"] == "loss")].set_index("eval_set")["value"]
    assert measure(result.weights, prepared.eval_sets["second"])["loss"].item() == pytest.approx(end["second"], abs=1e-5)
    assert len({replace(SHORT, eval_sets=sets).digest for sets in ([], [both], [SecondMatches()])}) == 3


@pytest.mark.parametrize("eval_set, words", [
    (replace(SecondMatches(), name="train"), "two evaluation sets are named 'train'"),
    (make_dataclass("Few", [("name", str, "few")], frozen=True, namespace={
        "draw": lambda self, splits, n, generator: task.sample(splits, n - 1, generator)})(), "'few' drew ids"),
    ("train", "each needs a `name`"),
])
def test_an_evaluation_set_that_cannot_be_used_is_named(eval_set, words, small_bank):
    with pytest.raises(ValueError, match=words):
        prepare([replace(SHORT, eval_sets=[eval_set])], small_bank)


def test_evaluation_sets_name_their_fields():
    with pytest.raises(ValueError, match="ids='exemplars'"):
        EvalSet("mine", "mine", "exemplars", "train_sets")


def test_a_bank_from_an_array_is_in_the_store_like_any_other(tmp_path):
    x = np.random.default_rng(0).standard_normal((30, 3, 12))
    bank, other = from_array(x, name="mine"), from_array(x + 1)
    store = Store(tmp_path)
    [first] = store.fetch([SHORT], bank=bank, progress=False)
    assert first.weights.d_exemplar == 12 and len(list(store.entries())) == 1
    [again] = store.fetch([SHORT], bank=from_array(x.astype(np.float32)), progress=False)  # a bank is named by its contents
    same(first, again)
    store.fetch([SHORT], bank=other, progress=False)
    assert len(list(store.entries())) == 2
    assert {entry.config["bank"]["name"] for entry in store.entries()} == {"mine", "own"}


def test_a_bank_keeps_its_contents_when_the_array_changes():
    x = np.random.default_rng(0).standard_normal((30, 3, 12)).astype(np.float32)
    bank = from_array(x)
    before = bank.digest
    x *= 2
    assert from_array(bank.features).digest == before != from_array(x).digest


@pytest.mark.parametrize("features, images, words", [
    (np.zeros((3, 4)), None, r"\[class, exemplar, dim\]"), (np.zeros((3, 2, 4)), None, "zero variance"),
    (np.full((3, 2, 4), np.nan), None, "NaN or infinite"), (np.zeros((0, 2, 4)), None, "not empty"),
    (np.arange(24.0).reshape(3, 2, 4), np.zeros((3, 2, 28, 28)), "uint8"),
])
def test_an_array_that_is_no_bank_is_refused(features, images, words):
    with pytest.raises(ValueError, match=words):
        from_array(features, images)


# New fields keep old runs.

def grown(kind, **extra):
    """The package's class with one more field, as a later version could have it."""
    return make_dataclass(kind.__name__, [("dropout", float, field(default=0.0))], bases=(kind,), frozen=True,
                          namespace={"__module__": kind.__module__, "__doc__": kind.__doc__})


def test_a_field_that_is_added_keeps_old_runs(small_bank, tmp_path):
    store = Store(tmp_path)
    run = replace(SHORT, clamps=[PerfectLayer1(), Ablate((1, 0))])
    [stored] = store.fetch([run], bank=small_bank, progress=False)

    def like(old, **changes):
        kind = grown(type(old))
        return kind(**{f.name: getattr(old, f.name) for f in dataclasses.fields(old)}, **changes)

    with_task = replace(run, task=like(run.task))
    later = [like(run), with_task, replace(run, model=like(run.model)), replace(run, clamps=[like(PerfectLayer1()), Ablate((1, 0))])]
    for each in later:
        assert each.digest == run.digest
        found = store.get(replace(Prepared.of(run, small_bank), run=each))
        assert found is not None and found.weights == stored.weights
    changed = [like(run, dropout=0.5), replace(run, task=like(run.task, dropout=0.5))]
    assert len({run.digest, *(each.digest for each in changed)}) == 3
    assert all(store.get(replace(Prepared.of(run, small_bank), run=each)) is None for each in changed)


def test_a_reader_s_fields_are_all_in_the_digest():
    """A reader may change the defaults of a class, so the digest does not leave them out."""
    one, two = (make_dataclass("Mine", [("strength", float, default)], frozen=True, namespace={"writes": LookAtSelf.__call__})
                for default in (1.0, 2.0))
    assert RunConfig(clamps=[one()]).digest != RunConfig(clamps=[two()]).digest
    for name in ("code", "type"):  # which a digest has itself
        taken = make_dataclass("Mine", [(name, int, 1)], frozen=True, namespace={"writes": LookAtSelf.__call__})
        with pytest.raises(TypeError, match=f"a field can't be called '{name}'.*rename"):
            RunConfig(clamps=[taken()]).digest  # noqa: B018


WATCHED = """
from dataclasses import dataclass
from typing import ClassVar
from ihbook.clamps import Write

def make(captured):
    @dataclass(frozen=True)
    class Mine:
        {attribute}
        strength: float = 1.0
        def writes(self, shape, factor={default}):
            return [Write("v", 1, ~shape.zeros("v"), ((factor * captured, None),))]
    return Mine
"""


def test_all_of_a_readers_class_is_in_the_digest(tmp_path, monkeypatch):
    """Attributes that are no fields, defaults of methods, and values that a closure captures: an edit of one is another run."""
    monkeypatch.syspath_prepend(tmp_path)
    made = iter(range(100))

    def digest(attribute="weight = 0.5", default=1.0, captured=1.0):
        name = f"watched_{next(made)}"
        (tmp_path / f"{name}.py").write_text(WATCHED.format(attribute=attribute, default=default))
        return RunConfig(clamps=[importlib.import_module(name).make(captured)()]).digest

    variants = [{}, {"attribute": "weight = 0.9"}, {"attribute": "weight: ClassVar[float] = 0.7"}, {"default": 2.0}, {"captured": 2.0}]
    assert len({digest(**each) for each in variants}) == len(variants) and digest() == digest(attribute="weight: ClassVar = 0.5")
    assert digest(attribute="broadcasts = True") == digest(attribute="extra_pass = True")  # they change no result
    with pytest.raises(TypeError, match="Mine.weight holds a value that can't be part of a digest"):
        digest(attribute="weight = {1, 2}")
    with pytest.raises(TypeError, match="Mine.act holds a value that can't be part of a digest"):  # its arguments would go unseen
        digest(attribute="act = __import__('functools').partial(max, 1)")
    mine = importlib.import_module("watched_0").make(1.0)
    before = RunConfig(clamps=[mine()]).digest
    mine.weight = 0.8
    assert RunConfig(clamps=[mine()]).digest != before


def test_a_metric_without_source_is_refused_too():
    names = {"__name__": "nowhere"}
    exec("class Nowhere:\n    name = 'x'\n    def __call__(self, acts, batch):\n        return 1\n", names)
    with pytest.raises(TypeError, match="source of Nowhere.__call__ can't be read"):
        _ = replace(SHORT, metrics=[dataclass(frozen=True)(names["Nowhere"])()]).digest


@pytest.mark.parametrize("make, words", [
    (lambda: Write("v", 1, None, (1.0, None)), r"the term 1.0; terms are pairs"),
    (lambda: Write("v", 1, None, ((None, 1.0),)), "terms are pairs"), (lambda: Shape(2, 8, 2).zeros("patern"), "'patern' is not known"),
    (lambda: During(Copy((1, 0)), "a"), "During: start='a'"), (lambda: During(Copy((1, 0)), 5, 5), "start < until"),
    (lambda: RunConfig(clamps=[Copy]), "the class Copy; give one made of it"),
    (lambda: RunConfig(metrics=[dataclass(Unfrozen)()]), "Unfrozen a frozen dataclass"),
    (lambda: train(RunConfig()), "give a list of them"), (lambda: train([RunConfig()], bank=np.zeros((3, 2, 4))), "from_array"),
    (lambda: claims.Claim("x", "", "", "", ""), "one of them at least"), (lambda: claims.Claim("x", "", "", "", "", 2, 1), "low at most high"),
])
def test_what_a_new_reader_may_get_wrong_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


class Unfrozen:
    name: str = "mine"

    def __call__(self, acts, batch):
        return acts.logits[:, :, 0]


@dataclass(frozen=True)
class Returns:
    """A clamp that gives what it is told to."""

    what: tuple

    def writes(self, shape):
        return {"one": self.write(shape, None), "nothing": None, "none": [self.write(shape, lambda acts: None)],
                "matrix": [self.write(shape, lambda acts: torch.eye(5))], "mask": [replace(self.write(shape, None), where=np.ones(3))],
                "vector": [replace(self.write(shape, None), terms=((torch.ones(64), None),))],
                "mlp": [replace(self.write(shape, None), name="mlp_out")]}[self.what]

    def write(self, shape, source):
        return Write("resid_pre", 1, ~shape.zeros("resid_pre"), ((1.0, source),))


@pytest.mark.parametrize("what, words", [
    ("one", "must return a list of Writes"), ("nothing", "must return a list of Writes"), ("none", "must be a tensor of 4 axes"),
    ("matrix", r"resid_pre is to be \[5, 5\]"), ("mask", "where of float64"), ("vector", r"give \[1, 64\]"),
    ("mlp", r"without an MLP \(mlp_ratio=0\) has no mlp_out"),
])
def test_what_a_clamp_may_get_wrong_is_named(what, words, networks, batch):
    with pytest.raises(ValueError, match=words):
        run_with_clamps(networks[0], batch, [Returns(what)])


def test_sequences_of_another_bank_are_named(networks, batch):
    other = replace(batch, bank=torch.zeros(1, 200, 12))
    for measuring in (run_with_clamps, measure):
        with pytest.raises(ValueError, match="have 12 features, but the network takes 32"):
            measuring(networks[0], other)
    with pytest.raises(ValueError, match="Copy is a class"):
        measure(networks[0], batch, [(During(Copy, 0, 5),)])


def test_what_is_printed_is_short(networks, batch, small_bank):
    [result] = train([SHORT], bank=small_bank, progress=False)
    acts = run_with_clamps(networks[0], batch)
    assert max(len(repr(each)) for each in (result, small_bank, acts)) < 400 and "pattern[1]" in repr(acts)
    with pytest.raises(KeyError, match=r"give \[name, layer\]"):
        acts["pattern"]


# What a clamp declares.

@dataclass(frozen=True)
class HalfUnclamped:
    """A clamp that sets a head's values to half of those in the unclamped pass."""

    extra_pass = True

    def writes(self, shape):
        where = shape.zeros("v")
        where[0] = True
        return [Write("v", 1, where, ((0.5, self.source),))]

    def source(self, acts):
        return acts.unclamped["v", 1]


def test_an_own_clamp_that_declares_an_extra_pass_is_grouped_like_a_built_in_one(small_bank, tmp_path):
    silent = make_dataclass("Silent", [], bases=(HalfUnclamped,), frozen=True, namespace={"extra_pass": False})
    asked = [(), (Copy((1, 0)),), (Ablate((0, 0)), Preserve("values")), (HalfUnclamped(),)]
    planned = blocks.plan_blocks(prepare([replace(RUN, clamps=each) for each in asked], small_bank), tmp_path, compile=True)
    together = {block.places[0]: len(block.compile_with) for block in planned}
    assert together == {0: 3, 1: 3, 2: 1, 3: 1}  # Ablate in the last layer is always there
    planned = blocks.plan_blocks(prepare([replace(RUN, clamps=each) for each in [*asked, (silent(),)]], small_bank), tmp_path, compile=True)
    assert {block.places[0]: len(block.compile_with) for block in planned} == {0: 4, 1: 4, 2: 1, 3: 1, 4: 4}


def test_own_clamps_that_broadcast_give_what_each_gives_alone(networks, batch, monkeypatch):
    kinds = [make_dataclass("Mine", [("head", int)], bases=(HalfUnclamped,), frozen=True, namespace={"broadcasts": value})
             for value in (True, False)]
    lists = [[(kind(h), Ablate((0, h))) for h in range(3)] for kind in kinds]
    shared, own = (measure(networks[0], batch, each)["loss"] for each in lists)
    torch.testing.assert_close(shared, own, atol=1e-6, rtol=1e-6)
    assert len(set(own.tolist())) == 3


# Architecture and context, from a chapter.

def test_settings_reach_the_network_and_the_task():
    settings = Settings("quick", n_pairs=4, burstiness=2, noise=0.1, zipf=0.5, n_layers=3, n_heads=4, d_model=32, mlp_ratio=2.0,
                        positions="learned", n_classes=20, n_test_classes=30, dim=48, embedding="random")
    run = settings.run(n_labels=7)
    assert run.model == ModelConfig(n_layers=3, n_heads=4, d_model=32, mlp_ratio=2.0, positions="learned")
    assert run.bank == BankConfig(dim=48, embedding="random")
    assert run.task == TaskConfig(n_classes=20, n_test_classes=30, n_labels=7, n_pairs=4, burstiness=2, noise=0.1, zipf=0.5)
    assert settings.tokens == ["x₁", "l₁", "x₂", "l₂", "x₃", "l₃", "x₄", "l₄", "x"] and not settings.as_published
    assert len({settings.digest, Settings("quick").digest, replace(settings, n_heads=2).digest}) == 3
    assert replace(settings, device="cpu", bank_path=None).digest == settings.digest
    with pytest.raises(ValueError, match="n_heads=5 must divide"):
        Settings("quick", n_heads=5)


@pytest.mark.parametrize("changes", [{"n_pairs": 3}, {"noise": 0.1}, {"zipf": 1.0}, {}])
def test_training_sequences_of_any_task(changes):
    settings = Settings("quick", n_classes=10, **changes)
    batch = experiments.training_sequences(settings)
    assert len(batch) == (10 * 9 * 8 * 4 if not changes else settings.scale.analysed)
    assert batch.labels.shape[2] == settings.n_pairs + 1


def test_the_threshold_is_that_of_the_labels_in_context(small_bank):
    run = replace(SHORT, task=replace(RUN.task, n_pairs=4))
    [result] = train([run], bank=small_bank, progress=False)
    losses = pd.Series([2.0, 0.5, 0.1], [0, 320, 640])
    rows = result.metrics["metric"].eq("loss") & result.metrics["eval_set"].eq("train")
    result.metrics.loc[rows, "value"] = losses.to_numpy()
    at = np.interp(0.4 * np.log(4), [0.5, 2.0], [320, 0])
    assert experiments.phase_change(result) == pytest.approx(at)


def test_previous_token_heads_are_fewer_where_heads_are_few(small_bank):
    [result] = train([SHORT], bank=small_bank, progress=False)
    assert len(experiments.previous_token_heads(result)) == 1  # of two


def test_the_layer_of_the_induction_heads(networks, batch):
    result = training.Result(RUN, None, None, networks[0], {})
    strength = measure(networks[0], batch)["strength"][0]
    assert experiments.induction_layer(result, batch) == 1 and len(strength) == 2


@pytest.mark.parametrize("package", ["chapters", "clamps", "engine"])
def test_a_package_names_its_modules(package):
    module = importlib.import_module(f"ihbook.{package}")
    for path in Path(module.__file__).parent.glob("[a-z]*.py"):
        assert f"`{path.name}`" in module.__doc__


# The wheel.

@pytest.mark.slow
def test_an_installed_wheel_has_all_it_needs(tmp_path):
    """The wheel is built from the checkout, installed into a fresh environment, and used from another folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    (tmp_path / "source").mkdir()
    for name in ("ihbook", "pyproject.toml", "README.md", "LICENSE"):  # a copy, since building leaves a folder behind
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / "source" / name)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "source"], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    ours, theirs = (subprocess.check_output([who, "-c", where], text=True).strip() for who in (sys.executable, python))
    (Path(theirs) / "dependencies.pth").write_text(ours + "\n")  # .pth files there, such as an editable ihbook's, are not read
    [wheel] = tmp_path.glob("ihbook-*.whl")
    subprocess.run([python, *pip[1:], "install", "--no-deps", wheel], check=True)
    script = tmp_path / "script.py"
    script.write_text("""
import json, pkgutil, sys
import ihbook
from ihbook import BankConfig, RunConfig, TaskConfig, train
from ihbook.chapters import claims, panels  # with their data files
from ihbook.clamps import Copy
from ihbook.engine import blocks

blocks.SHARE_FROM, blocks.n_cores = 1, lambda: 2  # in processes, from a script without a guard
run = dict(bank=BankConfig("gaussian", n_classes=30, dim=16), task=TaskConfig(n_classes=10, n_test_classes=10), n_sequences=640)
results = train([RunConfig(**run), RunConfig(**run, clamps=[Copy((1, 0))])], progress=False)
names = [name for _, name, _ in pkgutil.walk_packages(ihbook.__path__, "ihbook.")]
from pathlib import Path
from ihbook.chapters import kernel
scripts = [path.relative_to(Path(ihbook.__file__).parents[1]) for path in kernel.FOLDER.rglob("*.py")]  # a kernel is no module
names += [".".join(path.with_suffix("").parts) for path in scripts]
print(json.dumps([ihbook.__file__, [len(r.metrics) for r in results], len(claims.CLAIMS), len(panels.SCRIPT) > 100, names]))
""")
    out = subprocess.run([python, script], cwd=tmp_path, text=True, capture_output=True)
    assert out.returncode == 0, out.stderr[-3000:]
    file, rows, n_claims, has_script, names = json.loads(out.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path) and min(rows) > 0 and n_claims > 50 and has_script
    sources = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "ihbook").rglob("*.py")}
    assert {name for name in sources if not name.endswith("__init__")} - {"ihbook.__main__"} <= set(names)
    listed = subprocess.run([python, "-m", "ihbook", "store", "list", "--root", tmp_path / "none"], cwd=tmp_path, text=True,
                            capture_output=True)
    assert listed.returncode == 0 and "0.0 MB in all" in listed.stdout


def test_the_page_has_every_door():
    text = "\n".join(cell.source for cell in nbformat.read(ROOT / "book/extending.ipynb", 4).cells)
    for door in ("class Borrow", "Steer(", "from_array(", "class Margin", "EvalSet(", "def draw", "n_layers=3", "PerfectLayer1()",
                 "claims.Claim(", "extra_pass", "broadcasts", "papermill", "_toc.yml"):
        assert door in text, door
