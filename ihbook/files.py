"""Files that are written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, then move that file there. An error leaves nothing; an OSError names the remedy."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, (OSError, SafetensorError)) or _is_elsewhere(error, path.parent):
            raise
        raise OSError(f"can't write {path} ({error}); free space there, make it writable, or choose another directory "
                      "(IHBOOK_STORE names the book's)") from error


def _is_elsewhere(error: BaseException, folder: Path) -> bool:
    """Whether an error is of a file outside a folder, such as one that was to be copied into it."""
    name = getattr(error, "filename", None)
    return isinstance(name, (str, os.PathLike)) and not Path(name).absolute().is_relative_to(folder.absolute())


def sha256(path: Path) -> str:
    """The sha256 checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Busy(Exception):
    """Another process is making this file now."""


def kept(path: Path, make: Callable[[Path], None], record: dict | None = None, *, wait: bool = True) -> Path:
    """The file at `path`, as it was written; `make` makes it where it is absent or damaged. Beside it stands its checksum, with the
    `record`. Two processes that need it make it once: the other waits or, without `wait`, raises Busy."""
    if record_of(path) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(path.with_suffix(".lock")).acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise Busy from None
        with lock:
            if record_of(path) is None:  # another process may have made it meanwhile
                with writing(path) as partial:
                    make(partial)
                with writing(path.with_suffix(".json")) as partial:  # the checksum is written last
                    partial.write_text(json.dumps({"sha256": sha256(path), **(record or {})}))
    with suppress(OSError):
        os.utime(path.with_suffix(".json"))  # used: `prune` removes what has not been for long
    return path


def record_of(path: Path) -> dict | None:
    """The record of a file that is `kept` there, as it was written; None for another, or a damaged one, which is never used."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        return record if record["sha256"] == sha256(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune(folder: Path, record: dict, *, before: float, everything: bool = False) -> list[Path]:
    """Remove the `kept` files in a folder that are damaged, have another `record`, or were last used before the time
    `before` (seconds since the epoch); with `everything`, all of them. Return their paths. Their names are 32 hex digits; others
    stay."""
    gone = []
    for path in sorted(folder.glob("[0-9a-f]" * 32 + ".*")):
        if path.suffix in (".json", ".lock"):
            continue
        found = record_of(path)
        if (everything or found is None or any(found.get(key) != value for key, value in record.items())
                or path.with_suffix(".json").stat().st_mtime < before):
            gone.append(path)
            for each in (path, path.with_suffix(".json"), path.with_suffix(".lock")):
                each.unlink(missing_ok=True)
    return gone
