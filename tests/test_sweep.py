"""Sweeps, and runs on workers: here, in processes, and on a real Dask cluster on loopback."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import ROOT

from ihbook import Store, seeds, train
from ihbook.__main__ import main
from ihbook.chapters import sweep
from ihbook.clamps import Copy
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.engine import cluster as spread
from ihbook.engine import folders
from ihbook.engine.prepared import prepare

CELLS = ["x = 1\nseed = 0\nprofile = None\nwait = None", """\
import os, time
from pathlib import Path
from ihbook.chapters import claims
if wait:
    (Path(wait) / f"{os.getpid()}").touch()
    while not (Path(wait) / "go").exists():
        time.sleep(0.05)
if x < 0:
    raise ArithmeticError(f"x is {x}")
verdicts = [claims.judge("final-loss", [x / 1000, x / 10_000 + seed]), claims.judge("plateau", [])]
"""]


@pytest.fixture
def notebook(tmp_path):
    """A small chapter: two parameters, numbers that follow from them, and an error where x is negative."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(made, tmp_path / "chapter.ipynb")
    return tmp_path / "chapter.ipynb"


@pytest.fixture(scope="module")
def cluster():
    """A Dask scheduler and two workers of one thread each, as processes: the address, the workers, a function to start one."""
    pytest.importorskip("distributed", reason="Dask is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    host, port = address.removeprefix("tcp://").split(":")
    dask = [sys.executable, "-m", "dask"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen([*dask, "scheduler", "--host", host, "--port", port, "--no-dashboard", "--no-show"], **silent)

    def start():
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", host]
        return subprocess.Popen([*dask, "worker", address, *options], **silent)

    workers = [start(), start()]
    wait_for(address, 2)
    yield address, workers, start
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


def wait_for(address, n):
    """Wait until the cluster has `n` workers."""
    for _ in range(60):
        try:
            with spread.connect(address) as client:
                client.wait_for_workers(n, timeout=30)
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the cluster did not start")


def threads_that_train(client):
    """How many threads of each worker train, by its address."""
    def count():  # not of this module, which workers do not have
        n = 0
        for frame in sys._current_frames().values():
            while frame is not None:
                n += frame.f_code.co_name == "train_family"
                frame = frame.f_back
        return n

    return client.run(count)


GRID = {"x": [1, 4], "seed": [0, 1]}


def expected(grid=GRID):
    return [(x, seed, nth, value, "undecided" if seed else "holds")
            for x in grid["x"] for seed in grid["seed"] for nth, value in enumerate((x / 1000, x / 10_000 + seed))]


def rows(table):
    chosen = table[table["claim"] == "final-loss"]
    return list(chosen[["x", "seed", "nth", "value", "verdict"]].itertuples(index=False, name=None))


@pytest.mark.slow
def test_a_sweep_gathers_every_number(notebook, tmp_path):
    done = sweep.sweep(notebook, GRID, tmp_path / "out", progress=False)
    assert rows(done.table) == expected() and not done.failed
    untested = done.table[done.table["claim"] == "plateau"]
    assert len(untested) == 4 and set(untested["verdict"]) == {"not tested"} and untested["value"].isna().all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out/numbers.parquet"), done.table)
    page = done.page.read_text()
    assert "4 of 4 points" in page and 'alt="Against x' in page and page.count("out.ipynb") == 4
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("out.ipynb")}
    again = sweep.sweep(notebook, GRID | {"seed": [0, 1, 2]}, tmp_path / "out", progress=False)
    assert len(rows(again.table)) == 12
    assert {path: path.stat().st_mtime_ns for path in written} == written  # finished points were skipped
    assert len(list(tmp_path.rglob("out.ipynb"))) == 6


@pytest.mark.slow
def test_a_failing_point_does_not_stop_the_others(notebook, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["sweep", str(notebook), "-p", "x", "1", "-1", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert code == 1 and "x=-1" in said and "ArithmeticError: x is -1" in said and "1 points failed" in said
    assert sorted(set(pd.read_parquet(out / "numbers.parquet")["x"])) == [1, 2]
    left = [path for path in out.glob("points/*") if not (path / "numbers.json").exists()]
    assert len(left) == 1 and "x is -1" in (left[0] / "out.ipynb").read_text() and "x is -1" in (out / "index.html").read_text()
    assert main(["sweep", str(notebook), "-p", "x", "1", "2", "--out", str(out)]) == 0  # both are finished


@pytest.mark.slow
def test_a_sweep_of_nothing_but_failures(notebook, tmp_path):
    done = sweep.sweep(notebook, {"x": [-1]}, tmp_path / "out", progress=False)
    assert len(done.failed) == 1 and done.table.empty and "value" in pd.read_parquet(tmp_path / "out/numbers.parquet")
    assert "0 of 1 points" in done.page.read_text()


@pytest.mark.slow
def test_values_of_several_kinds_and_places_that_are_relative(notebook, tmp_path, monkeypatch):
    """A parameter has None, numbers and strings; `out` is relative to the working folder; three parameters vary."""
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        done = sweep.sweep("chapter.ipynb", {"x": [1, 2], "wait": [None, 0, ""], "seed": np.arange(2)}, "out", executor=pool,
                           progress=False)
    assert not done.failed and len(rows(done.table)) == 24 and done.page.samefile(tmp_path / "out/index.html")
    assert sorted(set(done.table["wait"])) == ["", "0", "None"]


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished(notebook, tmp_path, monkeypatch):
    def two(source, waiting, executor):
        yield waiting[0], sweep.execute(source, waiting[0].parameters)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_executed", two)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(notebook, GRID, tmp_path / "out", progress=False)
    assert len(rows(pd.read_parquet(tmp_path / "out/numbers.parquet"))) == 2
    assert "1 of 4 points" in (tmp_path / "out/index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_sweep_in_processes_ends_all_of_them(notebook, tmp_path, number):
    (wait := tmp_path / "wait").mkdir()
    sweeping = subprocess.Popen([sys.executable, "-m", "ihbook", "sweep", str(notebook), "-p", "x", "1", "4", "-p", "wait", str(wait),
                                 "--processes", "2", "--out", str(tmp_path / "out")], stderr=subprocess.DEVNULL,
                                # A shell ignores Ctrl-C for what it starts in the background, and a child would too.
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(3000):
        if len(list(wait.iterdir())) == 2:  # the chapters run, and wait
            break
        time.sleep(0.1)
    started = psutil.Process(sweeping.pid).children(recursive=True)
    assert len(started) >= 4  # two processes and their kernels
    sweeping.send_signal(number)
    assert sweeping.wait(60) != 0
    _, alive = psutil.wait_procs(started, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


def test_a_place_that_cannot_be_written_is_named_before_anything_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_executed", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose another folder for out"):
        sweep.sweep(notebook, GRID, tmp_path / "file", progress=False)


@pytest.mark.slow
def test_processes_give_the_same_table(notebook, tmp_path):
    here = sweep.sweep(notebook, GRID, tmp_path / "here", progress=False)
    with sweep.executor_for(processes=2) as pool:
        there = sweep.sweep(notebook, GRID, tmp_path / "there", executor=pool, progress=False)
    pd.testing.assert_frame_equal(here.table, there.table)


@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
def test_a_sweep_on_a_cluster_and_a_worker_killed_in_the_middle(notebook, tmp_path, cluster):
    address, workers, start = cluster
    with sweep.executor_for(scheduler=address) as executor:
        done = sweep.sweep(notebook, GRID, tmp_path / "out", executor=executor, progress=False)
    assert rows(done.table) == expected() and not done.failed

    waiting = tmp_path / "waiting"
    waiting.mkdir()
    command = [sys.executable, "-m", "ihbook", "sweep", notebook, "-p", "x", "1", "4", "-p", "seed", "0:2", "-p", "wait", waiting,
               "--out", tmp_path / "killed", "--scheduler", address]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(3000):
        if len(list(waiting.iterdir())) == 2:  # both workers have a kernel in the middle of a point
            break
        time.sleep(0.1)
    assert len(list(waiting.iterdir())) == 2
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait()
    (waiting / "go").touch()
    said, _ = job.communicate(timeout=900)
    assert job.returncode == 0, said
    table = pd.read_parquet(tmp_path / "killed/numbers.parquet")
    assert rows(table) == expected()
    workers[0] = start()
    wait_for(address, 2)


RUN = RunConfig(bank=BankConfig("gaussian", n_classes=30, dim=16), task=TaskConfig(n_classes=10, n_test_classes=10),
                model=ModelConfig(d_model=16, n_heads=2), n_sequences=1600, lr=3e-3, eval_every=800, eval_size=50,
                checkpoint_every=800)


@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
def test_runs_on_a_cluster_are_those_trained_here(tmp_path, cluster):
    address, _, _ = cluster
    runs = [*seeds(RUN, 3), replace(RUN, clamps=(Copy((1, 0)),))]
    with spread.connect(address) as client:
        there = Store(tmp_path / "there").fetch(runs, client=client, progress=False)
    here = Store(tmp_path / "here").fetch(runs, progress=False)
    for a, b in zip(there, here, strict=True):
        pd.testing.assert_frame_equal(a.metrics, b.metrics, atol=1e-4, rtol=1e-4)
        assert a.run == b.run and sorted(a.checkpoints) == [0, 800, 1600]
    stored = Store(tmp_path / "there")
    assert not stored.verify() and len(list(stored.entries())) == 4
    assert {path.name for path in (tmp_path / "there/runs").iterdir()} == {path.name for path in (tmp_path / "here/runs").iterdir()}
    again = stored.fetch(runs, progress=False)  # read back, without a client
    assert all(a.weights == b.weights for a, b in zip(again, there, strict=True))


@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
def test_train_with_a_client_needs_no_store(tmp_path, cluster):
    runs = [*seeds(RUN, 2), replace(RUN, clamps=(Copy((1, 0)),))]
    with spread.connect(cluster[0]) as client:
        there = train(runs, client=client, progress=False)
        with pytest.raises(ValueError, match="directory='here' with a client"):
            train(runs, client=client, directory="here")
    for a, b in zip(there, train(runs, progress=False), strict=True):
        pd.testing.assert_frame_equal(a.metrics, b.metrics, atol=1e-4, rtol=1e-4)
        pd.testing.assert_frame_equal(a.heads, b.heads, atol=1e-4, rtol=1e-4)
        assert a.run == b.run and sorted(a.checkpoints) == [0, 800, 1600] and a.checkpoints[1600] == a.weights


@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
def test_what_a_stopped_call_leaves_on_the_workers_ends(cluster):
    """A family would train for hours; its worker is free again within seconds of the end of the call, or once it has compiled."""
    runs = [replace(RUN, n_sequences=10**9, lr=1e-3), RUN]  # two families, one per worker
    with spread.connect(cluster[0]) as client:
        asked = spread.train_on_workers(client, prepare(runs), progress=False)
        assert next(asked)[0] == 1 and sum(threads_that_train(client).values()) == 1
        asked.close()
        started = time.monotonic()
        while any(threads_that_train(client).values()):
            assert time.monotonic() - started < 900  # to compile takes minutes where other work takes the cores; to train, hours
            time.sleep(0.5)


@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
def test_a_bank_of_ones_own_travels_to_the_workers(tmp_path, cluster, small_bank):
    runs = seeds(replace(RUN, bank=BankConfig()), 2)  # the config says glyphs; the bank given replaces them
    with spread.connect(cluster[0]) as client:
        there = Store(tmp_path / "there").fetch(runs, bank=small_bank, client=client, progress=False)
    here = Store(tmp_path / "here").fetch(runs, bank=small_bank, progress=False)
    for a, b in zip(there, here, strict=True):
        pd.testing.assert_frame_equal(a.metrics, b.metrics, atol=1e-4, rtol=1e-4)


@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
def test_a_worker_killed_while_it_trains(tmp_path, cluster):
    address, workers, start = cluster
    runs = seeds(replace(RUN, n_sequences=200_000), 6)
    with spread.connect(address) as client, ThreadPoolExecutor(1) as thread:
        job = thread.submit(Store(tmp_path).fetch, runs, client=client, progress=False)
        while not (busy := [where for where, n in threads_that_train(client).items() if n]):
            assert not job.done()
            time.sleep(0.1)
        pid = client.run(os.getpid, workers=busy)[busy[0]]
        killed = [worker.pid for worker in workers].index(pid)
        workers[killed].send_signal(signal.SIGKILL)
        results = job.result(timeout=900)
    assert [r.run for r in results] == runs and not Store(tmp_path).verify()
    workers[killed].wait()
    workers[killed] = start()
    wait_for(address, 2)


def test_a_worker_that_draws_other_characters_says_so():
    with pytest.raises(RuntimeError, match="other characters"):
        spread.train_on_this_worker([RUN], None, "0" * 64)


def test_what_a_worker_sends_is_verified(tmp_path):
    [each] = prepare([RUN])
    [files] = spread.train_on_this_worker([RUN], None, each.bank.digest)
    ours = Store(tmp_path)
    with pytest.raises(folders.Damaged, match="metrics.parquet is not what was written"):
        ours._receive(each, files | {"metrics.parquet": b"other"})
    book = json.loads(files["config.json"]) | {"version": -1}
    changed = json.dumps(book).encode()
    manifest = json.loads(files["manifest.json"]) | {"config.json": hashlib.sha256(changed).hexdigest()}
    with pytest.raises(RuntimeError, match="another version"):
        ours._receive(each, files | {"config.json": changed, "manifest.json": json.dumps(manifest).encode()})
    assert not list(ours.entries())
    ours._receive(each, files)
    assert ours.get(each) is not None


def test_workers_are_sent_what_they_are_made_for():
    small, large, gpu = spread.Worker("a", 1, False), spread.Worker("b", 3, False), spread.Worker("c", 4, True)
    take = spread.share_out([list(range(700)), [700, 701, 702], []])
    assert take(small) == list(range(8)) and take(large) == list(range(8, 16))
    assert take(gpu) == list(range(16, 528)) and take(gpu) == list(range(528, 700))  # a share is of one group
    assert [take(small), take(small)] == [[700, 701, 702], []]
    assert [worker.jobs for worker in (small, large, gpu)] == [1, 3, 1]


@pytest.mark.slow
def test_a_scheduler_that_is_not_there_is_a_clear_error(notebook, tmp_path, capsys):
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(notebook), "-p", "x", "1", "--out", str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:9"])
    assert stopped.value.code == 2 and time.monotonic() - started < 15
    assert "no Dask scheduler answers at 'tcp://127.0.0.1:9'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["-p", "y", "1"], "no parameter 'y'; it has x, seed, profile, wait"), (["-p", "x"], "-p x: give its values once"),
    (["-p", "x", "1", "1"], "none twice"), (["-p", "x", "1", "-p", "x", "2"], "-p x: give its values once"),
    (["-p", "x", "3:3"], "x=[]: give at least one value"), (["-p", "x", "1", "--processes", "0"], "processes=0"),
    (["-p", "x", "[1, 2]"], "x=[1, 2]: a parameter is a number"),
    (["-p", "x", "1", "--scheduler", ""], "no Dask scheduler answers at ''"),
])
def test_bad_grids_are_named_before_anything_runs(notebook, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(["sweep", str(notebook), *arguments, "--out", str(tmp_path / "out")])
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_values_on_the_command_line():
    found = sweep.grid([["a", "5", "0.5", "quick", "None", "True", "@x", "2024-01-01", "1e6", "010"], ["seed", "0:3", "7"]])
    assert found == {"a": [5, 0.5, "quick", None, True, "@x", "2024-01-01", 1e6, "010"], "seed": [0, 1, 2, 7]}
    with pytest.raises(ValueError, match="give a list"):
        sweep.points(ROOT / "book/02_phase_change.ipynb", {"bank": "glyphs"}, "out")


def test_a_notebook_without_claims_is_refused(tmp_path):
    with pytest.raises(ValueError, match="makes no list `verdicts`"):
        sweep.points(ROOT / "book/01_task.ipynb", {"seed": [1]}, tmp_path)
    with pytest.raises(ValueError, match="there is no notebook"):
        sweep.points(tmp_path / "none.ipynb", {}, tmp_path)


def test_a_change_of_the_notebook_or_the_profile_is_another_point(notebook, tmp_path, monkeypatch):
    [first] = sweep.points(notebook, {"x": [1]}, tmp_path)
    monkeypatch.setenv("IHBOOK_PROFILE", "quick")
    [second] = sweep.points(notebook, {"x": [1]}, tmp_path)
    notebook.write_text(notebook.read_text().replace("x / 1000", "x / 500"))
    [third] = sweep.points(notebook, {"x": [1]}, tmp_path)
    assert len({first.folder, second.folder, third.folder}) == 3
    [same] = sweep.points(notebook, {"x": [1], "profile": ["quick"]}, tmp_path)
    assert same.folder == third.folder
    monkeypatch.setattr(sweep, "_package", lambda: "edited")  # as is a change of the package
    [fourth] = sweep.points(notebook, {"x": [1]}, tmp_path)
    assert fourth.folder != third.folder
    assert first.parameters == {"profile": "paper", "x": 1} and second.parameters == {"profile": "quick", "x": 1}
