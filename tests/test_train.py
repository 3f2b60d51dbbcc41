"""Training: learning, resuming bit for bit, families, clamps in windows, schedules."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from cases import catalogue
from conftest import DATA

from ihbook import clamps, engine
from ihbook.clamps.compose import Plan
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.digest import code_digest, encode
from ihbook.engine import blocks as planning
from ihbook.engine import compiled, family, flat, step
from ihbook.engine import state as states
from ihbook.engine import train as training
from ihbook.engine.prepared import Prepared, family_digest, prepare
from ihbook.metrics import cross_entropy
from ihbook.model import initial_weights, stack
from ihbook.task import Batch, EvalSet

MODEL = ModelConfig(d_model=16, n_heads=2)
RUN = RunConfig(task=TaskConfig(n_classes=10, n_test_classes=10), model=MODEL, n_sequences=3200, lr=3e-3, eval_every=1000,
                eval_size=50, checkpoint_every=800)


def same(a, b):
    """Assert that two results are the same bit for bit."""
    pd.testing.assert_frame_equal(a.metrics, b.metrics, check_exact=True)
    pd.testing.assert_frame_equal(a.heads, b.heads, check_exact=True)
    assert a.weights == b.weights and a.checkpoints == b.checkpoints


def train(runs, bank, **options):
    return training.train(runs, bank=bank, progress=False, **options)


@pytest.mark.slow
def test_it_learns_the_task(small_bank):
    [result] = train([replace(RUN, n_sequences=40_000, checkpoint_every=0, model=ModelConfig(d_model=32, n_heads=4),
                              task=TaskConfig(n_classes=30, n_test_classes=10))], small_bank)
    end = result.metrics[result.metrics["sequences"] == 40_000].pivot(index="eval_set", columns="metric", values="value")
    assert end.loc["train", "accuracy"] > 0.95 and end.loc["train", "loss"] < 0.2
    assert end.loc["test_classes", "accuracy"] > 0.8
    strength = result.heads[(result.heads["layer"] == 1) & (result.heads["sequences"] == 40_000)]["strength"]
    assert strength.max() > 0.3


def test_what_is_recorded_and_when(small_bank):
    [result] = train([replace(RUN, heads_every=320)], small_bank)
    when = result.metrics.groupby("eval_set")["sequences"].unique()
    assert when["test_classes"].tolist() == [0, 1024, 2016, 3008, 3200]  # first step at or past each 1,000, and the end
    assert set(range(0, 3201, 320)) < set(when["train"])
    assert sorted(result.checkpoints) == [0, 800, 1600, 2400, 3200]
    assert result.checkpoints[3200] == result.weights
    assert result.checkpoints[0] == initial_weights(MODEL, 16, 5, RUN.init_seed)
    assert len(result.heads) == len(when["train"]) * 2 * 2
    assert result.heads[result.heads["layer"] == 0]["previous_token"].between(0, 1).all()


def test_the_same_run_gives_the_same_bits(small_bank):
    same(*(train([RUN], small_bank)[0] for _ in range(2)))


@pytest.mark.slow
def test_a_family_equals_each_run_alone(small_bank):
    """Runs with every clamp, 300 or 500 steps, and data of their own."""
    other = initial_weights(MODEL, 16, 5, 77)
    steady = replace(RUN, n_sequences=16_000, lr=5e-4, eval_every=4000, checkpoint_every=0)
    kinds = [(), (clamps.Ablate((0, 0)),), (clamps.Ablate((0, 0)), clamps.Preserve("values")),
             (clamps.Ablate((0, 1)), clamps.Preserve(("patterns", "queries"))), (clamps.PreviousToken((0, 1), 0.9),),
             (clamps.BlockPreviousToken((0, 0), labels_only=True),), (clamps.Induction((1, 1)),),
             (clamps.SimilarityMatch((1, 0), 0.5),), (clamps.HeadTemperature((0, 1), 2.0),), (clamps.LabelAttentionOnly((1, 1)),),
             (clamps.Copy((1, 0)),), (clamps.PerfectLayer1(),), (clamps.PerfectLayer1(), clamps.Copy((1, 0))),
             (clamps.Graft(other),), (clamps.Graft(other, part="above"),), (clamps.AblateEmbedding(),),
             (clamps.Steer("resid_pre", 1, [0.1] * 16),),
             (clamps.During(clamps.PreviousToken((0, 1)), 3200, 9600),)]
    assert not catalogue() - {type(c) for kind in kinds for c in kind}
    runs = [replace(steady, clamps=kind, data_seed=i, n_sequences=(16_000, 9_600)[i % 2]) for i, kind in enumerate(kinds)]
    runs += [replace(steady, init_seed=6), replace(steady, task=replace(RUN.task, n_classes=20))]
    assert len({Prepared.of(run, small_bank).family_key for run in runs}) == 1
    for run, together in zip(runs, train(runs, small_bank, compile=False), strict=True):
        [alone] = train([run], small_bank)
        assert together.run == run
        for name, tensor in alone.weights.tensors.items():
            # Where the embeddings are 0, their projections have no effect; Adam amplifies gradients that are only rounding.
            if (clamps.AblateEmbedding(),) != run.clamps or "qkv" not in name:
                torch.testing.assert_close(together.weights.tensors[name], tensor, atol=1e-4, rtol=1e-3)
        pd.testing.assert_frame_equal(together.metrics, alone.metrics, atol=1e-4, rtol=1e-4)


def test_different_programs_train_in_one_call(small_bank):
    runs = [RUN, replace(RUN, task=replace(RUN.task, n_labels=6)), replace(RUN, optimiser="sgd", lr=0.1)]
    results = train(runs, small_bank)
    assert [r.run for r in results] == runs and results[1].weights.n_labels == 6


class Stop(Exception):
    pass


def stop_after(n):
    """In place of `training.stop_signals`: stops when it is asked for the `n`th time after the first."""
    calls = iter(range(10_000))

    @contextmanager
    def signals():
        yield lambda: next(calls) >= n

    return signals


@pytest.mark.parametrize("at", [1, 32, 37, 60])
def test_resumed_training_is_bit_for_bit_the_same(small_bank, tmp_path, monkeypatch, at):
    runs = [RUN, replace(RUN, init_seed=6, n_sequences=1600, clamps=(clamps.During(clamps.Induction((1, 0)), 640, 1280),))]
    whole = train(runs, small_bank)
    monkeypatch.setattr(family, "SAVE_SECONDS", -1.0)  # save at every step
    count = iter(range(1000))

    def dying(*args):
        if next(count) == at:
            raise Stop
        return step.train_step(*args)

    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=dying))
    with pytest.raises(Stop):
        train(runs, small_bank, directory=tmp_path)
    monkeypatch.undo()
    for a, b in zip(whole, train(runs, small_bank, directory=tmp_path), strict=True):
        same(a, b)


@pytest.mark.parametrize("damage", [lambda b: b[:1000], lambda b: b"", lambda b: b[:-1], lambda b: b"x" * len(b)])
def test_a_damaged_state_is_reported_and_trained_again(small_bank, tmp_path, monkeypatch, damage):
    whole = train([RUN], small_bank)
    monkeypatch.setattr(training, "stop_signals", stop_after(6))
    with pytest.raises(KeyboardInterrupt):
        train([RUN], small_bank, directory=tmp_path)
    monkeypatch.undo()
    [path] = tmp_path.glob("*/state.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"):
        again = train([RUN], small_bank, directory=tmp_path)
    same(whole[0], again[0])
    assert not list(tmp_path.iterdir())  # nothing is left of a finished family


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_an_interrupted_family_changes_nothing(small_bank, tmp_path, monkeypatch):
    """A resumed call finds the damage, in the state and in every checkpoint, and ends with the same result bit for bit."""
    runs = [RUN, replace(RUN, init_seed=6, n_sequences=1600)]  # the shorter one has left
    whole, kept = train(runs, small_bank), tmp_path / "kept"
    monkeypatch.setattr(training, "stop_signals", stop_after(70))
    with pytest.raises(KeyboardInterrupt):
        train(runs, small_bank, directory=kept)
    monkeypatch.undo()
    files = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"family.json", "state.safetensors", "800.safetensors", "final.safetensors"}
    rng, found = np.random.default_rng(0), Counter()
    for name in files:
        size = (kept / name).stat().st_size
        for at in [rng.integers(8), rng.integers(8, min(400, size)), *rng.integers(size, size=3)]:  # length, header, anywhere
            folder = tmp_path / f"{name.stem}-{at}"
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            content = bytearray((folder / name).read_bytes())
            content[at] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(content)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                again = train(runs, small_bank, directory=folder)
            for a, b in zip(whole, again, strict=True):
                same(a, b)
            found[name.suffix] += any("is damaged" in str(each.message) for each in caught)
    assert found[".safetensors"] >= 0.9 * 5 * sum(name.suffix == ".safetensors" for name in files)  # else in a name of no meaning


def test_a_checkpoint_that_is_gone_or_of_another_run_is_not_taken(small_bank, tmp_path, monkeypatch):
    whole = train([RUN], small_bank)
    for change in (lambda path: path.unlink(),
                   lambda path: path.write_bytes((path.parent / "0.safetensors").read_bytes())):
        monkeypatch.setattr(training, "stop_signals", stop_after(60))
        with pytest.raises(KeyboardInterrupt):
            train([RUN], small_bank, directory=tmp_path)
        monkeypatch.undo()
        [path] = tmp_path.glob("*/run-0/800.safetensors")
        change(path)
        with pytest.warns(UserWarning, match="is damaged.*800"):
            again = train([RUN], small_bank, directory=tmp_path)
        same(whole[0], again[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_steps_and_saves(small_bank, tmp_path, monkeypatch, number):
    long, count = replace(RUN, n_sequences=3_200_000, checkpoint_every=0), iter(range(1000))
    handler = signal.getsignal(number)

    def interrupted(*args):
        if next(count) == 20:
            os.kill(os.getpid(), number)
        return step.train_step(*args)

    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=interrupted))
    monkeypatch.setitem(compiled.COMPILE_FROM, "cpu", math.inf)
    with pytest.raises(KeyboardInterrupt, match="same call goes on"):
        train([long], small_bank, directory=tmp_path)
    assert signal.getsignal(number) == handler
    assert step_of(tmp_path, long, small_bank) == 21


def step_of(directory, run, bank):
    prepared = [Prepared.of(run, bank)]
    return states.load_state(directory / family_digest(prepared), prepared, "cpu").steps_done


SCRIPT = """
import sys, torch
from tests_of_resume import BANK, RUN
from ihbook.engine import family, train
family.SAVE_SECONDS = 0.05
train.train([RUN], bank=BANK, directory=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_loses_little_and_resumes_bit_for_bit(small_bank, tmp_path, monkeypatch):
    """Two processes are killed (SIGKILL) at arbitrary moments; then this one trains to the end."""
    run = replace(RUN, n_sequences=32_000)
    (tmp_path / "tests_of_resume.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport torch\nfrom test_train import RUN as R\n"
        "from dataclasses import replace\nfrom ihbook.task import Bank\nRUN = replace(R, n_sequences=32_000)\n"
        "g = torch.Generator().manual_seed(0)\nc = torch.randn(40, 1, 16, generator=g)\n"
        "BANK = Bank(c + 0.1 * torch.randn(40, 3, 16, generator=g), None, {})\n")
    store = tmp_path / "store"
    steps = []
    for seconds in (0.4, 0.9):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(store)], cwd=tmp_path)
        deadline = time.monotonic() + 600
        while not list(store.glob("*/state.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.wait()
        steps.append(step_of(store, run, small_bank))
    assert 0 < steps[0] <= steps[1]
    same(train([run], small_bank, directory=store)[0], train([run], small_bank)[0])


def test_an_unwritable_directory_is_a_clear_error(small_bank, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another directory"):
        train([RUN], small_bank, directory=tmp_path / "file" / "store")


def test_a_window_makes_a_difference_only_inside(small_bank):
    """Before the window, the run equals the unclamped one; inside the window, it does not."""
    clamp = clamps.During(clamps.Induction((1, 0)), 1600, 2400)
    plain, windowed = (train([replace(RUN, clamps=c)], small_bank)[0] for c in ((), (clamp,)))
    assert all(plain.checkpoints[s] == windowed.checkpoints[s] for s in (0, 800, 1600))
    assert plain.checkpoints[2400] != windowed.checkpoints[2400]

    def metrics_at(result, sequences):
        return result.metrics[result.metrics["sequences"] == sequences]["value"].tolist()

    assert metrics_at(plain, 1024) == metrics_at(windowed, 1024) and metrics_at(plain, 2016) != metrics_at(windowed, 2016)
    always = train([replace(RUN, clamps=(clamp.clamp,))], small_bank)[0]
    assert metrics_at(always, 0) != metrics_at(plain, 0)  # clamped in training, clamped in evaluation


def test_clamped_weights_do_not_move(small_bank):
    [result] = train([replace(RUN, clamps=(clamps.PerfectLayer1(),))], small_bank)
    before, after = result.checkpoints[0].tensors, result.weights.tensors
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("layers.0."))
    assert not torch.equal(before["layers.1.attn.qkv.weight"], after["layers.1.attn.qkv.weight"])


def test_learning_rates():
    run = replace(RUN, warmup=320, schedule="cosine")
    assert family.rate(run, 0) == pytest.approx(run.lr * 32 / 352) and family.rate(run, 288) == pytest.approx(run.lr * 320 / 352)
    assert family.rate(run, 320) == run.lr and family.rate(run, 3200) == pytest.approx(0, abs=1e-12)
    assert family.rate(run, 1760) == pytest.approx(run.lr / 2)
    assert family.rate(RUN, 0) == family.rate(RUN, 3199) == RUN.lr


def test_sgd_follows_the_gradient(small_bank):
    run = replace(RUN, optimiser="sgd", lr=0.05, n_sequences=32, checkpoint_every=0, clamps=(clamps.Copy((1, 0)),))
    [result] = train([run], small_bank)
    before = initial_weights(MODEL, 16, 5, run.init_seed).tensors
    assert torch.equal(result.weights.tensors["unembed.weight"], before["unembed.weight"])  # no gradient, no step
    assert not torch.equal(result.weights.tensors["exemplar_embed.weight"], before["exemplar_embed.weight"])


@pytest.mark.parametrize("changes, words", [
    ({"clamps": (clamps.Ablate((1, 5)),)}, "no head 1.5"),
    ({"clamps": (clamps.Copy((1, 0)), clamps.Copy((1, 1)))}, "both set"),
    ({"task": TaskConfig(n_classes=35, n_test_classes=10)}, "n_classes=35"),
    ({"initial": initial_weights(MODEL, 8, 5, 0)}, "exemplar dim 8"),
    ({"initial": initial_weights(ModelConfig(d_model=16, n_heads=4), 16, 5, 0)}, "n_heads=4"),
    ({"clamps": (clamps.Graft(initial_weights(MODEL, 16, 6, 0)),)}, "the donor's n_labels is 6"),
    ({"clamps": (clamps.During(clamps.Graft(initial_weights(MODEL, 8, 5, 0)), 640),)}, "the donor's exemplar dim is 8"),
    ({"initial": initial_weights(MODEL, 16, 6, 0)}, "n_labels=6"),
    ({"model": ModelConfig(d_model=16, n_heads=2, positions="learned", max_positions=3)}, "max_positions=3"),
])
def test_a_run_that_cannot_be_trained_is_refused_before_any_is(small_bank, tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        train([RUN, replace(RUN, **changes)], small_bank, directory=tmp_path)
    assert words in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"lr": 0}, {"lr": math.nan}, {"optimiser": "lion"}, {"schedule": "step"}, {"n_sequences": 0},
                                 {"batch_size": 1.5}, {"eval_every": -1}, {"init_seed": "7"}])
def test_bad_runs_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RunConfig(**bad)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no runs"):
        training.train([])


def test_digests_name_values():
    assert RUN.digest == replace(RUN).digest
    variants = [RUN, replace(RUN, init_seed=6), replace(RUN, clamps=(clamps.Ablate((1, 0)),)),
                replace(RUN, clamps=(clamps.Ablate((1, 1)),)), replace(RUN, clamps=(clamps.LabelAttentionOnly((1, 1)),)),
                replace(RUN, initial=initial_weights(MODEL, 16, 5, 0)), replace(RUN, initial=initial_weights(MODEL, 16, 5, 1)),
                replace(RUN, clamps=(clamps.Graft(initial_weights(MODEL, 16, 5, 1)),))]
    assert len({v.digest for v in variants}) == len(variants)
    code = "from ihbook.config import RunConfig; print(RunConfig().digest)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == RunConfig().digest
    with pytest.raises(TypeError, match="digest"):
        encode(object())


# Blocks train in processes of their own, as long runs do on a CPU.

@dataclass(frozen=True)
class Own:
    """A clamp that only this file defines, so that processes have to get it by value."""

    def writes(self, shape):
        return [clamps.Write("v", 1, ~shape.zeros("v"), ((0.5, None),))]


@pytest.fixture
def processes(monkeypatch):
    """Pretend that the machine has two cores, and that 50 run-steps are enough to use processes, but not to compile."""
    monkeypatch.setattr(planning, "SHARE_FROM", 50)
    monkeypatch.setattr(planning, "n_cores", lambda: 2)


def many(n_sequences=RUN.n_sequences):
    short = replace(RUN, n_sequences=320)
    return [short, *training.seeds(replace(RUN, n_sequences=n_sequences), 5), replace(RUN, n_sequences=n_sequences, clamps=(Own(),))]


@pytest.mark.slow
def test_processes_give_what_this_process_gives(small_bank, processes, tmp_path):
    runs = many()
    blocks = planning.plan_blocks(prepare(runs, small_bank), tmp_path)
    assert [len(block.family) for block in blocks] == [4, 3]  # one per core
    assert sorted(i for block in blocks for i in block.places) == list(range(7))
    results = train(runs, small_bank, directory=tmp_path, compile=False)
    assert [r.run for r in results] == runs and not list(tmp_path.iterdir())
    for block in blocks:
        for i, expected in zip(block.places, family.train_family(block.family, tmp_path / "here"), strict=True):
            same(results[i], expected)
        shutil.rmtree(tmp_path / "here")


def test_what_is_compiled_is_compiled_once(small_bank, processes, tmp_path):
    """Runs with different clamps share a program, unless a clamp needs an extra pass; the blocks of a task stay together."""
    wider = replace(RUN, task=replace(RUN.task, n_classes=RUN.task.n_classes - 1))
    windows = (clamps.During(clamps.Copy((1, 0)), until=320), clamps.During(clamps.Copy((1, 1)), start=320))
    asked = [replace(run, clamps=kind) for run in (RUN, wider)
             for kind in [(), windows, (clamps.Ablate((1, 0)),), (clamps.Ablate((1, 1)),), (clamps.Preserve("values"),)]]
    blocks = planning.plan_blocks(prepare(asked, small_bank), tmp_path, compile=True)
    together = {block.places[0]: block.compile_with for block in blocks}
    assert {len(clamp_lists) for i, clamp_lists in together.items() if i % 5 != 4} == {4}  # none, each of two copies, ablation
    assert together[4] == together[9] == ((clamps.Preserve("values"),),)
    forms = set()
    for block in blocks:
        schedule = family.Schedule(block.family, "cpu", step.PLAIN, block.compile_with)
        forms |= {flat.form_of(schedule.plan(states.FamilyState(i, [0], {}, {}))) for i in (0, 50)}
    assert len(forms) == 2
    tasks = [block.family[0].run.task for block in blocks if block.places[0] % 5 != 4]
    assert [task == tasks[0] for task in tasks] == [True] * 4 + [False] * 4
    # The runs left of a stopped call use the programs of the whole call.
    left = planning.plan_blocks(prepare(asked[:1], small_bank), tmp_path, compile=True, asked=prepare(asked, small_bank))
    assert left[0].compile_with == together[0] and planning.plan_blocks(prepare(asked[:1], small_bank), tmp_path)[0].compile_with == ()


def test_calls_with_and_without_heads_off_share_a_program(small_bank, tmp_path):
    """That costs no time, and it is what most chapters ask for, one after the other."""
    def form(clamp_lists, which):
        blocks = planning.plan_blocks(prepare([replace(RUN, clamps=each) for each in clamp_lists], small_bank), tmp_path, compile=True)
        [block] = [block for block in blocks if block.places == [which]]
        return flat.form_of(family.Schedule(block.family, "cpu", step.PLAIN, block.compile_with).plan(states.FamilyState(0, [0], {}, {})))

    off = (clamps.Ablate((1, 1)),)
    assert form([()], 0) == form([off], 0) == form([off, ()], 1) == form([(), off], 1) != form([(), (clamps.Ablate((0, 0)),)], 0)


def test_processes_have_equal_shares_and_each_compiles_a_program_once(small_bank, monkeypatch):
    def made(*steps_and_programs, n_pairs=2):
        return [planning.Block(prepare([replace(RUN, n_sequences=32 * n, lr=lr, task=replace(RUN.task, n_pairs=n_pairs))],
                                       small_bank), [i], True) for i, (n, lr) in enumerate(steps_and_programs)]

    monkeypatch.setattr(planning, "COMPILING", 100)
    assert planning.shares(made(*[(10, 1e-3)] * 4), 2) == [[0, 1], [2, 3]]
    assert planning.shares(made((10, 1e-3), (10, 1e-3), (10, 1e-3), (10, 2e-3)), 2) == [[0, 1, 2], [3]]
    assert planning.shares(made((500, 1e-3), (10, 1e-3), (10, 2e-3)), 2) == [[0], [1, 2]]
    assert planning.shares(made((10, 1e-3)), 2) == [[0]]
    assert planning.shares(made(*[(10, 1e-3)] * 5), 3) == [[0, 1], [2, 3], [4]]
    mixed = [*made((1000, 1e-3), n_pairs=4), *made(*[(1000, 1e-3)] * 3)]  # a step on nine tokens costs 1.8 steps on five
    assert planning.shares(mixed, 2) == [[0, 1], [2, 3]] and mixed[0].work == 1800


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_stop_save_and_go_on(small_bank, processes, tmp_path, number):
    runs = many(24_000)
    whole = train(runs, small_bank, compile=False)

    def interrupt():  # when both have begun
        while len(list(tmp_path.glob("*/run-0/*.safetensors"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="same call goes on"):
        train(runs, small_bank, directory=tmp_path, compile=False)
    assert list(tmp_path.glob("*/state.safetensors"))
    for a, b in zip(whole, train(runs, small_bank, directory=tmp_path, compile=False), strict=True):
        same(a, b)


def test_a_call_that_goes_on_keeps_its_blocks(small_bank, processes, tmp_path, monkeypatch):
    """It does so also where a new plan of the runs left would make other blocks, or would not compile them."""
    runs = prepare(training.seeds(RUN, 4), small_bank)
    monkeypatch.setitem(compiled.COMPILE_FROM, "cpu", 400)
    monkeypatch.setitem(compiled.BLOCK, "cpu", 2)
    first, second = planning.plan_blocks(runs, tmp_path)
    for block in (first, second):
        block.announce(tmp_path)
    [left] = planning.plan_blocks(second.family, tmp_path)
    assert (left.family, left.places, left.compile) == (second.family, [0, 1], True)
    assert [block.compile for block in planning.plan_blocks(second.family, tmp_path / "new")] == [False, False]
    assert [block.places for block in planning.plan_blocks([*second.family[:1], *runs[:2]], tmp_path)] == [[1, 2], [0]]
    (second.folder(tmp_path) / "family.json").write_text("{")
    assert len(planning.plan_blocks(second.family, tmp_path)) == 2


@pytest.mark.parametrize("steps, pays", [([12_000], True), ([11_000], False), ([2000] * 8, False), ([4000] * 8, True)])
def test_a_long_run_is_compiled_before_as_many_steps_of_short_ones(steps, pays):
    assert compiled.pays(steps, "cpu") == pays


def test_a_failing_process_is_reported(small_bank, processes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another directory"):
        train(many(), small_bank, directory=tmp_path / "file" / "store", compile=False)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_they_save(small_bank, processes, tmp_path, monkeypatch):
    """The others would train for minutes."""
    announce = planning.Block.announce

    def broken(self, directory):
        announce(self, directory)
        if 0 in self.places:
            (self.folder(directory) / "run-0").write_text("")  # where checkpoints are to go

    monkeypatch.setattr(planning.Block, "announce", broken)
    with pytest.raises(OSError, match="can't write"):
        train(many(32_000_000), small_bank, directory=tmp_path, compile=False)
    assert len(list(tmp_path.glob("*/state.safetensors"))) == 1 and not training_processes()


@pytest.mark.slow
def test_a_process_that_is_killed_is_reported(small_bank, processes, tmp_path):
    def kill():  # when both have begun
        while len(list(tmp_path.glob("*/run-0/*.safetensors"))) < 2:
            time.sleep(0.02)
        training_processes()[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(RuntimeError, match="was killed.*goes on from what it last saved"):
        train(many(32_000_000), small_bank, directory=tmp_path, compile=False)
    assert not training_processes()


def training_processes():
    return [process for process in psutil.Process().children(recursive=True) if any("popen_loky" in word for word in process.cmdline())]


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_train as tests
import torch
from ihbook.engine import blocks, family, train
from ihbook.task import Bank

generator = torch.Generator().manual_seed(0)
centres = torch.randn(40, 1, 16, generator=generator)
bank = Bank(centres + 0.1 * torch.randn(40, 3, 16, generator=generator), None, {{}})
family.SAVE_SECONDS, blocks.SHARE_FROM, blocks.n_cores = 0.05, 50, lambda: 2
train.train(tests.many(24_000), bank=bank, directory=sys.argv[1], progress=False, compile=False)
"""


@pytest.mark.slow
def test_processes_die_with_a_killed_parent_and_the_work_goes_on(small_bank, processes, tmp_path):
    store, script = tmp_path / "store", KILLED.format(tests=str(Path(__file__).parent))
    parent = subprocess.Popen([sys.executable, "-c", script, str(store)])
    deadline = time.monotonic() + 600
    while len(list(store.glob("*/state.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=60)[1]  # none is left that could write
    assert len(list(store.glob("*/state.safetensors"))) >= 2
    runs = many(24_000)
    resumed = train(runs, small_bank, directory=store, compile=False)
    for a, b in zip(resumed, train(runs, small_bank, compile=False), strict=True):
        same(a, b)


# What decides a result: one thing per test.

def test_steps_see_at_least_the_sequences_asked_for():
    assert [replace(RunConfig(), n_sequences=n).n_steps for n in (1, 32, 33)] == [1, 1, 2]


def test_a_default_that_changes_is_another_version():
    """Defaults do not enter a digest: after a change of one, the store would return runs with the old one. New fields do no harm.

    If this fails, raise `engine.VERSION` and rewrite tests/data/defaults.json with `defaults_now()` and the version.
    """
    record = json.loads((DATA / "defaults.json").read_text())
    assert record["version"] == engine.VERSION

    def stays(then, now):
        if isinstance(then, dict):
            return all(key in now and stays(value, now[key]) for key, value in then.items())
        return then == now

    assert stays(record["defaults"], json.loads(json.dumps(defaults_now())))


def defaults_now():
    """The default of every field that has one, of a run, of each clamp and of `EvalSet`."""
    found = {"RunConfig": encode(RunConfig(), defaults=True)}
    for kind in sorted(catalogue() | {EvalSet}, key=lambda kind: kind.__name__):
        found[kind.__name__] = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    return found


@pytest.mark.parametrize("changes", [{"data_seed": 9}, {"init_seed": 9}, {"warmup": 320}, {"schedule": "cosine"}, {"lr": 1e-3},
                                     {"task": replace(RUN.task, noise=0.3)}, {"batch_size": 16}, {"optimiser": "sgd"}])
def test_it_changes_the_weights(small_bank, changes):
    plain, other = (train([replace(RUN, eval_every=0, n_sequences=640, **more)], small_bank)[0] for more in ({}, changes))
    assert plain.weights != other.weights


def test_the_eval_seed_changes_evaluations_alone(small_bank):
    a, b = (train([replace(RUN, n_sequences=640, eval_seed=seed)], small_bank)[0] for seed in (0, 1))
    assert a.weights == b.weights and a.metrics["value"].tolist() != b.metrics["value"].tolist()


@pytest.mark.parametrize("changes", [
    {"task": replace(RUN.task, noise=0.3)}, {"lr": 1e-3}, {"warmup": 320}, {"schedule": "cosine"}, {"batch_size": 16},
    {"eval_size": 20}, {"eval_every": 0}, {"optimiser": "sgd"}, {"task": replace(RUN.task, n_labels=6)},
    {"task": replace(RUN.task, n_pairs=4)}, {"model": replace(MODEL, mlp_ratio=1)},
])
def test_runs_of_different_programs_do_not_share_one(small_bank, tmp_path, changes):
    runs = [RUN, replace(RUN, **changes)]
    assert len(planning.plan_blocks(prepare(runs, small_bank), tmp_path)) == 2
    cosine = [replace(RUN, schedule="cosine"), replace(RUN, schedule="cosine", n_sequences=1600)]
    assert len(planning.plan_blocks(prepare(cosine, small_bank), tmp_path)) == 2


def test_a_family_of_noisy_runs_with_their_own_evaluations_equals_each_alone(small_bank, monkeypatch):
    monkeypatch.setattr(family, "CHUNK_STEPS", 16)
    noisy = replace(RUN, task=replace(RUN.task, noise=0.3), checkpoint_every=0)
    runs = [noisy, replace(noisy, eval_seed=4, n_sequences=2000), replace(noisy, data_seed=7, eval_every=700)]
    for run, together in zip(runs, train(runs, small_bank), strict=True):
        [alone] = train([run], small_bank)
        pd.testing.assert_frame_equal(together.metrics, alone.metrics, atol=5e-3, rtol=1e-3)


def test_every_step_has_sequences_of_its_own(small_bank, monkeypatch):
    monkeypatch.setattr(family, "CHUNK_STEPS", 4)
    prepared = prepare([RUN], small_bank)
    schedule = family.Schedule(prepared, "cpu", step.PLAIN)
    batches = [schedule.batch(states.FamilyState(i, [0], {}, {}))[0] for i in range(12)]
    assert len({tuple(b.ids.flatten().tolist()) for b in batches}) == 12


def test_steps_are_those_of_torch(small_bank):
    """Adam and SGD agree with PyTorch's own, with gradients of every size."""
    for optimiser, reference in (("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)):
        run = replace(RUN, optimiser=optimiser, lr=0.01)
        [each] = prepare([run], small_bank)
        schedule = family.Schedule([each], "cpu", step.PLAIN)
        ours, theirs = stack([each.weights]), {name: p.requires_grad_() for name, p in stack([each.weights]).items()}
        moments, other = step.initial_moments(ours, run), reference(theirs.values(), lr=0.01)
        for i in range(5):
            state = states.FamilyState(i, [0], ours, moments)
            (batch, scalars), plan = schedule.batch(state), schedule.plan(state)
            step.train_step(ours, moments, batch, plan, run.model, scalars)
            other.zero_grad()
            cross_entropy(plan(theirs, batch, run.model).logits, batch).sum().backward()
            other.step()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name].detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"warmup": 160}, {"schedule": "cosine"}, {"optimiser": "sgd", "warmup": 96, "schedule": "cosine"}])
def test_schedules_are_applied_at_their_step(small_bank, changes):
    """The steps agree with PyTorch's optimiser, which is given each step's learning rate."""
    run = replace(RUN, n_sequences=320, lr=0.01, **changes)
    [each] = prepare([run], small_bank)
    schedule = family.Schedule([each], "cpu", step.PLAIN)
    ours, theirs = stack([each.weights]), {name: p.requires_grad_() for name, p in stack([each.weights]).items()}
    moments = step.initial_moments(ours, run)
    other = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[run.optimiser](theirs.values(), lr=1.0)
    for i in range(run.n_steps):
        state = states.FamilyState(i, [0], ours, moments)
        (batch, scalars), plan = schedule.batch(state), schedule.plan(state)
        step.train_step(ours, moments, batch, plan, run.model, scalars)
        seen = 32 * i
        warm = run.lr * (seen + 32) / (run.warmup + 32)
        cosine = run.lr / 2 * (1 + math.cos(math.pi * (seen - run.warmup) / (320 - run.warmup)))
        other.param_groups[0]["lr"] = warm if seen < run.warmup else cosine if run.schedule == "cosine" else run.lr
        other.zero_grad()
        cross_entropy(plan(theirs, batch, run.model).logits, batch).sum().backward()
        other.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].detach(), atol=5e-5, rtol=1e-3)


def test_what_is_recorded_at_another_batch_size(small_bank):
    run = replace(RUN, batch_size=16, n_sequences=400, eval_every=100, checkpoint_every=150)
    [result] = train([run], small_bank)
    assert sorted(result.metrics["sequences"].unique()) == [0, 112, 208, 304, 400]
    assert sorted(result.checkpoints) == [0, 160, 304, 400]


def test_runs_on_banks_of_different_dims_train_in_one_call(tmp_path):
    runs = [replace(RUN, bank=BankConfig("gaussian", n_classes=30, dim=dim), n_sequences=320) for dim in (16, 24)]
    results = training.train(runs, progress=False)
    assert [r.weights.d_exemplar for r in results] == [16, 24]


def test_digests_reach_every_field():
    runs = [RUN, replace(RUN, data_seed=1), replace(RUN, task=replace(RUN.task, zipf=1.0)), replace(RUN, eval_seed=1),
            *(replace(RUN, clamps=(clamps.During(clamps.Copy((1, 0)), a, b),)) for a, b in ((0, 5), (0, None), (3, None)))]
    assert len({run.digest for run in runs}) == len(runs)
    assert RunConfig(lr=1).digest == RunConfig(lr=1.0).digest
    changed = type("Own", (Own,), {"writes": lambda self, shape: []})
    changed.__module__ = Own.__module__
    assert encode(Own())["code"] != encode(changed())["code"]


def test_a_family_is_of_its_bank(small_bank):
    other = replace(small_bank, features=small_bank.features + 1)
    assert family_digest(prepare([RUN], small_bank)) != family_digest(prepare([RUN], other))
    assert len({(run.init_seed, run.data_seed) for run in training.seeds(RUN, 3)}) == 3
    assert len({run.data_seed for run in training.seeds(RUN, 3)}) == 3


@dataclass(frozen=True)
class Untraceable:
    """A clamp whose source can't be compiled."""

    def writes(self, shape):
        return [clamps.Write("v", 1, ~shape.zeros("v"), ((1.0, self.source),))]

    @staticmethod
    def source(acts):
        x = acts["resid_pre", 1]
        return (x if bool((x == x).all()) else -x).unflatten(3, (2, 8))


def test_a_compiled_program_is_for_arguments_in_one_order(small_bank, tmp_path, monkeypatch):
    """It takes a flat list, in which one moment could be taken for the other; a state that is loaded keeps the order."""
    made = []
    monkeypatch.setattr(compiled, "compiled", lambda plain, args, tensors, wait: made.append(tensors) or (lambda *values: values))
    [each] = prepare([RUN], small_bank)
    params = stack([each.weights])
    state = states.FamilyState(0, [0], params, step.initial_moments(params, RUN))
    schedule = family.Schedule([each], "cpu", step.PLAIN)
    (batch, scalars), plan = schedule.batch(state), schedule.plan(state)
    call = compiled.Compiling(step.train_step)
    turned = {kind: state.moments[kind] for kind in ("exp_avg_sq", "exp_avg")}
    inside = {kind: dict(reversed(moments.items())) for kind, moments in state.moments.items()}
    for moments in (state.moments, turned, inside, state.moments):
        call(params, moments, batch, plan, RUN.model, scalars)
    call(dict(reversed(params.items())), state.moments, batch, plan, RUN.model, scalars)
    assert len(made) == 4
    states.save_state(tmp_path, state)
    loaded = states.load_state(tmp_path, [each], "cpu")
    assert flat.names_of((loaded.params, loaded.moments)) == flat.names_of((params, state.moments))


@pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler on this machine")
def test_what_cannot_be_compiled_is_trained_all_the_same(small_bank):
    run = replace(RUN, clamps=(Untraceable(),), n_sequences=320)
    with pytest.warns(UserWarning, match="train_step can.t be compiled"):
        [found] = train([run], small_bank, compile=True)
    same(found, train([run], small_bank, compile=False)[0])


def test_without_a_compiler_training_is_plain_and_says_so(small_bank, monkeypatch):
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)
    with pytest.warns(UserWarning, match="no C.. compiler") as warned:
        [found] = train([replace(RUN, n_sequences=320)], small_bank, compile=True)
    assert len(warned) == 1
    same(found, train([replace(RUN, n_sequences=320)], small_bank, compile=False)[0])


@pytest.mark.slow
@pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler on this machine")
def test_compiled_training_is_resumed_bit_for_bit_too(small_bank, tmp_path, monkeypatch):
    runs = training.seeds(replace(RUN, n_sequences=1600), 2)
    whole = train(runs, small_bank, compile=True)
    plain = train(runs, small_bank, compile=False)
    monkeypatch.setattr(training, "stop_signals", stop_after(6))
    with pytest.raises(KeyboardInterrupt):
        train(runs, small_bank, compile=True, directory=tmp_path)
    monkeypatch.undo()
    resumed = train(runs, small_bank, compile=True, directory=tmp_path)
    for a, b, c in zip(whole, resumed, plain, strict=True):
        same(a, b)
        pd.testing.assert_frame_equal(a.metrics, c.metrics, atol=5e-3, rtol=1e-3)


def test_a_stopped_call_keeps_the_blocks_that_it_had_finished(small_bank, tmp_path, monkeypatch):
    runs = [RUN, replace(RUN, lr=1e-3)]  # two programs
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        if count == 150:
            os.kill(os.getpid(), signal.SIGTERM)
        return step.train_step(*args)

    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=counted))
    with pytest.raises(KeyboardInterrupt):
        train(runs, small_bank, directory=tmp_path)
    train(runs, small_bank, directory=tmp_path)
    assert count == 200 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_edited_clamp_is_another_run(tmp_path, monkeypatch):
    """Names, constants and functions inside a method count, alike in every process; layout, comments and docstrings do not."""
    source = """
from dataclasses import dataclass
import math
{space}
@dataclass(frozen=True)
class Mine:
    strength: float = 1.0
    def writes(self, shape):
        {words}
        return [math.{function}(x) for x in map(lambda x: {factor} * x, [1.0]) if x in {{'a', 'b', 'c'}}]
    @property
    def {name}(self):
        return {constant}
"""
    first = {"space": "", "words": "", "function": "sin", "factor": 2, "name": "p", "constant": 1}
    made = iter(range(100))

    def digest(**changed):
        name = f"notebook_{next(made)}"
        (tmp_path / f"{name}.py").write_text(source.format(**first | changed))
        return RunConfig(clamps=[importlib.import_module(name).Mine()]).digest

    monkeypatch.syspath_prepend(tmp_path)
    assert digest() == digest(space="\n\n") == digest(words="'What it does.'  # and a comment")
    assert len({digest(), *(digest(**{key: value}) for key, value in
                            {"function": "cos", "factor": 3, "name": "q", "constant": 2}.items())}) == 5
    code = "from test_train import Own; from ihbook.config import RunConfig; print(RunConfig(clamps=[Own()]).digest)"
    assert len({subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parent,
                                        env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "123"}) == 1


def test_every_version_of_python_gives_a_clamp_the_same_digest():
    """The digest is pinned: every version must agree, whatever it makes of f-strings, comprehensions and the rest."""
    assert code_digest(Telling) == "5332cdfb6ad0135a"


@dataclass(frozen=True)
class Telling:
    """Some of the syntax that versions of Python parse differently."""

    head: tuple = (1, 0)

    def writes(self, shape):
        assert shape.n_heads > 0, f"no heads: {shape!r:>{2 * 3}} {'a' 'b'}"
        names = {key: [x[0, 1:] for x in ()] if False else value for key, value in {"v": 1}.items()}
        return [clamps.Write(name, layer, ~shape.zeros(name)) for name, layer in names.items() if (n := 1) and not n < 1]


def test_a_clamp_without_source_is_refused_by_name(small_bank):
    names = {"__name__": "nowhere"}
    exec("class Nowhere:\n    def writes(self, shape):\n        return []\n", names)
    mine = dataclass(frozen=True)(names["Nowhere"])
    with pytest.raises(TypeError, match="source of Nowhere.writes can't be read"):
        train([replace(RUN, clamps=(mine(),))], small_bank)


@pytest.mark.parametrize("bad, words", [({"bank": "omniglot"}, "BankConfig"), ({"task": {}}, "TaskConfig"),
                                        ({"model": None}, "ModelConfig"), ({"initial": {}}, "Weights")])
def test_parts_of_a_run_are_of_their_kind(bad, words):
    with pytest.raises(ValueError, match=words):
        RunConfig(**bad)


def test_initial_weights_are_of_the_precision_that_trains(small_bank):
    drawn = initial_weights(MODEL, 16, 5, 0)
    double = replace(drawn, tensors={name: tensor.double() for name, tensor in drawn.tensors.items()})
    with pytest.raises(ValueError, match="float32"):
        train([replace(RUN, initial=double)], small_bank)


def test_a_stopped_call_without_a_directory_does_not_promise_anything(small_bank, tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt("the state is saved in …")
        yield

    monkeypatch.setattr(training, "train_blocks", stopped)
    with pytest.raises(KeyboardInterrupt, match="nothing is kept"):
        train([RUN], small_bank)
    with pytest.raises(KeyboardInterrupt, match="the state is saved"):
        train([RUN], small_bank, directory=tmp_path)


@dataclass(frozen=True)
class Talks(Own):
    """A clamp that prints past Python's own output, as a library written in C may."""

    def writes(self, shape):
        os.write(1, b"a warning of a library\n" * 10_000)
        return super().writes(shape)


@pytest.mark.slow
def test_what_a_training_process_prints_is_not_taken_for_a_message(small_bank, processes, capfd):
    runs = [replace(run, clamps=(Talks(),)) for run in many()]
    assert len(train(runs, small_bank)) == len(runs)


def fake_programs(monkeypatch, seconds=0.0):
    """Replace `compiled.compiled` by a function that only says what it was made for."""
    def fake(plain, args, tensors, wait):
        time.sleep(seconds)
        made = [t.stride() for t in tensors], args[-1]
        return lambda *given: (made, [t.stride() for t in given])

    monkeypatch.setattr(compiled, "compiled", fake)
    return compiled.Compiling(lambda *args: None)


def test_a_program_is_not_used_for_tensors_that_lie_otherwise(monkeypatch):
    """Chunks of two evaluation sets can have one shape, but they have the strides of their sets."""
    call = fake_programs(monkeypatch)
    plan, ids = Plan(), torch.zeros(2, 100, 3, dtype=torch.long)
    for whole in (ids, ids[:, :50].contiguous(), ids):
        part = Batch(torch.zeros(1, 5, 4), whole[:, :25], whole[:, :25])
        (made_for, _), given = call(part, plan, None)
        assert made_for == given


def test_threads_that_train_at_once_do_not_take_each_others_program(monkeypatch):
    call, found = fake_programs(monkeypatch, 0.1), []

    def trains(size):
        plan, ids = Plan(), torch.zeros(2, size, 3, dtype=torch.long)
        batch = Batch(torch.zeros(1, size, 4), ids, ids)
        for _ in range(50):
            (made_for, _), given = call(batch, plan, None)
            found.append(made_for == given)
            time.sleep(0.002)

    threads = [threading.Thread(target=trains, args=(size,)) for size in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 150 and all(found)
