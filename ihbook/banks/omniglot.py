"""Omniglot: real characters, from archives or folders of images."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ihbook.banks.downloads import download
from ihbook.banks.embeddings import RANDOM, random_features, resnet18_features
from ihbook.banks.glyphs import SIDE
from ihbook.config import BankConfig
from ihbook.files import sha256

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
OMNIGLOT_MD5 = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
PAGE = 105  # side of an Omniglot image


def load_omniglot(config: BankConfig):
    """Features, images and metadata. Characters are sorted by name and shuffled once with the seed; random features are
    standardised over what is kept. With the embedding "auto", random features and a warning replace ResNet-18's if those can't be
    had."""
    pages, metadata = _omniglot_pages(config)
    flat = pages.reshape(-1, PAGE, PAGE)
    small = [np.asarray(Image.fromarray(255 - page).resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for page in flat]
    images = torch.from_numpy(np.stack(small)).unflatten(0, pages.shape[:2])
    metadata["why"] = f"embedding={config.embedding!r}"
    if config.embedding != "random":
        try:
            features, how = resnet18_features(pages, config.dim)
            return features, images, {"embedding": how, **metadata}
        except (RuntimeError, ValueError) as error:
            if config.embedding == "resnet18":
                raise
            metadata["why"] += f" and {error}"
            warnings.warn(f"Omniglot gets random features, not ResNet-18's: {error}", stacklevel=4)
    return random_features(images, config.dim, reference=images), images, {"embedding": RANDOM, **metadata}


def _omniglot_pages(config: BankConfig) -> tuple[np.ndarray, dict]:
    """Images uint8 `[class, exemplar, 105, 105]` as scanned, dark ink on 255, and their provenance."""
    remedy = "give images_background.zip, a folder with it or with its images, or path=None to download"
    if config.path is None:
        sources = [download(OMNIGLOT_URL + name, f"md5:{md5}") for name, md5 in OMNIGLOT_MD5.items()]
    else:
        path = Path(config.path).expanduser().resolve()
        if not path.exists():
            raise FileNotFoundError(f"path={str(path)!r} does not exist; {remedy}")
        sources = [path] if path.is_file() else [*sorted(path.glob("images_*.zip")), path]
    with ExitStack() as stack:
        drawings: dict[tuple[str, str], dict[int, Callable[[], bytes]]] = {}
        for source in sources:
            try:
                found = _list_drawings(source, stack)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{source} is not a whole zip file ({error}); {remedy}") from error
            for name, read in found:
                match = re.search(r"([^/]+)/([^/]+)/\d+_(\d+)\.png$", name)
                if match:  # a drawing that two archives hold counts once
                    drawings.setdefault(match.group(1, 2), {}).setdefault(int(match[3]), read)
        if not drawings:
            raise ValueError(f"no alphabet/character/NNNN_EE.png in {', '.join(map(str, sources))}; {remedy}")
        order = np.random.default_rng(config.seed).permutation(len(drawings))[: config.n_classes]
        names = sorted(drawings)
        classes = [names[i] for i in order]
        pages = np.empty((len(classes), config.n_exemplars, PAGE, PAGE), np.uint8)
        for row, key in zip(pages, classes, strict=True):
            what, drawers = "/".join(key), sorted(drawings[key])
            if len(drawers) < config.n_exemplars:
                raise ValueError(f"n_exemplars={config.n_exemplars} but {what} has {len(drawers)}; ask for fewer")
            for slot, drawer in zip(row, drawers, strict=False):
                slot[:] = _decode(drawings[key][drawer], f"{what} by drawer {drawer}", remedy)
    archives = {source.name: sha256(source) for source in sources if source.is_file()}
    return pages, {
        "source": ", ".join(source.name for source in sources),
        "archives_sha256": archives,
        "images_sha256": hashlib.sha256(pages).hexdigest(),
        "classes": ["/".join(key) for key in classes],
    }


def _list_drawings(source: Path, stack: ExitStack) -> list[tuple[str, Callable[[], bytes]]]:
    """The name of each image in a zip or a folder, and a function that reads it; the zip stays open as long as the stack."""
    if source.is_dir():
        return [(file.as_posix(), file.read_bytes) for file in sorted(source.rglob("*.png"))]
    archive = stack.enter_context(zipfile.ZipFile(source))
    return [(name, partial(archive.read, name)) for name in sorted(archive.namelist())]


def _decode(read: Callable[[], bytes], what: str, remedy: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(read())) as image:
            page = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"the image of {what} is damaged ({error}); {remedy}") from error
    if page.shape != (PAGE, PAGE):
        raise ValueError(f"the image of {what} is {page.shape}, not {PAGE}x{PAGE}; {remedy}")
    return page
