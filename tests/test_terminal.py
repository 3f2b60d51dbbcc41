"""The terminal of a build and of a sweep: how it gets on, warnings and errors, and nothing else."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import BUILD, ROOT, copy_of_the_book


@pytest.fixture
def as_a_reader():
    """A reader's environment: nothing says which kernels to start, or which warnings to hide."""
    return {name: value for name, value in os.environ.items() if name not in ("JUPYTER_PATH", "PYTHONWARNINGS")}


def write_notebook(path, *sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter"),
                                               *map(nbformat.v4.new_code_cell, sources)])
    notebook.cells[1].metadata["tags"] = ["parameters"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, path)


@pytest.mark.slow
def test_a_sweep_shows_its_progress_only(tmp_path, as_a_reader):
    write_notebook(tmp_path / "chapter.ipynb", "x = 1", "from ihbook.chapters import claims",
                   "verdicts = [claims.judge('final-loss', x / 1000)]")
    done = subprocess.run([sys.executable, "-m", "ihbook", "sweep", tmp_path / "chapter.ipynb", "-p", "x", "1", "2",
                           "--out", tmp_path / "out"], cwd=ROOT, env=as_a_reader, capture_output=True, text=True, check=True)
    assert "2 numbers, 0 points failed" in done.stdout
    assert "points: 100%" in done.stderr and re.sub(r"points: [^\[]*\[[^\]]*\]", "", done.stderr).split() == []  # only the bar


@pytest.mark.slow
def test_a_build_shows_its_chapters_and_warnings_only(tmp_path, as_a_reader):
    root = copy_of_the_book(tmp_path)
    (root / "book/_toc.yml").write_text("format: jb-book\nroot: first\nchapters:\n  - file: second\n")
    (root / "book/first.md").write_text("# The first page\n\n{doc}`nowhere`\n")
    write_notebook(root / "book/second.ipynb", "x = 1", "import sys\n\nprint('not a warning', file=sys.stderr)")
    done = subprocess.run(BUILD, cwd=root, env=as_a_reader, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [warning] = done.stderr.splitlines()
    assert "first.md:3: WARNING: unknown document: 'nowhere'" in warning
    said = re.sub(r"\x1b\[\d*(;\d+)*m", "", done.stdout).split("Running Sphinx")[1].split("Finished generating HTML")[0]
    lines = [line for line in said.splitlines()[1:] if line.strip("= ")]
    assert lines == ["loading translations [en]... done", "1 of 2: first", "2 of 2: second"]  # the first comes before extensions
