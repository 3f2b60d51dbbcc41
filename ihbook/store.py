"""The store of finished runs: a run's value names its folder; what is stored, whole and verified, is not trained again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import platformdirs
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ihbook import family, spread, train
from ihbook.banks import Bank
from ihbook.config import RunConfig, encode
from ihbook.family import Checkpoints, Prepared, Result, writing
from ihbook.model import load_weights, save_weights

if TYPE_CHECKING:
    from distributed import Client

MANIFEST = "manifest.json"


def default_root() -> Path:
    """Where the book keeps its runs: the folder that IHBOOK_STORE names, or the platform's place for user data."""
    return Path(os.environ.get("IHBOOK_STORE") or platformdirs.user_data_dir("ihbook")).expanduser()


class Damaged(Exception):
    """A stored run whose files are not those that were written."""


@dataclass(frozen=True)
class Entry:
    """A stored run: its folder, what its config says, its size in bytes, when it was written."""

    folder: Path
    config: dict
    size: int
    written: float


def key(each: Prepared) -> tuple[str, int]:
    """A run's name in the store: all that decides it but its length, and its length in sequences.

    Where the learning rate follows the length, that is part of the name too.
    """
    run = replace(each.config, bank=replace(each.config.bank, path=None))  # wherever it lies: its digest is what counts
    shape = run if run.schedule == "cosine" else replace(run, n_sequences=run.batch_size)
    names = [family.VERSION, encode(shape), each.bank.digest]
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:24], run.n_steps * run.batch_size


class Store:
    """A folder of finished runs (`runs`), of families that are training or were stopped (`training`), and of locks."""

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root) if root else default_root()

    def fetch(self, runs: Sequence[RunConfig], *, bank: Bank | None = None, device: str | torch.device = "cpu",
              compile: bool | None = None, progress: bool = True, executor: Client | None = None) -> list[Result]:
        """The results of `runs`, in their order: read where they are stored, trained and stored where not.

        A run that another process is training is waited for. Options as in `train.train`. With a Dask client as `executor`
        (`spread.connect`), what is missing is trained by its workers, on the devices that they have, and stored here.

        Raises ValueError for a run that can't be trained, OSError where the store can't be written, KeyboardInterrupt when
        stopped: what was done is kept, and the same call goes on.
        """
        prepared = family.prepare(runs, bank, device)
        names = [f"{name}-{length}" for name, length in map(key, prepared)]
        found = {name: self.get(each) for name, each in dict(zip(names, prepared, strict=True)).items()}
        missing = {name: each for name, each in zip(names, prepared, strict=True) if found[name] is None}
        if missing:
            with ExitStack() as locks:
                for name in sorted(missing):  # in one order, so that two processes never wait for each other
                    locks.enter_context(self._lock(name, progress))
                for name, each in missing.items():
                    found[name] = self.get(each)  # another process may have trained it while this one waited
                rest = {name: each for name, each in missing.items() if found[name] is None}
                found |= (self._train(rest, prepared, device, compile, progress) if executor is None
                          else self._spread(rest, executor, progress))
        return [replace(found[name], config=run) for name, run in zip(names, runs, strict=True)]

    def _train(self, missing: dict[str, Prepared], asked: list[Prepared], device: str | torch.device, compile: bool | None,
               progress: bool) -> dict[str, Result]:
        names, done = list(missing), {}
        directory = self.root / "training"
        blocks = train.plan_blocks(list(missing.values()), directory, device, compile, asked)
        for block, results in train.train_blocks(blocks, directory, device, progress):
            for i, each, result in zip(block.places, block.family, results, strict=True):
                done[names[i]] = self.put(each, result)
            shutil.rmtree(block.folder(directory), ignore_errors=True)
        return done

    def _spread(self, missing: dict[str, Prepared], client: Client, progress: bool) -> dict[str, Result]:
        names, family, done = list(missing), list(missing.values()), {}
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, each in sorted(enumerate(family), key=lambda item: -item[1].config.n_steps):
            groups[each.program, frozenset(each.forms), each.bank.digest].append(i)
        banks = {each.bank.digest: each.bank for each in family if not each.drawn_bank}
        sent_banks = {digest: client.scatter(bank, broadcast=True) for digest, bank in banks.items()}

        def arguments(share: list[int]) -> tuple:
            digest = family[share[0]].bank.digest
            return [family[i].config for i in share], sent_banks.get(digest), digest

        with tqdm(total=len(family), desc="runs", disable=not progress, leave=False) as bar:
            for share, sent in spread.run(client, _elsewhere, list(groups.values()), arguments):
                for i, files in zip(share, sent, strict=True):
                    done[names[i]] = self._receive(family[i], files)
                    bar.update()
        return done

    def _receive(self, each: Prepared, files: dict[str, bytes]) -> Result:
        """Store a run's folder as it was sent from elsewhere, once it is verified."""
        name, length = key(each)
        with self._placing(f"{name}-{length}") as partial:
            for path, content in files.items():
                (partial / path).parent.mkdir(exist_ok=True)
                (partial / path).write_bytes(content)
            _verify(partial)
            book = json.loads((partial / "config.json").read_text())
            if (book["version"], book["bank"]["digest"]) != (family.VERSION, each.bank.digest):
                raise RuntimeError("a worker has another version of ihbook; install there what is here")
        return _read(self.root / "runs" / f"{name}-{length}", each.config)

    @contextmanager
    def _placing(self, name: str) -> Iterator[Path]:
        """A new folder, which becomes that of a run when it is complete."""
        folder = self.root / "runs" / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
            yield partial
            if folder.exists():  # a damaged one, since a whole one would have been read
                shutil.rmtree(folder)
            os.replace(partial, folder)
        except OSError as error:
            raise OSError(f"can't store a run in {self.root} ({error}); free space there, make it writable, or set IHBOOK_STORE "
                          "to another folder") from error

    def _lock(self, name: str, progress: bool) -> FileLock:
        """The lock of a run, held. It goes with its process, however that ends."""
        path = self.root / "locks" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                return lock.acquire(timeout=0.2).lock
            except Timeout:
                if progress:
                    warnings.warn(f"another process is training the run {name}; waiting for it", stacklevel=4)
                return lock.acquire().lock
        except OSError as error:
            raise OSError(f"can't write to the store {self.root} ({error}); make it writable, or set IHBOOK_STORE to a folder "
                          "that is") from error

    def get(self, each: Prepared) -> Result | None:
        """The stored run, or the beginning of a longer one that was evaluated and kept there; None where there is none.

        A damaged folder is reported and removed.
        """
        name, length = key(each)
        longer = sorted(self.root.glob(f"runs/{name}-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
        for folder in longer:
            if int(folder.name.rsplit("-", 1)[1]) < length:
                continue
            try:
                result = _read(folder, each.config)
                if int(folder.name.rsplit("-", 1)[1]) > length:
                    result = _cut(result, length)
            except Damaged as error:
                warnings.warn(f"the stored run {folder} is damaged ({error}); it is removed, and will be trained again",
                              stacklevel=3)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if result is not None:
                return result
        return None

    def put(self, each: Prepared, result: Result) -> Result:
        """Store a result, whole or not at all; the checkpoints are moved there. Returns it as read from there."""
        name, length = key(each)
        with self._placing(f"{name}-{length}") as partial:
            (partial / "config.json").write_text(json.dumps(
                {"version": family.VERSION, "run": encode(each.config), "bank": each.bank.metadata | {"digest": each.bank.digest}},
                indent=1, default=str))
            result.metrics.to_parquet(partial / "metrics.parquet")
            result.heads.to_parquet(partial / "heads.parquet")
            save_weights(result.weights, partial / "weights.safetensors")
            (partial / "checkpoints").mkdir()
            for seen in result.checkpoints:
                shutil.copyfile(result.checkpoints.folder / f"{seen}.safetensors", partial / "checkpoints" / f"{seen}.safetensors")
            files = {path.relative_to(partial).as_posix(): _sha256(path) for path in sorted(partial.rglob("*")) if path.is_file()}
            with writing(partial / MANIFEST) as temporary:
                temporary.write_text(json.dumps(files, indent=1))
        return _read(self.root / "runs" / f"{name}-{length}", each.config)

    def entries(self) -> Iterator[Entry]:
        """Every stored run, the latest first; damaged ones with an empty config."""
        folders = [path for path in self.root.glob("runs/*-*") if not path.name.startswith(".")]
        for folder in sorted(folders, key=lambda path: -path.stat().st_mtime):
            try:
                config = json.loads((folder / "config.json").read_text())
            except (OSError, ValueError):
                config = {}
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield Entry(folder, config, size, folder.stat().st_mtime)

    def verify(self) -> dict[Path, str]:
        """What is wrong with each damaged run, by its folder."""
        wrong = {}
        for entry in self.entries():
            try:
                _verify(entry.folder)
            except Damaged as error:
                wrong[entry.folder] = str(error)
        return wrong

    def prune(self, *, days: float | None = None, everything: bool = False) -> list[Path]:
        """Remove damaged runs, those of other versions, what was left half-written, and stopped families; with `days`, also
        runs not written since; with `everything`, all. Returns what was removed. Nothing else may use the store meanwhile."""
        wrong = self.verify()
        old = time.time() - 86_400 * days if days is not None else -float("inf")
        gone = [e.folder for e in self.entries() if everything or e.folder in wrong or e.written < old
                or e.config.get("version") != family.VERSION]
        gone += [*self.root.glob("runs/.*"), *self.root.glob("training/*")]
        for folder in gone:
            shutil.rmtree(folder)
        shutil.rmtree(self.root / "locks", ignore_errors=True)
        return gone


def fetch(runs: Sequence[RunConfig], *, device: str | torch.device = "cpu", progress: bool = True,
          executor: Client | None = None) -> list[Result]:
    """`Store.fetch` on the default store: how the book's chapters get their runs."""
    return Store().fetch(runs, device=device, progress=progress, executor=executor)


def _elsewhere(runs: Sequence[RunConfig], bank: Bank | None, digest: str) -> list[dict[str, bytes]]:
    """On a worker: train runs as one family, on one core or the GPU, and give their stored folders as bytes. `bank` is theirs where
    the worker can't draw it; `digest` what it must be."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = family.prepare(runs, bank, device)
    if runs[0].bank.digest != digest:
        raise RuntimeError("this worker draws other characters than the machine that asks; install the same packages on both")
    with tempfile.TemporaryDirectory() as root:
        compiled = sum(each.config.n_steps for each in runs) >= train.COMPILE_FROM
        results = family.train_family(runs, Path(root) / "training", device, compiled)
        sent = []
        for each, result in zip(runs, results, strict=True):
            Store(root).put(each, result)
            folder = Path(root) / "runs" / "{}-{}".format(*key(each))
            sent.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
        return sent


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path) -> None:
    """Raise Damaged unless the folder holds just what its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, digest in files.items():
            if _sha256(folder / name) != digest:
                raise Damaged(f"{name} is not what was written")
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(f"its {MANIFEST} or a file that it names can't be read: {error}") from error


def _read(folder: Path, run: RunConfig) -> Result:
    """A verified folder as a result."""
    _verify(folder)
    return Result(run, pd.read_parquet(folder / "metrics.parquet"), pd.read_parquet(folder / "heads.parquet"),
                  load_weights(folder / "weights.safetensors"), Checkpoints(folder / "checkpoints"))


def _cut(result: Result, length: int) -> Result | None:
    """The first `length` sequences of a longer result, or None where it has no weights or no evaluation there."""
    run = result.config
    evaluated = set(result.metrics[result.metrics["sequences"] == length]["eval_set"])
    if length not in result.checkpoints or evaluated != set(result.metrics["eval_set"]):
        return None
    metrics, heads = (table[table["sequences"] <= length].reset_index(drop=True) for table in (result.metrics, result.heads))
    kept = {seen: result.checkpoints[seen] for seen in result.checkpoints if seen <= length}
    return Result(run, metrics, heads, kept[length], kept)
