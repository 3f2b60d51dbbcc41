"""Exemplar banks: `features[class, exemplar, dim]` from drawn glyphs, Omniglot, the authors' file, or plain vectors."""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import h5py
import numpy as np
import platformdirs
import pooch
import torch
from PIL import Image
from tqdm import tqdm

from ihbook.config import EMBEDDINGS, BankConfig, one_of
from ihbook.glyphs import SIDE, draw_glyphs

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
OMNIGLOT_MD5 = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
AUTHORS_URL = "https://raw.githubusercontent.com/aadityasingh/icl-dynamics/47eba1d/"
AUTHORS_FILE = "omniglot_resnet18_randomized_order_s0.h5"
AUTHORS_BLOB = "9eb588c516b641f5f25ac22227865a7ce5ab0b2f"
AUTHORS_DATASET = "resnet18/224/feat"
TIMEOUT = 8  # seconds of silence after which a server counts as out of reach
PAGE = 105  # side of an Omniglot image
REFERENCE = 512  # glyphs that set the standardisation, however many are asked for


@dataclass(frozen=True, eq=False)
class Bank:
    """Characters as features float32 [class, exemplar, dim] and, where there are any, images uint8 [.., .., 28, 28].

    Ink is 255 on 0. `metadata` (JSON-able) says where the bank came from and how the features were made.
    """

    features: torch.Tensor
    images: torch.Tensor | None
    metadata: dict

    @cached_property
    def digest(self) -> str:
        """sha256 of the features' shape and bytes."""
        return _sha256(repr(tuple(self.features.shape)).encode(), self.features.contiguous().numpy())

    @property
    def n_classes(self) -> int:
        return self.features.shape[0]

    @property
    def n_exemplars(self) -> int:
        return self.features.shape[1]

    @property
    def dim(self) -> int:
        return self.features.shape[2]


def load_bank(config: BankConfig) -> Bank:
    """The bank that `config` names, drawn, read from `config.path`, or downloaded once into the cache.

    Banks that are read keep at most `n_classes` of their classes, and may have fewer. `onehot` has dim = n_classes. The last
    two that were drawn are kept in memory: their tensors are not to be written to.
    """
    return (_load if config.name in ("omniglot", "authors") else _drawn)(config)


def _load(config: BankConfig) -> Bank:
    loaders = {
        "glyphs": (_glyphs, ("auto", "random")),
        "omniglot": (_omniglot, EMBEDDINGS),
        "authors": (_authors, ("auto",)),
        "gaussian": (_gaussian, ("auto",)),
        "onehot": (_onehot, ("auto",)),
    }
    load, embeddings = loaders[config.name]
    one_of(f"the bank {config.name!r}: embedding", config.embedding, embeddings)
    if config.path is not None and config.name not in ("omniglot", "authors"):
        raise ValueError(f"path={config.path!r} but the bank {config.name!r} is generated; drop path or choose another")
    features, images, metadata = load(config)
    source = f"the bank {config.name!r} ({metadata['source']})"
    if not features.isfinite().all():
        wrong = (~features.isfinite()).nonzero()
        where = f"{len(wrong)} NaN or infinite features, the first at {wrong[0].tolist()}"
        raise ValueError(f"{source} has {where}; get a fresh copy of its source")
    if len(features) > 1 and (features == features[:1, :1]).all():
        raise ValueError(f"{source} has zero variance: every exemplar is the same; get a fresh copy of its source")
    return Bank(features, images, {"name": config.name, **metadata})


_drawn = lru_cache(maxsize=2)(_load)


def cache_dir() -> Path:
    """Where downloads are kept: the environment variable IHBOOK_CACHE, or else the user's cache folder."""
    return Path(os.environ.get("IHBOOK_CACHE") or platformdirs.user_cache_dir("ihbook"))


# --- generated banks -------------------------------------------------------------------------------------------------


def _glyphs(config: BankConfig):
    images = draw_glyphs(config.n_classes, config.n_exemplars, config.seed)
    features, how = _random_features(images, config.dim, reference=draw_glyphs(REFERENCE, 1, config.seed))
    return features, images, {"embedding": how, "source": f"drawn with seed {config.seed}"}


def _gaussian(config: BankConfig):
    """N(0, I) marginally; two exemplars of a class have a cosine of about 0.94."""
    shape = config.n_classes, config.dim
    centres = np.random.default_rng([config.seed, 0]).standard_normal(shape)
    noise = [np.random.default_rng([config.seed, 1 + e]).standard_normal(shape) for e in range(config.n_exemplars)]
    features = (centres[:, None] + 0.25 * np.stack(noise, 1)) / np.sqrt(1 + 0.25**2)
    source = f"centres N(0, I), exemplars with noise of 0.25, seed {config.seed}"
    return torch.from_numpy(features).float(), None, {"embedding": "none", "source": source}


def _onehot(config: BankConfig):
    features = torch.eye(config.n_classes)[:, None].repeat(1, config.n_exemplars, 1)
    return features, None, {"embedding": "none", "source": "one-hot classes, all exemplars identical"}


# --- the authors' file -----------------------------------------------------------------------------------------------


def _authors(config: BankConfig):
    """The file's own order, first classes and first exemplars."""
    remedy = "give a file in the authors' format, or path=None to download theirs"
    if config.path is None:
        path = _download_blob(AUTHORS_URL + AUTHORS_FILE, AUTHORS_BLOB)
    else:
        path = Path(config.path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; {remedy}")
    try:
        with h5py.File(path) as file:
            data = file.get(AUTHORS_DATASET)
            if not isinstance(data, h5py.Dataset):
                names = []
                file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
                raise ValueError(f"{path} has no dataset {AUTHORS_DATASET!r}, only {names}; {remedy}")
            if data.ndim != 3 or 0 in data.shape or data.dtype != np.float32:
                raise ValueError(
                    f"{AUTHORS_DATASET!r} in {path} is {data.dtype} {list(data.shape)}, "
                    f"not float32 [class, exemplar, dim]; {remedy}"
                )
            if data.shape[2] != config.dim:
                raise ValueError(f"features in {path} have dim {data.shape[2]}, not dim={config.dim}; set dim to that")
            if data.shape[1] < config.n_exemplars:
                raise ValueError(f"n_exemplars={config.n_exemplars} but {path} has {data.shape[1]}; ask for fewer")
            features = data[: config.n_classes, : config.n_exemplars]
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is not a whole HDF5 file ({error}); {remedy}") from error
    metadata = {"embedding": "as in the file", "source": path.name, "sha256": _sha256(path.read_bytes())}
    return torch.from_numpy(features), None, metadata


# --- Omniglot --------------------------------------------------------------------------------------------------------


def _omniglot(config: BankConfig):
    """Characters in order of name, shuffled once with the seed; random features are standardised over what is kept."""
    pages, metadata = _omniglot_pages(config)
    flat = pages.reshape(-1, PAGE, PAGE)
    small = [np.asarray(Image.fromarray(255 - page).resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for page in flat]
    images = torch.from_numpy(np.stack(small)).unflatten(0, pages.shape[:2])
    metadata["why"] = f"embedding={config.embedding!r}"
    if config.embedding != "random":
        try:
            features, how = _resnet18_features(pages, config.dim)
            return features, images, {"embedding": how, **metadata}
        except (RuntimeError, ValueError) as error:
            if config.embedding == "resnet18":
                raise
            metadata["why"] += f" and {error}"
            warnings.warn(f"Omniglot gets random features, not ResNet-18's: {error}", stacklevel=4)
    features, how = _random_features(images, config.dim, reference=images)
    return features, images, {"embedding": how, **metadata}


def _omniglot_pages(config: BankConfig) -> tuple[np.ndarray, dict]:
    """Images uint8 [class, exemplar, 105, 105] as scanned, dark ink on 255, and their provenance."""
    remedy = "give images_background.zip, a folder with it or with its images, or path=None to download"
    if config.path is None:
        sources = [_download(OMNIGLOT_URL + name, f"md5:{md5}") for name, md5 in OMNIGLOT_MD5.items()]
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
                if match:  # a character that two archives hold counts once
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
    archives = {source.name: _sha256(source.read_bytes()) for source in sources if source.is_file()}
    return pages, {
        "source": ", ".join(source.name for source in sources),
        "archives_sha256": archives,
        "images_sha256": _sha256(pages),
        "classes": ["/".join(key) for key in classes],
    }


def _list_drawings(source: Path, stack: ExitStack) -> list[tuple[str, Callable[[], bytes]]]:
    """Names, and how to read them, of what a zip or a folder holds; the zip stays open as long as the stack."""
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


# --- embeddings ------------------------------------------------------------------------------------------------------


def _random_features(images: torch.Tensor, dim: int, reference: torch.Tensor) -> tuple[torch.Tensor, str]:
    """ReLU features [.., dim] of images [.., 28, 28] under a fixed projection, standardised by the reference images."""
    sigma, floor = 1.5, 0.003
    place = torch.arange(SIDE, dtype=torch.float64)
    kernel = (-((place[:, None] - place) ** 2) / (2 * sigma**2)).exp() / (sigma * (2 * torch.pi) ** 0.5)

    def blur(ink: torch.Tensor) -> torch.Tensor:
        return (kernel @ (ink.flatten(0, -3).double() / 255) @ kernel).flatten(1)

    base = blur(reference)
    spread = base.std(0, correction=0) + floor  # pixels that are never inked must not blow up
    # On these grids every product and sum below is exact, whatever the threads, the batch and the machine.
    pixels = ((blur(images) - base.mean(0)) / spread * 2**12).round() / 2**12
    projection = np.random.default_rng(0).standard_normal((SIDE * SIDE, dim)) / SIDE
    features = (pixels @ torch.from_numpy((projection * 2**16).round() / 2**16)).relu().float()
    how = f"random: {SIDE}x{SIDE}, blurred ({sigma} px), standardised per pixel, ReLU of a fixed N(0, 1/784) projection"
    return features.unflatten(0, images.shape[:-2]), how


def _resnet18_features(pages: np.ndarray, dim: int) -> tuple[torch.Tensor, str]:
    """Penultimate activations [class, exemplar, 512] of ImageNet's ResNet-18 for uint8 pages [class, exemplar, h, w].

    This takes minutes, so the cache keeps it. RuntimeError says why it can't be had.
    """
    how = "resnet18: torchvision IMAGENET1K_V1, penultimate layer, 224 px, three equal channels, ImageNet normalisation"
    if dim != 512:
        raise ValueError(f"dim={dim} but ResNet-18 has 512; set dim=512 or embedding='random'")
    cached = cache_dir() / f"resnet18-{_sha256(how.encode(), repr(pages.shape).encode(), pages)}.npz"
    try:
        with np.load(cached) as file:  # a zip file, whose checksums np.load verifies
            return torch.from_numpy(file["features"]), how
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # absent or damaged: made anew
    features = _resnet18_run(_resnet18(), pages)
    partly = cached.with_suffix(f".{os.getpid()}.part")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with partly.open("wb") as file:
            np.savez(file, features=features.numpy())
        partly.replace(cached)
    except OSError as error:
        warnings.warn(f"{cached} can't be kept ({error}); set IHBOOK_CACHE to a folder that can be", stacklevel=5)
    return features, how


def _resnet18() -> torch.nn.Module:
    """torchvision's ResNet-18 with ImageNet weights and without its last layer."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub waits for ever otherwise
    try:
        from torchvision.models import ResNet18_Weights, resnet18

        with torch.random.fork_rng(devices=[]):  # its random initialisation is no business of the caller's
            model = resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # absent, unfit for this torch, no weights
        raise RuntimeError(
            f"torchvision's ResNet-18 or its ImageNet weights can't be had ({type(error).__name__}: {error}); "
            "pip install torchvision and connect to the internet once, or choose embedding='random'"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    model.fc = torch.nn.Identity()
    return model.eval()


@torch.inference_mode()
def _resnet18_run(model: torch.nn.Module, pages: np.ndarray) -> torch.Tensor:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    features = []
    for batch in tqdm(torch.from_numpy(pages).flatten(0, 1).split(64), "ResNet-18", leave=False):
        page = torch.nn.functional.interpolate(batch[:, None] / 255, (224, 224), mode="bilinear")
        features.append(model((page.expand(-1, 3, -1, -1) - mean) / std))
    return torch.cat(features).unflatten(0, pages.shape[:2]).clone()


# --- downloads -------------------------------------------------------------------------------------------------------


def _download(url: str, known_hash: str | None, check: Callable[[str], None] = lambda file: None) -> Path:
    """The cached file of that address, downloaded to a temporary name and moved in place once it is verified."""

    def downloader(url, output_file, pooch_):
        pooch.HTTPDownloader(progressbar=True, chunk_size=2**16, timeout=TIMEOUT)(url, output_file, pooch_)
        check(output_file)

    name = url.rsplit("/", 1)[-1]
    try:
        return Path(pooch.retrieve(url, known_hash, fname=name, path=cache_dir(), downloader=downloader))
    except ValueError as error:
        raise RuntimeError(f"{url} is not the expected file ({error}); try again, or give your own by path=") from error
    except OSError as error:  # requests' errors are OSErrors too
        raise RuntimeError(
            f"could not download {url} to {cache_dir()} ({error}); check the network and that this folder can be "
            "written (the environment variable IHBOOK_CACHE moves it), or get the file yourself and give it by path="
        ) from error


def _download_blob(url: str, blob: str) -> Path:
    """The same for a file known by its git blob id, which pooch can't check."""

    def check(file: str | Path) -> None:
        content = Path(file).read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if found != blob:
            raise ValueError(f"its git blob id is {found}, not {blob}")

    cached = cache_dir() / url.rsplit("/", 1)[-1]
    if cached.is_file():
        try:
            check(cached)
        except ValueError:
            cached.unlink()  # damaged since: fetched anew
    return _download(url, None, check)


def _sha256(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()
