"""What the tests share: the golden numbers, the shared folder where there is one, the built book, a small bank."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ihbook.chapters import kernel
from ihbook.config import ModelConfig
from ihbook.model import Weights
from ihbook.task import Bank, from_exemplars

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers, and all that they start, share what is compiled
    os.environ["IHBOOK_CACHE"] = tempfile.mkdtemp(prefix="ihbook-tests-")
    atexit.register(shutil.rmtree, os.environ["IHBOOK_CACHE"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # otherwise threads wait for each other, ten times slower
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

os.environ["JUPYTER_PATH"] = str(kernel.FOLDER)  # the kernels of the tests start and end faster, and quietly

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"


def shared(path: str) -> Path:
    """A file of the full reference data, which may lie beside the checkout; without it, the test is skipped."""
    if not (SHARED / path).exists():
        pytest.skip(f"the full reference data ({path}) is not beside this checkout; tests/data holds a compact copy")
    return SHARED / path


def tensors(numbers, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix):]: torch.tensor(numbers[name]) for name in numbers if name.startswith(prefix)}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent  # the programs of the environment that runs the tests
BUILD = [TOOLS / "jupyter-book", "build", "book/"]


def copy_of_the_book(folder: Path) -> Path:
    for name in ("book", "_config.yml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> dict[str, str]:
    """The environment of the quick profile, with one store for the whole session."""
    return {"IHBOOK_PROFILE": "quick", "IHBOOK_STORE": str(tmp_path_factory.mktemp("store"))}


@pytest.fixture(scope="session")
def built(tmp_path_factory, quick) -> tuple[Path, str]:
    """The book built in the quick profile: the folder of its pages, and the build's standard error."""
    root = copy_of_the_book(tmp_path_factory.mktemp("book"))
    done = subprocess.run(BUILD, cwd=root, env=os.environ | quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "_build/html", done.stderr


@pytest.fixture(scope="module")
def browser():
    """Chromium, with no network but loopback."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser: install Chromium")
    with sync.sync_playwright() as playwright:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        chromium = playwright.chromium.launch(executable_path=path, args=[rules, "--no-sandbox"])
        yield chromium
        chromium.close()


THEIRS = ("Identifier 'THEBE_JS_URL' has already been declared", "Got invalid theme mode",  # the theme's own, on every page
          "Failed to load resource")  # repeats what is recorded as a response or a failed request


def opened(browser, address, width=1366, first=""):
    """A page, and the errors on it that are not the theme's; the script `first` runs before the page's own."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}), []
    page.set_default_timeout(600_000)  # milliseconds: a page that trains networks beside other work takes minutes
    page.add_init_script(first)

    def said(words):
        if not words.startswith(THEIRS):
            wrong.append(words)

    page.on("console", lambda message: said(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said(str(error)))
    page.on("response", lambda r: wrong.append(f"{r.status}: {r.url}") if r.status >= 400 and "favicon.ico" not in r.url else None)
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.goto(address, wait_until="networkidle")
    return page, wrong


@pytest.fixture(scope="session")
def golden():
    return read_npz(DATA / "golden.npz")


@pytest.fixture(scope="session")
def reference():
    """The authors' trained network, the exemplars it was trained on, and what they measured on it."""
    numbers = read_npz(DATA / "reference.npz")
    return {"weights": Weights(ModelConfig(), tensors(numbers, "weights/")), "features": torch.tensor(numbers["features"]),
            "measured": json.loads(str(numbers["measured"]))}


@pytest.fixture(scope="session")
def networks(golden):
    """The golden network and the golden donor."""
    return tuple(Weights(ModelConfig(), tensors(golden, prefix)) for prefix in ("params/", "donor_params/"))


@pytest.fixture(scope="session")
def batch(golden):
    return from_exemplars(torch.tensor(golden["batch/exemplars"]), torch.tensor(golden["batch/labels"]))


@pytest.fixture(scope="session")
def small_bank():
    """40 classes of 3 exemplars, dim 16, which are clearly separable and so quickly learnt."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 1, 16, generator=generator)
    return Bank(centres + 0.1 * torch.randn(40, 3, 16, generator=generator), None, {"name": "small"})
