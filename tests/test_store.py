"""The store: stored runs are read and not trained, damaged runs are trained again, and no work is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from test_train import RUN, same

from ihbook import clamps, engine, train
from ihbook.__main__ import main
from ihbook.engine import folders, step
from ihbook.engine.prepared import Prepared
from ihbook.engine.store import Store, default_root
from ihbook.files import writing


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "cache"))  # whose programs are pruned with it
    return Store(tmp_path / "store")


def fetch(store, runs, bank):
    return store.fetch(runs, bank=bank, progress=False)


def never(*args):
    raise AssertionError("a stored run was trained")


def test_a_stored_run_is_read_and_not_trained(store, small_bank, monkeypatch):
    runs = [RUN, replace(RUN, init_seed=6, n_sequences=1600), replace(RUN, clamps=(clamps.Induction((1, 0)),)), RUN]
    first = fetch(store, runs, small_bank)
    assert [r.run for r in first] == runs and first[0].weights == first[3].weights != first[1].weights
    for stored, plain in zip(first, train(runs, bank=small_bank, progress=False), strict=True):
        torch.testing.assert_close(dict(stored.weights.tensors), dict(plain.weights.tensors), atol=1e-5, rtol=1e-4)
    assert len(list(store.entries())) == 3 and not list(store.root.glob("training/*"))
    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=never))
    for a, b in zip(first, fetch(store, runs, small_bank), strict=True):
        same(a, b)
    assert sorted(first[0].checkpoints) == [0, 800, 1600, 2400, 3200]
    with pytest.raises(KeyError, match="no checkpoint at 5 sequences; there are"):
        first[0].checkpoints[5]


def test_another_bank_is_another_run(store, small_bank, monkeypatch):
    other = replace(small_bank, features=small_bank.features + 1)
    a, b = (fetch(store, [RUN], bank)[0] for bank in (small_bank, other))
    assert a.weights != b.weights and len(list(store.entries())) == 2
    monkeypatch.setattr(engine, "VERSION", 999)
    assert store.get(Prepared.of(RUN, small_bank)) is None


def test_a_longer_run_serves_its_beginning(store, small_bank, monkeypatch):
    run = replace(RUN, eval_every=800)
    fetch(store, [run], small_bank)
    [plain] = train([replace(run, n_sequences=1600)], bank=small_bank, progress=False)
    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=never))
    [short] = fetch(store, [replace(run, n_sequences=1600)], small_bank)
    same(short, plain)
    with pytest.raises(AssertionError, match="was trained"):  # no checkpoint there
        fetch(store, [replace(run, n_sequences=960)], small_bank)
    with pytest.raises(AssertionError, match="was trained"):  # the stored run is shorter
        fetch(store, [replace(run, n_sequences=4000)], small_bank)


def test_a_longer_run_without_evaluations_serves_nothing_else(store, small_bank):
    run = replace(RUN, eval_every=0, checkpoint_every=0)
    long, short = (fetch(store, [replace(run, n_sequences=n)], small_bank)[0] for n in (960, 320))
    assert long.weights != short.weights


def test_a_length_that_decides_the_learning_rate_is_part_of_the_run(store, small_bank):
    run = replace(RUN, eval_every=800, schedule="cosine")
    long = fetch(store, [run], small_bank)[0]
    assert fetch(store, [replace(run, n_sequences=1600)], small_bank)[0].weights != long.checkpoints[1600]


DAMAGE = {"truncated": lambda b: b[:-7], "a bit flipped": lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:],
          "empty": lambda b: b"", "gone": None}
FILES = ["config.json", "metrics.parquet", "heads.parquet", "weights.safetensors", "checkpoints/1600.safetensors", "manifest.json"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory, small_bank):
    """A store with one run."""
    store = Store(tmp_path_factory.mktemp("stored"))
    return store, fetch(store, [RUN], small_bank)[0]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_reported_and_the_run_trained_again(stored, store, small_bank, name, damage):
    original, first = stored
    shutil.copytree(original.root, store.root)
    weights = first.weights
    [entry] = store.entries()
    assert {p.relative_to(entry.folder).as_posix() for p in entry.folder.rglob("*") if p.is_file()} >= set(FILES)
    path = entry.folder / name
    if DAMAGE[damage]:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    else:
        path.unlink()
    assert list(store.verify()) == [entry.folder]
    with pytest.warns(UserWarning, match="is damaged"):
        again = fetch(store, [RUN], small_bank)[0]
    assert again.weights == weights and not store.verify()
    pd.testing.assert_frame_equal(again.metrics, first.metrics)


SCRIPT = textwrap.dedent("""
    import sys
    sys.path.insert(0, {tests!r})
    from dataclasses import replace
    import torch
    from test_train import RUN
    from ihbook.engine import family, step
    from ihbook.task import Bank
    from ihbook import Store

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 1, 16, generator=generator)
    bank = Bank(centres + 0.1 * torch.randn(40, 3, 16, generator=generator), None, {{}})
    runs = [replace(RUN, n_sequences=n, checkpoint_every=0) for n in {lengths}]
    count = 0

    def counted(*args):
        global count
        count += 1
        return step.train_step(*args)

    step.PLAIN = replace(step.PLAIN, step=counted)
    family.SAVE_SECONDS = 0.05
    Store(sys.argv[1]).fetch(runs, bank=bank, progress=False)
    print(count)
""")


def start(store, tmp_path, lengths):
    code = SCRIPT.format(tests=str(Path(__file__).parent), lengths=lengths)
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(store.root)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_train_a_run_once(store, tmp_path, small_bank):
    processes = [start(store, tmp_path, lengths) for lengths in ([16_000, 32_000], [32_000])]
    steps = [int(p.communicate(timeout=900)[0]) for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert sorted(steps) in ([0, 1000], [500, 1000])  # the first process trains all it needs, the other one the rest
    assert len(list(store.entries())) == 2


@pytest.mark.slow
def test_killed_at_several_moments_and_resumed_bit_for_bit(store, tmp_path, small_bank):
    """SIGKILL may come during a step, a save, an evaluation, or the storing of results."""
    lengths = [32_000, 16_000]
    for seconds in (0.3, 0.05, 0.6, 0.2):
        process = start(store, tmp_path, lengths)
        deadline = time.monotonic() + 600
        seen = set(store.root.glob("training/*/state.safetensors"))
        stamp = {p: p.stat().st_mtime_ns for p in seen}
        while process.poll() is None and time.monotonic() < deadline:
            now = list(store.root.glob("training/*/state.safetensors"))
            if any(stamp.get(p) != p.stat().st_mtime_ns for p in now):
                break
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
        process.wait()
        process.stdout.close()
    runs = [replace(RUN, n_sequences=n, checkpoint_every=0) for n in lengths]
    whole = train(runs, bank=small_bank, progress=False)
    for a, b in zip(whole, fetch(store, runs, small_bank), strict=True):
        same(a, b)


def test_a_store_that_cannot_be_written_is_a_clear_error(small_bank, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="IHBOOK_STORE"):
        fetch(Store(tmp_path / "file" / "store"), [RUN], small_bank)


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_one_that_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), writing(tmp_path / "out"):
        (tmp_path.parent / "elsewhere").read_text()
    with pytest.raises(OSError, match="can't write.*IHBOOK_STORE"), writing(tmp_path / "out") as partial:
        partial.with_name("there").read_text()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_clear_error_and_loses_nothing(store, small_bank, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(OSError, match="No space left.*IHBOOK_STORE"):
            fetch(store, [RUN], small_bank)
    assert not list(store.entries())
    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=never))
    assert fetch(store, [RUN], small_bank)[0].run == RUN  # its training was finished, and is stored now


def test_the_command_line_lists_verifies_and_prunes(store, small_bank, capsys):
    fetch(store, [RUN, replace(RUN, init_seed=9, clamps=(clamps.PerfectLayer1(), clamps.Copy((1, 0))))], small_bank)
    root = ["--root", str(store.root)]
    assert main(["store", "list", *root]) == 0
    listed = capsys.readouterr().out
    assert "seed 9, PerfectLayer1 + Copy" in listed and "seed 5, no clamp" in listed and "MB in all" in listed
    assert main(["store", "verify", *root]) == 0 and "2 runs are whole, 0 damaged" in capsys.readouterr().out
    [first, _] = store.entries()
    (first.folder / "weights.safetensors").write_bytes(b"")
    assert main(["store", "verify", *root]) == 1 and "weights.safetensors is not what was written" in capsys.readouterr().out
    assert main(["store", "prune", *root]) == 0 and first.folder.name in capsys.readouterr().out
    assert len(list(store.entries())) == 1
    os.utime(next(store.entries()).folder, (0, 0))
    assert len(store.prune(days=1)) == 1 and not list(store.entries())


def test_where_the_store_is(monkeypatch, tmp_path):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path / "elsewhere"))
    assert default_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("IHBOOK_STORE")
    assert default_root().name == "ihbook"


def test_what_a_folder_says_of_itself(store, small_bank):
    fetch(store, [RUN], small_bank)
    [entry] = store.entries()
    assert entry.config["run"]["n_sequences"] == 3200 and entry.config["bank"]["digest"] == small_bank.digest
    assert json.loads((entry.folder / "manifest.json").read_text()).keys() >= {"config.json", "weights.safetensors"}


def test_what_is_not_the_stores_is_left_alone(store, small_bank, capsys):
    """Another tool's `runs` and `training` may lie in the same folder."""
    fetch(store, [RUN], small_bank)
    theirs = [store.root / name for name in ("runs/Aug01-12_host", "runs/1000000.bak-1", "runs/.git", "training/images")]
    for folder in theirs:
        folder.mkdir(parents=True)
    (store.root / "runs" / ".DS_Store").write_text("x")
    (store.root / "training" / ("0" * 24)).mkdir()
    [entry] = store.entries()
    shutil.copytree(entry.folder, entry.folder.with_name(entry.folder.name + ".bak"))
    assert store.get(Prepared.of(RUN, small_bank)) is not None
    assert [path.name for path in store.prune()] == ["0" * 24] and not store.verify()
    assert store.prune(everything=True) == [entry.folder] and all(folder.exists() for folder in theirs)
    with pytest.raises(ValueError, match="days=-1"):
        store.prune(days=-1)
    with pytest.raises(SystemExit):
        main(["store", "prune", "--days", "-1", "--root", str(store.root)])
    assert "days=-1" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_just_now_is_not_removed(store, small_bank, monkeypatch):
    def busy(path):
        raise OSError(errno.EMFILE, "Too many open files")

    fetch(store, [RUN], small_bank)
    with monkeypatch.context() as patched:
        patched.setattr(folders, "sha256", busy)
        with pytest.raises(OSError, match="Too many open files"):
            fetch(store, [RUN], small_bank)
    assert store.get(Prepared.of(RUN, small_bank)) is not None


def test_a_damaged_run_is_passed_over_by_who_does_not_hold_its_lock(store, small_bank):
    fetch(store, [RUN], small_bank)
    [entry] = store.entries()
    (entry.folder / "weights.safetensors").write_bytes(b"")
    prepared = Prepared.of(RUN, small_bank)
    assert store.get(prepared, mend=False) is None and entry.folder.exists()
    with pytest.warns(UserWarning, match="damaged"):
        assert store.get(prepared) is None
    assert not entry.folder.exists()


def test_what_cannot_be_stored_leaves_nothing_behind(store, small_bank, monkeypatch):
    def full(folder, each, result):
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    [result] = train([RUN], bank=small_bank, progress=False)
    prepared = Prepared.of(RUN, small_bank)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="free space there"):
        patched.setattr(folders, "write", full)
        store.put(prepared, result)
    assert not list((store.root / "runs").iterdir())
    same(store.put(prepared, result), result)  # also a result whose checkpoints are in memory
    umask = os.umask(0)
    os.umask(umask)
    assert next(store.entries()).folder.stat().st_mode & 0o777 == 0o777 & ~umask  # others may read a shared store


def test_locks_are_free_afterwards(store, small_bank):
    fetch(store, [RUN], small_bank)
    [path] = (store.root / "locks").iterdir()
    with FileLock(path, timeout=0):
        pass


def test_too_many_runs_at_once_say_what_helps(store, small_bank, monkeypatch):
    def acquire(self, timeout=None):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(OSError, match="ulimit -n"):
        fetch(store, [RUN], small_bank)
