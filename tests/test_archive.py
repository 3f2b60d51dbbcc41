"""The store as one file: what is exported is imported bit for bit, and nothing else ever is."""

import errno
import hashlib
import json
import os
import random
import shutil
import stat
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from test_train import RUN, same

from ihbook import engine
from ihbook.__main__ import main
from ihbook.engine import archive, step
from ihbook.engine.archive import export_runs, import_runs
from ihbook.engine.prepared import prepare
from ihbook.engine.store import Store, run_name

RUNS = [replace(RUN, n_sequences=n, init_seed=seed) for n, seed in ((1600, 5), (960, 6), (320, 7))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, small_bank):
    """A store of three runs, their results, and the file that it was exported to."""
    folder = tmp_path_factory.mktemp("exported")
    store = Store(folder / "store")
    results = store.fetch(RUNS, bank=small_bank, progress=False)
    names, wrong = export_runs(store, folder / "runs.zip", progress=False)
    assert sorted(names) == sorted(run_name(prepared) for prepared in prepare(RUNS, small_bank)) and not wrong
    return store, results, folder / "runs.zip"


@pytest.fixture
def empty(tmp_path):
    return Store(tmp_path / "student")


def contents(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def forged(path: Path, files, edit=lambda info: None) -> Path:
    """An archive of (name, content) pairs with the right checksum, as a cheat would make it; `edit` changes a member's record."""
    with zipfile.ZipFile(path, "w") as file:
        file.comment = archive.MARK + b"0" * archive.HEX
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            edit(info)
            file.writestr(info, content)
    return seal(path)


def seal(path: Path) -> Path:
    content = path.read_bytes()[:-archive.HEX]
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    return path


def refused(store: Store, path: Path, words: str) -> None:
    """Assert that a file is refused by name, in the function and the command, and that nothing is written."""
    with pytest.raises(ValueError, match=words) as error:
        import_runs(store, path, progress=False)
    assert str(path) in str(error.value) and "store export" in str(error.value)
    assert not store.root.exists()


def test_what_is_imported_is_what_was_exported(exported, empty, small_bank, monkeypatch):
    store, results, path = exported
    stored, there = import_runs(empty, path, progress=False)
    assert len(stored) == 3 and not there
    assert contents(empty.root / "runs") == contents(store.root / "runs")
    monkeypatch.setattr(step, "PLAIN", replace(step.PLAIN, step=None))  # training would fail
    for a, b in zip(results, empty.fetch(RUNS, bank=small_bank, progress=False), strict=True):
        same(a, b)
    before = contents(empty.root)
    assert import_runs(empty, path, progress=False) == ([], stored) and contents(empty.root) == before


def test_the_same_runs_give_the_same_bytes_and_any_tool_opens_them(exported, empty, tmp_path):
    store, _, path = exported
    import_runs(empty, path, progress=False)
    export_runs(empty, tmp_path / "again.zip", progress=False)
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()
    shutil.unpack_archive(path, tmp_path / "unpacked", "zip")
    assert contents(tmp_path / "unpacked") == contents(store.root / "runs")


def test_a_run_that_is_damaged_in_the_store_is_mended(exported, empty):
    _, _, path = exported
    [name, *_], _ = import_runs(empty, path, progress=False)
    whole = contents(empty.root)
    (empty.folder(name) / "weights.safetensors").write_bytes(b"")
    assert import_runs(empty, path, progress=False)[0] == [name] and contents(empty.root) == whole


def test_the_command_exports_what_is_whole_and_imports_it(exported, empty, tmp_path, capsys):
    store, _, _ = exported
    lecturer = Store(tmp_path / "lecturer")
    shutil.copytree(store.root, lecturer.root)
    damaged, old, *_ = lecturer.entries()
    (damaged.folder / "heads.parquet").write_bytes(b"")
    config = json.loads((old.folder / "config.json").read_text())  # a whole run, of another version
    (old.folder / "config.json").write_text(json.dumps(config | {"version": engine.VERSION - 1}))
    manifest = json.loads((old.folder / "manifest.json").read_text())
    manifest["config.json"] = hashlib.sha256((old.folder / "config.json").read_bytes()).hexdigest()
    (old.folder / "manifest.json").write_text(json.dumps(manifest))
    assert not lecturer.verify().keys() - {damaged.folder}
    path = tmp_path / "runs.zip"
    assert main(["store", "export", str(path), "--root", str(lecturer.root)]) == 1
    said = capsys.readouterr().out
    assert f"{damaged.folder.name}: heads.parquet is not what was written" in said and "1 runs" in said
    assert main(["store", "import", str(path), "--root", str(empty.root)]) == 0
    assert "1 runs are imported, 0 were there already" in capsys.readouterr().out
    assert main(["store", "import", str(path), "--root", str(empty.root)]) == 0
    assert "0 runs are imported, 1 were there already" in capsys.readouterr().out


def test_the_command_ends_with_status_2_where_it_can_do_nothing(exported, empty, tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_bytes(b"\xff\xd8" * 500)
    for arguments, words in ((["import", str(tmp_path / "holiday.jpg")], "holiday.jpg can't be imported: it is not an archive"),
                             (["import", str(tmp_path / "nowhere.zip")], "nowhere.zip is not a file"),
                             (["import", str(tmp_path)], "is not a file"), (["import"], "needs a file"), (["export"], "needs a file"),
                             (["export", str(tmp_path / "runs.zip")], "has no whole runs; build the book first"),
                             (["export", str(tmp_path / "holiday.jpg" / "runs.zip"), "--root", str(exported[0].root)], "can't write")):
        with pytest.raises(SystemExit) as error:
            main(["store", *arguments[:2], "--root", str(empty.root), *arguments[2:]])
        assert error.value.code == 2 and words in capsys.readouterr().err, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.jpg"]


def test_a_bit_flipped_anywhere_is_refused(exported, empty, tmp_path):
    content = exported[2].read_bytes()
    draw = random.Random(0)
    directory = content.index(b"PK\x01\x02")
    places = ([draw.randrange(len(content)) for _ in range(60)] + [draw.randrange(directory, len(content)) for _ in range(60)]
              + [draw.randrange(1, 30) for _ in range(10)] + [0, len(content) - 1])
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        (tmp_path / "flipped.zip").write_bytes(flipped)
        refused(empty, tmp_path / "flipped.zip", "checksum is wrong|not an archive of runs")


def test_a_file_that_was_cut_off_is_refused(exported, empty, tmp_path):
    content = exported[2].read_bytes()
    for kept in (0, 1, 50, len(content) // 2, len(content) - 100, len(content) - 1):
        (tmp_path / "cut.zip").write_bytes(content[:kept])
        refused(empty, tmp_path / "cut.zip", "its end is missing")
    (tmp_path / "longer.zip").write_bytes(content + b"\0")
    refused(empty, tmp_path / "longer.zip", "its end is missing")
    (tmp_path / "middle.zip").write_bytes(content[:1000] + content[2000:])
    refused(empty, tmp_path / "middle.zip", "checksum is wrong")


def test_another_zip_is_refused(exported, empty, tmp_path):
    shutil.make_archive(str(tmp_path / "other"), "zip", exported[0].root / "runs")
    refused(empty, tmp_path / "other.zip", "not an archive of runs")


def test_a_forged_file_with_a_flipped_bit_is_refused_or_imports_the_same(exported, empty, tmp_path):
    """The checksum of the whole file is right: each check behind it must hold alone."""
    content = exported[2].read_bytes()
    draw = random.Random(1)
    directory = content.index(b"PK\x01\x02")
    harmless = 0
    for place in ([draw.randrange(directory, len(content) - 90) for _ in range(80)] + [draw.randrange(directory) for _ in range(20)]
                  + [draw.randrange(len(content) - 115, len(content) - 84) for _ in range(40)]):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        (tmp_path / "flipped.zip").write_bytes(flipped)
        seal(tmp_path / "flipped.zip")
        try:
            import_runs(empty, tmp_path / "flipped.zip", progress=False)
        except ValueError as error:
            assert "flipped.zip" in str(error) and not empty.root.exists()
        else:  # such as another date
            assert contents(empty.root / "runs") == contents(exported[0].root / "runs")
            shutil.rmtree(empty.root)
            harmless += 1
    assert 0 < harmless < 120


NAMES = ["/etc/passwd", "../escaped", "{run}/../../escaped", "{run}/checkpoints/../../escaped", "C:/escaped", "C:\\escaped",
         "{run}\\config.json", "{run}//config.json", "./{run}/config.json", "{run}/notes.txt", "{run}/sub/weights.safetensors",
         "{run}/checkpoints/-1.safetensors", "{run}/checkpoints/last.safetensors", "{run}/checkpoints/٣.safetensors", "{run}/", "",
         "{run}/config.json ", "{run}/config.json\n", "{run}/CONFIG.JSON", "config.json", "locks/x", "{run}/con", "{run}/config.json:x",
         "{run}x/config.json", "{run}/checkpoints/" + "1" * 200 + ".safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_run_has_is_refused(exported, empty, tmp_path, name):
    files = list(members(exported[2]).items())
    run = files[0][0].split("/")[0]
    refused(empty, forged(tmp_path / "runs.zip", [*files, (name.format(run=run), b"x")]), "no run has a file|is not a plain file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.zip"]


def test_a_name_with_a_zero_byte_is_refused(exported, empty, tmp_path):
    path = forged(tmp_path / "runs.zip", members(exported[2]).items())
    content = path.read_bytes()
    assert content.count(b"/weights.safetensors") == 6
    path.write_bytes(content.replace(b"/weights.safetensors", b"/weights.safetensor\0"))
    refused(empty, seal(path), "no run has a file")


@pytest.mark.parametrize("kind", ["S_IFLNK", "S_IFDIR", "S_IFIFO", "S_IFCHR", "S_IFBLK", "S_IFSOCK"])
def test_a_link_or_a_device_is_refused(exported, empty, tmp_path, kind):
    def edit(info):
        if info.filename.endswith("weights.safetensors"):
            info.external_attr = (getattr(stat, kind) | 0o777) << 16

    refused(empty, forged(tmp_path / "runs.zip", members(exported[2]).items(), edit), "is not a plain file")


def test_a_bomb_is_refused_before_it_is_unpacked(exported, empty, tmp_path, monkeypatch):
    files = members(exported[2])
    weights = next(name for name in files if name.endswith("/weights.safetensors"))

    def deflated(info):
        if info.filename == weights:
            info.compress_type = zipfile.ZIP_DEFLATED

    bomb = forged(tmp_path / "deflated.zip", (files | {weights: bytes(10**7)}).items(), deflated)
    refused(empty, bomb, "is not a plain file, uncompressed")

    content = forged(tmp_path / "runs.zip", files.items()).read_bytes()  # it claims more than there is
    record = content.index(b"PK\x01\x02", content.rindex(weights.encode()) - 46)
    for claim in (2**31 - 1, 2**32 - 2):
        sizes = claim.to_bytes(4, "little") * 2
        (tmp_path / "claims.zip").write_bytes(content[:record + 20] + sizes + content[record + 28:])
        refused(empty, seal(tmp_path / "claims.zip"), "its files claim to have|can't be imported")

    first = content[:record] + content[record:record + 24] + (10**9).to_bytes(4, "little") + content[record + 28:]
    (tmp_path / "differ.zip").write_bytes(first)  # the size on the disk is said to differ from that in the archive
    refused(empty, seal(tmp_path / "differ.zip"), "is not a plain file, uncompressed")

    monkeypatch.setattr(archive, "MOST_TEXT", 1000)
    refused(empty, forged(tmp_path / "text.zip", files.items()), "1000 are the most")


def test_members_that_share_their_bytes_are_refused(exported, empty, tmp_path):
    """The way to a bomb without compression: many records of one content."""
    files = members(exported[2])
    run = next(iter(files)).split("/")[0]
    many = {f"{run}/checkpoints/{n}.safetensors": b"" for n in range(10, 60)} | {f"{run}/checkpoints/9.safetensors": bytes(10**6)}
    path = tmp_path / "runs.zip"

    with zipfile.ZipFile(path, "w") as file:
        file.comment = archive.MARK + b"0" * archive.HEX
        for name, content in many.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            file.writestr(info, content)
        big = file.infolist()[-1]
        for info in file.infolist():
            info.header_offset, info.CRC = big.header_offset, big.CRC
            info.file_size = info.compress_size = big.file_size
    refused(empty, seal(path), "its files claim to have")


def test_the_same_file_twice_is_refused(exported, empty, tmp_path):
    files = list(members(exported[2]).items())
    with pytest.warns(UserWarning, match="Duplicate"):
        path = forged(tmp_path / "runs.zip", [*files, files[0]])
    refused(empty, path, "is there twice")


def rewritten(files: dict[str, bytes], edit) -> dict[str, bytes]:
    """The files of an archive whose last run, and its manifest, `edit` has changed."""
    run = list(files)[-1].split("/")[0]
    mine = {name.removeprefix(run + "/"): content for name, content in files.items() if name.startswith(run)}
    edit(mine, json.loads(mine["manifest.json"]))
    others = {name: content for name, content in files.items() if not name.startswith(run)}
    return others | {f"{run}/{name}": content for name, content in mine.items()}


def manifest_with(**changes):
    def edit(files, manifest):
        files["manifest.json"] = json.dumps({name: value for name, value in {**manifest, **changes}.items() if value}).encode()

    return edit


def config_with(text):
    def edit(files, manifest):
        files["config.json"] = text
        manifest_with(**{"config.json": hashlib.sha256(text).hexdigest()})(files, manifest)

    return edit


def without(*names):
    def edit(files, manifest):
        for name in names:
            del files[name]
        if "manifest.json" in files:
            manifest_with(**dict.fromkeys(names))(files, manifest)

    return edit


@pytest.mark.parametrize("edit, words", [
    (lambda files, manifest: files.update({"metrics.parquet": files["metrics.parquet"] + b"\0"}), "metrics.parquet is not what was written"),
    (lambda files, manifest: files.update({"weights.safetensors": b""}), "weights.safetensors is not what was written"),
    (manifest_with(**{"heads.parquet": "0" * 64}), "heads.parquet is not what was written"),
    (manifest_with(**{"heads.parquet": ["list"]}), "heads.parquet is not what was written"),
    (manifest_with(**{"../escaped": "0" * 64}), "'../escaped', which no run has"),
    (manifest_with(**{"checkpoints/7.safetensors": "0" * 64}), "has other files than its manifest"),
    (manifest_with(**{"checkpoints/0.safetensors": None}), "has other files than its manifest"),
    (manifest_with(**{"weights.safetensors": None}), "does not name weights.safetensors"),
    (without("weights.safetensors"), "does not name weights.safetensors"),
    (without("config.json"), "has no manifest.json or no config.json"),
    (without("manifest.json"), "has no manifest.json"),
    (lambda files, manifest: files.update({"manifest.json": b"[]"}), "has no manifest.json"),
    (lambda files, manifest: files.update({"manifest.json": b"\xff"}), "can't be imported"),
    (lambda files, manifest: files.update({"manifest.json": b"[" * 100_000}), "can't be imported"),
    (config_with(b"[]"), "has no manifest.json or no config.json of a run"), (config_with(b"{}"), "has no manifest.json or no config"),
    (config_with(b"3"), "has no manifest.json or no config.json of a run"),
    (config_with(json.dumps({"version": engine.VERSION + 1}).encode()), f"version {engine.VERSION + 1}, and this ihbook reads"),
])
def test_a_run_that_is_not_whole_is_refused_with_all_others(exported, empty, tmp_path, edit, words):
    """The last run is the bad one: the good ones before it are not stored either."""
    files = rewritten(members(exported[2]), edit)
    assert files.keys() != members(exported[2]).keys() or files != members(exported[2])
    refused(empty, forged(tmp_path / "runs.zip", files.items()), words)


def test_an_interrupted_import_goes_on(exported, empty, monkeypatch):
    _, _, path = exported
    moves = []

    def interrupted(source, target, move=os.replace):
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", interrupted)
        import_runs(empty, path, progress=False)
    [first] = (empty.root / "runs").iterdir()  # whole, and nothing half-written beside it
    assert not empty.verify()
    killed = empty.folder(f".{first.name}.0123")  # what a killed process leaves
    killed.mkdir()
    stored, there = import_runs(empty, path, progress=False)
    assert there == [first.name] and len(stored) == 2 and not empty.verify()
    assert empty.prune() == [killed]


def test_what_arrives_damaged_on_the_disk_is_not_stored(exported, empty, monkeypatch):
    monkeypatch.setattr(archive.shutil, "copyfileobj", lambda source, target: target.write(source.read()[:-1]))
    with pytest.raises(ValueError, match="can.t be imported: its manifest.json or a file that it names"):
        import_runs(empty, exported[2], progress=False)
    assert not list((empty.root / "runs").iterdir())


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(exported, empty, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(OSError, match="0 MB free; free space there, or set IHBOOK_STORE"):
        patched.setattr(archive.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        import_runs(empty, exported[2], progress=False)
    assert not empty.root.exists()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device.*IHBOOK_STORE"):
        patched.setattr(archive.shutil, "copyfileobj", full)
        import_runs(empty, exported[2], progress=False)
    assert not list((empty.root / "runs").iterdir())


def test_an_export_that_fails_leaves_the_old_file(exported, tmp_path, monkeypatch):
    path = tmp_path / "runs.zip"
    path.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match=r"can't write .*runs.zip"):
        export_runs(exported[0], path, progress=False)
    assert contents(tmp_path) == {"runs.zip": b"old"}


def test_an_import_waits_for_who_is_training_the_run(exported, empty):
    [name, *_], _ = import_runs(empty, exported[2], progress=False)
    shutil.rmtree(empty.folder(name))
    waited = []

    class Waited(Exception):
        pass

    def acquire(self, *args, timeout=None, **kwargs):
        waited.append(self.lock_file)
        raise Waited

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Waited):
        patched.setattr(FileLock, "acquire", acquire)
        import_runs(empty, exported[2], progress=False)
    assert [Path(path).name for path in waited] == [name] and not empty.folder(name).exists()


def test_progress_is_shown(exported, empty, capsys):
    import_runs(empty, exported[2])
    export_runs(empty, empty.root / "again.zip")
    shown = capsys.readouterr().err
    assert "checking" in shown and "importing" in shown and "exporting" in shown
