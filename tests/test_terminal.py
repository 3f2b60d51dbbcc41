"""What a small build and a sweep show: in the terminal how they get on, warnings and nothing else; to others a card of each page."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import BUILD, ROOT, copy_of_the_book
from PIL import Image

# A reader's environment: nothing says which kernels to start, or which warnings to hide.
READER = {name: value for name, value in os.environ.items() if name not in ("JUPYTER_PATH", "PYTHONWARNINGS")}


def write_notebook(path, *sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter"),
                                               *map(nbformat.v4.new_code_cell, sources)])
    notebook.cells[1].metadata["tags"] = ["parameters"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, path)


@pytest.mark.slow
def test_a_sweep_shows_its_progress_only(tmp_path):
    write_notebook(tmp_path / "chapter.ipynb", "x = 1", "from ihbook.chapters import claims",
                   "verdicts = [claims.judge('final-loss', x / 1000)]")
    done = subprocess.run([sys.executable, "-m", "ihbook", "sweep", tmp_path / "chapter.ipynb", "-p", "x", "1", "2",
                           "--out", tmp_path / "out"], cwd=ROOT, env=READER, capture_output=True, text=True, check=True)
    assert "2 numbers, 0 points failed" in done.stdout
    assert "points: 100%" in done.stderr and re.sub(r"points: [^\[]*\[[^\]]*\]", "", done.stderr).split() == []  # only the bar


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A book of two pages, with an address: the folder of its pages, its standard output and error."""
    root = copy_of_the_book(tmp_path_factory.mktemp("small"))
    config = (root / "_config.yml").read_text()
    assert 'ogp_site_url: ""' in config
    (root / "_config.yml").write_text(config.replace('ogp_site_url: ""', 'ogp_site_url: "https://example.org/book/"'))
    (root / "book/_toc.yml").write_text("format: jb-book\nroot: first\nchapters:\n  - file: second\n")
    (root / "book/first.md").write_text("# The first page\n\nIt names {doc}`nowhere`.\n")
    write_notebook(root / "book/second.ipynb", "x = 1", "import sys\n\nprint('not a warning', file=sys.stderr)",
                   "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])")
    done = subprocess.run(BUILD, cwd=root, env=READER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "_build/html", done.stdout, done.stderr


@pytest.mark.xdist_group("small book")
@pytest.mark.slow
def test_a_build_shows_its_chapters_and_warnings_only(small):
    root, said, warned = small
    [warning] = warned.splitlines()
    assert "first.md:3: WARNING: unknown document: 'nowhere'" in warning
    said = re.sub(r"\x1b\[\d*(;\d+)*m", "", said).split("Running Sphinx")[1].split("Finished generating HTML")[0]
    lines = [line for line in said.splitlines()[1:] if line.strip("= ")]
    assert lines == ["loading translations [en]... done", "1 of 2: first", "2 of 2: second"]  # the first comes before extensions
    assert 'src="_images/' in (root / "second.html").read_text()  # as a usual kernel draws it


@pytest.mark.xdist_group("small book")
@pytest.mark.slow
def test_a_page_has_an_icon_and_a_card(small):
    root, *_ = small
    page = (root / "first.html").read_text()
    card = dict(re.findall(r'<meta property="og:(\S+)" content="([^"]*)"', page))
    assert card["title"] == "The first page" and card["description"].startswith("It names")
    assert card["url"] == "https://example.org/book/first.html" and card["image"] == "https://example.org/book/_static/card.png"
    with Image.open(root / "_static/card.png") as image:
        assert image.size == (1200, 630) and (root / "_static/card.png").stat().st_size <= 100_000
    [icon] = re.findall(r'<link rel="icon" href="([^"]*)"', page)
    assert "<svg" in (root / icon).read_text()
