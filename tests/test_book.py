"""The book: notebooks run with other parameters, say what is wrong with bad ones, and build into pages."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
TOOLS = Path(sys.executable).parent  # of the environment that runs the tests
BUILD = [TOOLS / "jupyter-book", "build", "book/"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("IHBOOK_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def execute(name, tmp_path, parameters, wanted="None"):
    """Run a chapter from another folder; the value of the expression `wanted` in it, by way of JSON."""
    notebook = nbformat.read(ROOT / "book" / f"{name}.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json; print('WANTED' + json.dumps({wanted}))"))
    nbformat.write(notebook, tmp_path / "in.ipynb")
    out = papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", parameters, kernel_name="python3",
                                     progress_bar=False, cwd=tmp_path)
    text = "".join(o["text"] for o in out.cells[-1].outputs if o.get("name") == "stdout")
    return json.loads(text.split("WANTED")[1])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1
    assert not any(line.lstrip().startswith("class ") for cell in code for line in cell.source.splitlines())
    subprocess.run([TOOLS / "nbstripout", "--keep-id", "--verify", str(path)], check=True)


def test_01_with_other_parameters(tmp_path):
    parameters = {"n_labels": 10, "n_classes": 20, "seed": 3}
    found = execute("01_task", tmp_path, parameters, "[len(everything), len(splits.test_sets), right.item()]")
    assert found[:2] == [20 * 19 * 36 * 2 * 2, 9] and 0.1 < found[2] < 0.9
    assert execute("01_task", tmp_path, {"bank": "onehot"}, "right.item()") == 1.0


def test_02_measures_what_it_is_asked_to(tmp_path, store):
    parameters = {"seed": 7, "n_labels": 10, "n_sequences": 12_000}
    wanted = ("[int(last), result.config.init_seed, result.weights.n_labels, end['loss']['train'], strengths, "
              "verdicts.values.tolist()]")
    last, seed, n_labels, loss, strengths, verdicts = execute("02_phase_change", tmp_path, parameters, wanted)
    assert (last, seed, n_labels, len(strengths)) == (12_000, 7, 10, 8)
    assert 0.5 < loss < 2.4  # no phase change yet, and the verdicts say so
    assert {row[-1] for row in verdicts} == {"can't tell: no phase change in this run"}
    assert len(list(store.glob('runs/*/manifest.json'))) == 1
    again = execute("02_phase_change", tmp_path, parameters, wanted)
    assert again[:4] == [last, seed, n_labels, loss]  # read back


@pytest.mark.parametrize("name, parameters, words", [
    ("02_phase_change", {"n_labels": 1}, "n_labels=1"),
    ("02_phase_change", {"n_classes": 1600}, "n_classes=1600"),
    ("02_phase_change", {"n_sequences": 0}, "n_sequences=0"),
    ("02_phase_change", {"bank": "klingon"}, "bank='klingon'"),
    ("02_phase_change", {"bank": "authors", "bank_path": "/nowhere.h5"}, "/nowhere.h5"),
    ("02_phase_change", {"seed": -1}, "init_seed=-1"),
    ("01_task", {"n_labels": "five"}, "n_labels='five'"),
])
def test_bad_parameters_fail_with_the_named_error(tmp_path, store, name, parameters, words):
    with pytest.raises(papermill.PapermillExecutionError) as error:
        execute(name, tmp_path, parameters)
    assert words in str(error.value)


def copy_of_the_book(tmp_path):
    for name in ("book", "_config.yml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def test_the_book_builds(tmp_path, store):
    """As published: this trains the full network."""
    root = copy_of_the_book(tmp_path)
    done = subprocess.run(BUILD, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    pages = {p.stem: p.read_text() for p in (root / "_build/html").glob("*.html")}
    assert {path.stem for path in CHAPTERS} | {"intro", "bibliography", "index"} <= pages.keys()
    for path in CHAPTERS:
        page = pages[path.stem]
        assert page.count('alt="') > 1 and 'src="data:image/png;base64,' in page
        assert "Traceback" not in page and "run-step" not in page  # nothing of the progress bar is left
    assert ">differs<" not in pages["02_phase_change"] and pages["02_phase_change"].count(">holds<") == 6
    again = subprocess.run(BUILD, cwd=root, capture_output=True, text=True)  # runs the chapters, and finds the network trained
    assert again.returncode == 0 and "02_phase_change" in again.stdout and "no targets are out of date" not in again.stdout


def test_a_failing_cell_fails_the_build(tmp_path, store):
    root = copy_of_the_book(tmp_path)
    (root / "book/02_phase_change.ipynb").unlink()
    (root / "book/_toc.yml").write_text("format: jb-book\nroot: intro\nchapters:\n  - file: 01_task\n")
    notebook = nbformat.read(root / "book/01_task.ipynb", 4)
    notebook.cells.insert(2, nbformat.v4.new_code_cell("raise ArithmeticError('this cell fails')"))
    nbformat.write(notebook, root / "book/01_task.ipynb")
    done = subprocess.run(BUILD, cwd=root, capture_output=True, text=True)
    assert done.returncode != 0 and "this cell fails" in done.stdout + done.stderr
