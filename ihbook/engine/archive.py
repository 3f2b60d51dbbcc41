"""The runs of a store as one file, to hand out. It is a zip of their folders: nothing is compressed, and its comment is a checksum.

A stored member takes as many bytes in the archive as on the disk, so no archive can unpack to more than its own size.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from tqdm import tqdm

from ihbook import engine
from ihbook.engine import folders
from ihbook.engine.folders import MANIFEST, Damaged
from ihbook.engine.store import Store
from ihbook.files import writing

MARK = b"ihbook runs, sha256 "  # the comment, which ends the file; the checksum of all that stands before it follows, in hex
HEX = 64
NEEDED = {"config.json", "metrics.parquet", "heads.parquet", "weights.safetensors"}
MEMBER = re.compile(r"([0-9a-f]{24}-[0-9]{1,15})/((?:config|manifest)\.json|(?:metrics|heads)\.parquet|weights\.safetensors|"
                    r"checkpoints/[0-9]{1,15}\.safetensors)")
MOST_TEXT = 2**26  # bytes of a config or a manifest, which are read into memory; those of the book have at most 20,000

Members = Mapping[str, zipfile.ZipInfo]  # a run's files in an archive, by their names in its folder


def export_runs(store: Store, path: str | Path, *, progress: bool = True) -> tuple[list[str], dict[str, str]]:
    """Write all whole runs of a store into one file, whole or not at all.

    Return the runs' names, and what is wrong with each damaged run, by its name: these are left out, as are runs of other versions
    of ihbook, which this one does not read. Raises ValueError for a store without whole runs, OSError where the file can't be
    written.
    """
    names, wrong = [], {}
    with writing(Path(path)) as partial:
        with zipfile.ZipFile(partial, "w") as archive:
            archive.comment = MARK + b"0" * HEX
            for entry in tqdm(sorted(store.entries(), key=lambda entry: entry.folder.name), "exporting", disable=not progress,
                              leave=False, unit="run"):
                name = entry.folder.name
                if entry.config and entry.config.get("version") != engine.VERSION:
                    continue
                try:
                    files = folders.verify(entry.folder)
                    _check_names(name, files)
                except Damaged as error:
                    wrong[name] = str(error)
                    continue
                for file in [*files, MANIFEST]:
                    info = zipfile.ZipInfo(f"{name}/{file}")  # dated 1980: the same runs give the same bytes
                    info.external_attr = (stat.S_IFREG | 0o644) << 16
                    archive.writestr(info, (entry.folder / file).read_bytes())
                names.append(name)
        if not names:
            raise ValueError(f"the store {store.root} has no whole runs; build the book first, or name another store with --root")
        with partial.open("r+b") as file:
            checksum = _sha256(file, file.seek(0, 2) - HEX)
            file.seek(-HEX, 2)
            file.write(checksum.encode())
    return names, wrong


def import_runs(store: Store, path: str | Path, *, progress: bool = True) -> tuple[list[str], list[str]]:
    """Verify the whole of a file that `export_runs` wrote, then store its runs one by one, each whole or not at all.

    Return the names of the runs that were stored, and of those that were there already. After an interrupt, the same call goes on.
    Raises ValueError for any other file, and then nothing is stored; OSError where the runs can't be stored.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give one that `python -m ihbook store export` wrote")
    try:
        with path.open("rb") as file:
            runs, archive = _checked(file, progress)
            whole = {name: _is_whole(store, name) for name in runs}
            missing = [name for name in runs if not whole[name]]
            _check_room(store, sum(info.file_size for name in missing for info in runs[name].values()))
            for name in tqdm(missing, "importing", disable=not progress, leave=False, unit="run"):
                with store.lock(name, progress):
                    if not _is_whole(store, name):  # another process may have stored it meanwhile
                        _place(store, name, archive, runs[name])
    except (Damaged, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise ValueError(f"{path} can't be imported: {error}; get it again, or have it written again by `python -m ihbook store "
                         "export` of this version of ihbook") from error
    return missing, [name for name in runs if whole[name]]


def _checked(file: IO[bytes], progress: bool) -> tuple[dict[str, Members], zipfile.ZipFile]:
    """The members of every run, by its name, and the open archive. Raises Damaged, or what `zipfile` raises, unless all that is in
    the file is as `export_runs` writes it."""
    size = file.seek(0, 2)
    with tqdm(None, "checking", 2 * size, disable=not progress, leave=False, unit="B", unit_scale=True) as bar:
        file.seek(max(0, size - HEX - len(MARK)))
        end = file.read()
        if not end.startswith(MARK):
            raise Damaged("it is not an archive of runs, or its end is missing")
        if end != MARK + _sha256(file, size - HEX, bar).encode():
            raise Damaged("its checksum is wrong, so it is damaged")
        archive = zipfile.ZipFile(file)
        runs = _members(archive, size)
        for name, members in runs.items():
            _check_run(name, archive, members, bar)
    return runs, archive


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, Members]:
    """The members of an archive of `size` bytes, by run and by name. Raises Damaged for any that no run has."""
    runs: dict[str, dict[str, zipfile.ZipInfo]] = {}
    for info in archive.infolist():
        found = MEMBER.fullmatch(info.orig_filename)
        if not found:
            raise Damaged(f"no run has a file {info.orig_filename[:200]!r}")
        if (stat.S_IFMT(info.external_attr >> 16) != stat.S_IFREG or info.compress_type != zipfile.ZIP_STORED or info.flag_bits
                or info.file_size != info.compress_size or not 0 <= info.header_offset < size):
            raise Damaged(f"{info.filename} is not a plain file, uncompressed")
        run, name = found.groups()
        if name in runs.setdefault(run, {}):
            raise Damaged(f"{info.filename} is there twice")
        if name.endswith(".json") and info.file_size > MOST_TEXT:
            raise Damaged(f"{info.filename} has {info.file_size} bytes; {MOST_TEXT} are the most")
        runs[run][name] = info
    claimed = sum(info.file_size for info in archive.infolist())
    if claimed > size:  # members that share their bytes
        raise Damaged(f"its files claim to have {claimed} bytes, and all of it has {size}")
    return runs


def _check_run(name: str, archive: zipfile.ZipFile, members: Members, bar: tqdm) -> None:
    """Raise Damaged unless a run's members are what its manifest says, and of this version of ihbook."""
    try:
        manifest = json.loads(archive.read(members[MANIFEST]))
        version = json.loads(archive.read(members["config.json"]))["version"]
        checksums = dict(manifest.items())
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{name} has no {MANIFEST} or no config.json of a run") from error
    if version != engine.VERSION:
        raise Damaged(f"{name} is a run of version {version!r}, and this ihbook reads version {engine.VERSION}: both sides need "
                      "the same one")
    _check_names(name, checksums)
    if checksums.keys() != members.keys() - {MANIFEST}:
        raise Damaged(f"{name} has other files than its {MANIFEST} names")
    for file, checksum in checksums.items():
        with archive.open(members[file]) as source:
            if _sha256(source, members[file].file_size, bar) != checksum:
                raise Damaged(f"{name}/{file} is not what was written")


def _check_names(run: str, files: Iterable[str]) -> None:
    """Raise Damaged unless these can be all the files of a run but its manifest."""
    odd = [file for file in files if not MEMBER.fullmatch(f"{run}/{file}")]
    if odd or not set(files) >= NEEDED:
        raise Damaged(f"its {MANIFEST} names {odd[0]!r}, which no run has" if odd
                      else f"its {MANIFEST} does not name {', '.join(sorted(NEEDED - set(files)))}")


def _is_whole(store: Store, name: str) -> bool:
    """Whether a run is in the store as it was written. Raises OSError where it can't be read at this moment."""
    try:
        return bool(folders.verify(store.folder(name)))
    except Damaged:
        return False


def _place(store: Store, name: str, archive: zipfile.ZipFile, members: Members) -> None:
    """Unpack a run, verify what arrived on the disk, and move it to its place in the store."""
    with store.placing(name) as partial:
        for file, info in members.items():
            (partial / file).parent.mkdir(exist_ok=True)
            with archive.open(info) as source, (partial / file).open("xb") as target:
                shutil.copyfileobj(source, target)
        folders.verify(partial)


def _check_room(store: Store, needed: int) -> None:
    """Raise OSError unless `needed` bytes are free where the store is, or will be."""
    there = next(folder for folder in (store.root.absolute(), *store.root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(f"the runs need {needed / 1e6:.0f} MB, and {store.root} has {free / 1e6:.0f} MB free; free space there, or "
                      "set IHBOOK_STORE to another folder")


def _sha256(file: IO[bytes], n_bytes: int, bar: tqdm | None = None) -> str:
    """The sha256, in hex, of the first `n_bytes` of a file."""
    file.seek(0)
    found = hashlib.sha256()
    while n_bytes > 0 and (piece := file.read(min(n_bytes, 2**20))):
        found.update(piece)
        n_bytes -= len(piece)
        if bar is not None:
            bar.update(len(piece))
    return found.hexdigest()
