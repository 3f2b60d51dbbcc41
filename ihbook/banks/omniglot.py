"""Omniglot: real characters, from archives or folders of images."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ihbook.banks.downloads import download
from ihbook.banks.embeddings import RANDOM, random_features, resnet18_features
from ihbook.banks.encoder import described, learnt_features
from ihbook.banks.glyphs import SIDE
from ihbook.config import BankConfig
from ihbook.files import sha256

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
OMNIGLOT_MD5 = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
# The thirty alphabets of images_background.zip. They trained the shipped encoder, so that it embeds the other twenty alone.
BACKGROUND = frozenset((
    "Alphabet_of_the_Magi", "Anglo-Saxon_Futhorc", "Arcadian", "Armenian", "Asomtavruli_(Georgian)", "Balinese", "Bengali",
    "Blackfoot_(Canadian_Aboriginal_Syllabics)", "Braille", "Burmese_(Myanmar)", "Cyrillic", "Early_Aramaic", "Futurama", "Grantha",
    "Greek", "Gujarati", "Hebrew", "Inuktitut_(Canadian_Aboriginal_Syllabics)", "Japanese_(hiragana)", "Japanese_(katakana)",
    "Korean", "Latin", "Malay_(Jawi_-_Arabic)", "Mkhedruli_(Georgian)", "N_Ko", "Ojibwe_(Canadian_Aboriginal_Syllabics)",
    "Sanskrit", "Syriac_(Estrangelo)", "Tagalog", "Tifinagh"))
REMEDY = "give images_background.zip or images_evaluation.zip, a folder with them or with their images, or path=None to download"


@dataclass(frozen=True)
class Pages:
    """Images uint8 `[class, exemplar, side, side]` as scanned, dark ink on 255, and their provenance."""

    pages: np.ndarray
    provenance: dict

    def small(self) -> torch.Tensor:
        """The images uint8 `[class, exemplar, 28, 28]`, ink 255 on 0."""
        ink = 255 - self.pages.reshape(-1, *self.pages.shape[2:])
        if ink.shape[-1] != SIDE:
            ink = np.stack([np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for one in ink])
        return torch.from_numpy(ink).unflatten(0, self.pages.shape[:2])


def load_omniglot(config: BankConfig):
    """Features, images and metadata. Characters are sorted by name and shuffled once with the seed. With the embedding "auto",
    they are of the twenty alphabets that did not train the shipped encoder; with another, of all fifty. Random features are
    standardised over what is kept."""
    learnt = config.embedding == "auto"
    found = read_pages(config.path, config.n_exemplars, config.n_classes, config.seed,
                       lambda alphabet: not (learnt and alphabet in BACKGROUND))
    images = found.small()
    if learnt:
        features, how = learnt_features(images, config.dim, "omniglot"), described("omniglot")
    elif config.embedding == "resnet18":
        features, how = resnet18_features(found.pages, config.dim)
    else:
        features, how = random_features(images, config.dim, reference=images), RANDOM
    return features, images, {"embedding": how, **found.provenance}


def read_pages(path: str | None, n_exemplars: int, n_classes: int | None = None, seed: int | None = None,
               of: Callable[[str], bool] = lambda alphabet: True) -> Pages:
    """At most `n_classes` characters (None: all) of the alphabets `of`, sorted by name, or shuffled with `seed`, by their first
    `n_exemplars` drawers. All images have one size, square, at least 28 pixels. Raises ValueError and FileNotFoundError."""
    if path is None:
        sources = [download(OMNIGLOT_URL + name, f"md5:{md5}") for name, md5 in OMNIGLOT_MD5.items()]
    else:
        place = Path(path).expanduser().resolve()
        if not place.exists():
            raise FileNotFoundError(f"path={str(place)!r} does not exist; {REMEDY}")
        sources = [place] if place.is_file() else [*sorted(place.glob("images_*.zip")), place]
    with ExitStack() as stack:
        drawings: dict[tuple[str, str], dict[int, Callable[[], bytes]]] = {}
        for source in sources:
            try:
                listed = _list_drawings(source, stack)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{source} is not a whole zip file ({error}); {REMEDY}") from error
            for name, read in listed:
                match = re.search(r"([^/]+)/([^/]+)/\d+_(\d+)\.png$", name)
                if match:  # a drawing that two archives hold counts once
                    drawings.setdefault(match.group(1, 2), {}).setdefault(int(match[3]), read)
        where = ", ".join(map(str, sources))
        if not drawings:
            raise ValueError(f"no alphabet/character/NNNN_EE.png in {where}; {REMEDY}")
        names = sorted(name for name in drawings if of(name[0]))
        if not names:
            raise ValueError(f"all alphabets in {where} trained the shipped encoder, which would know them; give "
                             "images_evaluation.zip too, or choose embedding='random'")
        if seed is not None:
            names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        names, pages = names[:n_classes], None
        for row, key in enumerate(names):
            what, drawers = "/".join(key), sorted(drawings[key])
            if len(drawers) < n_exemplars:
                raise ValueError(f"n_exemplars={n_exemplars} but {what} has {len(drawers)}; ask for fewer")
            for slot, drawer in enumerate(drawers[:n_exemplars]):
                page = _decode(drawings[key][drawer], f"{what} by drawer {drawer}")
                if pages is None:
                    pages = np.empty((len(names), n_exemplars, *page.shape), np.uint8)
                if page.shape != pages.shape[2:]:
                    raise ValueError(f"the image of {what} by drawer {drawer} is {page.shape}, the first {pages.shape[2:]}; give "
                                     "images of one size")
                pages[row, slot] = page
    archives = {source.name: sha256(source) for source in sources if source.is_file()}
    return Pages(pages, {"source": ", ".join(source.name for source in sources), "archives_sha256": archives,
                         "images_sha256": hashlib.sha256(pages).hexdigest(), "classes": ["/".join(key) for key in names]})


def _list_drawings(source: Path, stack: ExitStack) -> list[tuple[str, Callable[[], bytes]]]:
    """The name of each image in a zip or a folder, and a function that reads it; the zip stays open as long as the stack."""
    if source.is_dir():
        return [(file.as_posix(), file.read_bytes) for file in sorted(source.rglob("*.png"))]
    archive = stack.enter_context(zipfile.ZipFile(source))
    return [(name, partial(archive.read, name)) for name in sorted(archive.namelist())]


def _decode(read: Callable[[], bytes], what: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(read())) as image:
            page = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"the image of {what} is damaged ({str(error) or 'it ends early'}); {REMEDY}") from error
    if page.shape[0] != page.shape[1] or len(page) < SIDE:
        raise ValueError(f"the image of {what} is {page.shape}; it must be a square of at least {SIDE} pixels; {REMEDY}")
    return page
