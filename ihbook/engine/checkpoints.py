"""Weights in files, and a run's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ihbook.config import ModelConfig
from ihbook.files import writing
from ihbook.model import Weights


def save_weights(weights: Weights, path: str | Path) -> None:
    """Write a safetensors file, whole or not at all. Its metadata hold the architecture and a checksum. Raises OSError."""
    with writing(Path(path)) as partial:
        save_file(dict(weights.tensors), partial, metadata={"config": json.dumps(asdict(weights.config)),
                                                            "digest": weights.content_digest})


def load_weights(path: str | Path, config: ModelConfig | None = None) -> Weights:
    """Read a safetensors file, and verify it if `save_weights` wrote it; `config` is needed only for others.

    Raises FileNotFoundError, or ValueError for a damaged file, one without an architecture, or one that does not fit `config`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; train a run first, or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Clones: a tensor that is mapped from a file changes with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a dict
        stored = ModelConfig(**json.loads(metadata["config"])) if "config" in metadata else config
    except (SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); delete it and train or copy it again") from error
    if stored is None:
        raise ValueError(f"{path} does not say its architecture; pass config=ModelConfig(...)")
    if config is not None and config != stored:
        raise ValueError(f"{path} holds a network of {stored}, not of {config}; leave config out")
    weights = Weights(stored, tensors)
    if "digest" in metadata and metadata["digest"] != weights.content_digest:
        raise ValueError(f"{path} is not what was written: its checksum differs; delete it and train or copy it again")
    return weights


class Checkpoints(Mapping[int, Weights]):
    """A run's weights by sequences seen, read from a folder on access. Raises KeyError where there is no such checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, sequences: int) -> Weights:
        if sequences not in set(self):
            raise KeyError(f"no checkpoint at {sequences} sequences; there are {sorted(self)}")
        return load_weights(self.folder / f"{sequences}.safetensors")

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(p.stem) for p in self.folder.glob("[0-9]*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)
