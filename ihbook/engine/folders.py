"""A finished run as a folder: its config as JSON, tables as Parquet, weights as safetensors, and a manifest of checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ihbook import engine
from ihbook.config import RunConfig
from ihbook.digest import encode
from ihbook.engine.checkpoints import Checkpoints, load_weights, save_weights
from ihbook.engine.prepared import Prepared
from ihbook.engine.results import Result
from ihbook.files import sha256, writing

MANIFEST = "manifest.json"


class Damaged(Exception):
    """The error for a run's folder whose files are not as they were written."""


def write(folder: Path, prepared: Prepared, result: Result) -> None:
    """Write a result into an empty folder, the manifest last. Raises OSError where it can't be written."""
    (folder / "config.json").write_text(json.dumps(
        {"version": engine.VERSION, "run": encode(prepared.run, defaults=True),
         "bank": prepared.bank.metadata | {"digest": prepared.bank.digest}},
        indent=1, default=str))
    result.metrics.to_parquet(folder / "metrics.parquet")
    result.heads.to_parquet(folder / "heads.parquet")
    save_weights(result.weights, folder / "weights.safetensors")
    (folder / "checkpoints").mkdir()
    for seen in result.checkpoints:
        save_weights(result.checkpoints[seen], folder / "checkpoints" / f"{seen}.safetensors")
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    with writing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(files, indent=1))


def read(folder: Path, run: RunConfig) -> Result:
    """Verify a run's folder, and read it as a result; its checkpoints are read on access. Raises as `verify` does."""
    verify(folder)
    return Result(run, pd.read_parquet(folder / "metrics.parquet"), pd.read_parquet(folder / "heads.parquet"),
                  load_weights(folder / "weights.safetensors"), Checkpoints(folder / "checkpoints"))


def verify(folder: Path) -> list[str]:
    """The names of the files that a run's manifest lists. Raises Damaged unless each is there as it was written; OSError where one
    can't be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, digest in files.items():
            if sha256(folder / name) != digest:
                raise Damaged(f"{name} is not what was written")
        return list(files)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, AttributeError) as error:
        raise Damaged(f"its {MANIFEST} or a file that it names can't be read: {error}") from error


def pack(folder: Path) -> dict[str, bytes]:
    """The contents of a folder's files by relative path, to send elsewhere."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpack(files: Mapping[str, bytes], folder: Path, prepared: Prepared) -> None:
    """Write a finished run's files (from `pack`) into an empty folder, and verify them. Raises Damaged, or RuntimeError where
    they come from another version of ihbook or from another bank."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    verify(folder)
    book = json.loads((folder / "config.json").read_text())
    for name, theirs, ours in (("version of ihbook", book["version"], engine.VERSION),
                               ("bank", book["bank"]["digest"], prepared.bank.digest)):
        if theirs != ours:
            raise RuntimeError(f"a worker trained with another {name} ({theirs}, not {ours}); install there what is here")
