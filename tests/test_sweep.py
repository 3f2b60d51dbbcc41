"""Sweeps and spread runs: a grid of points, here and on a real Dask cluster on loopback."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import pandas as pd
import pytest

from ihbook import spread, sweep
from ihbook.__main__ import main
from ihbook.clamps import Copy
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.store import Store
from ihbook.train import BLOCK, seeds

CELLS = ["x = 1\nseed = 0\nprofile = None\nwait = None", """\
import os, time
from pathlib import Path
from ihbook import claims
if wait:
    (Path(wait) / f"{os.getpid()}").touch()
    while not (Path(wait) / "go").exists():
        time.sleep(0.05)
if x < 0:
    raise ArithmeticError(f"x is {x}")
verdicts = [claims.judge("final-loss", [x / 100, x / 10 + seed]), claims.judge("plateau", [])]
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
    """A Dask scheduler and two workers of one thread each, real processes; its address and the workers."""
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
    """Until so many workers are there."""
    for _ in range(60):
        try:
            with spread.connect(address) as client:
                client.wait_for_workers(n, timeout=30)
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the cluster did not start")


GRID = {"x": [1, 4], "seed": [0, 1]}


def expected(grid=GRID):
    return [(x, seed, nth, value, "differs" if (x / 100 + x / 10 + seed) / 2 > 0.03 else "holds")
            for x in grid["x"] for seed in grid["seed"] for nth, value in enumerate((x / 100, x / 10 + seed))]


def rows(table):
    chosen = table[table["claim"] == "final-loss"]
    return list(chosen[["x", "seed", "nth", "value", "verdict"]].itertuples(index=False, name=None))


def test_a_sweep_gathers_every_number(notebook, tmp_path):
    done = sweep.sweep(notebook, GRID, tmp_path / "out", progress=False)
    assert rows(done.table) == expected() and not done.failed
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out/numbers.parquet"), done.table)
    page = done.page.read_text()
    assert "4 of 4 points" in page and 'alt="Against x' in page and page.count("out.ipynb") == 4
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("out.ipynb")}
    again = sweep.sweep(notebook, GRID | {"seed": [0, 1, 2]}, tmp_path / "out", progress=False)
    assert len(rows(again.table)) == 12
    assert {path: path.stat().st_mtime_ns for path in written} == written  # finished points were skipped
    assert len(list(tmp_path.rglob("out.ipynb"))) == 6


def test_a_failing_point_does_not_stop_the_others(notebook, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["sweep", str(notebook), "-p", "x", "1", "-1", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert code == 1 and "x=-1" in said and "ArithmeticError: x is -1" in said and "1 points failed" in said
    assert sorted(set(pd.read_parquet(out / "numbers.parquet")["x"])) == [1, 2]
    left = [path for path in out.glob("points/*") if not (path / "numbers.json").exists()]
    assert len(left) == 1 and "x is -1" in (left[0] / "out.ipynb").read_text() and "x is -1" in (out / "index.html").read_text()
    assert main(["sweep", str(notebook), "-p", "x", "1", "2", "--out", str(out), "--processes", "2"]) == 0


def test_processes_give_the_same_table(notebook, tmp_path):
    here = sweep.sweep(notebook, GRID, tmp_path / "here", progress=False)
    with sweep.places(processes=2) as pool:
        there = sweep.sweep(notebook, GRID, tmp_path / "there", executor=pool, progress=False)
    pd.testing.assert_frame_equal(here.table, there.table)


def test_a_sweep_on_a_cluster_and_a_worker_killed_in_the_middle(notebook, tmp_path, cluster):
    address, workers, start = cluster
    with sweep.places(scheduler=address) as executor:
        done = sweep.sweep(notebook, GRID, tmp_path / "out", executor=executor, progress=False)
    assert rows(done.table) == expected() and not done.failed

    waiting = tmp_path / "waiting"
    waiting.mkdir()
    command = [sys.executable, "-m", "ihbook", "sweep", notebook, "-p", "x", "1", "4", "-p", "seed", "0:2", "-p", "wait", waiting,
               "--out", tmp_path / "killed", "--scheduler", address]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(600):
        if len(list(waiting.iterdir())) == 2:  # both workers have a kernel in the middle of a point
            break
        time.sleep(0.1)
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait()
    (waiting / "go").touch()
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    table = pd.read_parquet(tmp_path / "killed/numbers.parquet")
    assert rows(table) == expected()
    workers[0] = start()
    wait_for(address, 2)


RUN = RunConfig(bank=BankConfig("gaussian", n_classes=30, dim=16), task=TaskConfig(n_classes=10, n_test_classes=10),
                model=ModelConfig(d_model=16, n_heads=2), n_sequences=1600, lr=3e-3, eval_every=800, eval_size=50,
                checkpoint_every=800)


def test_runs_on_a_cluster_are_those_trained_here(tmp_path, cluster):
    address, _, _ = cluster
    runs = [*seeds(RUN, 3), replace(RUN, clamps=(Copy((1, 0)),))]
    with spread.connect(address) as client:
        there = Store(tmp_path / "there").fetch(runs, executor=client, progress=False)
    here = Store(tmp_path / "here").fetch(runs, progress=False)
    for a, b in zip(there, here, strict=True):
        pd.testing.assert_frame_equal(a.metrics, b.metrics, atol=1e-4, rtol=1e-4)
        assert a.config == b.config and sorted(a.checkpoints) == [0, 800, 1600]
    stored = Store(tmp_path / "there")
    assert not stored.verify() and len(list(stored.entries())) == 4
    assert {path.name for path in (tmp_path / "there/runs").iterdir()} == {path.name for path in (tmp_path / "here/runs").iterdir()}
    again = stored.fetch(runs, progress=False)  # read back, with no executor
    assert all(a.weights == b.weights for a, b in zip(again, there, strict=True))


def test_what_a_worker_sends_is_verified(tmp_path):
    from ihbook import family, store
    [each] = family.prepare([RUN])
    [files] = store._elsewhere([RUN], [])
    ours = Store(tmp_path)
    with pytest.raises(store.Damaged, match="metrics.parquet is not what was written"):
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
    found = spread.shares([list(range(16))], [100] * 16, [small, large])
    assert sorted(i for _, share in found for i in share) == list(range(16))
    assert all(len(share) <= BLOCK["cpu"] for _, share in found)
    of = {worker: sum(len(share) for w, share in found if w == worker) for worker in (small, large)}
    assert of == {small: 4, large: 12}
    assert spread.shares([list(range(100))], [5] * 100, [small, gpu]) == [(gpu, list(range(100)))]


def test_a_scheduler_that_is_not_there_is_a_clear_error(notebook, tmp_path, capsys):
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(notebook), "-p", "x", "1", "--out", str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:9"])
    assert stopped.value.code == 2 and time.monotonic() - started < 15
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["-p", "y", "1"], "no parameter 'y'; it has x, seed, profile, wait"), (["-p", "x"], "-p x: give its values once"),
    (["-p", "x", "1", "1"], "none twice"), (["-p", "x", "1", "-p", "x", "2"], "-p x: give its values once"),
    (["-p", "x", "3:3"], "x=[]: give at least one value"), (["-p", "x", "1", "--processes", "0"], "processes=0"),
])
def test_bad_grids_are_named_before_anything_runs(notebook, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(["sweep", str(notebook), *arguments, "--out", str(tmp_path / "out")])
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_values_on_the_command_line():
    found = sweep.grid([["a", "5", "0.5", "quick", "None", "true"], ["seed", "0:3", "7"]])
    assert found == {"a": [5, 0.5, "quick", None, True], "seed": [0, 1, 2, 7]}


def test_a_notebook_without_claims_is_refused(tmp_path):
    with pytest.raises(ValueError, match="makes no list `verdicts`"):
        from conftest import ROOT
        sweep.points(ROOT / "book/01_task.ipynb", {"seed": [1]}, tmp_path)
    with pytest.raises(ValueError, match="there is no notebook"):
        sweep.points(tmp_path / "none.ipynb", {}, tmp_path)


def test_a_change_of_the_notebook_or_the_profile_is_another_point(notebook, tmp_path, monkeypatch):
    [first] = sweep.points(notebook, {"x": [1]}, tmp_path)
    monkeypatch.setenv("IHBOOK_PROFILE", "quick")
    [second] = sweep.points(notebook, {"x": [1]}, tmp_path)
    notebook.write_text(notebook.read_text().replace("x / 100", "x / 50"))
    [third] = sweep.points(notebook, {"x": [1]}, tmp_path)
    assert len({first.folder, second.folder, third.folder}) == 3
    assert first.parameters == {"profile": "paper", "x": 1} and second.parameters == {"profile": "quick", "x": 1}
