"""Compiled functions on disk: compiled once, loaded afterwards, never run when damaged or made for something else."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from filelock import FileLock

from ihbook import Store, files
from ihbook.clamps.compose import Plan
from ihbook.engine import compiled, programs
from ihbook.task import Batch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("programs"),
              pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler on this machine")]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


def plain(x, factor):
    """In place, as a training step is; a constant of the graph, as the rotary angles are."""
    x.add_(factor * x.new_tensor([1.0, 2.0, 3.0]))
    return {"twice": 2 * x, "sum": x.sum()}


def use(factor=0.5):
    x = torch.ones(3)
    function = programs.compiled(plain, (x, factor), [x])
    found = function(x)
    assert torch.equal(x, 1 + factor * torch.tensor([1.0, 2.0, 3.0])) and list(found) == ["twice", "sum"]
    assert torch.equal(found["twice"], 2 * x) and found["sum"] == x.sum()


def never(*args):
    raise AssertionError("it was compiled again")


def test_a_function_is_compiled_once_and_loaded_afterwards(cache, monkeypatch):
    use()
    monkeypatch.setattr(programs, "_compile", never)
    use()
    assert len(list(cache.glob("*.so"))) == 1
    with pytest.warns(UserWarning, match="it was compiled again"):  # another constant is another function
        assert programs.compiled(plain, (torch.ones(3), 0.25), [torch.ones(3)]) is None


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from ihbook.engine import programs
import test_programs
before, compile = "torch._inductor" in sys.modules, programs._compile
count = []
programs._compile = lambda *args: count.append(compile(*args))
test_programs.use()
print(len(count), "torch._inductor.compile_fx" in sys.modules)
"""


def start():
    code = SCRIPT.format(tests=os.path.dirname(__file__))
    return subprocess.Popen([sys.executable, "-W", "error::UserWarning:ihbook", "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_compile_it_once_and_a_third_does_not_load_the_compiler(cache):
    both = [start() for _ in range(2)]
    said = sorted(process.communicate(timeout=900)[0].split()[0] for process in both)
    assert said == ["0", "1"]
    assert start().communicate(timeout=900)[0].split() == ["0", "False"]


def test_a_damaged_or_foreign_function_is_compiled_anew(cache, monkeypatch):
    use()
    [path] = cache.glob("*.so")
    content, record = path.read_bytes(), path.with_suffix(".json")
    written, middle, compiling = record.read_text(), len(content) // 2, programs._compile
    monkeypatch.setattr(programs, "_compile", never)
    for damage in (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:], content[:-9], b""):
        path.unlink()  # a new file: what this process has loaded stays as it is
        path.write_bytes(damage)
        with pytest.warns(UserWarning, match="it was compiled again"):
            assert programs.compiled(plain, (torch.ones(3), 0.5), [torch.ones(3)]) is None
    path.write_bytes(content)
    use()
    for damage in (None, json.dumps({"sha256": "0" * 64}), "{", "[]"):
        record.unlink()
        if damage:
            record.write_text(damage)
        with pytest.warns(UserWarning, match="it was compiled again"):
            assert programs.compiled(plain, (torch.ones(3), 0.5), [torch.ones(3)]) is None
        record.write_text(written)
    path.unlink()
    path.write_bytes(b"")
    monkeypatch.setattr(programs, "_compile", compiling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use()
    assert files.record_of(path)


def test_the_name_has_all_that_it_depends_on(cache, monkeypatch):
    """The graph, its constants, the layout of the tensors, PyTorch, the compiler, the processor, the options."""
    names = []
    monkeypatch.setattr(programs, "_compile", lambda graph, tensors, path: names.append(path.stem))

    def name(x=None, factor=0.5):
        x = torch.ones(3) if x is None else x
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            programs.compiled(plain, (x, factor), [x])
        return names[-1]

    assert name() == name()
    found = [name(), name(factor=0.25), name(torch.ones(2, 3)), name(torch.ones(3, 2).T), name(torch.ones(3).double())]
    for target, attribute, value in ((torch, "__version__", "0"), (programs, "_compiler", lambda: "another"),
                                     (programs, "_processor", lambda: "another"), (programs, "OPTIONS", {})):
        with monkeypatch.context() as patched:
            patched.setattr(target, attribute, value)
            found.append(name())
    assert len(set(found)) == len(found) == 9


def test_they_are_pruned_with_the_store(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path / "store"))
    use()
    [path] = cache.glob("*.so")
    foreign = cache / ("0" * 32 + ".so")
    foreign.write_bytes(b"made by another version")
    foreign.with_suffix(".json").write_text(json.dumps({"sha256": files.sha256(foreign), "torch": "0"}))
    (cache / "notes.so").write_text("not ours")
    store = Store()
    assert store.prune() == [foreign] and path.exists()
    os.utime(path.with_suffix(".json"), (0, 0))
    use()  # what is used is not old
    assert store.prune(days=1) == []
    assert store.prune(everything=True) == [path] and [each.name for each in cache.iterdir()] == ["notes.so"]


def test_who_prepares_does_not_wait_for_a_process_that_compiles(cache):
    """So two processes that need a step and an evaluation compile one each, side by side."""
    batch, plan = Batch(torch.zeros(1, 5, 4), *torch.zeros(2, 1, 4, 3, dtype=torch.long)), Plan()
    count = compiled.Compiling(lambda batch, plan: {"n": batch.labels.sum()})
    count(batch, plan)
    [path] = cache.glob("*.so")
    path.unlink()
    count = compiled.Compiling(count.plain)
    with FileLock(path.with_suffix(".lock")):  # as the other process holds it
        count.prepare(batch, plan)
        assert not path.exists()
    count.prepare(batch, plan)
    assert path.exists() and count(batch, plan)["n"] == 0
