"""The store of finished runs. A run's value names its folder; a stored run that is whole and verified is not trained again."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from ihbook import banks, engine
from ihbook.checks import at_least
from ihbook.config import RunConfig
from ihbook.digest import digest
from ihbook.engine import cluster, folders, programs
from ihbook.engine.blocks import plan_blocks
from ihbook.engine.folders import Damaged
from ihbook.engine.prepared import Prepared, prepare
from ihbook.engine.results import Result
from ihbook.engine.train import train_blocks
from ihbook.task import Bank

if TYPE_CHECKING:
    from distributed import Client


def default_root() -> Path:
    """The folder where the book stores its runs: the one that IHBOOK_STORE names, or the platform's folder for user data."""
    return Path(os.environ.get("IHBOOK_STORE") or platformdirs.user_data_dir("ihbook")).expanduser()


@dataclass(frozen=True)
class Entry:
    """A stored run: its folder, its config.json, its size in bytes, and when it was written (seconds since 1970)."""

    folder: Path
    config: dict
    size: int
    written: float


def store_key(prepared: Prepared) -> tuple[str, int]:
    """A run's key in the store: a digest of everything that decides it except its length, and its length in sequences.

    The digest includes the length where the learning rate depends on it (the cosine schedule).
    """
    run = replace(prepared.run, bank=replace(prepared.run.bank, path=None))  # the bank's digest counts, not its path
    any_length = run if run.schedule == "cosine" else replace(run, n_sequences=run.batch_size)
    return digest([engine.VERSION, any_length, prepared.bank.digest])[:24], run.n_steps * run.batch_size


def run_name(prepared: Prepared) -> str:
    """The name of a run's folder in the store: its key in one word."""
    return "{}-{}".format(*store_key(prepared))


class Store:
    """A folder of finished runs (`runs`), of families that are training or were stopped (`training`), and of `locks`."""

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root) if root else default_root()

    def fetch(self, runs: Sequence[RunConfig], *, bank: Bank | None = None, device: str | torch.device = "cpu",
              compile: bool | None = None, progress: bool = True, client: Client | None = None) -> list[Result]:
        """Return the results of `runs`, in their order: read the runs that are stored; train and store the others.

        If another process is training a run, wait for it. Options are as in `train.train`. With a Dask `client`
        (`cluster.connect`), its workers train the missing runs, on the devices that they have, and the results are stored here.

        Raises as `train.train` does, and OSError where the store can't be read or written. On KeyboardInterrupt, finished work is
        kept, and the same call resumes.
        """
        asked = prepare(runs, bank, device)
        names = [run_name(prepared) for prepared in asked]
        found = {name: self.get(prepared, mend=False) for name, prepared in dict(zip(names, asked, strict=True)).items()}
        missing = {name: prepared for name, prepared in zip(names, asked, strict=True) if found[name] is None}
        if missing:
            with ExitStack() as locks:
                for name in sorted(missing):  # in a fixed order, so that two processes never wait for each other
                    locks.enter_context(self.lock(name, progress))
                for name, prepared in missing.items():
                    found[name] = self.get(prepared)  # another process may have trained it while this one waited
                rest = {name: prepared for name, prepared in missing.items() if found[name] is None}
                found |= (self._train(rest, asked, device, compile, progress) if client is None
                          else self._train_on_workers(rest, client, progress))
        return [replace(found[name], run=run) for name, run in zip(names, runs, strict=True)]

    def _train(self, missing: dict[str, Prepared], asked: list[Prepared], device: str | torch.device, compile: bool | None,
               progress: bool) -> dict[str, Result]:
        names, done = list(missing), {}
        directory = self.root / "training"
        blocks = plan_blocks(list(missing.values()), directory, device, compile, asked)
        for block, results in train_blocks(blocks, directory, device, progress):
            for i, prepared, result in zip(block.places, block.family, results, strict=True):
                done[names[i]] = self.put(prepared, result)
            shutil.rmtree(block.folder(directory), ignore_errors=True)
        return done

    def _train_on_workers(self, missing: dict[str, Prepared], client: Client, progress: bool) -> dict[str, Result]:
        names, wanted, done = list(missing), list(missing.values()), {}
        for i, files in cluster.train_on_workers(client, wanted, progress):
            done[names[i]] = self._receive(wanted[i], files)
        return done

    def _receive(self, prepared: Prepared, files: dict[str, bytes]) -> Result:
        """Verify the files of a run that a worker sent, store them, and return the result."""
        name = run_name(prepared)
        with self.placing(name) as partial:
            folders.unpack(files, partial, prepared)
        return folders.read(self.folder(name), prepared.run)

    def folder(self, name: str) -> Path:
        """The folder of the run with this name (`run_name`), stored or not."""
        return self.root / "runs" / name

    @contextmanager
    def placing(self, name: str) -> Iterator[Path]:
        """Yield a new folder, which becomes the folder of a run when it is complete. Raises OSError with a remedy."""
        folder = self.folder(name)
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():  # it is damaged: a whole one would have been read
                shutil.rmtree(folder)
            os.replace(partial, folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise OSError(f"can't store a run in {self.root} ({error}); free space there, make it writable, or set IHBOOK_STORE "
                          "to another folder") from error

    def lock(self, name: str, progress: bool) -> AcquireReturnProxy:
        """Acquire a run's lock. It is held until its context ends or its process does, even if that is killed."""
        path = self.root / "locks" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                return lock.acquire(timeout=0.2)
            except Timeout:
                if progress:
                    warnings.warn(f"another process is training the run {name}; waiting for it", stacklevel=4)
                return lock.acquire()
        except OSError as error:
            remedy = ("raise the limit of open files (ulimit -n), or ask for fewer runs at once" if error.errno == errno.EMFILE
                      else "make it writable, or set IHBOOK_STORE to a folder that is")
            raise OSError(f"can't write to the store {self.root} ({error}); {remedy}") from error

    def get(self, prepared: Prepared, *, mend: bool = True) -> Result | None:
        """The stored run, or the beginning of a longer one that was evaluated and has a checkpoint there; None without either.

        A damaged folder: with `mend` (only while holding the run's lock) warn and delete it; otherwise skip it. Raises OSError
        where a file can't be read at this moment.
        """
        name, length = store_key(prepared)
        for stored in sorted(int(path.name.rsplit("-", 1)[1]) for path in self._folders(f"runs/{name}-*")):
            if stored < length:
                continue
            folder = self.folder(f"{name}-{stored}")
            try:
                result = folders.read(folder, prepared.run)
                if stored > length:
                    result = _cut(result, length)
            except Damaged as error:
                if not mend:
                    continue
                warnings.warn(f"the stored run {folder} is damaged ({error}); it is removed, and will be trained again",
                              stacklevel=3)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if result is not None:
                return result
        return None

    def put(self, prepared: Prepared, result: Result) -> Result:
        """Store a result, whole or not at all, and return it as read from the store. Raises OSError where that fails."""
        name = run_name(prepared)
        with self.placing(name) as partial:
            folders.write(partial, prepared, result)
        return folders.read(self.folder(name), prepared.run)

    def _folders(self, where: str = "runs/*", name: str = r"[0-9a-f]{24}-\d+") -> list[Path]:
        """The folders that match the glob `where` and the pattern `name`; other files there do not belong to the store."""
        return [path for path in self.root.glob(where) if re.fullmatch(name, path.name) and path.is_dir()]

    def entries(self) -> Iterator[Entry]:
        """Yield every stored run, the latest first; the config is empty where it can't be read."""
        for folder in sorted(self._folders(), key=lambda path: -path.stat().st_mtime):
            try:
                config = json.loads((folder / "config.json").read_text())
            except (OSError, ValueError):
                config = {}
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield Entry(folder, config, size, folder.stat().st_mtime)

    def verify(self) -> dict[Path, str]:
        """What is wrong with each damaged run, by its folder. Raises OSError where a file can't be read at this moment."""
        wrong = {}
        for entry in self.entries():
            try:
                folders.verify(entry.folder)
            except Damaged as error:
                wrong[entry.folder] = str(error)
        return wrong

    def prune(self, *, days: float | None = None, everything: bool = False) -> list[Path]:
        """Remove (and return) damaged runs, runs of other versions, half-written folders and stopped families; with `days`, also
        older runs; with `everything`, all. Of the default store, the compiled programs and the drawn banks in the cache, which all
        stores share, go in the same way. Nothing else may use them meanwhile. Raises ValueError for negative `days`."""
        if days is not None:
            at_least("days", days, 0)
        wrong = self.verify()
        old = time.time() - 86_400 * days if days is not None else -float("inf")
        gone = [e.folder for e in self.entries() if everything or e.folder in wrong or e.written < old
                or e.config.get("version") != engine.VERSION]
        gone += self._folders("runs/.*", r"\.[0-9a-f]{24}-\d+\..*") + self._folders("training/*", r"[0-9a-f]{24}")
        for folder in gone:
            shutil.rmtree(folder)
        shutil.rmtree(self.root / "locks", ignore_errors=True)
        if self.root == default_root():
            gone += programs.prune(before=old, everything=everything) + banks.prune(before=old, everything=everything)
        return gone


def fetch(runs: Sequence[RunConfig], *, bank: Bank | None = None, device: str | torch.device = "cpu", progress: bool = True,
          client: Client | None = None) -> list[Result]:
    """`Store.fetch` on the default store (`default_root`): the book's chapters get their runs this way."""
    return Store().fetch(runs, bank=bank, device=device, progress=progress, client=client)


def _cut(result: Result, length: int) -> Result | None:
    """The first `length` sequences of a longer result, or None where it has no checkpoint or no evaluation there."""
    evaluated = set(result.metrics[result.metrics["sequences"] == length]["eval_set"])
    if length not in result.checkpoints or evaluated != set(result.metrics["eval_set"]):
        return None
    metrics, heads = (table[table["sequences"] <= length].reset_index(drop=True) for table in (result.metrics, result.heads))
    kept = {seen: result.checkpoints[seen] for seen in result.checkpoints if seen <= length}
    return Result(result.run, metrics, heads, kept[length], kept)
