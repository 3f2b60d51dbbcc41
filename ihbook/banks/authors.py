"""The authors' own features, in their file format."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import torch

from ihbook.banks.downloads import download_blob
from ihbook.config import BankConfig
from ihbook.files import sha256

AUTHORS_URL = "https://raw.githubusercontent.com/aadityasingh/icl-dynamics/47eba1d/"
AUTHORS_FILE = "omniglot_resnet18_randomized_order_s0.h5"
AUTHORS_BLOB = "9eb588c516b641f5f25ac22227865a7ce5ab0b2f"
AUTHORS_DATASET = "resnet18/224/feat"


def load_authors(config: BankConfig):
    """Features float32 `[class, exemplar, dim]`, no images, and metadata: the file's first classes and exemplars, in its order.
    Raises FileNotFoundError for a missing file, ValueError for a file that does not fit, RuntimeError for a failed download."""
    remedy = "give a file in the authors' format, or path=None to download theirs"
    own = config.path is not None
    path = Path(config.path).expanduser() if own else download_blob(AUTHORS_URL + AUTHORS_FILE, AUTHORS_BLOB)
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
    metadata = {"embedding": "as in the file", "source": path.name, "sha256": sha256(path)}
    return torch.from_numpy(features), None, metadata
