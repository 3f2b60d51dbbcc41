"""Exemplar banks: features of characters, from drawn glyphs, Omniglot, the authors' file, plain vectors, or a reader's array."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ihbook import files
from ihbook.banks import embeddings, encoder, glyphs
from ihbook.banks.authors import load_authors
from ihbook.banks.downloads import cache_dir
from ihbook.banks.embeddings import RANDOM, random_features
from ihbook.banks.glyphs import SIDE, draw_glyphs
from ihbook.banks.omniglot import load_omniglot
from ihbook.checks import one_of
from ihbook.config import EMBEDDINGS, BankConfig
from ihbook.files import kept
from ihbook.task import Bank

REFERENCE = 512  # the number of glyphs that set the standardisation, whatever `n_classes` is


def load_bank(config: BankConfig) -> Bank:
    """The bank that `config` names, drawn, read from `config.path`, or downloaded once into the cache.

    A bank that is read keeps at most `n_classes` of its classes, and may have fewer. `onehot` has dim = n_classes. The last two
    drawn banks are kept in memory: do not write to their tensors. Raises ValueError for a `config` or a file that does not fit,
    FileNotFoundError for a `path` that is not there, RuntimeError where something can't be downloaded.
    """
    return (_load if config.name in ("omniglot", "authors") else _drawn)(config)


def _load(config: BankConfig) -> Bank:
    loaders = {
        "glyphs": (_glyphs, ("auto", "random")),
        "omniglot": (load_omniglot, EMBEDDINGS),
        "authors": (load_authors, ("auto",)),
        "gaussian": (_gaussian, ("auto",)),
        "onehot": (_onehot, ("auto",)),
    }
    load, embeddings = loaders[config.name]
    one_of(f"the bank {config.name!r}: embedding", config.embedding, embeddings)
    if config.path is not None and config.name not in ("omniglot", "authors"):
        raise ValueError(f"path={config.path!r} but the bank {config.name!r} is generated; drop path or choose another")
    features, images, metadata = load(config)
    return _checked(features, images, {"name": config.name, **metadata}, "get a fresh copy of its source")


_drawn = lru_cache(maxsize=2)(_load)


def from_array(features: np.ndarray | torch.Tensor, images: np.ndarray | torch.Tensor | None = None, *, name: str = "own",
               source: str = "an array") -> Bank:
    """A reader's own bank from features `[class, exemplar, dim]` and, if there are any, images uint8 `[class, exemplar, 28, 28]`
    (ink 255 on 0): `fetch(runs, bank=from_array(x))`. Its contents name its runs in the store.

    Raises ValueError where the shapes do not fit, a feature is not finite, or all exemplars are the same.
    """
    features = torch.as_tensor(features).detach().float().contiguous().cpu().clone()  # its digest is kept, so its bytes must stay
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"features are {list(features.shape)}; they must be [class, exemplar, dim], and not empty")
    if images is not None:
        images = torch.as_tensor(images).clone()
        if images.dtype != torch.uint8 or images.shape != (*features.shape[:2], SIDE, SIDE):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; they must be uint8 "
                             f"{[*features.shape[:2], SIDE, SIDE]}")
    return _checked(features, images, {"name": name, "embedding": "as given", "source": source}, "mend the array")


def _checked(features: torch.Tensor, images: torch.Tensor | None, metadata: dict, remedy: str) -> Bank:
    """The bank. Raises ValueError where a feature is not finite or all exemplars are the same."""
    bank = f"the bank {metadata['name']!r} ({metadata['source']})"
    if not features.isfinite().all():
        wrong = (~features.isfinite()).nonzero()
        raise ValueError(f"{bank} has {len(wrong)} NaN or infinite features, the first at {wrong[0].tolist()}; {remedy}")
    if len(features) > 1 and (features == features[:1, :1]).all():
        raise ValueError(f"{bank} has zero variance: every exemplar is the same; {remedy}")
    return Bank(features, images, metadata)


def _glyphs(config: BankConfig):
    """Drawing and embedding take seconds, so the cache keeps what they give."""
    if config.embedding == "auto" and config.seed == encoder.GLYPH_SEED:
        raise ValueError(f"seed={config.seed} draws the characters that trained the learnt encoder; choose another seed")

    def drawn() -> dict[str, torch.Tensor]:
        images = draw_glyphs(config.n_classes, config.n_exemplars, config.seed)
        if config.embedding == "random":
            return {"images": images,
                    "features": random_features(images, config.dim, reference=draw_glyphs(REFERENCE, 1, config.seed))}
        return {"images": images, "features": encoder.learnt_features(images, config.dim, "glyphs")}

    how = RANDOM if config.embedding == "random" else encoder.described("glyphs")
    code = b"".join(Path(file).read_bytes() for file in (__file__, glyphs.__file__, embeddings.__file__, encoder.__file__))
    key = hashlib.sha256(repr(config).encode() + how.encode() + code).hexdigest()[:32]
    try:
        found = load_file(kept(folder() / f"{key}.safetensors", lambda path: save_file(drawn(), path)))
    except OSError:  # the cache can't be written
        found = drawn()
    return found["features"], found["images"], {"embedding": how, "source": f"drawn with seed {config.seed}"}


def folder() -> Path:
    """Where drawn banks are kept: beside the downloads."""
    return cache_dir() / "banks"


def prune(*, before: float, everything: bool = False) -> list[Path]:
    """Remove drawn banks that are damaged or were last used `before` (seconds since the epoch); or all. Returns them."""
    return files.prune(folder(), {}, before=before, everything=everything)


def _gaussian(config: BankConfig):
    """Features that are N(0, I) marginally; two exemplars of a class have a cosine of about 0.94."""
    shape = config.n_classes, config.dim
    centres = np.random.default_rng([config.seed, 0]).standard_normal(shape)
    noise = [np.random.default_rng([config.seed, 1 + e]).standard_normal(shape) for e in range(config.n_exemplars)]
    features = (centres[:, None] + 0.25 * np.stack(noise, 1)) / np.sqrt(1 + 0.25**2)
    source = f"centres N(0, I), exemplars with noise of 0.25, seed {config.seed}"
    return torch.from_numpy(features).float(), None, {"embedding": "none", "source": source}


def _onehot(config: BankConfig):
    features = torch.eye(config.n_classes)[:, None].repeat(1, config.n_exemplars, 1)
    return features, None, {"embedding": "none", "source": "one-hot classes, all exemplars identical"}
